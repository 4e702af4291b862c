"""Reads a run folder's event files with TensorBoard's own reader and holds them against metrics.jsonl.

Every step and every validation must appear exactly once, with the recorded value (in f32), however
often the run was stopped, killed and resumed.

    pip install tensorboard
    python tests/interop/tensorboard_reads_runs.py runs/NAME
"""

import json
import pathlib
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Tag, kind of the metrics line, its field.
CURVES = [
    ("train/loss", "step", "loss"),
    ("train/lr", "step", "lr"),
    ("train/grad_norm", "step", "grad_norm"),
    ("val/loss", "validation", "loss"),
    ("val/bits_per_byte", "validation", "bits_per_byte"),
]


def in_f32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def main(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A size of 0 keeps every point instead of a sample.
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    files = len(list((run / "tensorboard").iterdir()))
    wrong = 0
    for tag, kind, field in CURVES:
        expected = [
            (line["step"], in_f32(line[field]))
            for line in lines
            if line["kind"] == kind and line.get(field) is not None
        ]
        if not expected:
            continue
        found = [(event.step, event.value) for event in reader.Scalars(tag)]
        same = found == expected
        wrong += not same
        print(f"{tag}: {len(found)} points of {len(expected)}, {'equal' if same else 'DIFFERENT'}")
        for point in sorted(set(expected) ^ set(found))[:5]:
            print(f"    only in {'metrics.jsonl' if point in expected else 'TensorBoard'}: {point}")
    print(f"{files} event files, {wrong} curves wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))

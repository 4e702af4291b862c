"""Measures how fast one sequence is decoded: Cairn beside llama.cpp and others, in turns.

Each turn runs every side once, as a process of its own; the table gives medians and extremes and the ratio to
the best peer. llama.cpp runs with its file mapped and read into memory; another peer is a command that prints
JSON with `decode_tokens_per_s`. Cairn's runs measure the memory bandwidth between their own tokens; a
measurement with a median below 25 GB/s says nothing and is refused.

    python tests/interop/decode_beside_peers.py MODEL_DIR --cairn target/release/cairn \
        --side bf16z --side bf16z:bf16 --llama-bench PATH --gguf model.bf16.gguf \
        [--against "candle, bf16=candle-peer bf16 MODEL_DIR 32 96"]
"""

import argparse
import json
import statistics
import subprocess
import sys

BANDWIDTH_MIN = 25.0

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--cairn", required=True)
parser.add_argument("--side", action="append", default=[], help="DTYPE or DTYPE:COMPUTE")
parser.add_argument("--llama-bench")
parser.add_argument("--gguf", action="append", default=[])
parser.add_argument("--against", action="append", default=[], help="NAME=COMMAND")
parser.add_argument("--new", type=int, default=96)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--turns", type=int, default=5)
args = parser.parse_args()
bandwidths = []


def output(command):
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cairn(side):
    dtype, _, compute = side.partition(":")
    found = output([
        args.cairn, "bench", "decode", "--model", args.model, "--dtype", dtype,
        "--compute-dtype", compute or "f32", "--prompt-tokens", "32", "--new-tokens", str(args.new),
        "--repetitions", "2", "--threads", str(args.threads), "--json",
    ])["figures"]
    bandwidths.append(found["bandwidth"]["gbs"])
    return found["tokens_per_s"]


def llama(gguf, mapped):
    return output([
        args.llama_bench, "-m", gguf, "-p", "0", "-n", str(args.new), "-t", str(args.threads),
        "-lm", "mmap" if mapped else "none", "-r", "2", "-o", "json",
    ])[0]["samples_ts"]


def other(command):
    return [output(command.split())["decode_tokens_per_s"]]


sides = {f"cairn, {side}": (lambda s=side: cairn(s)) for side in args.side}
for gguf in args.gguf:
    for mapped in [True, False]:
        name = f"llama.cpp, {gguf.split('/')[-1]}{'' if mapped else ', read'}"
        sides[name] = lambda g=gguf, m=mapped: llama(g, m)
for against in args.against:
    name, command = against.split("=", 1)
    sides[name] = lambda c=command: other(c)

speeds = {name: [] for name in sides}
for _ in range(args.turns):
    for name, measure in sides.items():
        speeds[name] += measure()
        print(f"{name}: {speeds[name][-1]:.1f}", file=sys.stderr, flush=True)
medians = {name: statistics.median(values) for name, values in speeds.items()}
bandwidth = statistics.median(bandwidths)
print(f"{args.threads} threads, {args.new} tokens, {bandwidth:.1f} GB/s ({min(bandwidths):.1f} to {max(bandwidths):.1f})")
peer = max(median for name, median in medians.items() if not name.startswith("cairn"))
for name, values in speeds.items():
    print(
        f"{name:36} {medians[name]:6.1f} tokens/s ({min(values):.1f} to {max(values):.1f}),"
        f" {medians[name] / peer:.2f} of the best peer"
    )
if bandwidth < BANDWIDTH_MIN:
    raise SystemExit(f"void: {bandwidth:.1f} GB/s is below {BANDWIDTH_MIN}")

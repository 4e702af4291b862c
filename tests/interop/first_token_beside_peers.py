"""Measures the time from starting a process to its first token: Cairn beside transformers, and beside
whatever else is named, in turns. The page cache is warm: a turn that does not count comes first.

    pip install torch transformers
    python tests/interop/first_token_beside_peers.py MODEL_DIR --cairn target/release/cairn \
        [--cairn-model NAME=PATH ...] [--against "NAME=COMMAND" ...]

A peer's COMMAND reads the prompt of three ids its own way, writes one token and ends.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
with torch.no_grad():
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, do_sample=False)
"""

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--cairn", required=True)
parser.add_argument("--cairn-model", action="append", default=[], metavar="NAME=PATH")
parser.add_argument("--against", action="append", default=[], metavar="NAME=COMMAND")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--turns", type=int, default=5)
args = parser.parse_args()
environment = dict(
    os.environ, OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1", RAYON_NUM_THREADS=str(args.threads)
)


def cairn(model):
    return [
        args.cairn, "-q", "generate", "--model", model, "--prompt-ids", "5,6,7",
        "--max-new-tokens", "1", "--temperature", "0", "--json",
    ]


sides = {"cairn": cairn(args.model)}
for named in args.cairn_model:
    name, path = named.split("=", 1)
    sides[f"cairn, {name}"] = cairn(path)
sides["transformers"] = [sys.executable, "-c", TRANSFORMERS, args.model, str(args.threads)]
for named in args.against:
    name, command = named.split("=", 1)
    sides[name] = shlex.split(command)

seconds = {name: [] for name in sides}
for turn in range(args.turns + 1):
    for name, command in sides.items():
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        if turn:
            seconds[name].append(time.perf_counter() - start)
for name, values in seconds.items():
    print(f"{name:24} {statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})")

"""Measures how fast prompts are read: Cairn beside transformers and llama.cpp, in turns.

Each turn runs every side for a few prompts; the table gives the median and the extremes of all of them
and the ratio of medians. Weights are the same numbers on all sides, held in the type of `--dtype`.

    pip install torch transformers
    python tests/interop/prefill_beside_peers.py MODEL_DIR --cairn target/release/cairn \
        [--dtype bf16|f32] [--llama-bench PATH --gguf FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import time

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--cairn", required=True)
parser.add_argument("--llama-bench")
parser.add_argument("--gguf")
parser.add_argument("--tokens", type=int, default=512)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--turns", type=int, default=5)
parser.add_argument("--repetitions", type=int, default=2)
parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
parser.add_argument("--compute", nargs="*", help="Cairn's products [default: bf16 and f32 of bf16, f32 of f32]")
args = parser.parse_args()
args.compute = args.compute or {"bf16": ["bf16", "f32"], "f32": ["f32"]}[args.dtype]
os.environ["OMP_NUM_THREADS"] = str(args.threads)
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM


def cairn(compute):
    command = [
        args.cairn, "bench", "decode", "--model", args.model, "--weights", args.dtype,
        "--compute-dtype", compute, "--prompt-tokens", str(args.tokens), "--new-tokens", "2",
        "--repetitions", str(args.repetitions + 1), "--json",
    ]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(run.stdout)
    # The peers' first run does not count either: llama-bench makes one before it measures.
    return found.get("figures", found)["prefill_tokens_per_s"][1:]


def transformers(model, ids):
    speeds = []
    for _ in range(args.repetitions):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        speeds.append(args.tokens / (time.perf_counter() - start))
    return speeds


def llama():
    command = [
        args.llama_bench, "-m", args.gguf, "-p", str(args.tokens), "-n", "0", "-t",
        str(args.threads), "-r", str(args.repetitions), "-o", "json",
    ]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout)[0]["samples_ts"]


torch.set_num_threads(args.threads)
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype={"bf16": torch.bfloat16, "f32": torch.float32}[args.dtype]).eval()
ids = torch.randint(300, model.config.vocab_size, (1, args.tokens))
model(input_ids=ids, use_cache=True, logits_to_keep=1)

sides = {f"cairn, {compute} products": (lambda c=compute: cairn(c)) for compute in args.compute}
sides[f"transformers, {args.dtype}"] = lambda: transformers(model, ids)
if args.llama_bench:
    sides[f"llama.cpp, {args.dtype}"] = llama
speeds = {name: [] for name in sides}
for _ in range(args.turns):
    for name, measure in sides.items():
        speeds[name] += measure()
peer = max(statistics.median(v) for name, v in speeds.items() if not name.startswith("cairn"))
print(f"torch {torch.__version__}, {args.threads} threads, prompts of {args.tokens} tokens")
for name, values in speeds.items():
    median = statistics.median(values)
    print(
        f"{name:24} {median:7.1f} tokens/s ({min(values):.1f} to {max(values):.1f}),"
        f" {median / peer:.2f} of the best peer"
    )

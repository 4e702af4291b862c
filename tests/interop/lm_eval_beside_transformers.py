"""Runs lm-evaluation-harness, unchanged, against `cairn serve` and against transformers, and compares.

The tasks are made here: log-likelihoods of endings (through `local-completions`, as ids with `echo`), rolling
log-likelihoods, and greedy continuations (`local-chat-completions`).

    pip install torch transformers "lm-eval[api]"
    python tests/interop/lm_eval_beside_transformers.py MODEL_DIR --cairn target/release/cairn
"""

import argparse
import os
import re
import subprocess
import threading

parser = argparse.ArgumentParser()
parser.add_argument("model", help="folder that transformers reads as well")
parser.add_argument("--cairn", required=True)
parser.add_argument("--tolerance", type=float, default=1e-3)
args = parser.parse_args()
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

server = subprocess.Popen(
    [args.cairn, "serve", "--port", "0", "--served-model-name", "m", "--model", args.model,
     "--log-level", "off"],
    stderr=subprocess.PIPE, text=True,
)
address = next(found.group() for line in server.stderr if (found := re.search(r"http://\S+", line)))
threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()

PAIRS = [
    ("The stones lie", " one upon another"),
    ("A cairn is", " a pile of stones, and it marks a way."),
    ("fn main() {", "\n    println!(\"stone\");\n}"),
    ("", "Stones."),
    ("Of all the stones that lay there only", " seven"),
]
TEXTS = ["One stone upon another makes a cairn, and many cairns make a way.", "Stones do not move."]


def instances(kind, arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


try:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        tokenizer=tokenizer, device="cpu", batch_size=1,
    )
    ours = LocalCompletionsAPI(
        base_url=f"{address}/v1/completions", model="m", tokenizer=args.model,
        tokenizer_backend="huggingface", num_concurrent=2, batch_size=2, max_length=256,
    )
    worst = 0.0
    for kind, arguments in [("loglikelihood", PAIRS), ("loglikelihood_rolling", [(text,) for text in TEXTS])]:
        expected = getattr(theirs, kind)(instances(kind, arguments))
        found = getattr(ours, kind)(instances(kind, arguments))
        for pair, a, b in zip(arguments, expected, found, strict=True):
            (a, is_greedy), (b, was_greedy) = (a, b) if isinstance(a, tuple) else ((a, None), (b, None))
            assert is_greedy == was_greedy, (pair, is_greedy, was_greedy)
            worst = max(worst, abs(a - b) / max(1.0, abs(a)))
            print(f"{kind} {pair!r}: transformers {a:.5f}, Cairn {b:.5f}")
    assert worst <= args.tolerance, worst

    until = {"until": ["\n"], "max_gen_toks": 12, "temperature": 0}
    texts = instances("generate_until", [(prompt, until) for prompt, _ in PAIRS if prompt])
    expected = theirs.generate_until(texts)
    found = ours.generate_until(texts)
    assert expected == found, (expected, found)
    if tokenizer.chat_template:
        chat = LocalChatCompletion(
            base_url=f"{address}/v1/chat/completions", model="m", tokenizer_backend=None, num_concurrent=1,
        )
        message = '[{"role": "user", "content": "Hi", "type": "text"}]'
        answers = chat.generate_until(instances("generate_until", [([{"role": "user", "content": "Hi"}], until)]))
        print(f"a chat: {answers!r}")
finally:
    server.terminate()
    server.wait(60)
print(f"largest difference of a log-likelihood: {worst:.1e}; {len(texts)} continuations are equal")

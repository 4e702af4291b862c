#!/usr/bin/env python3
"""What transformers makes of sentences with the small BERT: embeddings and filled masks.

Writes tests/goldens/embeddings.json, from the model in tests/goldens/bert and the tokenizer in
tests/goldens/tokenizers/word_piece.

Needs: pip install torch transformers
"""

import json
import pathlib

import torch
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).parent.parent / "goldens"
TEXTS = [
    "A cairn is a stack of stones.",
    "Cairns mark the way!",
    "x",
    "The quick brown fox jumps over the lazy dog, again and again.",
]
MASKED = ["A [MASK] is a stack of [MASK].", "[MASK] mark the way"]


def main():
    config = json.loads((ROOT / "tokenizers/word_piece/tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "tokenizers/word_piece/tokenizer.json"), **config)
    model = AutoModelForMaskedLM.from_pretrained(
        ROOT / "bert", attn_implementation="eager", dtype=torch.float32).eval()
    result = {"embeddings": [], "masks": []}
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tok.encode(text)])
            hidden = model.base_model(ids).last_hidden_state[0]
            result["embeddings"].append({
                "text": text, "num_tokens": ids.shape[1],
                "mean": hidden.mean(0).tolist(), "cls": hidden[0].tolist(),
                "last": hidden[-1].tolist()})
        for text in MASKED:
            ids = torch.tensor([tok.encode(text)])
            places = (ids[0] == tok.mask_token_id).nonzero()[:, 0]
            best = model(ids).logits[0, places].softmax(-1).topk(5)
            result["masks"].append({
                "text": text, "token_ids": best.indices.tolist(),
                "probabilities": best.values.tolist()})
    (ROOT / "embeddings.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

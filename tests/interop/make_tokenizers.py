#!/usr/bin/env python3
"""Makes the small tokenizers under tests/goldens/tokenizers, with what transformers says of each.

One folder per kind: `tokenizer.json`, `tokenizer_config.json` and `expected.json`: for every text
the ids as plain text (`text`), with special tokens recognized (`parsed`), as the model wants them
(`model`), and the text of the `parsed` ids (`decoded`).

Needs: pip install transformers tokenizers
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

OUT = pathlib.Path(__file__).parent.parent / "goldens" / "tokenizers"

TRAINING = [
    "A cairn is a stack of stones. Cairns mark the way; a cairn's stones are laid one at a time.",
    "Hello world! How are you today? I'm fine, thanks. Don't worry, it's 12345 o'clock.",
    "def main():\n    return [x * 2 for x in range(10)]\n",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "Ünïcödé naïve café déjà vu, été à la plage; straße, Ærø.",
] * 4

TEXTS = [
    "Hello world",
    " leading and trailing  ",
    "two  spaces\n\nnew\tlines \r\n end",
    "naïve café ⛰️ 👩‍👩‍👧 🎉🎉",
    "漢字かな 한국어 العربية",
    "<s> </s> [MASK] <|im_start|>user<|im_end|> <unk>[CLS]",
    "x<|im_end|>y</s>z[SEP]w",
    "",
    " ",
    "▁▁ underline ▁",
    "12345 it's DON'T stop",
    "e\u0301 \u00e9 \ufb01 \u2460 \u200b\u00a0|",
    "def main():\n    return 1",
    "\u0000\u0007 control \ufffd",
    "<think>hm</think> ok",
]


def specials(*names):
    return [AddedToken(name, special=True, normalized=False) for name in names]


def byte_level():
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
             r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(TRAINING, trainer)
    tok.add_special_tokens(specials("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tok.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    return tok, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}


def byte_fallback_vocab(tok):
    """Adds the 256 byte tokens behind `<unk> <s> </s>` to a trained BPE, as LLaMA has them."""
    raw = json.loads(tok.to_str())
    old = raw["model"]["vocab"]
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    names += [name for name in old if name not in names]
    raw["model"]["vocab"] = {name: at for at, name in enumerate(names)}
    raw["model"]["byte_fallback"] = True
    raw["model"]["unk_token"] = "<unk>"
    raw["model"]["fuse_unk"] = True
    return Tokenizer.from_str(json.dumps(raw))


def bos(tok):
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tok.token_to_id("<s>"))])


def metaspace(style):
    tok = Tokenizer(models.BPE())
    if style == "legacy":
        tok.normalizer = normalizers.Sequence([
            normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    splitter = tok.pre_tokenizer
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tok.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=260, special_tokens=[], show_progress=False))
    tok = byte_fallback_vocab(tok)
    raw = json.loads(tok.to_str())
    raw["pre_tokenizer"] = None
    tok = Tokenizer.from_str(json.dumps(raw))
    if style != "legacy":
        tok.pre_tokenizer = splitter
    tok.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens(specials("<unk>", "<s>", "</s>"))
    bos(tok)
    return tok, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                 "add_bos_token": True, "add_eos_token": False}


def word_piece():
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece(prefix="##")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tok.train_from_iterator(TRAINING, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=specials(*names), show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tok, {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
                 "pad_token": "[PAD]", "unk_token": "[UNK]"}


def unigram():
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.NFKC()
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tok.decoder = decoders.Metaspace(prepend_scheme="always")
    tok.train_from_iterator(TRAINING, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=specials("<pad>", "</s>", "<unk>"), unk_token="<unk>",
        show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return tok, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


KINDS = {
    "byte_level": byte_level,
    "metaspace_legacy": lambda: metaspace("legacy"),
    "metaspace_first": lambda: metaspace("first"),
    "word_piece": word_piece,
    "unigram": unigram,
}


def main():
    for name, make in KINDS.items():
        backend, config = make()
        folder = OUT / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(backend.to_str()), ensure_ascii=False,
                                   separators=(",", ":")) + "\n")
        tok = PreTrainedTokenizerFast(tokenizer_file=str(path),
                                      **{k: v for k, v in config.items() if v is not None})
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        cases = []
        for text in TEXTS:
            parsed = tok.encode(text, add_special_tokens=False)
            cases.append({
                "text": text,
                "plain": tok.encode(text, add_special_tokens=False, split_special_tokens=True),
                "parsed": parsed,
                "model": tok.encode(text, add_special_tokens=True),
                "decoded": tok.decode(parsed, skip_special_tokens=False,
                                      clean_up_tokenization_spaces=False),
            })
        (folder / "expected.json").write_text(
            json.dumps({"vocab_size": len(tok), "cases": cases}, ensure_ascii=False,
                       separators=(",", ":")) + "\n")
        print(name, len(tok), path.stat().st_size)


if __name__ == "__main__":
    main()

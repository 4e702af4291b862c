"""Trains a small model of every family, and adapters, with `cairn train`; loads what was saved with transformers and PEFT.

    cargo build --release
    python trained_models_load.py target/release/cairn

For every golden's config.json: a fresh model is trained for a few steps from a recipe that names the file, the checkpoint
is loaded by transformers as it is, and its logits are compared with `cairn logits`. Then an adapter is trained beside each
checkpoint, in every encoding of the base, and one of experts stacked as PEFT has them; it is loaded by PEFT as it is, and
its logits are compared with `cairn logits --adapter` (f32) and with those of `cairn adapter merge`. Nothing in a folder is
changed before it is loaded.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "goldens"
FAMILIES = ["llama", "gpt2", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_neox",
            "phi3", "olmo2", "gemma2", "gemma3_text", "bert", "modernbert"]
TOLERANCE = 1e-5
RECIPE = """
schema = "train/2"
[run]
threads = 2
[data]
corpus = "corpus"
seq_len = 32
[optimizer]
learning_rate = 5e-3
[batch]
micro_batch_size = 4


[budget]
steps = 6
"""


def run(cairn: str, folder: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run([cairn, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stderr}"
    return done.stdout


def logits_here(cairn: str, folder: pathlib.Path, *model: str) -> torch.Tensor:
    run(cairn, folder, "logits", *model, "--input", "ids.safetensors", "--output", "logits.safetensors")
    return load_file(folder / "logits.safetensors")["logits"]


def newest(folder: pathlib.Path) -> pathlib.Path:
    return sorted((folder / "checkpoints").iterdir())[-1]


def transformers_model(folder: pathlib.Path, masked: bool):
    loader = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, report = loader.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    problems = {key: value for key, value in report.items() if value}
    assert not problems, f"{folder}: {problems}"
    return model.float().eval()


def compare(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    worst = (ours - theirs).abs().max().item()
    bound = TOLERANCE * max(1.0, theirs.abs().max().item())
    assert worst <= bound, f"{what}: off by {worst}"
    return f"{worst:.1e}"


@torch.no_grad()
def check_family(cairn: str, work: pathlib.Path, name: str) -> None:
    config = json.loads((GOLDENS / name / "config.json").read_text())
    config["vocab_size"] = 300
    (work / f"{name}.json").write_text(json.dumps(config))
    (work / f"{name}.toml").write_text(RECIPE)
    masked = "bert" in name
    extra = ["objective.mask_token=<|endoftext|>"] if masked else []
    base = work / name
    run(cairn, work, "train", f"{name}.toml", f"model.config={name}.json", "--output", str(base), *extra)
    saved = newest(base)
    ids = load_file(work / "ids.safetensors")["input_ids"]
    model = transformers_model(saved, masked)
    words = [compare(name, logits_here(cairn, work, "--model", str(saved)), model(ids).logits)]
    kinds = {kind: ["adapter.lora_dropout=0.1", f"adapter.base_encoding={kind}"] for kind in ["f32", "bf16", "q8"]}
    if "num_experts_per_tok" in config:
        kinds["stacked"] = ["adapter.target_parameters=['experts.gate_up_proj', 'down_proj', 'gate.weight']"]
    for encoding, settings in kinds.items():
        folder = work / f"{name}-{encoding}"
        run(cairn, work, "train", f"{name}.toml", f"model.initial={saved}", "--output", str(folder), "adapter.r=4",
            "adapter.lora_alpha=16", *settings, *extra)
        adapter = newest(folder)
        tuned = PeftModel.from_pretrained(transformers_model(saved, masked), adapter).eval()
        theirs = tuned(ids).logits
        assert (theirs - model(ids).logits).abs().max() > 1e-3, f"{name}: the adapter does nothing"
        ours = logits_here(cairn, work, "--model", str(saved), "--adapter", str(adapter))
        words.append(compare(f"{name} {encoding}", ours, theirs))
        merged = work / f"{name}-{encoding}-merged"
        run(cairn, work, "adapter", "merge", "--model", str(saved), "--adapter", str(adapter), "--output", str(merged))
        words.append(compare(f"{name} {encoding} merged", logits_here(cairn, work, "--model", str(merged)), theirs))
    print(f"{name}: trained and loaded, off by {words[0]}; adapters beside and merged: {', '.join(words[1:])}", flush=True)


def main() -> None:
    torch.set_num_threads(2)
    cairn = str(pathlib.Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        work = pathlib.Path(temporary)
        text = work / "text"
        text.mkdir()
        for number in range(24):
            lines = [f"stone {line * number % 13} on stone {(line + number) % 7}\n" for line in range(30)]
            (text / f"{number}.txt").write_text("".join(lines))
        run(cairn, work, "corpus", "build", "--input", "text", "--output", "corpus", "--vocab-size", "290")
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 290, (2, 24), generator=generator)
        save_file({"input_ids": ids}, work / "ids.safetensors")
        for name in sys.argv[2:] or FAMILIES:
            check_family(cairn, work, name)


if __name__ == "__main__":
    main()

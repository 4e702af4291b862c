"""Loads folders that Cairn saved with real transformers and compares the logits with the goldens.

    cargo run --release -p cairn-model --example save_folders -- tests/goldens/{llama,qwen3,bert} FOLDER
    python transformers_loads_ours.py FOLDER

FOLDER holds one folder for each golden, as the example above writes it, and `NAME.body` where the body was saved alone,
which is loaded as such (BertModel, ModernBertModel). Nothing is changed in a folder before it is loaded. Fails if
transformers misses a tensor, finds one too many, or computes other logits or other last hidden states.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "goldens"


# The layer over the first token, which a masked-LM model does not have: transformers makes a fresh one, and no hidden
# state goes through it.
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}


@torch.no_grad()
def check_body(folder: pathlib.Path) -> float:
    config = json.loads((folder / "config.json").read_text())
    model, report = AutoModel.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert type(model).__name__ == config["architectures"][0], f"{folder.name}: {type(model)}"
    problems = {key: sorted(set(value) - POOLER) for key, value in report.items() if set(value) - POOLER}
    assert not problems, f"{folder.name}: {problems}"
    golden = load_file(GOLDENS / folder.stem / "golden.safetensors")
    expected = golden[f"hidden_{config['num_hidden_layers']}"]
    hidden = model.float().eval()(golden["input_ids"]).last_hidden_state
    worst = (hidden - expected).abs().max().item()
    assert worst <= 1e-5 * max(1.0, expected.abs().max().item()), f"{folder.name}: off by {worst}"
    return worst


@torch.no_grad()
def check(folder: pathlib.Path) -> float:
    config = json.loads((folder / "config.json").read_text())
    masked = config["architectures"][0].endswith("ForMaskedLM")
    loader = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, report = loader.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    problems = {key: value for key, value in report.items() if value}
    assert not problems, f"{folder.name}: {problems}"
    golden = load_file(GOLDENS / folder.name / "golden.safetensors")
    logits = model.float().eval()(golden["input_ids"], use_cache=False).logits if not masked else model.float().eval()(
        golden["input_ids"]).logits
    worst = (logits - golden["logits"]).abs().max().item()
    assert worst <= 1e-5 * max(1.0, golden["logits"].abs().max().item()), f"{folder.name}: off by {worst}"
    return worst


def main() -> None:
    torch.set_num_threads(1)
    folders = sorted(path.parent for path in pathlib.Path(sys.argv[1]).glob("*/config.json"))
    assert folders, "no folders"
    for folder in folders:
        if folder.suffix == ".body":
            print(f"{folder.name}: loaded, last hidden states within {check_body(folder):.1e}")
        else:
            print(f"{folder.name}: loaded, logits within {check(folder):.1e}")


if __name__ == "__main__":
    main()

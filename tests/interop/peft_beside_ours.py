"""Compares adapters on experts, routers, `kv_b_proj` and heads with what PEFT computes of them.

    cargo build --release -p cairn
    python tests/interop/peft_beside_ours.py target/release/cairn FOLDER

Needs torch, transformers, peft and safetensors. For each golden model below it writes an adapter of random numbers as
PEFT saves it, one tensor for each module of the model's files. `cairn logits` with the adapter beside the model, and of
the model that `cairn adapter merge` writes, is compared with PEFT, which loads the adapter beside transformers' model,
and with transformers after the products have been added to the file's own tensors here; and so is what transformers
computes of the merged folder as it is. FOLDER holds what is made.
Fails if logits are off by more than 1e-4 · max(1, max|logit|), or if an adapter changes nothing.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "goldens"
RANK, ALPHA = 4, 6
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]


def of_experts(count: int) -> list[str]:
    return [f"experts.{expert}.{name}" for expert in range(count) for name in EXPERTS]


# The golden model, and the ends of its modules' names. PEFT takes every `gate_proj` of a model with experts for theirs,
# so dense blocks and shared experts have none here. transformers 5 calls GPT-NeoX's `embed_out` `lm_head`.
CASES = [
    ("mixtral", ATTENTION + ["gate", "w1", "w2", "w3", "lm_head"]),
    ("qwen3_moe", ATTENTION + ["gate", "lm_head"] + of_experts(4)),
    ("deepseek_v2", ["q_proj", "lm_head", "gate"] + LATENT + of_experts(8)),
    ("deepseek_v3", ["q_a_proj", "q_b_proj", "gate"] + LATENT + of_experts(8)),
    ("llama", ATTENTION + EXPERTS + ["lm_head"]),
    ("qwen3", ATTENTION + ["lm_head"]),
    ("gpt_neox", ["query_key_value", "dense", "lm_head"]),
    ("modernbert", ["Wqkv", "Wo", "Wi", "head.dense"]),
    # Heads that are the embedding, one for each place that families keep them in.
    ("gpt2", ["c_attn", "c_fc", "mlp.c_proj", "lm_head"]),
    ("gemma2", ATTENTION + EXPERTS + ["lm_head"]),
    ("gemma3_text", ATTENTION + ["lm_head"]),
    ("bert", ["query", "output.dense", "transform.dense", "cls.predictions.decoder"]),
    ("modernbert", ["Wqkv", "decoder"]),
]
# Tables, and the heads that they are in models without one of their own.
TABLES = {
    "model.embed_tokens.weight": "lm_head.weight",
    "transformer.wte.weight": "lm_head.weight",
    "bert.embeddings.word_embeddings.weight": "cls.predictions.decoder.weight",
    "model.embeddings.tok_embeddings.weight": "decoder.weight",
}
# GPT-2's matrices are stored `[inputs, outputs]`.
TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")


def is_target(module: str, names: list[str]) -> bool:
    return any(module == name or module.endswith("." + name) for name in names)


def weights_of(base: pathlib.Path) -> dict[str, torch.Tensor]:
    """The file's tensors, and the head where it is the embedding."""
    weights = load_file(base / "model.safetensors")
    if json.loads((base / "config.json").read_text())["tie_word_embeddings"]:
        for table, head in TABLES.items():
            if table in weights:
                weights.setdefault(head, weights[table].clone())
    if "cls.predictions.bias" in weights:
        weights.setdefault("cls.predictions.decoder.bias", weights["cls.predictions.bias"].clone())
    return weights


def make_adapter(base: pathlib.Path, names: list[str], folder: pathlib.Path, name: str = "") -> dict[str, torch.Tensor]:
    """Writes the adapter; returns what it adds to the file's tensors."""
    weights = weights_of(base)
    torch.manual_seed(11)
    tensors, added = {}, {}
    for key, weight in weights.items():
        module = key.removesuffix(".weight").replace("embed_out", "lm_head")
        if weight.dim() != 2 or not key.endswith(".weight") or not is_target(module, names):
            continue
        outputs, inputs = reversed(weight.shape) if key.endswith(TRANSPOSED) else weight.shape
        a, b = 0.1 * torch.randn(RANK, inputs), 0.1 * torch.randn(outputs, RANK)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        product = ALPHA / RANK * (b.double() @ a.double())
        added[key] = product.T if key.endswith(TRANSPOSED) else product
    modules = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors]
    for end in names:
        assert any(is_target(module, [end]) for module in modules), f"{base.name} has no {end}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(peft_type="LORA", task_type=None, r=RANK, lora_alpha=ALPHA, target_modules=names, bias="none",
                  base_model_name_or_path=name or str(base), inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits.float()


def ours(cairn: str, arguments: list, folder: pathlib.Path, ids: torch.Tensor) -> torch.Tensor:
    save_file({"input_ids": ids.contiguous()}, folder / "ids.safetensors")
    output = folder / "out.safetensors"
    command = [cairn, "logits", *arguments, "--input", folder / "ids.safetensors", "--output", output]
    subprocess.run(command, check=True, capture_output=True)
    return load_file(output)["logits"]


def main() -> None:
    torch.set_num_threads(1)
    cairn, root = sys.argv[1], pathlib.Path(sys.argv[2])
    for name, names in CASES:
        heads = sorted(set(TABLES.values()))
        base, folder = GOLDENS / name, root / f"{name}-{len(names)}"
        shutil.rmtree(folder, ignore_errors=True)
        added = make_adapter(base, names, folder / "adapter")
        golden = load_file(base / "golden.safetensors")
        ids = golden["input_ids"]
        loader = AutoModelForMaskedLM if "bert" in name else AutoModelForCausalLM
        load = lambda path: loader.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        references = {"PEFT": logits_of(PeftModel.from_pretrained(load(base), folder / "adapter"), ids)}
        summed = {key: (value.double() + added.get(key, 0)).float() for key, value in weights_of(base).items()}
        (folder / "summed").mkdir()
        config = json.loads((base / "config.json").read_text())
        changed = [head for head in heads if is_target(head.removesuffix(".weight"), names) and head in added]
        config["tie_word_embeddings"] = config["tie_word_embeddings"] and not changed
        (folder / "summed" / "config.json").write_text(json.dumps(config))
        save_file(summed, folder / "summed" / "model.safetensors", metadata={"format": "pt"})
        references["sums"] = logits_of(load(folder / "summed"), ids)
        subprocess.run([cairn, "adapter", "merge", "--model", base, "--adapter", folder / "adapter", "--output",
                        folder / "merged"], check=True, capture_output=True)
        found = {
            "beside": ours(cairn, ["--model", base, "--adapter", folder / "adapter"], folder, ids),
            "merged": ours(cairn, ["--model", folder / "merged"], folder, ids),
            "merged, in transformers": logits_of(load(folder / "merged"), ids),
        }
        assert config["tie_word_embeddings"] == json.loads((folder / "merged" / "config.json").read_text())["tie_word_embeddings"]
        for which, reference in references.items():
            effect = (reference - golden["logits"]).abs().max().item()
            assert effect > 0.1, f"{name}: the adapter changes logits by {effect} in {which}"
            bound = 1e-4 * max(1.0, reference.abs().max().item())
            for form, logits in found.items():
                off = (logits - reference).abs().max().item()
                assert off <= bound, f"{name} {form}: off by {off} from {which}, whose effect is {effect}"
                print(f"{name}, {form}: off by {off:.1e} from {which}; the adapter changes logits by {effect:.2f}")


if __name__ == "__main__":
    main()

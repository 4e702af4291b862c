"""Makes tests/goldens/lora_*: small PEFT adapters on golden models, and what PEFT computes with them.

Needs torch, transformers, peft and safetensors. Run from the repository's root:

    python tests/interop/make_adapter_goldens.py
"""

import os
import pathlib

import torch
import peft_beside_ours
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CASES = {
    "lora_llama": ("llama", dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
                                 rank_pattern={"v_proj": 2}, alpha_pattern={"o_proj": 3})),
    "lora_gpt2": ("gpt2", dict(r=3, lora_alpha=5, use_rslora=True, fan_in_fan_out=True,
                               target_modules=["c_attn", "mlp.c_proj"], layers_to_transform=[0, 2])),
    # Experts as PEFT has them with transformers 5: stacked, gate and up in one, both parameters or one alone.
    "lora_mixtral_stacked": ("mixtral", dict(r=2, lora_alpha=6, target_modules="all-linear")),
    "lora_qwen3_moe_stacked": ("qwen3_moe", dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"],
                                                 target_parameters=["experts.gate_up_proj", "mlp.gate.weight"])),
    "lora_deepseek_v3_stacked": ("deepseek_v3", dict(r=2, lora_alpha=3, target_modules=[],
                                                     target_parameters=["gate_up_proj", "mlp.experts.down_proj"],
                                                     rank_pattern={r".*\.1\.mlp\.experts\.gate_up_proj": 5},
                                                     alpha_pattern={"down_proj": 4})),
}

root = os.path.join(os.path.dirname(__file__), "..", "goldens")
for name, (base, settings) in CASES.items():
    folder = os.path.join(root, name)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(
        os.path.join(root, base), dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.copy_(0.1 * torch.randn_like(value))
    model.peft_config["default"].base_model_name_or_path = base
    model.eval().save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    ids = load_file(os.path.join(root, base, "golden.safetensors"))["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    save_file({"input_ids": ids, "logits": logits.contiguous()}, os.path.join(folder, "golden.safetensors"))
    print(name, tuple(logits.shape), float(logits.abs().max()))

# Experts, routers, `kv_b_proj` and heads, a pair of tensors for each module as the model's files name it: PEFT loads
# these beside models with experts, and saves others.
for base in ["mixtral", "deepseek_v2", "qwen3"]:
    folder = pathlib.Path(root) / f"lora_{base}"
    peft_beside_ours.make_adapter(pathlib.Path(root) / base, dict(peft_beside_ours.CASES)[base], folder, name=base)
    ids = load_file(os.path.join(root, base, "golden.safetensors"))["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(
        os.path.join(root, base), dtype=torch.float32, attn_implementation="eager")
    logits = peft_beside_ours.logits_of(PeftModel.from_pretrained(model, folder), ids)
    save_file({"input_ids": ids, "logits": logits.contiguous()}, folder / "golden.safetensors")
    print(folder.name, tuple(logits.shape), float(logits.abs().max()))

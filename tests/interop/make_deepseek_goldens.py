"""Writes the DeepSeek goldens: tiny models with random weights and what transformers computes for them.

    python tests/interop/make_deepseek_goldens.py tests/goldens

Made with transformers 5.23 and torch 2.15 on the CPU; eager attention, float32. `golden.safetensors` holds
`input_ids`, `logits`, `hidden_0 .. hidden_L` (the last after the final norm) and `greedy_ids`
(`input_ids[0, :8]` and 24 greedy tokens).
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

SHARED = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    max_position_embeddings=128,
    initializer_range=0.15,
    tie_word_embeddings=False,
    attn_implementation="eager",
)


def yarn(mscale, mscale_all_dim):
    return dict(
        rope_type="yarn",
        rope_theta=10000.0,
        factor=4.0,
        original_max_position_embeddings=32,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


MODELS = {
    # As V2-Lite: plain queries; as V2: groups judged by their best expert.
    "deepseek_v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config(
            **SHARED,
            q_lora_rank=None,
            n_shared_experts=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=3.0,
            norm_topk_prob=False,
            rope_parameters=yarn(0.707, 1.0),
        ),
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **SHARED,
            q_lora_rank=12,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            rope_parameters=yarn(1.0, 1.0),
            num_mtp_layers=0,
        ),
    ),
}


def write(folder, model_class, config, seed):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            torch.nn.init.normal_(buffer, 0.0, 0.1)
    model.save_pretrained(folder)
    ids = torch.randint(0, config.vocab_size, (2, 20))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        greedy = model.generate(
            ids[:1, :8], max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    tensors = {f"hidden_{i}": h.contiguous() for i, h in enumerate(out.hidden_states)}
    tensors |= {"input_ids": ids, "logits": out.logits.contiguous(), "greedy_ids": greedy}
    save_file(tensors, folder / "golden.safetensors")
    about = dict(
        family=config.model_type,
        torch=torch.__version__,
        transformers=transformers.__version__,
        attention="eager",
        dtype="float32",
        seed=seed,
    )
    (folder / "golden.json").write_text(json.dumps(about, indent=1) + "\n")


def main():
    for seed, (name, (model_class, config)) in enumerate(MODELS.items(), start=7):
        folder = pathlib.Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, model_class, config, seed)
        print(name, sum(f.stat().st_size for f in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()

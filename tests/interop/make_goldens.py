"""Makes the small golden folders of tests/goldens that this repository computes for itself.

    python make_goldens.py OUT [NAME...]

Needs transformers 5.23, torch and safetensors (CPU). Each folder holds `config.json`, `model.safetensors` and
`golden.safetensors`, laid out as tests/goldens/README.md says. Weights are random; vectors (norms, biases) are random
too, so that no bias is zero and no norm is one.
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
ROPE = dict(rope_theta=10000.0)
LONG = [1.0 + 0.5 * i for i in range(4)]

CASES = {
    "gpt_neox": ("gpt_neox", dict(hidden_act="gelu", rotary_pct=0.5, num_key_value_heads=None), 40),
    "gpt_neox_serial": (
        "gpt_neox",
        dict(use_parallel_residual=False, attention_bias=False, num_key_value_heads=None, num_hidden_layers=2,
             tie_word_embeddings=True),
        24,
    ),
    "phi3": ("phi3", dict(sliding_window=9), 40),
    "phi3_partial": (
        "phi3",
        dict(num_hidden_layers=2, max_position_embeddings=64, original_max_position_embeddings=16,
             rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.2],
                                  long_factor=[1.0, 2.0, 4.0], partial_rotary_factor=0.75)),
        40,
    ),
    "olmo2": ("olmo2", dict(), 40),
    "gemma2": (
        "gemma2",
        dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=8, attn_logit_softcapping=3.0,
             final_logit_softcapping=2.0),
        40,
    ),
    "gemma3_text": (
        "gemma3_text",
        dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=8, sliding_window_pattern=3,
             num_hidden_layers=4,
             rope_parameters=dict(
                 full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1e6),
                 sliding_attention=dict(rope_type="default", rope_theta=1e4))),
        40,
    ),
    "qwen2_windows": (
        "qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1), 40,
    ),
    "mistral_windows": (
        "ministral",
        dict(head_dim=8, sliding_window=7, layer_types=["sliding_attention", "full_attention", "sliding_attention"]), 40,
    ),
    "llama_linear": ("llama", dict(rope_parameters=dict(ROPE, rope_type="linear", factor=3.0)), 40),
    "llama_dynamic": (
        "llama",
        dict(max_position_embeddings=24, rope_parameters=dict(ROPE, rope_type="dynamic", factor=2.0)), 40,
    ),
    "llama_yarn": (
        "llama",
        dict(rope_parameters=dict(ROPE, rope_type="yarn", factor=4.0, original_max_position_embeddings=16,
                                  mscale=0.7, mscale_all_dim=1.1, truncate=False, beta_fast=4.0)),
        40,
    ),
    "llama3": (
        "llama",
        dict(rope_parameters=dict(rope_theta=500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                  high_freq_factor=4.0, original_max_position_embeddings=16)),
        40,
    ),
}


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * noise)
        else:
            parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)


@torch.no_grad()
def make(name: str, out: pathlib.Path) -> None:
    model_type, changes, length = CASES[name]
    sizes = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
    config = AutoConfig.for_model(model_type, **sizes)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    randomize(model, generator)
    model.tie_weights()
    folder = out / name
    model.save_pretrained(folder)
    ids = torch.randint(3, config.vocab_size, (2, length), generator=generator)
    result = model(ids, output_hidden_states=True, use_cache=False)
    tensors = {"input_ids": ids, "logits": result.logits}
    tensors |= {f"hidden_{i}": hidden for i, hidden in enumerate(result.hidden_states)}
    # Keys that other lengths would rotate otherwise cannot be cached.
    new = min(24, config.max_position_embeddings - 8)
    if "longrope" in json.dumps(config.to_dict()):
        new = 8
    tensors["greedy_ids"] = model.generate(
        ids[:1, :8], attention_mask=torch.ones(1, 8), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "golden.safetensors")
    note = dict(family=model_type, torch=torch.__version__, transformers=transformers.__version__,
                attention="eager", dtype="float32", made_by="tests/interop/make_goldens.py")
    (folder / "golden.json").write_text(json.dumps(note, indent=1) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if model_type == "ministral":
        # transformers reads a mistral file with layer_types as this class.
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace("MinistralFor", "MistralFor").replace('"ministral"', '"mistral"'))


def main() -> None:
    out = pathlib.Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in sys.argv[2:] or CASES:
        make(name, out)
        sizes = {path.name: path.stat().st_size for path in (out / name).iterdir()}
        print(name, sizes)


if __name__ == "__main__":
    main()

"""Writes the GGUF files that tests read, and compares loads of GGUF and safetensors.

    python tests/interop/make_gguf.py blocks OUT.gguf
        tensors of every format that is read, each beside what the gguf package decodes it to
    python tests/interop/make_gguf.py model FAMILY OUT
        a folder OUT with a small random model, and OUT.gguf with the same weights in Q8_0;
        transformers loads both and must compute the same
    python tests/interop/make_gguf.py convert FOLDER OUT.gguf [F32|F16|BF16|Q8_0|Q4_0]
        any model folder of a family below, as llama.cpp's converter lays it out
    python tests/interop/make_gguf.py tokenizer llama|gpt-2|llama-bpe|qwen2|deepseek-llm|deepseek-v3|bert OUT.gguf
        a small tokenizer in a file without tensors, and OUT.gguf.json with texts and their ids
    python tests/interop/make_gguf.py chat OUT
        a folder OUT and OUT.gguf with a model, a tokenizer, special tokens and a chat template
    python tests/interop/make_gguf.py compare FOLDER SCRATCH CAIRN
        the logits of `cairn logits` from FOLDER equal those from it as GGUF: bit for bit in F32,
        and in Q8_0 to the bits of the folder that holds the decoded weights

Made with gguf 0.19.0, transformers 5.23.0, torch 2.15.0. Not run in CI.
"""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file, save_file

READ = [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_K, T.Q5_K, T.Q6_K]


def blocks(out):
    """512 elements of every format: random bits under random finite scales."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(out, "test")
    for kind in READ:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        count = 512 // elements
        raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
        halves = {T.Q8_0: [0], T.Q4_0: [0], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
        for at in halves.get(kind, []):
            scale = rng.uniform(-0.1, 0.1, (count, 1)).astype(np.float16)
            raw[:, at : at + 2] = scale.view(np.uint8)
        if kind in (T.F32, T.F16, T.BF16):
            values = rng.standard_normal(512).astype(np.float32)
            raw = gguf.quants.quantize(values, kind).view(np.uint8)
        raw = raw.reshape(1, -1)
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
        decoded = gguf.quants.dequantize(raw if kind != T.F32 else raw.view(np.float32), kind)
        writer.add_tensor(f"{kind.name}.decoded", decoded.reshape(1, 512).astype(np.float32))
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Of the families with experts: one tensor for all of them.
EXPERTS_BLOCK = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
    "gate_proj": "ffn_gate_exps",
    "down_proj": "ffn_down_exps",
    "up_proj": "ffn_up_exps",
}
DEEPSEEK_BLOCK = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
BERT_BLOCK = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
GEMMA_BLOCK = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PHI3_BLOCK = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
GPT2_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}


def gguf_name(name, family):
    stem, part = name.rsplit(".", 1)
    stem = stem.removeprefix("bert.")
    if part == "e_score_correction_bias":
        return f"blk.{stem.split('.')[2]}.exp_probs_b.bias"
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{part}"
    pieces = stem.split(".")
    layer, module = pieces[2], ".".join(pieces[3:])
    if module in BERT_BLOCK:
        return f"blk.{layer}.{BERT_BLOCK[module]}.{part}"
    if ".experts" in module:
        return f"blk.{layer}.{EXPERTS_BLOCK[pieces[-1]]}.{part}"
    blocks = LLAMA_BLOCK | GPT2_BLOCK | EXPERTS_BLOCK | PHI3_BLOCK | DEEPSEEK_BLOCK
    if family.startswith("gemma"):
        blocks |= GEMMA_BLOCK
    return f"blk.{layer}.{blocks[module]}.{part}"


def stack_experts(tensors):
    """As llama.cpp's converter: the experts' matrices of a layer become one tensor."""
    stacked, parts = {}, {}
    for name, tensor in tensors.items():
        before, found, after = name.partition(".experts.")
        if not found:
            stacked[name] = tensor
            continue
        number, module = after.split(".", 1)
        parts.setdefault(f"{before}.experts.{module}", {})[int(number)] = tensor
    for name, experts in parts.items():
        stacked[name] = torch.stack([experts[number] for number in sorted(experts)])
    return stacked


ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}


def permute(rows, heads):
    """As llama.cpp's converter: the halves of a head become neighbors."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def split_kv_b(tensors, config, fused):
    """As llama.cpp's converter since 2025: the keys' part turned, the values' part beside it."""
    split = {}
    for name, tensor in tensors.items():
        if fused or not name.endswith("kv_b_proj.weight"):
            split[name] = tensor
            continue
        heads, latent = config["num_attention_heads"], tensor.shape[-1]
        parts = [config["qk_nope_head_dim"], config["v_head_dim"]]
        keys, values = tensor.view(heads, sum(parts), latent).split(parts, dim=1)
        split[name.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2).contiguous()
        split[name.replace("kv_b_proj", "v_b_proj")] = values.contiguous()
    return split


# Tensors of BERT's folders that are no part of the body.
BEYOND_BODY = ("bert.pooler.", "pooler.", "cls.", "embeddings.position_ids", "bert.embeddings.position_ids")


def convert(folder, out, kind=T.F32, add_vocabulary=None, fused=False):
    """Writes a model folder as GGUF and returns the weights that the file decodes to, but those that
    are laid out otherwise there. `fused` writes DeepSeek as converters did until 2025."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    arch = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(out, arch)
    write_keys(writer, config, family, add_vocabulary, fused)
    if (config.get("rope_parameters") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    if (config.get("rope_parameters") or {}).get("rope_type") == "longrope":
        for kind_of in ("long", "short"):
            factors = np.array(config["rope_parameters"][f"{kind_of}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{kind_of}.weight", factors)
    decoded = {}
    for name, tensor in split_kv_b(stack_experts(tensors), config, fused).items():
        if name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
            continue
        if name.startswith(BEYOND_BODY):
            continue
        rows = tensor.to(torch.float32).numpy()
        conv1d = family == "gpt2" and rows.ndim == 2 and ".h." in name
        if conv1d:
            rows = np.ascontiguousarray(rows.T)
        if arch == "llama" and ".q_proj." in name:
            rows = permute(rows, config["num_attention_heads"])
        if arch == "llama" and ".k_proj." in name:
            rows = permute(rows, config["num_key_value_heads"])
        if family.startswith("gemma") and name.endswith("norm.weight"):
            rows = rows + 1
        whole = "wpe" in name or name.endswith((".gate.weight",))
        whole |= "position_embeddings" in name or "token_type_embeddings" in name
        here = kind if rows.ndim >= 2 and not whole else T.F32
        raw = gguf.quants.quantize(np.ascontiguousarray(rows), here)
        writer.add_tensor(gguf_name(name, family), raw, raw_dtype=here)
        # What the file says: decoded from it, and laid out as in the folder again.
        plain = gguf.quants.quantize(tensor.to(torch.float32).numpy(), T.F32)
        if here != T.F32:
            stored = plain.T if conv1d else plain
            stored = np.ascontiguousarray(stored)
            plain = gguf.quants.dequantize(gguf.quants.quantize(stored, here), here)
            plain = plain.T if conv1d else plain
        decoded[name] = torch.from_numpy(np.ascontiguousarray(plain))
    finish(writer)
    return decoded


def llama3_divisors(config):
    """As llama.cpp's converter: what the llama3 rule divides each frequency by."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    divisors = []
    for freq in freqs:
        wavelength = 2 * np.pi / freq
        smooth = (original / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(
            1.0
            if wavelength < original / high
            else factor if wavelength > original / low else float(between)
        )
    return np.array(divisors, dtype=np.float32)


def write_deepseek_keys(writer, config, family, fused):
    latent, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    key = config["qk_nope_head_dim"] + rotary
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_attention_heads"] if fused else 1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(key if fused else latent + rotary)
    writer.add_value_length(config["v_head_dim"] if fused else latent)
    if not fused:
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rotary)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        assert rope["mscale"] == rope["mscale_all_dim"], "the file has one of them"
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    # Files from before there was a choice say nothing of scoring and groups.
    if config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    if family == "deepseek_v3" or not fused:
        is_v3 = family == "deepseek_v3"
        kind = gguf.ExpertGatingFuncType.SIGMOID if is_v3 else gguf.ExpertGatingFuncType.SOFTMAX
        writer.add_expert_gating_func(kind)
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def write_bert_keys(writer, config):
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(config["type_vocab_size"])


def write_keys(writer, config, family, add_vocabulary, fused=False):
    rope = config.get("rope_parameters") or {}
    if family.startswith("deepseek"):
        write_deepseek_keys(writer, config, family, fused)
    elif family == "bert":
        write_bert_keys(writer, config)
    elif family == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        rotated = head_dim
        if family == "phi3":
            rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
            writer.add_sliding_window(config["sliding_window"] or 0)
            writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        else:
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(rotated)
        whole = rope.get("full_attention", rope)
        writer.add_rope_freq_base(whole.get("rope_theta", config.get("rope_theta", 10000.0)))
        if whole.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(whole["factor"])
        if rope.get("rope_type") == "longrope":
            scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
            length = np.log(config["original_max_position_embeddings"])
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / length)))
        if family.startswith("gemma"):
            writer.add_sliding_window(config["sliding_window"])
            if config.get("sliding_window_pattern"):
                writer.add_sliding_window_pattern(config["sliding_window_pattern"])
            if config.get("final_logit_softcapping"):
                writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        if family == "gemma2":
            writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        if family in ("mixtral", "qwen3_moe"):
            writer.add_expert_count(config["num_local_experts"])
            writer.add_expert_used_count(config["num_experts_per_tok"])
        if family == "qwen3_moe":
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if family != "bert":
        writer.add_vocab_size(config["vocab_size"])
    if add_vocabulary:
        add_vocabulary(writer)
    else:
        # transformers' reader wants to know that there is a vocabulary.
        writer.add_tokenizer_model("none")
    for name in ("bos", "eos"):
        token = config.get(f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token if isinstance(token, int) else token[0])


GEMMA = dict(hidden_size=64, sliding_window=6, query_pre_attn_scalar=16)
PHI3 = dict(hidden_size=64, sliding_window=6, pad_token_id=0, original_max_position_embeddings=64,
            tie_word_embeddings=False)
DEEPSEEK = dict(
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
    moe_intermediate_size=32, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=3,
    kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=8, v_head_dim=16,
    tie_word_embeddings=False, initializer_range=0.02)


def yarn(mscale):
    return dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16,
                beta_fast=32.0, beta_slow=1.0, mscale=mscale, mscale_all_dim=mscale)


FURTHER = {
    # As V2-Lite, laid out as until 2025; as V2; as V3.
    "deepseek_v2_old": DEEPSEEK | dict(
        q_lora_rank=None, n_shared_experts=2, n_group=1, topk_group=1, topk_method="greedy",
        routed_scaling_factor=1.0, norm_topk_prob=False, rope_parameters=yarn(0.707)),
    "deepseek_v2": DEEPSEEK | dict(
        q_lora_rank=32, n_shared_experts=2, n_group=4, topk_group=2, topk_method="group_limited_greedy",
        routed_scaling_factor=16.0, norm_topk_prob=False, rope_parameters=yarn(0.707)),
    "deepseek_v3": DEEPSEEK | dict(
        q_lora_rank=32, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        norm_topk_prob=True, rope_parameters=yarn(1.0)),
    "bert": dict(num_hidden_layers=2, type_vocab_size=2, intermediate_size=64, layer_norm_eps=1e-12,
                 pad_token_id=0),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
    # The square root of the width is whole, so that no type rounds it.
    "gemma2": GEMMA | dict(num_hidden_layers=2, attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
    "gemma3_text": GEMMA | dict(
        num_hidden_layers=3, sliding_window_pattern=2,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1e6),
            sliding_attention=dict(rope_type="default", rope_theta=1e4))),
    "phi3": PHI3 | dict(rope_parameters=dict(
        rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "phi3_long": PHI3 | dict(
        original_max_position_embeddings=8,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=8,
            short_factor=[1.0 + 0.125 * i for i in range(8)], long_factor=[1.5 + i for i in range(8)])),
}


def write_small_word_piece(out):
    """A tokenizer.json of 48 pieces, letters mostly; returns them."""
    import tokenizers as hf
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghiklmnoprstuwy"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, "stone", *letters, *(f"##{letter}" for letter in letters)]
    vocab = {token: number for number, token in enumerate(tokens)}
    source = hf.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    source.normalizer = normalizers.BertNormalizer(lowercase=True)
    source.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    source.decoder = decoders.WordPiece()
    source.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    source.add_special_tokens(special)
    source.save(str(Path(out) / "tokenizer.json"))
    return tokens


def model(name, out):
    """A model of some 9,000 weights, each a multiple of 2^-9, so that Q8_0 and bf16 hold it."""
    import transformers

    family = name.removesuffix("_long").removesuffix("_old")
    sizes = dict(vocab_size=48, max_position_embeddings=64)
    if family == "gpt2":
        sizes |= dict(n_positions=64, n_embd=32, n_layer=1, n_head=4, n_inner=64)
        del sizes["max_position_embeddings"]
    else:
        sizes |= dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        sizes |= dict(num_key_value_heads=2, head_dim=16, intermediate_size=32, rms_norm_eps=1e-5)
        sizes |= dict(tie_word_embeddings=family != "llama")
    sizes |= FURTHER.get(name, {})
    special = dict(bos_token_id=1, eos_token_id=2)
    if family.startswith("deepseek"):
        del sizes["head_dim"]
    if family == "bert":
        for name in ("num_key_value_heads", "head_dim", "rms_norm_eps"):
            del sizes[name]
        special = {}
    config = transformers.AutoConfig.for_model(family, **sizes, **special, dtype="bfloat16")
    kind = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    network = kind.from_config(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter, weight in network.named_parameters():
            steps = torch.randint(-127, 128, weight.shape, generator=generator)
            if weight.dim() >= 2:
                # Each 32 inputs of a row have an extreme, so that the scale is 2^-9 exactly.
                conv1d = family == "gpt2" and ".h." in parameter
                inputs = steps.T if conv1d else steps
                inputs[..., ::32] = 127
                if "kv_b_proj" in parameter:
                    # The same for the keys' part, which is stored turned.
                    heads = config.num_attention_heads
                    steps.view(heads, -1, steps.shape[-1])[:, : config.qk_nope_head_dim : 32] = 127
            # Gemma's own files count norms from zero.
            is_norm = ("norm" in parameter or ".ln_" in parameter) and not family.startswith("gemma")
            is_norm |= "LayerNorm.weight" in parameter
            weight.copy_(steps / 512 + is_norm * (weight.dim() == 1))
        for buffer, values in network.named_buffers():
            if "correction_bias" in buffer:
                values.copy_(torch.randint(-127, 128, values.shape, generator=generator) / 512)
    network.to(torch.bfloat16).save_pretrained(out)
    vocabulary = write_small_word_piece(out) if family == "bert" else None
    add_vocabulary = vocabulary and (lambda writer: add_word_piece(writer, vocabulary))
    convert(out, f"{out}.gguf", T.Q8_0, add_vocabulary, fused=name.endswith("_old"))
    ids = torch.randint(3, 48, (1, 16), generator=generator)
    again = kind.from_pretrained(out, dtype=torch.float32).eval()
    # Of some families transformers does not read the size of the vocabulary, so it gets the rest.
    if family in ("mixtral", "bert") or family.startswith("deepseek"):
        print(family, "is not read from GGUF files by transformers")
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        Path(out).parent, gguf_file=Path(out).name + ".gguf", dtype=torch.float32, config=config
    ).eval()
    with torch.no_grad():
        difference = (again(ids).logits - theirs(ids).logits).abs().max()
    print(family, "transformers: folder against GGUF, largest difference", difference.item())
    assert difference < 1e-5


# Letters with a case, as the tokenizer of DeepSeek LLM and V2 lists them.
DEEPSEEK_LLM_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-"
    "\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90"
    "-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-"
    "\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_LLM = ["[\r\n]", rf"\s?[{DEEPSEEK_LLM_LETTERS}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$",
                "[一-龥ࠀ-一가-\ud7ff]+"]
DEEPSEEK_V3 = [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
               r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
               r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""]


def train_word_piece(corpus):
    import tokenizers as hf
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    source = hf.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    source.normalizer = normalizers.BertNormalizer(lowercase=True)
    source.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    source.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Capitals of their own, so that putting texts in lower case or not makes a difference.
    alphabet = list("▁TSO")
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    source.train_from_iterator(corpus, trainer)
    return source


def train_tokenizer(kind):
    """A small tokenizer of the `tokenizers` package, its tokens, merges and texts to try it on."""
    import tokenizers as hf
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    texts = ["A cairn is a stack of stones that shows the way.", "Löwe, 狮子 and 🦁!", "  two\n\n three"]
    texts += ["x = 1234567; // don't", "the the the", "", " ", "a<b></s>", "\ttabs\r\n"]
    corpus = [text * 4 for text in texts] + [Path(__file__).read_text()] * 4
    if kind == "bert":
        source = train_word_piece(corpus)
        vocab = source.get_vocab(with_added_tokens=True)
        return source, sorted(vocab, key=vocab.get), [], texts
    source = hf.Tokenizer(models.BPE(byte_fallback=kind == "llama", unk_token="<unk>" if kind == "llama" else None))
    special = ["<unk>", "<s>", "</s>"]
    if kind == "llama":
        source.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        byte = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + byte, max_token_length=12)
    else:
        digits = "{1,3}" if kind == "llama-bpe" else ""
        words = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = pre_tokenizers.Split(hf.Regex(words), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt-2")
        deepseek = {"deepseek-v3": DEEPSEEK_V3, "deepseek-llm": DEEPSEEK_LLM}.get(kind, [])
        cuts = [pre_tokenizers.Split(hf.Regex(cut), "isolated") for cut in deepseek] or [split]
        cuts += [pre_tokenizers.Digits(individual_digits=True)] if kind == "deepseek-llm" else []
        source.pre_tokenizer = plain if kind == "gpt-2" else pre_tokenizers.Sequence([*cuts, plain])
        source.normalizer = normalizers.NFC() if kind == "qwen2" else None
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    source.train_from_iterator(corpus, trainer)
    model = json.loads(source.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    merges = [" ".join(merge) for merge in model["merges"]]
    return source, tokens, merges, texts


def add_word_piece(writer, tokens):
    """As llama.cpp's converter writes BERT's: the mark is on pieces that begin a word."""
    special = {"padding": 0, "unknown": 1, "cls": 2, "seperator": 3, "mask": 4}
    turned = [token[2:] if token.startswith("##") else "▁" + token for token in tokens]
    turned[:5] = tokens[:5]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(turned)
    writer.add_token_types([3] * 5 + [1] * (len(tokens) - 5))
    for name, token in special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", True)


def add_tokenizer(writer, kind, tokens, merges):
    """As llama.cpp's converter writes a vocabulary."""
    if kind == "bert":
        add_word_piece(writer, tokens)
        return
    special = ["<unk>", "<s>", "</s>"]
    rank = {merge.replace(" ", ""): number for number, merge in reversed(list(enumerate(merges)))}
    kinds = [3 if token in special else 1 for token in tokens]
    writer.add_tokenizer_model("llama" if kind == "llama" else "gpt2")
    writer.add_token_list(tokens)
    if kind == "llama":
        kinds = [6 if token.startswith("<0x") else kind for token, kind in zip(tokens, kinds)]
        kinds[0] = 2
        writer.add_token_scores([float(-rank.get(token, 10**6)) for token in tokens])
    else:
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges(merges)
    writer.add_token_types(kinds)


def tokenizer(kind, out):
    """A small tokenizer as GGUF, and OUT.json with texts and the ids that the source gives."""
    source, tokens, merges, texts = train_tokenizer(kind)
    writer = gguf.GGUFWriter(out, "llama")
    add_tokenizer(writer, kind, tokens, merges)
    finish(writer)
    # Special tokens that a text spells out are text here: that is how a corpus is read.
    source.encode_special_tokens = True
    ids = [source.encode(text, add_special_tokens=False).ids for text in texts]
    Path(f"{out}.json").write_text(json.dumps({"texts": texts, "ids": ids}, ensure_ascii=False))


CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def chat(out):
    """A model with a tokenizer and a chat template: a folder OUT, and OUT.gguf."""
    import transformers
    from tokenizers import decoders, processors

    source, tokens, merges, _ = train_tokenizer("llama")
    sizes = dict(vocab_size=len(tokens), hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, head_dim=8, intermediate_size=32, max_position_embeddings=256)
    sizes |= dict(tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    config = transformers.LlamaConfig(**sizes)
    network = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            steps = torch.randint(-127, 128, weight.shape, generator=generator)
            if weight.dim() == 2:
                steps[:, ::32] = 127
            weight.copy_(steps / 512 + (weight.dim() == 1))
    network.to(torch.bfloat16).save_pretrained(out)
    (Path(out) / "generation_config.json").unlink()
    source.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    source.decoder = decoders.Sequence(steps)
    # The trainer makes bytes special, which they are not.
    file = json.loads(source.to_str())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["id"] < 3]
    (Path(out) / "tokenizer.json").write_text(json.dumps(file, ensure_ascii=False, indent=1))
    named = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT)
    (Path(out) / "tokenizer_config.json").write_text(json.dumps(named, indent=1))
    convert(out, f"{out}.gguf", T.Q8_0, lambda writer: add_chat(writer, tokens, merges))


def add_chat(writer, tokens, merges):
    add_tokenizer(writer, "llama", tokens, merges)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    tools = dict(name="tool_use", template="{{ tools }}")
    writer.add_chat_template([dict(name="default", template=CHAT), tools])


def compare(folder, scratch, cairn):
    scratch = Path(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    config = json.loads((Path(folder) / "config.json").read_text())
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, config["vocab_size"], (2, 24), generator=generator)
    save_file({"input_ids": ids}, scratch / "ids.safetensors")

    def logits(path):
        out = scratch / "logits.safetensors"
        arguments = ["--input", scratch / "ids.safetensors", "--output", out]
        subprocess.run([cairn, "logits", "--model", path, *arguments], check=True)
        return load_file(out)["logits"]

    for kind in (T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0):
        decoded = convert(folder, scratch / "model.gguf", kind)
        save_file(decoded, scratch / "model.safetensors")
        (scratch / "config.json").write_text(json.dumps(config))
        same = torch.equal(logits(scratch), logits(scratch / "model.gguf"))
        print(Path(folder).name, kind.name, "equal bit for bit" if same else "DIFFERENT")
        assert same


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "convert" and len(rest) == 3:
        rest[2] = T[rest[2]]
    dict(
        blocks=blocks, model=model, convert=convert, compare=compare, tokenizer=tokenizer, chat=chat
    )[what](*rest)

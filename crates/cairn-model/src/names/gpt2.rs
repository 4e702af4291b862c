//! GPT-2: `Conv1D` keeps weights `[inputs, outputs]`, and `c_attn` is query, key and value.

use super::{Names, Place};

const QKV: Place = Place::FusedTransposed(
    "attn.c_attn",
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
);

pub(super) const NAMES: Names = Names {
    block: "transformer.h.{}.",
    places: &[
        ("model.embed_tokens", Place::Module("transformer.wte")),
        ("model.embed_positions", Place::Module("transformer.wpe")),
        ("model.norm", Place::Module("transformer.ln_f")),
        ("input_layernorm", Place::Module("ln_1")),
        ("self_attn.q_proj", QKV),
        ("self_attn.k_proj", QKV),
        ("self_attn.v_proj", QKV),
        ("self_attn.o_proj", Place::Transposed("attn.c_proj")),
        ("post_attention_layernorm", Place::Module("ln_2")),
        ("mlp.up_proj", Place::Transposed("mlp.c_fc")),
        ("mlp.down_proj", Place::Transposed("mlp.c_proj")),
    ],
    // The base model's own files.
    wrapper: Some("transformer."),
    // Masks that older versions saved with the model.
    ignorable: &[".attn.bias", ".attn.masked_bias"],
    head_bias_copy: None,
    older: &[],
};

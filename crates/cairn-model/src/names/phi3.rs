//! Phi-3: query, key and value are one tensor, and so are gate and up.

use super::{Names, Place};

const QKV: Place = Place::Fused(
    "self_attn.qkv_proj",
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
);
const GATE_UP: Place = Place::Fused("mlp.gate_up_proj", &["mlp.gate_proj", "mlp.up_proj"]);

pub(super) const NAMES: Names = Names {
    block: "model.layers.{}.",
    places: &[
        ("self_attn.q_proj", QKV),
        ("self_attn.k_proj", QKV),
        ("self_attn.v_proj", QKV),
        ("mlp.gate_proj", GATE_UP),
        ("mlp.up_proj", GATE_UP),
    ],
    // The body's own files.
    wrapper: Some("model."),
    ignorable: &[".rotary_emb.inv_freq"],
    head_bias_copy: None,
    older: &[],
};

//! Families with experts: one tensor for each expert, as files have it, or the stacked tensors that
//! transformers holds in memory.

use super::{Names, Place};

const KV_B: Place =
    Place::Interleaved("self_attn.kv_b_proj", &["self_attn.k_b_proj", "self_attn.v_b_proj"]);
const GATE_UP: Place =
    Place::Stacked("mlp.experts.gate_up_proj", &["mlp.experts.gate_proj", "mlp.experts.up_proj"]);

const ROTARY: &[&str] = &[".rotary_emb.inv_freq"];

pub(super) const MIXTRAL: Names = Names {
    block: "model.layers.{}.",
    places: &[
        ("mlp.gate", Place::Module("block_sparse_moe.gate")),
        ("mlp.experts.gate_proj", Place::Module("block_sparse_moe.experts.{}.w1")),
        ("mlp.experts.up_proj", Place::Module("block_sparse_moe.experts.{}.w3")),
        ("mlp.experts.down_proj", Place::Module("block_sparse_moe.experts.{}.w2")),
    ],
    // The body's own files.
    wrapper: Some("model."),
    ignorable: ROTARY,
    head_bias_copy: None,
    older: &[],
};

/// Qwen3-MoE and DeepSeek.
pub(super) const SEPARATE: Names = Names {
    block: "model.layers.{}.",
    places: &[
        ("mlp.experts.gate_proj", Place::Module("mlp.experts.{}.gate_proj")),
        ("mlp.experts.up_proj", Place::Module("mlp.experts.{}.up_proj")),
        ("mlp.experts.down_proj", Place::Module("mlp.experts.{}.down_proj")),
        ("self_attn.k_b_proj", KV_B),
        ("self_attn.v_b_proj", KV_B),
    ],
    // The body's own files.
    wrapper: Some("model."),
    ignorable: ROTARY,
    head_bias_copy: None,
    older: &[],
};

/// All of them, as transformers 5 holds them in memory.
pub(super) const STACKED: Names = Names {
    block: "model.layers.{}.",
    places: &[
        ("mlp.experts.gate_proj", GATE_UP),
        ("mlp.experts.up_proj", GATE_UP),
        ("mlp.experts.down_proj", Place::Stacked("mlp.experts.down_proj", DOWN)),
        ("self_attn.k_b_proj", KV_B),
        ("self_attn.v_b_proj", KV_B),
    ],
    // The body's own files.
    wrapper: Some("model."),
    ignorable: ROTARY,
    head_bias_copy: None,
    older: &[],
};

const DOWN: &[&str] = &["mlp.experts.down_proj"];

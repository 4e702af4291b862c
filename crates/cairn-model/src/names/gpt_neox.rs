//! GPT-NeoX: query, key and value of a head follow one another in one tensor.

use super::{Names, Place};

const QKV: &str = "attention.query_key_value";

pub(super) const NAMES: Names = Names {
    block: "gpt_neox.layers.{}.",
    places: &[
        ("model.embed_tokens", Place::Module("gpt_neox.embed_in")),
        ("model.norm", Place::Module("gpt_neox.final_layer_norm")),
        ("lm_head", Place::Module("embed_out")),
        ("self_attn.q_proj", Place::PerHead(QKV, 0, 3)),
        ("self_attn.k_proj", Place::PerHead(QKV, 1, 3)),
        ("self_attn.v_proj", Place::PerHead(QKV, 2, 3)),
        ("self_attn.o_proj", Place::Module("attention.dense")),
        ("mlp.up_proj", Place::Module("mlp.dense_h_to_4h")),
        ("mlp.down_proj", Place::Module("mlp.dense_4h_to_h")),
    ],
    // The body's own files.
    wrapper: Some("gpt_neox."),
    // Masks and frequencies that older versions saved with the model.
    ignorable: &[".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"],
    head_bias_copy: None,
    older: &[],
};

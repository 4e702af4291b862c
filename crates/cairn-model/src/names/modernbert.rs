//! ModernBERT: query, key and value are one tensor, and so are gate and up.

use super::{Names, Place};

const QKV: Place =
    Place::Fused("attn.Wqkv", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]);
const GATE_UP: Place = Place::Fused("mlp.Wi", &["mlp.gate_proj", "mlp.up_proj"]);

pub(super) const NAMES: Names = Names {
    block: "model.layers.{}.",
    places: &[
        ("model.embed_tokens", Place::Module("model.embeddings.tok_embeddings")),
        ("model.embed_norm", Place::Module("model.embeddings.norm")),
        ("model.norm", Place::Module("model.final_norm")),
        ("lm_head", Place::Module("decoder")),
        ("input_layernorm", Place::Module("attn_norm")),
        ("self_attn.q_proj", QKV),
        ("self_attn.k_proj", QKV),
        ("self_attn.v_proj", QKV),
        ("self_attn.o_proj", Place::Module("attn.Wo")),
        ("post_attention_layernorm", Place::Module("mlp_norm")),
        ("mlp.gate_proj", GATE_UP),
        ("mlp.up_proj", GATE_UP),
        ("mlp.down_proj", Place::Module("mlp.Wo")),
    ],
    // The body's own files.
    wrapper: Some("model."),
    ignorable: &[],
    head_bias_copy: None,
    older: &[],
};

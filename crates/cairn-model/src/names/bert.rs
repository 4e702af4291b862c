//! BERT.

use super::{Names, Place};

pub(super) const NAMES: Names = Names {
    block: "bert.encoder.layer.{}.",
    places: &[
        ("model.embed_tokens", Place::Module("bert.embeddings.word_embeddings")),
        ("model.embed_positions", Place::Module("bert.embeddings.position_embeddings")),
        ("model.embed_token_types", Place::Module("bert.embeddings.token_type_embeddings")),
        ("model.embed_norm", Place::Module("bert.embeddings.LayerNorm")),
        ("self_attn.q_proj", Place::Module("attention.self.query")),
        ("self_attn.k_proj", Place::Module("attention.self.key")),
        ("self_attn.v_proj", Place::Module("attention.self.value")),
        ("self_attn.o_proj", Place::Module("attention.output.dense")),
        ("post_attention_layernorm", Place::Module("attention.output.LayerNorm")),
        ("mlp.up_proj", Place::Module("intermediate.dense")),
        ("mlp.down_proj", Place::Module("output.dense")),
        ("post_feedforward_layernorm", Place::Module("output.LayerNorm")),
        ("head.dense", Place::Module("cls.predictions.transform.dense")),
        ("head.norm", Place::Module("cls.predictions.transform.LayerNorm")),
        ("lm_head.weight", Place::Module("cls.predictions.decoder")),
        ("lm_head.bias", Place::Module("cls.predictions")),
    ],
    // The body's own files.
    wrapper: Some("bert."),
    // A list of numbers that older versions saved; the layer over the
    // first token and the head over pairs of sentences, which the masked-LM model does not have.
    ignorable: &[
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ],
    head_bias_copy: Some("cls.predictions.decoder.bias"),
    older: &[("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")],
};

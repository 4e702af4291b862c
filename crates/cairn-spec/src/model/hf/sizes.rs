//! Sizes and heads that BERT, GPT-NeoX and ModernBERT say by the same names.

use super::decoder::share;
use super::fields::Fields;
use crate::model::{AttentionForm, Gqa, ModelSpec, Norm, NormKind, SpecError};
use serde_json::{Map, Value};

/// The sizes of a model.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) intermediate_size: usize,
}

pub(super) fn read(config: &Fields<'_>) -> Result<Sizes, SpecError> {
    Ok(Sizes {
        vocab_size: config.required_size("vocab_size")?,
        hidden_size: config.required_size("hidden_size")?,
        num_hidden_layers: config.required_size("num_hidden_layers")?,
        max_position_embeddings: config.required_size("max_position_embeddings")?,
        intermediate_size: config.required_size("intermediate_size")?,
    })
}

/// A head of keys for each of queries, an even share of the width; biases on all projections or none.
pub(super) fn heads(config: &Fields<'_>, sizes: Sizes, bias: bool) -> Result<Gqa, SpecError> {
    let num_attention_heads = config.required_size("num_attention_heads")?;
    Ok(Gqa {
        num_attention_heads,
        num_key_value_heads: num_attention_heads,
        head_dim: share(sizes.hidden_size, num_attention_heads)?,
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: None,
    })
}

/// A norm by mean and variance, its epsilon under this name.
pub(super) fn layer_norm(
    config: &Fields<'_>,
    (name, default): (&str, f64),
    bias: bool,
) -> Result<Norm, SpecError> {
    let eps = config.real(name)?.unwrap_or(default);
    Ok(Norm { kind: NormKind::Layer, eps, plus_one: false, bias })
}

/// What [`read`] and [`heads`] read, but the vocabulary, which every family says alike, and biases.
pub(super) fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = Map::new();
    let mut set = |name: &str, value: usize| map.insert(name.to_owned(), value.into());
    set("hidden_size", spec.hidden_size);
    set("num_hidden_layers", spec.num_hidden_layers);
    set("max_position_embeddings", spec.max_position_embeddings);
    set("intermediate_size", spec.mlp.intermediate_size());
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        set("num_attention_heads", gqa.num_attention_heads);
    }
    map
}

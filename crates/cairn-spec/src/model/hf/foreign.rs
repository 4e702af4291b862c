//! Fields that change the numbers of *some* model and that files of other families may not set.
//!
//! transformers' own classes ignore fields that they do not know, but a file that carries
//! one was made for code that does not (a fork, a custom class, a quantiser), so the numbers its
//! authors got cannot be had by ignoring it.

use super::fields::{Fields, quote};
use crate::model::{Family, SpecError};
use serde_json::Value;

/// The value of a foreign field that changes nothing.
#[derive(Clone, Copy)]
enum Neutral {
    /// Only absence does.
    Absent,
    /// `false`.
    False,
    /// The number 0.
    Zero,
    /// The number 1.
    One,
    /// An empty list or object.
    Empty,
}

const FOREIGN: [(&str, Neutral); 40] = [
    ("alibi", Neutral::False),
    ("add_cross_attention", Neutral::False),
    ("attention_chunk_size", Neutral::Absent),
    ("attention_multiplier", Neutral::Absent),
    ("attn_logit_softcapping", Neutral::Absent),
    ("clip_qkv", Neutral::Absent),
    ("compression_config", Neutral::Absent),
    ("dim_model_base", Neutral::Absent),
    ("embedding_multiplier", Neutral::One),
    ("final_logit_softcapping", Neutral::Absent),
    ("is_encoder_decoder", Neutral::False),
    ("kv_lora_rank", Neutral::Absent),
    ("logit_scale", Neutral::One),
    ("logits_scaling", Neutral::One),
    ("n_routed_experts", Neutral::Zero),
    ("no_rope_layers", Neutral::Empty),
    ("num_experts", Neutral::Zero),
    ("num_experts_per_tok", Neutral::Zero),
    ("num_local_experts", Neutral::Zero),
    ("parallel_attn", Neutral::False),
    ("partial_rotary_factor", Neutral::One),
    ("pruned_heads", Neutral::Empty),
    ("qk_layernorm", Neutral::False),
    ("qk_norm", Neutral::False),
    ("quantization_config", Neutral::Absent),
    ("query_pre_attn_scalar", Neutral::Absent),
    ("residual_multiplier", Neutral::One),
    ("rope_local_base_freq", Neutral::Absent),
    ("rotary_pct", Neutral::One),
    ("scale_depth", Neutral::Absent),
    ("scale_emb", Neutral::One),
    ("sliding_window", Neutral::Absent),
    ("sliding_window_pattern", Neutral::Absent),
    ("tie_encoder_decoder", Neutral::False),
    ("use_alibi", Neutral::False),
    ("use_bidirectional_attention", Neutral::False),
    ("use_parallel_residual", Neutral::False),
    ("use_qk_norm", Neutral::False),
    ("use_sliding_window", Neutral::False),
    ("word_embed_proj_dim", Neutral::Absent),
];

/// Refuses a file that sets a foreign field to something that matters.
pub(super) fn refuse(
    config: &Fields<'_>,
    family: Family,
    honors: &[&str],
) -> Result<(), SpecError> {
    for (field, neutral) in FOREIGN.iter().filter(|(field, _)| !honors.contains(field)) {
        if let Some(value) = config.value(field)
            && !is_neutral(value, *neutral)
        {
            return Err(unsupported(config, field, value, family));
        }
    }
    if honors.contains(&"layer_types") {
        return Ok(());
    }
    let layer_types = config.texts("layer_types")?;
    match (config.value("layer_types"), layer_types.iter().all(|kind| kind == "full_attention")) {
        (Some(value), false) => Err(unsupported(config, "layer_types", value, family)),
        _ => Ok(()),
    }
}

fn is_neutral(value: &Value, neutral: Neutral) -> bool {
    let is_number =
        |number: f64| value.as_f64().is_some_and(|actual| actual.total_cmp(&number).is_eq());
    match neutral {
        Neutral::Absent => false,
        Neutral::False => value == &Value::Bool(false),
        Neutral::Zero => is_number(0.0),
        Neutral::One => is_number(1.0),
        Neutral::Empty => {
            value.as_array().is_some_and(Vec::is_empty)
                || value.as_object().is_some_and(serde_json::Map::is_empty)
        }
    }
}

pub(super) fn unsupported(
    config: &Fields<'_>,
    field: &str,
    value: &Value,
    family: Family,
) -> SpecError {
    SpecError::Unsupported { field: config.name(field), value: quote(value), family }
}

//! `model_type` gemma2: `Gemma2Config` of transformers; and what Gemma 3 shares with it.

use super::Mapping;
use super::decoder::{self, Defaults, GELU_TANH};
use super::fields::Fields;
use super::windows;
use crate::DType;
use crate::model::validate;
use crate::model::{AttentionForm, BlockForm, Family, Head, ModelFields, ModelSpec, SpecError};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    body: "Gemma2Model",
    also: &[],
    honors: &[
        "sliding_window",
        "layer_types",
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "query_pre_attn_scalar",
    ],
    read,
    write,
};

/// Defaults of both generations.
pub(super) const fn defaults(family: Family) -> Defaults {
    Defaults {
        head_dim: Some(256),
        activation: ("hidden_activation", GELU_TANH),
        tie_word_embeddings: true,
        bos: Some(2),
        eos: &[1],
        pad: Some(0),
        ..Defaults::llama(family)
    }
}

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    let family = Family::Gemma2;
    let mut fields = decoder::read(config, &defaults(family))?;
    read_gemma(config, &mut fields, [Some(30.0), Some(50.0)])?;
    let layers = windows::windowed_layers(config, family, |layer| layer % 2 == 0)?;
    fields.attention.sliding_window = windows::window(sliding_window(config)?, layers);
    Ok(fields)
}

/// Reads what both generations have: sandwich norms that count from one, a scaled embedding,
/// scores scaled by a number of the file, and softcaps on logits and scores, given their defaults.
pub(super) fn read_gemma(
    config: &Fields<'_>,
    fields: &mut ModelFields,
    [logits_cap, scores_cap]: [Option<f64>; 2],
) -> Result<(), SpecError> {
    decoder::refuse_mlp_bias(config, fields.family)?;
    fields.block = BlockForm::SandwichNorm;
    fields.norm.plus_one = true;
    fields.embedding.scale = Some(embedding_scale(fields.hidden_size, fields.dtype));
    let scalar = config.real("query_pre_attn_scalar")?.unwrap_or(256.0);
    validate::positive("query_pre_attn_scalar", scalar)?;
    fields.attention.scale = Some(scalar.powf(-0.5));
    fields.attention.logit_softcap = softcap(config, "attn_logit_softcapping", scores_cap)?;
    let softcap = softcap(config, "final_logit_softcapping", logits_cap)?;
    fields.head = Some(Head { softcap, ..Head::default() });
    Ok(())
}

/// Absent is the default, null is no cap.
fn softcap(
    config: &Fields<'_>,
    field: &str,
    default: Option<f64>,
) -> Result<Option<f64>, SpecError> {
    if config.has(field) { config.real(field) } else { Ok(default) }
}

/// Absent is transformers' default, null is no window.
pub(super) fn sliding_window(config: &Fields<'_>) -> Result<Option<usize>, SpecError> {
    if config.has("sliding_window") { config.size("sliding_window") } else { Ok(Some(4096)) }
}

/// The square root of the width, rounded to the type of the weights as transformers rounds it.
fn embedding_scale(hidden_size: usize, dtype: DType) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "widths above 2^20 are refused later")]
    let root = (hidden_size as f64).sqrt().max(1.0);
    let significand_bits = match dtype {
        DType::Bf16 => 8,
        DType::F16 => 11,
        _ => 24,
    };
    let mut step = 2f64.powi(1 - significand_bits);
    while step * 2f64.powi(significand_bits) <= root {
        step *= 2.0;
    }
    (root / step).round_ties_even() * step
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &defaults(Family::Gemma2));
    write_gemma(spec, &mut map);
    map
}

/// Writes what [`read_gemma`] reads, and the windows.
pub(super) fn write_gemma(spec: &ModelSpec, map: &mut Map<String, Value>) {
    let window = spec.attention.sliding_window.as_ref();
    map.insert("sliding_window".to_owned(), window.map(|window| window.size).into());
    windows::write_layer_types(spec, map);
    let cap = spec.head.and_then(|head| head.softcap);
    map.insert("final_logit_softcapping".to_owned(), cap.into());
    map.insert("attn_logit_softcapping".to_owned(), spec.attention.logit_softcap.into());
    let scalar = spec.attention.scale.map(query_pre_attn_scalar);
    map.insert("query_pre_attn_scalar".to_owned(), scalar.into());
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        map.insert("attention_bias".to_owned(), gqa.qkv_bias.into());
    }
}

/// The number whose inverse square root is `scale`; transformers takes whole ones only.
fn query_pre_attn_scalar(scale: f64) -> Value {
    let whole = scale.powi(-2).round();
    if (1.0..1e9).contains(&whole) && whole.powf(-0.5).total_cmp(&scale).is_eq() {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whole and below 1e9"
        )]
        let whole = whole as u64;
        return whole.into();
    }
    scale.powi(-2).into()
}

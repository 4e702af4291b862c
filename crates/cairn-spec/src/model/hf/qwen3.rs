//! `model_type` qwen3: `Qwen3Config` of transformers.

use super::Mapping;
use super::decoder::{self, Defaults};
use super::fields::Fields;
use super::windows;
use crate::model::{AttentionForm, Family, ModelFields, ModelSpec, QkNorm, SpecError};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    body: "Qwen3Model",
    also: &[],
    honors: &["sliding_window", "use_sliding_window", "layer_types"],
    read,
    write,
};

const DEFAULTS: Defaults =
    Defaults { head_dim: Some(128), bos: None, eos: &[], ..Defaults::llama(Family::Qwen3) };

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    decoder::refuse_mlp_bias(config, Family::Qwen3)?;
    let mut fields = decoder::read(config, &DEFAULTS)?;
    decoder::with_gqa(&mut fields, |gqa| gqa.qk_norm = Some(QkNorm::PerHead));
    fields.attention.sliding_window = windows::read_optional(config, Family::Qwen3)?;
    Ok(fields)
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    windows::write_optional(spec, &mut map);
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        map.insert("attention_bias".to_owned(), gqa.qkv_bias.into());
    }
    map
}

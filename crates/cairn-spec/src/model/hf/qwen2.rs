//! `model_type` qwen2: `Qwen2Config` of transformers.

use super::Mapping;
use super::decoder::{self, Defaults};
use super::fields::Fields;
use super::windows;
use crate::model::{Family, ModelFields, ModelSpec, SpecError};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    body: "Qwen2Model",
    also: &[],
    honors: &["sliding_window", "use_sliding_window", "layer_types"],
    read,
    write,
};

const DEFAULTS: Defaults = Defaults { bos: None, eos: &[], ..Defaults::llama(Family::Qwen2) };

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    decoder::refuse_biases(config, Family::Qwen2)?;
    let mut fields = decoder::read(config, &DEFAULTS)?;
    decoder::with_gqa(&mut fields, |gqa| gqa.qkv_bias = true);
    fields.attention.sliding_window = windows::read_optional(config, Family::Qwen2)?;
    Ok(fields)
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    windows::write_optional(spec, &mut map);
    map
}

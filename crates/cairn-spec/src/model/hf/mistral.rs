//! `model_type` mistral: `MistralConfig` of transformers.

use super::Mapping;
use super::decoder::{self, Defaults};
use super::fields::Fields;
use crate::model::{Family, ModelFields, ModelSpec, SlidingWindow, SpecError, WindowedLayers};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    body: "MistralModel",
    also: &[],
    honors: &["sliding_window"],
    read,
    write,
};

const DEFAULTS: Defaults = Defaults::llama(Family::Mistral);

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    decoder::refuse_biases(config, Family::Mistral)?;
    let mut fields = decoder::read(config, &DEFAULTS)?;
    // Absent is transformers' default of 4096; null is no window.
    let size = match config.size("sliding_window")? {
        None if !config.has("sliding_window") => Some(4096),
        size => size,
    };
    fields.attention.sliding_window =
        size.map(|size| SlidingWindow { size, layers: WindowedLayers::All, rope: None });
    Ok(fields)
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    let window = spec.attention.sliding_window.as_ref();
    map.insert("sliding_window".to_owned(), window.map(|window| window.size).into());
    map
}

//! `model_type` mistral: `MistralConfig` of transformers; with `layer_types`, `MinistralConfig`, as
//! which transformers reads such a file.

use super::Mapping;
use super::decoder::{self, Defaults};
use super::fields::Fields;
use super::foreign::unsupported;
use super::windows;
use crate::model::{Family, ModelFields, ModelSpec, SpecError, WindowedLayers};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    body: "MistralModel",
    also: &[],
    honors: &["sliding_window", "layer_types"],
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
    let layers = windowed_layers(config, size)?;
    fields.attention.sliding_window = windows::window(size, layers);
    Ok(fields)
}

/// All layers, unless `layer_types` says which.
fn windowed_layers(config: &Fields<'_>, size: Option<usize>) -> Result<WindowedLayers, SpecError> {
    let Some(value) = config.value("layer_types") else { return Ok(WindowedLayers::All) };
    let layers = windows::windowed_layers(config, Family::Mistral, |_| true)?;
    let WindowedLayers::Listed(listed) = &layers else { return Ok(layers) };
    if size.is_none() && listed.contains(&true) {
        // transformers has no window to give to the layers that ask for one.
        return Err(unsupported(config, "layer_types", value, Family::Mistral));
    }
    Ok(if listed.contains(&false) { layers } else { WindowedLayers::All })
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    let window = spec.attention.sliding_window.as_ref();
    map.insert("sliding_window".to_owned(), window.map(|window| window.size).into());
    if window.is_some_and(|window| window.layers != WindowedLayers::All) {
        windows::write_layer_types(spec, &mut map);
    }
    map
}

//! Sliding windows in a `config.json`: `sliding_window`, `use_sliding_window`, `max_window_layers`
//! and `layer_types`.

use super::fields::Fields;
use super::foreign::unsupported;
use crate::model::{Family, ModelSpec, SlidingWindow, SpecError, WindowedLayers};
use serde_json::{Map, Value};

pub(super) const FULL: &str = "full_attention";
pub(super) const SLIDING: &str = "sliding_attention";

/// Which layers have a window: as `layer_types` lists them, or else as `default` says.
pub(super) fn windowed_layers(
    config: &Fields<'_>,
    family: Family,
    default: impl Fn(usize) -> bool,
) -> Result<WindowedLayers, SpecError> {
    let Some(value) = config.value("layer_types") else {
        let layers = config.required_size("num_hidden_layers")?;
        // The limit on layers is checked later; a list of a million is not made for nothing.
        let layers = layers.min(crate::model::NUM_HIDDEN_LAYERS_MAX);
        return Ok(WindowedLayers::Listed((0..layers).map(default).collect()));
    };
    let kinds = config.texts("layer_types")?;
    let num_hidden_layers = config.required_size("num_hidden_layers")?;
    if kinds.len() != num_hidden_layers {
        let (field, actual) = ("layer_types", kinds.len());
        return Err(SpecError::LayerCount { field, actual, num_hidden_layers });
    }
    if kinds.iter().any(|kind| kind != FULL && kind != SLIDING) {
        return Err(unsupported(config, "layer_types", value, family));
    }
    Ok(WindowedLayers::Listed(kinds.iter().map(|kind| kind == SLIDING).collect()))
}

/// A window of `size` in `layers`; none where no layer has it.
pub(super) fn window(size: Option<usize>, layers: WindowedLayers) -> Option<SlidingWindow> {
    let any = match &layers {
        WindowedLayers::All => true,
        WindowedLayers::Listed(layers) => layers.contains(&true),
    };
    size.filter(|_| any).map(|size| SlidingWindow { size, layers, rope: None })
}

/// Qwen's windows: `sliding_window` counts only with `use_sliding_window`, from layer
/// `max_window_layers` on unless `layer_types` says which.
pub(super) fn read_optional(
    config: &Fields<'_>,
    family: Family,
) -> Result<Option<SlidingWindow>, SpecError> {
    let used = config.flag("use_sliding_window", false)?;
    let first = config.size("max_window_layers")?.unwrap_or(28);
    let size = match config.value("sliding_window") {
        _ if !used => None,
        None if config.has("sliding_window") => None,
        None => Some(4096),
        Some(_) => config.size("sliding_window")?,
    };
    let layers = windowed_layers(config, family, |layer| size.is_some() && layer >= first)?;
    let window = window(size, layers.clone());
    match (&layers, size, config.value("layer_types")) {
        // transformers has no window to give to the layers that ask for one.
        (WindowedLayers::Listed(listed), None, Some(value)) if listed.contains(&true) => {
            Err(unsupported(config, "layer_types", value, family))
        }
        _ => Ok(window),
    }
}

/// Writes what [`read_optional`] reads.
pub(super) fn write_optional(spec: &ModelSpec, map: &mut Map<String, Value>) {
    let window = spec.attention.sliding_window.as_ref();
    map.insert("use_sliding_window".to_owned(), window.is_some().into());
    map.insert("sliding_window".to_owned(), window.map(|window| window.size).into());
    write_layer_types(spec, map);
    // The first windowed layer, for what reads this and not `layer_types`.
    let first = (0..spec.num_hidden_layers).find(|&layer| spec.attention.window(layer).is_some());
    map.insert("max_window_layers".to_owned(), first.unwrap_or(spec.num_hidden_layers).into());
}

/// Writes `layer_types`.
pub(super) fn write_layer_types(spec: &ModelSpec, map: &mut Map<String, Value>) {
    let kind = |layer| if spec.attention.window(layer).is_some() { SLIDING } else { FULL };
    let kinds: Vec<&str> = (0..spec.num_hidden_layers).map(kind).collect();
    map.insert("layer_types".to_owned(), kinds.into());
}

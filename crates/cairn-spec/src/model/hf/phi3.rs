//! `model_type` phi3: `Phi3Config` of transformers.

use super::Mapping;
use super::decoder::{self, Defaults};
use super::fields::Fields;
use super::rope_fields::Keys;
use crate::model::{
    Family, ModelFields, ModelSpec, Position, RopeScaling, SlidingWindow, SpecError, WindowedLayers,
};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    body: "Phi3Model",
    also: &[],
    honors: &["sliding_window", "partial_rotary_factor"],
    read,
    write,
};

const DEFAULTS: Defaults = Defaults {
    rms_norm_eps: 1e-5,
    rope: Keys { partial: Some(("partial_rotary_factor", 1.0)), ..Keys::WHOLE_HEAD },
    eos: &[32000],
    pad: Some(32000),
    ..Defaults::llama(Family::Phi3)
};

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    decoder::refuse_biases(config, Family::Phi3)?;
    let mut fields = decoder::read(config, &DEFAULTS)?;
    let size = config.size("sliding_window")?;
    fields.attention.sliding_window =
        size.map(|size| SlidingWindow { size, layers: WindowedLayers::All, rope: None });
    fields.dropout.embd = config.real("embd_pdrop")?.unwrap_or(0.0);
    fields.dropout.resid = config.real("resid_pdrop")?.unwrap_or(0.0);
    Ok(fields)
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    let window = spec.attention.sliding_window.as_ref();
    map.insert("sliding_window".to_owned(), window.map(|window| window.size).into());
    map.insert("embd_pdrop".to_owned(), spec.dropout.embd.into());
    map.insert("resid_pdrop".to_owned(), spec.dropout.resid.into());
    let scaling = match &spec.position {
        Position::Rope(rope) => &rope.scaling,
        Position::Learned => &RopeScaling::Default,
    };
    // Outside, it counts for every scaling that knows an original length.
    let original = match scaling {
        RopeScaling::Longrope(longrope) => longrope.original_max_position_embeddings,
        RopeScaling::Llama3(llama3) => llama3.original_max_position_embeddings,
        _ => spec.max_position_embeddings,
    };
    map.insert("original_max_position_embeddings".to_owned(), original.into());
    map
}

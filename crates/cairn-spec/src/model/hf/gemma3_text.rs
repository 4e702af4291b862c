//! `model_type` `gemma3_text`: `Gemma3TextConfig` of transformers.

use super::Mapping;
use super::decoder::{self, Defaults};
use super::fields::Fields;
use super::gemma2;
use super::rope_fields::{self, Around, Keys};
use super::windows::{self, FULL, SLIDING};
use crate::model::{Family, ModelFields, ModelSpec, Position, QkNorm, SpecError};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    body: "Gemma3TextModel",
    also: &[],
    honors: &[
        "sliding_window",
        "layer_types",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "sliding_window_pattern",
    ],
    read,
    write,
};

const DEFAULTS: Defaults = Defaults { rope: GLOBAL, ..gemma2::defaults(Family::Gemma3Text) };
/// The rotation of layers that see everything.
const GLOBAL: Keys = Keys { default_theta: 1e6, layer_type: Some(FULL), ..Keys::WHOLE_HEAD };
/// The rotation of windowed layers.
const LOCAL: Keys = Keys {
    theta: "rope_local_base_freq",
    layer_type: Some(SLIDING),
    scaled: false,
    ..Keys::WHOLE_HEAD
};

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    let family = Family::Gemma3Text;
    let mut fields = decoder::read(config, &DEFAULTS)?;
    // `attn_logit_softcapping` is refused: transformers reads it in Gemma 2 only.
    gemma2::read_gemma(config, &mut fields, [None, None])?;
    decoder::with_gqa(&mut fields, |gqa| gqa.qk_norm = Some(QkNorm::PerHead));
    let pattern = config.size("sliding_window_pattern")?.unwrap_or(6).max(1);
    let layers =
        windows::windowed_layers(config, family, |layer| !(layer + 1).is_multiple_of(pattern))?;
    let around = Around {
        family,
        head_dim: fields.attention.form.key_dim(),
        max_position_embeddings: fields.max_position_embeddings,
        original_max_position_embeddings: None,
        keys: LOCAL,
    };
    let local = rope_fields::read(config, around)?;
    let window = windows::window(gemma2::sliding_window(config)?, layers);
    fields.attention.sliding_window = window.map(|mut window| {
        window.rope = Some(local);
        window
    });
    Ok(fields)
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    gemma2::write_gemma(spec, &mut map);
    if let Position::Rope(full) = &spec.position {
        let window = spec.attention.sliding_window.as_ref();
        let local = window.and_then(|window| window.rope.as_ref()).unwrap_or(full);
        rope_fields::write_both((full, GLOBAL), (local, LOCAL), &mut map);
    }
    map
}

//! `model_type` llama: `LlamaConfig` of transformers.

use super::Mapping;
use super::decoder::{self, Defaults};
use super::fields::Fields;
use crate::model::{AttentionForm, Family, Mlp, ModelFields, ModelSpec, SpecError};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    body: "LlamaModel",
    also: &[],
    honors: &[],
    read,
    write,
};

const DEFAULTS: Defaults = Defaults::llama(Family::Llama);

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    decoder::read(config, &DEFAULTS)
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    map.insert("pretraining_tp".to_owned(), 1.into());
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        map.insert("attention_bias".to_owned(), gqa.qkv_bias.into());
    }
    if let Mlp::Glu { bias, .. } = &spec.mlp {
        map.insert("mlp_bias".to_owned(), (*bias).into());
    }
    map
}

//! `model_type` olmo2: `Olmo2Config` of transformers.

use super::Mapping;
use super::decoder::{self, Defaults};
use super::fields::Fields;
use crate::model::{AttentionForm, BlockForm, Family, ModelFields, ModelSpec, QkNorm, SpecError};
use serde_json::{Map, Value};

pub(super) const MAPPING: Mapping = Mapping {
    model_type: "olmo2",
    architecture: "Olmo2ForCausalLM",
    body: "Olmo2Model",
    also: &[],
    honors: &[],
    read,
    write,
};

const DEFAULTS: Defaults = Defaults {
    rms_norm_eps: 1e-5,
    bos: None,
    eos: &[50279],
    pad: Some(1),
    ..Defaults::llama(Family::Olmo2)
};

fn read(config: &Fields<'_>) -> Result<ModelFields, SpecError> {
    decoder::refuse_mlp_bias(config, Family::Olmo2)?;
    let mut fields = decoder::read(config, &DEFAULTS)?;
    fields.block = BlockForm::PostNorm;
    decoder::with_gqa(&mut fields, |gqa| gqa.qk_norm = Some(QkNorm::AllHeads));
    Ok(fields)
}

fn write(spec: &ModelSpec) -> Map<String, Value> {
    let mut map = decoder::write(spec, &DEFAULTS);
    // Its class shares the width out evenly and ignores the field.
    map.remove("head_dim");
    if let AttentionForm::Gqa(gqa) = &spec.attention.form {
        map.insert("attention_bias".to_owned(), gqa.qkv_bias.into());
    }
    map
}

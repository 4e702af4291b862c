//! `config.json` of a Hugging Face folder: read into a [`ModelSpec`] and written back.
//!
//! Both styles are read: the newer (`rope_parameters`, `dtype`) and the older (`rope_theta`,
//! `rope_scaling`, `torch_dtype`); where a file has both, they must agree; a key that is there twice is
//! refused. A field that transformers has a default for may be absent, a size may not. A field that
//! changes the numbers is honored or refused by name; a field that is known to change none (`harmless`) is passed over;
//! any other is passed over too, and named in [`HfConfig::ignored`] so that it can be said.
//!
//! Checked against transformers 5.23: the `configuration_*.py` of each family and
//! `modeling_rope_utils.py`.

mod bert;
mod decoder;
mod deepseek;
mod experts;
mod fields;
mod foreign;
mod gemma2;
mod gemma3_text;
mod gpt2;
mod gpt_neox;
mod harmless;
mod llama;
mod mistral;
mod mixtral;
mod modernbert;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod rope_fields;
mod sizes;
mod windows;

use super::{Dropout, Family, ModelFields, ModelSpec, SpecError, SpecialTokens};
use crate::DType;
use crate::unique_json::{self, UniqueError};
use fields::{Fields, quote};
use serde_json::{Map, Value};

/// How the files of one family say what a model computes. Each family is one file of this folder
/// with one such constant, and one line of [`mapping`].
#[derive(Debug)]
pub(super) struct Mapping {
    /// `model_type` of the file.
    pub(super) model_type: &'static str,
    /// The class in `architectures`.
    pub(super) architecture: &'static str,
    /// The class of a file that holds the body alone.
    pub(super) body: &'static str,
    /// Other classes whose head over the vocabulary is the same.
    also: &'static [&'static str],
    /// Fields that are refused in files of other families and mean something here.
    pub(super) honors: &'static [&'static str],
    read: fn(&Fields<'_>) -> Result<ModelFields, SpecError>,
    write: fn(&ModelSpec) -> Map<String, Value>,
}

pub(super) const fn mapping(family: Family) -> &'static Mapping {
    match family {
        Family::Llama => &llama::MAPPING,
        Family::Gpt2 => &gpt2::MAPPING,
        Family::Mistral => &mistral::MAPPING,
        Family::Qwen2 => &qwen2::MAPPING,
        Family::Qwen3 => &qwen3::MAPPING,
        Family::Mixtral => &mixtral::MAPPING,
        Family::Qwen3Moe => &qwen3_moe::MAPPING,
        Family::DeepseekV2 => &deepseek::V2,
        Family::DeepseekV3 => &deepseek::V3,
        Family::GptNeox => &gpt_neox::MAPPING,
        Family::Phi3 => &phi3::MAPPING,
        Family::Olmo2 => &olmo2::MAPPING,
        Family::Gemma2 => &gemma2::MAPPING,
        Family::Gemma3Text => &gemma3_text::MAPPING,
        Family::Bert => &bert::MAPPING,
        Family::ModernBert => &modernbert::MAPPING,
    }
}

/// A `config.json` as it was understood.
#[derive(Clone, Debug, PartialEq)]
pub struct HfConfig {
    /// The model.
    pub spec: ModelSpec,
    /// Fields that nothing here knows, in alphabetical order: they had no influence.
    pub ignored: Vec<String>,
}

impl HfConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    ///
    /// As from [`ModelSpec::from_hf_json`].
    pub fn from_json(text: &str) -> Result<Self, SpecError> {
        let config = unique_json::parse(text).map_err(|error| match error {
            UniqueError::Json(reason) => SpecError::NotJson { reason },
            UniqueError::Twice(twice) => SpecError::Twice {
                field: twice.field,
                first: quote(&twice.first),
                second: quote(&twice.second),
            },
        })?;
        Self::from_value(&config)
    }

    fn from_value(config: &Value) -> Result<Self, SpecError> {
        let Value::Object(map) = config else {
            return Err(SpecError::NotAnObject { actual: fields::kind(config) });
        };
        let config = Fields::new(map);
        let model_type = config.required_text("model_type")?;
        let family = Family::from_model_type(&model_type)
            .ok_or(SpecError::UnsupportedFamily { model_type })?;
        let mapping = mapping(family);
        let has_head = reads_head(&config, family)?;
        foreign::refuse(&config, family, mapping.honors)?;
        let mut fields = (mapping.read)(&config)?;
        fields.head = fields.head.filter(|_| has_head);
        let spec = ModelSpec::new(fields)?;
        let ignored = config.unread().into_iter().filter(|name| !harmless::is_harmless(name));
        Ok(Self { spec, ignored: ignored.collect() })
    }
}

impl ModelSpec {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    ///
    /// [`SpecError`] naming the field that is missing, malformed, contradictory or not supported.
    pub fn from_hf_json(text: &str) -> Result<Self, SpecError> {
        Ok(HfConfig::from_json(text)?.spec)
    }

    /// Reads a parsed `config.json`.
    ///
    /// # Errors
    ///
    /// [`SpecError`] naming the field that is missing, malformed, contradictory or not supported.
    pub fn from_hf_config(config: &Value) -> Result<Self, SpecError> {
        Ok(HfConfig::from_value(config)?.spec)
    }

    /// Writes the `config.json` that transformers 4 and 5 load unmodified: both styles side by
    /// side, keys in alphabetical order.
    ///
    /// # Errors
    ///
    /// [`SpecError::NotRepresentable`] if the spec holds what a `config.json` of its family cannot
    /// say, such as a query norm in a LLaMA model. Dropout rates it cannot say are left out.
    pub fn to_hf_config(&self) -> Result<Value, SpecError> {
        let mut map = (mapping(self.family).write)(self);
        write_shared(self, &mut map);
        map.sort_keys();
        let config = Value::Object(map);
        // Reading back is the one complete check that nothing was lost.
        match Self::from_hf_config(&config) {
            Ok(read) if read.without_dropout() == self.without_dropout() => Ok(config),
            _ => Err(SpecError::NotRepresentable { family: self.family }),
        }
    }

    /// Dropout is about training; what a family cannot say of it changes no number of the model.
    fn without_dropout(&self) -> ModelFields {
        ModelFields { dropout: Dropout::default(), ..self.0.clone() }
    }

    /// The `generation_config.json` that goes beside the weights.
    pub fn to_hf_generation_config(&self) -> Value {
        let mut map = Map::new();
        map.insert("_from_model_config".to_owned(), Value::Bool(true));
        write_tokens(&self.tokens, &mut map);
        Value::Object(map)
    }
}

/// Whether the file has the family's head over the vocabulary, or the body alone. A model with
/// another head or another body computes something else from the same fields.
fn reads_head(config: &Fields<'_>, family: Family) -> Result<bool, SpecError> {
    let mapping = mapping(family);
    let names = config.texts("architectures")?;
    let with_head = |name: &String| name == mapping.architecture || mapping.also.contains(&&**name);
    if names.is_empty() || names.iter().any(with_head) {
        return Ok(true);
    }
    if names.iter().any(|name| name == mapping.body) {
        return Ok(false);
    }
    Err(SpecError::Unsupported {
        field: "architectures".to_owned(),
        value: names.join(", "),
        family,
    })
}

/// The element type, from whichever of the two names is present.
fn read_dtype(config: &Fields<'_>, family: Family) -> Result<DType, SpecError> {
    let name = match (config.text("dtype")?, config.text("torch_dtype")?) {
        (Some(new), Some(old)) if new != old => {
            return Err(SpecError::Contradiction {
                first: "dtype".to_owned(),
                first_value: new,
                second: "torch_dtype".to_owned(),
                second_value: old,
            });
        }
        (Some(name), _) | (None, Some(name)) => name,
        // PyTorch's default type is what transformers loads into when the file does not say.
        (None, None) => return Ok(DType::F32),
    };
    match DType::from_hf_name(&name) {
        Some(dtype) if dtype.is_float() => Ok(dtype),
        _ => Err(SpecError::Unsupported { field: "dtype".to_owned(), value: name, family }),
    }
}

fn read_tokens(config: &Fields<'_>, defaults: &SpecialTokens) -> Result<SpecialTokens, SpecError> {
    let bos = config.token_ids("bos_token_id")?;
    let pad = config.token_ids("pad_token_id")?;
    Ok(SpecialTokens {
        bos: bos.map_or(defaults.bos, |ids| ids.first().copied()),
        eos: config.token_ids("eos_token_id")?.unwrap_or_else(|| defaults.eos.clone()),
        pad: pad.map_or(defaults.pad, |ids| ids.first().copied()),
    })
}

fn write_shared(spec: &ModelSpec, map: &mut Map<String, Value>) {
    map.insert("model_type".to_owned(), spec.family.model_type().into());
    let class = match spec.head {
        Some(_) => spec.family.architecture(),
        None => spec.family.body_architecture(),
    };
    map.insert("architectures".to_owned(), vec![class].into());
    map.insert("vocab_size".to_owned(), spec.vocab_size.into());
    map.insert("tie_word_embeddings".to_owned(), spec.tie_word_embeddings.into());
    map.insert("initializer_range".to_owned(), spec.initializer_range.into());
    map.insert("use_cache".to_owned(), true.into());
    // `dtype` since transformers 4.56, `torch_dtype` before.
    map.insert("dtype".to_owned(), spec.dtype.hf_name().into());
    map.insert("torch_dtype".to_owned(), spec.dtype.hf_name().into());
    write_tokens(&spec.tokens, map);
}

fn write_tokens(tokens: &SpecialTokens, map: &mut Map<String, Value>) {
    map.insert("bos_token_id".to_owned(), tokens.bos.into());
    let eos = match tokens.eos.as_slice() {
        [] => Value::Null,
        [id] => (*id).into(),
        ids => ids.into(),
    };
    map.insert("eos_token_id".to_owned(), eos);
    map.insert("pad_token_id".to_owned(), tokens.pad.into());
}

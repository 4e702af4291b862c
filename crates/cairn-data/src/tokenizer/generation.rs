//! `generation_config.json`: what the authors of a model generate with.

use std::path::Path;

use serde_json::{Map, Value};

use super::config::read_object;
use super::{ModelFiles, TokenizerError};

/// Keys that say nothing about how tokens are chosen.
const SILENT: [&str; 8] = [
    "_from_model_config",
    "bos_token_id",
    "decoder_start_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
];

/// The settings of a `generation_config.json` that Cairn has, and the names of the others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end an output.
    pub eos_token_ids: Vec<u32>,
    /// Whether tokens are drawn; otherwise the likeliest is taken. `None` where the file is silent.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keeps the k likeliest tokens.
    pub top_k: Option<usize>,
    /// Keeps the likeliest tokens of this mass.
    pub top_p: Option<f32>,
    /// Keeps tokens with this share of the largest probability.
    pub min_p: Option<f32>,
    /// Keeps the most typical tokens of this mass.
    pub typical_p: Option<f32>,
    /// Divides the logits of tokens that occurred.
    pub repetition_penalty: Option<f32>,
    /// Lets no sequence of so many tokens occur twice.
    pub no_repeat_ngram_size: Option<usize>,
    /// Most new tokens.
    pub max_new_tokens: Option<usize>,
    /// Settings of the file that Cairn does not have, in the file's order.
    pub ignored: Vec<String>,
}

impl GenerationConfig {
    /// Reads the file in a model's folder; `None` where there is none.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::File`] or [`TokenizerError::Config`] if it cannot be used.
    pub fn read(folder: &Path) -> Result<Option<Self>, TokenizerError> {
        Self::of(ModelFiles::Folder(folder))
    }

    /// As [`read`](Self::read), for a file that may be inside a pack.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read); [`TokenizerError::Pack`] if the pack's file was altered.
    pub fn of(files: ModelFiles<'_>) -> Result<Option<Self>, TokenizerError> {
        let Some((object, path)) = read_object(files, "generation_config.json")? else {
            return Ok(None);
        };
        Self::parse(&object).map(Some).map_err(|reason| TokenizerError::Config { path, reason })
    }

    fn parse(object: &Map<String, Value>) -> Result<Self, String> {
        let mut config = Self::default();
        for (key, value) in object {
            let wrong = || format!("{key} is {value}");
            if value.is_null() {
                continue;
            }
            match key.as_str() {
                "eos_token_id" => config.eos_token_ids = ids(value).ok_or_else(wrong)?,
                "do_sample" => config.do_sample = Some(value.as_bool().ok_or_else(wrong)?),
                "temperature" => config.temperature = Some(number(value).ok_or_else(wrong)?),
                // Zero is how the files switch it off.
                "top_k" => config.top_k = Some(count(value).ok_or_else(wrong)?).filter(|k| *k != 0),
                "top_p" => config.top_p = Some(number(value).ok_or_else(wrong)?),
                "min_p" => config.min_p = Some(number(value).ok_or_else(wrong)?),
                "typical_p" => config.typical_p = Some(number(value).ok_or_else(wrong)?),
                "repetition_penalty" => {
                    config.repetition_penalty = Some(number(value).ok_or_else(wrong)?);
                }
                "no_repeat_ngram_size" => {
                    let size = count(value).ok_or_else(wrong)?;
                    config.no_repeat_ngram_size = Some(size).filter(|size| *size != 0);
                }
                "max_new_tokens" => {
                    config.max_new_tokens = Some(count(value).ok_or_else(wrong)?);
                }
                // What does nothing at its default is not worth a word.
                _ if SILENT.contains(&key.as_str()) || is_neutral(value) => {}
                _ => config.ignored.push(key.clone()),
            }
        }
        Ok(config)
    }
}

/// Whether a setting is off: false, 0, 1 or empty.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Bool(on) => !on,
        Value::Number(number) => {
            number.as_f64().is_some_and(|x| x.abs() < 1e-12 || (x - 1.0).abs() < 1e-12)
        }
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Null | Value::String(_) => false,
    }
}

fn ids(value: &Value) -> Option<Vec<u32>> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().map(one).collect(),
        single => one(single).map(|id| vec![id]),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a sampling setting is an f32")]
fn number(value: &Value) -> Option<f32> {
    value.as_f64().map(|number| number as f32).filter(|number| number.is_finite())
}

fn count(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|count| usize::try_from(count).ok())
}

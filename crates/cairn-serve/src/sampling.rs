//! How a request wants its tokens chosen: its own fields first, then what the model's authors state.

use std::collections::BTreeMap;

use cairn_data::tokenizer::GenerationConfig;
use cairn_engine::{SamplingFields, SamplingParams};

use crate::error::ApiError;
use crate::fields::Fields;

/// Entries of `logit_bias`, at most.
const LOGIT_BIASES_MAX: usize = 1024;

/// Reads the sampling of a request. Where it names no seed, its own number keys the randomness.
pub(crate) fn sampling(
    fields: &mut Fields,
    stated: &GenerationConfig,
    own_seed: u64,
) -> Result<SamplingParams, ApiError> {
    let stated_temperature = match stated.do_sample {
        Some(false) => Some(0.0),
        _ => stated.temperature,
    };
    let seed = fields.take::<i64>("seed")?.map_or(own_seed, i64::cast_unsigned);
    let asked = SamplingFields {
        temperature: fields.number("temperature")?.or(stated_temperature).unwrap_or(1.0),
        // Servers take 0 and −1 for "all".
        top_k: match fields.take::<i64>("top_k")? {
            Some(0 | -1) => None,
            Some(k) => Some(usize::try_from(k).map_err(|_| {
                ApiError::field("top_k", format!("top_k is {k}, which is not at least -1"))
            })?),
            None => stated.top_k,
        },
        top_p: fields.number("top_p")?.or(stated.top_p),
        min_p: fields.number("min_p")?.or(stated.min_p),
        typical_p: fields.number("typical_p")?.or(stated.typical_p),
        repetition_penalty: fields
            .number("repetition_penalty")?
            .or(stated.repetition_penalty)
            .unwrap_or(1.0),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(0.0),
        no_repeat_ngram_size: fields.take("no_repeat_ngram_size")?.or(stated.no_repeat_ngram_size),
        logit_bias: logit_bias(fields)?,
        seed,
    };
    SamplingParams::new(asked).map_err(|error| ApiError::field(error.field, &error))
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let refuse = |message: String| Err(ApiError::field("logit_bias", message));
    let found: BTreeMap<String, f64> = fields.take("logit_bias")?.unwrap_or_default();
    if LOGIT_BIASES_MAX < found.len() {
        return refuse(format!(
            "logit_bias has {} entries, at most {LOGIT_BIASES_MAX}",
            found.len()
        ));
    }
    let mut biases = Vec::with_capacity(found.len());
    for (token, bias) in found {
        let Ok(id) = token.parse() else {
            return refuse(format!("logit_bias: '{token}' is no token id"));
        };
        #[expect(clippy::cast_possible_truncation, reason = "checked with the other fields")]
        biases.push((id, bias as f32));
    }
    Ok(biases)
}

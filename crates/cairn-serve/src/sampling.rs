//! How a request wants its tokens chosen: its own fields first, then what the model's authors state.

use std::collections::BTreeMap;

use cairn_data::tokenizer::GenerationConfig;
use cairn_engine::{MirostatParams, MirostatVersion, SamplingFields, SamplingParams};

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
    let mirostat = mirostat(fields)?;
    // What the authors leave out is left out in another way where the request says how.
    let unsteered = GenerationConfig {
        top_k: None,
        top_p: None,
        min_p: None,
        typical_p: None,
        ..stated.clone()
    };
    let stated = if mirostat.is_some() { &unsteered } else { stated };
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
        tfs_z: one_of(fields, ["tfs_z", "tfs"])?,
        epsilon_cutoff: fields.number("epsilon_cutoff")?,
        eta_cutoff: fields.number("eta_cutoff")?,
        mirostat,
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

/// A number with two names; both at once have to agree.
fn one_of(fields: &mut Fields, names: [&'static str; 2]) -> Result<Option<f32>, ApiError> {
    let found = [fields.number(names[0])?, fields.number(names[1])?];
    match found {
        [Some(first), Some(second)] if first.to_bits() != second.to_bits() => {
            let message = format!("{} is {first} and {} is {second}", names[0], names[1]);
            Err(ApiError::field(names[1], message))
        }
        [first, second] => Ok(first.or(second)),
    }
}

fn mirostat(fields: &mut Fields) -> Result<Option<MirostatParams>, ApiError> {
    const NAME: &str = "mirostat";
    let version = match fields.take::<i64>(NAME)? {
        None | Some(0) => None,
        Some(1) => Some(MirostatVersion::V1),
        Some(2) => Some(MirostatVersion::V2),
        Some(other) => {
            return Err(ApiError::field(NAME, format!("{NAME} is {other}, none of 0, 1, 2")));
        }
    };
    let mut params = version.map(MirostatParams::new);
    for name in ["mirostat_tau", "mirostat_eta"] {
        match (fields.number(name)?, &mut params) {
            (None, _) => {}
            (Some(_), None) => {
                return Err(ApiError::field(name, format!("{name} is only for mirostat = 1 or 2")));
            }
            (Some(value), Some(params)) if name == "mirostat_tau" => params.tau = value,
            (Some(value), Some(params)) => params.eta = value,
        }
    }
    Ok(params)
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

//! The rotation in a GGUF file, as the `rope_parameters` of a `config.json`.

use super::keys::{Keys, shortest};
use super::{GgufSpecError, ROPE_FACTORS, ROPE_FACTORS_LONG};
use cairn_spec::model::{HEAD_DIM_MAX, Llama3Scaling, Rope, RopeScaling};
use serde_json::{Value, json};

/// How far a divisor in the file may be from the one that the rule gives, relative to it: the
/// converter computes in f32, in another order.
const FACTOR_TOLERANCE: f64 = 1e-5;

/// The bounds of the `llama3` rule in every model that Meta has released; a GGUF file holds what
/// the rule gives, not the rule.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
const ORIGINAL_POSITIONS: usize = 8192;

pub(super) fn parameters(keys: &Keys<'_>, head_dim: u64) -> Result<Value, GgufSpecError> {
    let theta = keys.optional_real("rope.freq_base")?.unwrap_or(10_000.0);
    let mut parameters = scaling(keys)?;
    if keys.has_tensor(ROPE_FACTORS) {
        if parameters["rope_type"] != "default" {
            return Err(refuse_factors(keys));
        }
        parameters = llama3(keys, theta, head_dim)?;
    }
    parameters["rope_theta"] = theta.into();
    Ok(parameters)
}

/// Phi-3's rule for long contexts, whose divisors lie in two tensors; `None` without those.
pub(super) fn longrope(keys: &Keys<'_>) -> Result<Option<Value>, GgufSpecError> {
    if !ROPE_FACTORS_LONG.iter().any(|name| keys.has_tensor(name)) {
        return Ok(None);
    }
    let kind = keys.optional_word("rope.scaling.type")?;
    if kind.is_some_and(|kind| kind != "longrope") {
        return Err(keys.unsupported(&keys.full("rope.scaling.type")));
    }
    let [short, long] = ROPE_FACTORS_LONG.map(|name| divisors(keys, name));
    Ok(Some(json!({
        "rope_type": "longrope",
        "rope_theta": keys.optional_real("rope.freq_base")?.unwrap_or(10_000.0),
        "short_factor": short?,
        "long_factor": long?,
        "attention_factor": keys.optional_real("rope.scaling.attn_factor")?.unwrap_or(1.0),
    })))
}

/// A tensor of divisors, one for each pair of dimensions.
fn divisors(keys: &Keys<'_>, name: &str) -> Result<Vec<f64>, GgufSpecError> {
    let missing = || GgufSpecError::Missing { key: format!("tensor {name}") };
    let tensor = keys.file().header().tensor(name).ok_or_else(missing)?;
    if tensor.elements() > HEAD_DIM_MAX {
        return Err(refuse_factors(keys));
    }
    let mut divisors = vec![0.0; tensor.elements()];
    keys.file().read_f32(name, 0..tensor.elements(), &mut divisors)?;
    Ok(divisors.into_iter().map(|divisor| shortest(divisor.into())).collect())
}

/// The scaling that the keys name.
fn scaling(keys: &Keys<'_>) -> Result<Value, GgufSpecError> {
    // The old name of a linear factor.
    let old = keys.optional_real("rope.scale_linear")?.filter(|&factor| factor > 1.0);
    let kind = keys.optional_word("rope.scaling.type")?;
    let factor = keys.optional_real("rope.scaling.factor")?;
    let original = keys.optional_size("rope.scaling.original_context_length")?;
    let fast = keys.optional_real("rope.scaling.yarn_beta_fast")?;
    let slow = keys.optional_real("rope.scaling.yarn_beta_slow")?;
    let missing = |key: &str| GgufSpecError::Missing { key: keys.full(key) };
    match (kind, old) {
        (None | Some("none"), None) => Ok(json!({ "rope_type": "default" })),
        (None, Some(factor)) => Ok(json!({ "rope_type": "linear", "factor": factor })),
        (Some("linear"), None) => {
            let factor = factor.ok_or_else(|| missing("rope.scaling.factor"))?;
            Ok(json!({ "rope_type": "linear", "factor": factor }))
        }
        (Some("yarn"), None) => Ok(json!({
            "rope_type": "yarn",
            "factor": factor.ok_or_else(|| missing("rope.scaling.factor"))?,
            "original_max_position_embeddings":
                original.ok_or_else(|| missing("rope.scaling.original_context_length"))?,
            "beta_fast": fast.unwrap_or(32.0),
            "beta_slow": slow.unwrap_or(1.0),
        })),
        (Some(_), None) => Err(keys.unsupported(&keys.full("rope.scaling.type"))),
        (Some(_), Some(_)) => Err(keys.unsupported(&keys.full("rope.scale_linear"))),
    }
}

/// Finds the rule behind the divisors in the file, or refuses them.
fn llama3(keys: &Keys<'_>, theta: f64, head_dim: u64) -> Result<Value, GgufSpecError> {
    let tensor = keys.file().header().tensor(ROPE_FACTORS).expect("looked for by the caller");
    let rotary_dim = usize::try_from(head_dim).unwrap_or(usize::MAX);
    if tensor.elements() != rotary_dim / 2 {
        return Err(refuse_factors(keys));
    }
    let mut divisors = vec![0.0; tensor.elements()];
    keys.file().read_f32(ROPE_FACTORS, 0..tensor.elements(), &mut divisors)?;
    // The lowest frequency is divided by the whole factor.
    let factor = divisors.iter().copied().fold(1.0_f32, f32::max).into();
    let plain = Rope::new(theta, rotary_dim);
    let scaling = Llama3Scaling {
        factor,
        low_freq_factor: LOW_FREQ_FACTOR,
        high_freq_factor: HIGH_FREQ_FACTOR,
        original_max_position_embeddings: ORIGINAL_POSITIONS,
    };
    let scaled = Rope { scaling: RopeScaling::Llama3(scaling), ..plain.clone() };
    let frequencies = plain.inv_freq().into_iter().zip(scaled.inv_freq());
    let is_rule = frequencies.zip(divisors).all(|((plain, scaled), divisor)| {
        let expected = f64::from(plain) / f64::from(scaled);
        (f64::from(divisor) - expected).abs() <= FACTOR_TOLERANCE * expected
    });
    if !is_rule {
        return Err(refuse_factors(keys));
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW_FREQ_FACTOR,
        "high_freq_factor": HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": ORIGINAL_POSITIONS,
    }))
}

fn refuse_factors(keys: &Keys<'_>) -> GgufSpecError {
    GgufSpecError::Unsupported {
        key: format!("tensor {ROPE_FACTORS}"),
        value: "divisors that the llama3 rule does not give".to_owned(),
        architecture: keys.architecture().to_owned(),
    }
}

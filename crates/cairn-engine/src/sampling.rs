//! How tokens are chosen, as data: [`SamplingParams`].
//!
//! The chain, in order; what is not set is skipped. The order is that of transformers'
//! `_get_logits_processor` (version 5), with the penalties that only servers have beside the one
//! that both have, as in vLLM:
//!
//! 1. `logit_bias` is added.
//! 2. `repetition_penalty`: logits of tokens in prompt or output are divided by it if positive,
//!    multiplied if negative (Keskar et al. 2019).
//! 3. `frequency_penalty` × occurrences and `presence_penalty` are subtracted; they see the output
//!    only, as `OpenAI`'s do.
//! 4. `no_repeat_ngram_size`: tokens that would complete an n-gram of prompt and output again are
//!    excluded.
//! 5. `temperature` 0 ends here: the largest logit wins. Otherwise logits are divided by it.
//! 6. `top_k`: the k largest stay.
//! 7. `top_p`: the fewest tokens whose probabilities reach the mass stay (Holtzman et al. 2020).
//! 8. `min_p`: tokens with at least that share of the largest probability stay (Nguyen et al. 2024).
//! 9. `typical_p`: the fewest tokens, nearest to the expected information first, whose
//!    probabilities reach the mass stay (Meister et al. 2023).
//! 10. `tfs_z`: what comes in front of the tail stays, where the curve of the sorted probabilities has bent by that
//!     share of all its bending (Phénix 2019, "Tail free sampling", as llama.cpp had it).
//! 11. `epsilon_cutoff`: tokens with at least this probability stay.
//! 12. `eta_cutoff` ε: tokens stay with at least the probability min(ε, √ε · exp(−entropy)) (Hewitt et al. 2022).
//! 13. One token is drawn with the random number of (`seed`, position).
//!
//! `mirostat` stands instead of 6 to 12, none of which may be set with it; see [`crate::MirostatParams`].
//!
//! Probabilities are renormalized between the steps. **Ties go to the lowest id**, where
//! transformers keeps all tokens that tie with the k-th. At least one token survives every step.
//!
//! **Invariant:** [`SamplingParams`] that exist are in range; [`SamplingFields`] are the same data
//! before that check.

use std::ops::Deref;

use cairn_spec::Hint;
use serde::{Deserialize, Serialize};

use crate::mirostat::MirostatParams;

/// Most alternatives whose log-probabilities are reported for a position.
pub const TOP_LOGPROBS_MAX: usize = 128;
/// Largest magnitude of a presence or frequency penalty.
pub const PENALTY_MAX: f32 = 2.0;
/// Largest repetition penalty, and the inverse of the smallest: beyond, it is no penalty but a way to
/// numbers that are none.
pub const REPETITION_PENALTY_MAX: f32 = 100.0;
/// Largest magnitude of a logit bias; enough to force or exclude a token.
pub const LOGIT_BIAS_MAX: f32 = 100.0;

/// The contents of [`SamplingParams`], not yet checked. The default samples from the model's own
/// distribution with seed 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingFields {
    /// 0 takes the likeliest token; 1 leaves the distribution as it is.
    pub temperature: f32,
    /// Keeps the k likeliest tokens.
    pub top_k: Option<usize>,
    /// Keeps the likeliest tokens that together reach this mass, in (0, 1].
    pub top_p: Option<f32>,
    /// Keeps tokens with at least this share of the largest probability, in [0, 1].
    pub min_p: Option<f32>,
    /// Keeps the most typical tokens that together reach this mass, in (0, 1].
    pub typical_p: Option<f32>,
    /// Cuts the tail off where the sorted probabilities have bent by this share, in (0, 1].
    pub tfs_z: Option<f32>,
    /// Keeps tokens with at least this probability, in [0, 1).
    pub epsilon_cutoff: Option<f32>,
    /// Keeps tokens that are likely for how much is open, in [0, 1).
    pub eta_cutoff: Option<f32>,
    /// Steers how surprising tokens are.
    pub mirostat: Option<MirostatParams>,
    /// Divides the logits of tokens that occurred in prompt or output, in [0.01, 100]; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that occurred in the output.
    pub presence_penalty: f32,
    /// Subtracted once for every occurrence in the output.
    pub frequency_penalty: f32,
    /// No n-gram of this length occurs twice.
    pub no_repeat_ngram_size: Option<usize>,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Keys all randomness, together with the position.
    pub seed: u64,
}

impl Default for SamplingFields {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            typical_p: None,
            tfs_z: None,
            epsilon_cutoff: None,
            eta_cutoff: None,
            mirostat: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            no_repeat_ngram_size: None,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// How the tokens of one request are chosen; see the module for the chain. Fields are read through
/// [`SamplingFields`].
///
/// ```
/// use cairn_engine::{SamplingFields, SamplingParams};
/// let fields = SamplingFields { temperature: 0.8, top_p: Some(0.95), ..Default::default() };
/// assert!(SamplingParams::new(fields).is_ok());
/// let error = SamplingParams::new(SamplingFields { top_p: Some(1.5), ..Default::default() });
/// assert_eq!(error.unwrap_err().to_string(), "top_p is 1.5, which is not in (0, 1]");
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "SamplingFields", into = "SamplingFields")]
pub struct SamplingParams(SamplingFields);

impl SamplingParams {
    /// Checks `fields` and makes them parameters.
    ///
    /// # Errors
    ///
    /// [`SamplingError`] naming the first field that is out of range, infinite or not a number.
    pub fn new(fields: SamplingFields) -> Result<Self, SamplingError> {
        check("temperature", fields.temperature, 0.0 <= fields.temperature, "at least 0")?;
        let penalty = fields.repetition_penalty;
        let most = REPETITION_PENALTY_MAX;
        let is_usable = (1.0 / most..=most).contains(&penalty);
        check("repetition_penalty", penalty, is_usable, "in [0.01, 100]")?;
        for (name, value) in [
            ("presence_penalty", fields.presence_penalty),
            ("frequency_penalty", fields.frequency_penalty),
        ] {
            check(name, value, value.abs() <= PENALTY_MAX, "in [-2, 2]")?;
        }
        let masses =
            [("top_p", fields.top_p), ("typical_p", fields.typical_p), ("tfs_z", fields.tfs_z)];
        for (name, mass) in masses {
            let mass = mass.unwrap_or(1.0);
            check(name, mass, 0.0 < mass && mass <= 1.0, "in (0, 1]")?;
        }
        let share = fields.min_p.unwrap_or(0.0);
        check("min_p", share, (0.0..=1.0).contains(&share), "in [0, 1]")?;
        for (name, cutoff) in
            [("epsilon_cutoff", fields.epsilon_cutoff), ("eta_cutoff", fields.eta_cutoff)]
        {
            let cutoff = cutoff.unwrap_or(0.0);
            check(name, cutoff, (0.0..1.0).contains(&cutoff), "in [0, 1)")?;
        }
        check_mirostat(&fields)?;
        for (name, count) in
            [("top_k", fields.top_k), ("no_repeat_ngram_size", fields.no_repeat_ngram_size)]
        {
            if count == Some(0) {
                return Err(SamplingError { field: name, value: "0".into(), range: "at least 1" });
            }
        }
        for &(token, bias) in &fields.logit_bias {
            if LOGIT_BIAS_MAX < bias.abs() || !bias.is_finite() {
                let value = format!("{bias} for token {token}");
                return Err(SamplingError { field: "logit_bias", value, range: "in [-100, 100]" });
            }
        }
        Ok(Self(fields))
    }

    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self(SamplingFields { temperature: 0.0, ..SamplingFields::default() })
    }

    /// Gives the fields back, to change some.
    pub fn into_fields(self) -> SamplingFields {
        self.0
    }
}

impl Deref for SamplingParams {
    type Target = SamplingFields;

    fn deref(&self) -> &SamplingFields {
        &self.0
    }
}

impl TryFrom<SamplingFields> for SamplingParams {
    type Error = SamplingError;

    fn try_from(fields: SamplingFields) -> Result<Self, SamplingError> {
        Self::new(fields)
    }
}

impl From<SamplingParams> for SamplingFields {
    fn from(params: SamplingParams) -> Self {
        params.0
    }
}

/// A sampling setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}, which is not {range}")]
pub struct SamplingError {
    /// The setting.
    pub field: &'static str,
    /// What it was set to.
    pub value: String,
    /// What it may be.
    pub range: &'static str,
}

impl Hint for SamplingError {
    fn hints(&self) -> Vec<String> {
        vec![format!("set {} to a number {}", self.field, self.range)]
    }
}

/// Mirostat stands alone among what leaves tokens out.
fn check_mirostat(fields: &SamplingFields) -> Result<(), SamplingError> {
    let Some(MirostatParams { tau, eta, .. }) = fields.mirostat else { return Ok(()) };
    check("mirostat_tau", tau, 0.0 < tau && tau <= 100.0, "in (0, 100]")?;
    check("mirostat_eta", eta, (0.0..=1.0).contains(&eta), "in [0, 1]")?;
    let others = [
        ("top_p", fields.top_p),
        ("min_p", fields.min_p),
        ("typical_p", fields.typical_p),
        ("tfs_z", fields.tfs_z),
        ("epsilon_cutoff", fields.epsilon_cutoff),
        ("eta_cutoff", fields.eta_cutoff),
    ];
    let set = others.into_iter().find_map(|(field, value)| Some((field, value?.to_string())));
    let set = fields.top_k.map(|k| ("top_k", k.to_string())).or(set);
    match set {
        Some((field, value)) => {
            Err(SamplingError { field, value, range: "unset, as mirostat wants it" })
        }
        None => Ok(()),
    }
}

fn check(
    field: &'static str,
    value: f32,
    in_range: bool,
    range: &'static str,
) -> Result<(), SamplingError> {
    if value.is_finite() && in_range {
        return Ok(());
    }
    Err(SamplingError { field, value: value.to_string(), range })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mirostat::MirostatVersion;

    fn refused(change: impl FnOnce(&mut SamplingFields)) -> &'static str {
        let mut fields = SamplingFields::default();
        change(&mut fields);
        SamplingParams::new(fields).map_or_else(|error| error.field, |_| "accepted")
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.5] {
            assert_eq!(refused(|f| f.temperature = bad), "temperature");
            assert_eq!(refused(|f| f.repetition_penalty = bad), "repetition_penalty");
            assert_eq!(refused(|f| f.top_p = Some(bad)), "top_p");
            assert_eq!(refused(|f| f.typical_p = Some(bad)), "typical_p");
            assert_eq!(refused(|f| f.min_p = Some(bad)), "min_p");
            assert_eq!(refused(|f| f.tfs_z = Some(bad)), "tfs_z");
            assert_eq!(refused(|f| f.epsilon_cutoff = Some(bad)), "epsilon_cutoff");
            assert_eq!(refused(|f| f.eta_cutoff = Some(bad)), "eta_cutoff");
            let miro = MirostatParams::new(MirostatVersion::V2);
            let steered = |tau, eta| Some(MirostatParams { tau, eta, ..miro });
            assert_eq!(refused(|f| f.mirostat = steered(bad, 0.1)), "mirostat_tau");
            assert_eq!(refused(|f| f.mirostat = steered(5.0, bad)), "mirostat_eta");
        }
        for bad in [f32::NAN, 2.5, -2.5, f32::INFINITY] {
            assert_eq!(refused(|f| f.presence_penalty = bad), "presence_penalty");
            assert_eq!(refused(|f| f.frequency_penalty = bad), "frequency_penalty");
        }
        for bad in [f32::NAN, 101.0, f32::NEG_INFINITY] {
            assert_eq!(refused(|f| f.logit_bias = vec![(1, 0.0), (2, bad)]), "logit_bias");
        }
        for bad in [0.0, 1e-40, 1e-45, 0.009, 101.0, 3e38] {
            assert_eq!(refused(|f| f.repetition_penalty = bad), "repetition_penalty");
        }
        assert_eq!(refused(|f| f.top_p = Some(0.0)), "top_p");
        assert_eq!(refused(|f| f.min_p = Some(1.01)), "min_p");
        assert_eq!(refused(|f| f.eta_cutoff = Some(1.0)), "eta_cutoff");
        let miro = Some(MirostatParams::new(MirostatVersion::V1));
        assert_eq!(refused(|f| (f.mirostat, f.top_k) = (miro, Some(3))), "top_k");
        assert_eq!(refused(|f| (f.mirostat, f.tfs_z) = (miro, Some(1.0))), "tfs_z");
        assert_eq!(refused(|f| f.top_k = Some(0)), "top_k");
        assert_eq!(refused(|f| f.no_repeat_ngram_size = Some(0)), "no_repeat_ngram_size");
    }

    #[test]
    fn limits_themselves_are_accepted() {
        let fields = SamplingFields {
            temperature: 0.0,
            top_k: Some(1),
            top_p: Some(1.0),
            min_p: Some(0.0),
            typical_p: Some(1.0),
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            logit_bias: vec![(0, -100.0)],
            seed: u64::MAX,
            ..SamplingFields::default()
        };
        assert!(SamplingParams::new(fields).is_ok());
    }
}

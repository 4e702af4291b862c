//! What a run learns to predict: `[objective]`.
//!
//! A causal model learns the next token. A model whose attention looks both ways learns the tokens
//! that were taken away from it (Devlin et al. 2018, section 3.1): some are chosen, of those most
//! become the mask token, some a random token, and the rest stay.

use super::RecipeError;
use crate::ModelSpec;
use crate::model::MaskKind;
use serde::{Deserialize, Serialize};

/// What is predicted: `[objective]`, by the names of transformers' `DataCollatorForLanguageModeling`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ObjectiveSection {
    /// `causal_lm` for causal models and `masked_lm` for encoders if absent.
    pub kind: Option<ObjectiveKind>,
    /// Share of the tokens that are chosen to be predicted; 0.15 if absent. Masked LM only, like the
    /// keys below.
    pub mlm_probability: Option<f64>,
    /// Share of the chosen that become the mask token; 0.8 if absent.
    pub mask_replace_prob: Option<f64>,
    /// Share of the chosen that become a random token; 0.1 if absent. The rest stay as they are.
    pub random_replace_prob: Option<f64>,
    /// Spelling of the mask token; `[MASK]`, `<mask>` or `<|mask|>`, whichever the tokenizer has, if
    /// absent.
    pub mask_token: Option<String>,
}

/// The objectives there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectiveKind {
    /// Every next token.
    CausalLm,
    /// Tokens that were taken away.
    MaskedLm,
}

/// What a run learns to predict.
#[derive(Clone, Debug, PartialEq)]
pub enum Objective {
    /// Every next token.
    CausalLm,
    /// Tokens that were taken away.
    MaskedLm(MaskedLm),
}

/// How tokens are taken away.
#[derive(Clone, Debug, PartialEq)]
pub struct MaskedLm {
    /// Share of the tokens that are predicted.
    pub mlm_probability: f64,
    /// Share of those that become the mask token.
    pub mask_replace_prob: f64,
    /// Share of those that become a random token.
    pub random_replace_prob: f64,
    /// Spelling of the mask token, where it is not a usual one.
    pub mask_token: Option<String>,
}

pub(super) fn resolve(
    section: &ObjectiveSection,
    model: &ModelSpec,
) -> Result<Objective, RecipeError> {
    let is_causal = model.attention.mask == MaskKind::Causal;
    let (own, attention) = match is_causal {
        true => (ObjectiveKind::CausalLm, "causal"),
        false => (ObjectiveKind::MaskedLm, "bidirectional"),
    };
    let kind = section.kind.unwrap_or(own);
    if kind != own {
        let objective = match kind {
            ObjectiveKind::CausalLm => "causal_lm",
            ObjectiveKind::MaskedLm => "masked_lm",
        };
        return Err(RecipeError::Objective { attention, objective });
    }
    if is_causal {
        refuse_keys_of_masked_lm(section)?;
        return Ok(Objective::CausalLm);
    }
    let masked = MaskedLm {
        mlm_probability: section.mlm_probability.unwrap_or(0.15),
        mask_replace_prob: section.mask_replace_prob.unwrap_or(0.8),
        random_replace_prob: section.random_replace_prob.unwrap_or(0.1),
        mask_token: section.mask_token.clone(),
    };
    share("objective.mlm_probability", masked.mlm_probability)?;
    share("objective.mask_replace_prob", masked.mask_replace_prob)?;
    share("objective.random_replace_prob", masked.random_replace_prob)?;
    if masked.mlm_probability <= 0.0 {
        return Err(outside("objective.mlm_probability", "above 0", masked.mlm_probability));
    }
    let replaced = masked.mask_replace_prob + masked.random_replace_prob;
    if replaced > 1.0 {
        let expected = "at most 1 together with objective.mask_replace_prob";
        return Err(outside("objective.random_replace_prob", expected, masked.random_replace_prob));
    }
    Ok(Objective::MaskedLm(masked))
}

/// A key that the objective has no use for would be ignored; that must not happen silently.
fn refuse_keys_of_masked_lm(section: &ObjectiveSection) -> Result<(), RecipeError> {
    let set = [
        ("objective.mlm_probability", section.mlm_probability.is_some()),
        ("objective.mask_replace_prob", section.mask_replace_prob.is_some()),
        ("objective.random_replace_prob", section.random_replace_prob.is_some()),
        ("objective.mask_token", section.mask_token.is_some()),
    ];
    match set.into_iter().find(|(_, is_set)| *is_set) {
        None => Ok(()),
        Some((key, _)) => Err(RecipeError::OutOfRange {
            key,
            expected: "absent: the model learns by causal_lm".to_owned(),
            actual: "set".to_owned(),
        }),
    }
}

fn share(key: &'static str, value: f64) -> Result<(), RecipeError> {
    // Written so that NaN, which is in no range, is refused.
    if (0.0..=1.0).contains(&value) { Ok(()) } else { Err(outside(key, "from 0 to 1", value)) }
}

fn outside(key: &'static str, expected: &str, value: f64) -> RecipeError {
    RecipeError::OutOfRange { key, expected: expected.to_owned(), actual: value.to_string() }
}

/// The section that resolves to an objective; empty for the one that needs none.
pub(super) fn section(objective: &Objective) -> ObjectiveSection {
    match objective {
        Objective::CausalLm => ObjectiveSection::default(),
        Objective::MaskedLm(masked) => ObjectiveSection {
            kind: Some(ObjectiveKind::MaskedLm),
            mlm_probability: Some(masked.mlm_probability),
            mask_replace_prob: Some(masked.mask_replace_prob),
            random_replace_prob: Some(masked.random_replace_prob),
            mask_token: masked.mask_token.clone(),
        },
    }
}

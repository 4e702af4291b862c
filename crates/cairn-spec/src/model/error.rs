//! What can be wrong with a model spec, and what to do about it.

use super::Family;
use crate::{Activation, Hint};
use thiserror::Error;

/// A `config.json`, a recipe or a set of fields that cannot describe a working model.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum SpecError {
    /// The text is not JSON.
    #[error("config.json is not valid JSON: {reason}")]
    NotJson {
        /// The parser's words, with line and column.
        reason: String,
    },
    /// An object has a key twice; parsers disagree about which one counts.
    #[error("'{field}' is there twice, as {first} and as {second}")]
    Twice {
        /// Its name in the file.
        field: String,
        /// What it is first.
        first: String,
        /// What it is then.
        second: String,
    },
    /// The document is not an object.
    #[error("config.json must hold an object, not {actual}")]
    NotAnObject {
        /// What it holds.
        actual: &'static str,
    },
    /// A field that decides the model is absent.
    #[error("'{field}' is missing")]
    Missing {
        /// Its name in the file.
        field: String,
    },
    /// A field has the wrong type.
    #[error("'{field}' must be {expected}, not {actual}")]
    WrongType {
        /// Its name in the file.
        field: String,
        /// What belongs there.
        expected: &'static str,
        /// What was found.
        actual: String,
    },
    /// A number is outside its limits.
    #[error("'{field}' must be between {min} and {max}, not {actual}")]
    OutOfRange {
        /// Its name.
        field: String,
        /// The value given.
        actual: String,
        /// Smallest accepted value.
        min: String,
        /// Largest accepted value.
        max: String,
    },
    /// Query heads cannot be shared out evenly over key/value heads.
    #[error(
        "{num_attention_heads} attention heads cannot share {num_key_value_heads} key/value heads"
    )]
    UnevenHeads {
        /// `num_attention_heads`.
        num_attention_heads: usize,
        /// `num_key_value_heads`.
        num_key_value_heads: usize,
    },
    /// The width cannot be cut into heads, and no `head_dim` says otherwise.
    #[error("hidden_size {hidden_size} is not a multiple of {num_attention_heads} attention heads")]
    HiddenNotDivisible {
        /// `hidden_size`.
        hidden_size: usize,
        /// `num_attention_heads`.
        num_attention_heads: usize,
    },
    /// A rotation needs pairs of dimensions inside the head.
    #[error("rotary dimension {rotary_dim} must be even and at most the head's {key_dim}")]
    RotaryDim {
        /// Dimensions to rotate.
        rotary_dim: usize,
        /// Dimensions of a key.
        key_dim: usize,
    },
    /// A list with one entry per layer has another length.
    #[error("'{field}' has {actual} entries for {num_hidden_layers} layers")]
    LayerCount {
        /// Its name.
        field: &'static str,
        /// Entries found.
        actual: usize,
        /// Layers of the model.
        num_hidden_layers: usize,
    },
    /// All layers together have too many experts.
    #[error(
        "'num_experts' = {num_experts} in 'num_hidden_layers' = {num_hidden_layers} layers are more \
         than {max} experts in all"
    )]
    TooManyExperts {
        /// Experts of a layer.
        num_experts: usize,
        /// Layers of the model.
        num_hidden_layers: usize,
        /// The limit.
        max: usize,
    },
    /// A token's experts cannot all come from the groups it may choose from.
    #[error(
        "{num_experts_per_tok} of {num_experts} experts cannot come from {topk_group} of {n_group} even groups"
    )]
    ExpertGroups {
        /// Experts of a layer.
        num_experts: usize,
        /// Experts of a token.
        num_experts_per_tok: usize,
        /// Groups of a layer.
        n_group: usize,
        /// Groups of a token.
        topk_group: usize,
    },
    /// A list with one entry per rotated pair of dimensions has another length.
    #[error("'{field}' has {actual} entries for {pairs} pairs of dimensions")]
    FactorCount {
        /// Its name.
        field: &'static str,
        /// Entries found.
        actual: usize,
        /// Pairs of dimensions that are rotated.
        pairs: usize,
    },
    /// An activation that Cairn does not have.
    #[error("activation '{name}' is not supported")]
    UnknownActivation {
        /// Its name in the file.
        name: String,
    },
    /// A family that Cairn does not compute.
    #[error("model_type {model_type} is not supported yet")]
    UnsupportedFamily {
        /// `model_type` of the file.
        model_type: String,
    },
    /// A setting that would change the numbers and that Cairn does not honor for this family.
    #[error("'{field}' = {value} is not supported for {family} models")]
    Unsupported {
        /// Its name in the file.
        field: String,
        /// Its value.
        value: String,
        /// The file's family.
        family: Family,
    },
    /// A `config.json` of the family has no way to say what the spec holds.
    #[error("this model cannot be written as a config.json of model_type {family}")]
    NotRepresentable {
        /// The spec's family.
        family: Family,
    },
    /// Two places of the file disagree.
    #[error("'{first}' says {first_value}, but '{second}' says {second_value}")]
    Contradiction {
        /// One name.
        first: String,
        /// Its value.
        first_value: String,
        /// The other name.
        second: String,
        /// Its value.
        second_value: String,
    },
}

impl Hint for SpecError {
    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::UnevenHeads { num_attention_heads, .. } => {
                format!("num_key_value_heads must divide {num_attention_heads}")
            }
            Self::HiddenNotDivisible { hidden_size, num_attention_heads } => format!(
                "choose a hidden_size such as {}, or set head_dim where the family allows it",
                hidden_size.next_multiple_of((*num_attention_heads).max(1))
            ),
            Self::UnknownActivation { .. } => {
                format!("known activations: {}", Activation::HF_NAMES.join(", "))
            }
            Self::UnsupportedFamily { .. } => {
                let families: Vec<_> = Family::ALL.iter().map(|f| f.model_type()).collect();
                format!("supported model types: {}", families.join(", "))
            }
            Self::Contradiction { first, second, .. } => {
                format!("remove '{first}' or '{second}', whichever is wrong")
            }
            Self::Twice { field, .. } => format!("remove the '{field}' that is wrong"),
            Self::RotaryDim { .. } => "choose an even head_dim".to_owned(),
            _ => return Vec::new(),
        };
        vec![hint]
    }
}

//! Why a GGUF file has no spec.

use super::ARCHITECTURES;
use cairn_artifacts::gguf::GgufError;
use cairn_spec::Hint;
use cairn_spec::model::SpecError;
use thiserror::Error;

/// Why the keys of a GGUF file do not describe a model that Cairn computes.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum GgufSpecError {
    /// A key that is needed is not there.
    #[error("the key {key} is missing")]
    Missing {
        /// The key.
        key: String,
    },
    /// An architecture that is not read.
    #[error("models of architecture '{architecture}' are not read from GGUF files")]
    Architecture {
        /// `general.architecture`.
        architecture: String,
    },
    /// A value of the wrong type.
    #[error("{key} is {found}, not {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What it is.
        found: String,
        /// What was needed.
        expected: &'static str,
    },
    /// A key or tensor that changes the numbers in a way that is not computed.
    #[error("{key} = {value} is not supported for {architecture} models")]
    Unsupported {
        /// The key or the tensor.
        key: String,
        /// Its value, shortened.
        value: String,
        /// `general.architecture`.
        architecture: String,
    },
    /// Two statements that cannot both hold.
    #[error("{first} is {first_value}, but {second} is {second_value}")]
    Contradiction {
        /// One.
        first: String,
        /// What it says.
        first_value: String,
        /// The other.
        second: String,
        /// What that says.
        second_value: String,
    },
    /// The keys are there but describe no working model.
    #[error("its keys describe no model that Cairn computes")]
    Spec(#[from] SpecError),
    /// A list or a tensor cannot be read.
    #[error(transparent)]
    File(#[from] GgufError),
}

impl Hint for GgufSpecError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Architecture { .. } => {
                vec![format!("architectures that are read: {}", ARCHITECTURES.join(", "))]
            }
            Self::Spec(error) => error.hints(),
            Self::File(error) => error.hints(),
            _ => Vec::new(),
        }
    }
}

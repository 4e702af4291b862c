//! What can be wrong with a checkpoint, and what to do about it.

use super::SCHEMA;
use crate::safetensors::{ReadError, WeightsError};
use crate::{FileError, Hash};
use cairn_spec::Hint;
use std::path::PathBuf;
use thiserror::Error;

/// A checkpoint that cannot be written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The optimizer's tensor file is not sound.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The model's tensor files are not sound.
    #[error(transparent)]
    Weights(#[from] Box<WeightsError>),
    /// The manifest is not one.
    #[error("{} is malformed: {reason}", path.display())]
    Malformed {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The manifest follows another schema.
    #[error("{} has schema '{schema}'; this version reads '{SCHEMA}'", path.display())]
    UnknownSchema {
        /// The manifest.
        path: PathBuf,
        /// The schema it names.
        schema: String,
    },
    /// A file has another size than when it was written.
    #[error("{} has {actual} bytes instead of {expected}", path.display())]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Its size by the manifest.
        expected: u64,
        /// Its size.
        actual: u64,
    },
    /// A file has other contents than when it was written.
    #[error("{} was altered: its hash is {actual} instead of {expected}", path.display())]
    Altered {
        /// The file.
        path: PathBuf,
        /// Its hash by the manifest.
        expected: Hash,
        /// Its hash.
        actual: Hash,
    },
    /// A further file has the name of another or is not simply a name.
    #[error("'{name}' cannot be the name of a file in {}", folder.display())]
    BadName {
        /// The checkpoint.
        folder: PathBuf,
        /// The name.
        name: String,
    },
}

impl Hint for CheckpointError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::File(error) => error.hints(),
            Self::Read(error) => error.hints(),
            Self::Weights(error) => error.hints(),
            Self::UnknownSchema { .. } => {
                vec!["use the version of cairn that wrote it".to_owned()]
            }
            Self::WrongSize { .. } | Self::Altered { .. } | Self::Malformed { .. } => {
                vec!["use another checkpoint of the run, or copy this one again".to_owned()]
            }
            Self::BadName { .. } => Vec::new(),
        }
    }
}

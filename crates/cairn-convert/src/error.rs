//! Why a conversion fails.

use std::path::PathBuf;

use cairn_artifacts::gguf::GgufReadError;
use cairn_artifacts::leanpack::PackError;
use cairn_artifacts::{CheckpointError, FileError};
use cairn_engine::EngineError;
use cairn_kernels::Encoding;
use cairn_model::gguf::{GgufExportError, GgufSpecError};
use cairn_model::{BuildError, LoadError};
use cairn_program::{RunError, SessionError};
use cairn_spec::Hint;

/// A model that cannot be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The pack cannot be written or read.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// A file cannot be written or read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The tensors are not the model's.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The model has no program.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The model has no plan.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The model's memory cannot be had.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The text does not suit the model.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The folder's manifest is not sound.
    #[error(transparent)]
    Manifest(#[from] CheckpointError),
    /// A file that belongs to the model is larger than any real one.
    #[error("{} has {bytes} bytes; at most {max} are packed", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// A tensor has elements that no weight is made of.
    #[error("tensor {name} has elements of {dtype}, of which no weight is made")]
    Elements {
        /// The tensor.
        name: String,
        /// Their type.
        dtype: &'static str,
    },
    /// No encoding holds the source's elements without loss.
    #[error("no encoding here holds {dtype} as it is")]
    NoAutomatic {
        /// Their type.
        dtype: &'static str,
    },
    /// The model is none of those that GGUF files describe.
    #[error(transparent)]
    GgufExport(#[from] GgufExportError),
    /// A GGUF file that was just written does not read back.
    #[error("what was written is no sound GGUF file")]
    GgufRead(#[from] GgufReadError),
    /// A GGUF file that was just written describes no model.
    #[error("what was written describes no model")]
    GgufSpec(#[from] GgufSpecError),
    /// The smallest encodings take more bytes than are allowed.
    #[error("{limit} bytes are too few: the smallest encodings take about {least}")]
    ByteLimit {
        /// The limit.
        limit: u64,
        /// Bytes of the smallest pack there is.
        least: u64,
    },
    /// An encoding was asked for the head of a model that has none.
    #[error("the model has no head that could have an encoding of its own")]
    NoHead,
    /// Whoever asked for the conversion ended it.
    #[error("stopped; nothing was written")]
    Stopped,
}

impl Hint for ConvertError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Pack(error) => error.hints(),
            Self::File(error) => error.hints(),
            Self::Engine(error) => error.hints(),
            Self::Manifest(error) => error.hints(),
            Self::NoAutomatic { .. } => {
                let names: Vec<_> = Encoding::ALL.into_iter().map(Encoding::name).collect();
                vec![format!("choose one with --encoding: {}", names.join(", "))]
            }
            Self::ByteLimit { least, .. } => {
                vec![format!("allow more: --bytes {}MB", least.div_ceil(1_000_000))]
            }
            Self::Load(_)
            | Self::Build(_)
            | Self::Session(_)
            | Self::Run(_)
            | Self::GgufExport(_)
            | Self::GgufRead(_)
            | Self::GgufSpec(_)
            | Self::FileTooLarge { .. }
            | Self::Elements { .. }
            | Self::NoHead
            | Self::Stopped => Vec::new(),
        }
    }
}

//! Why a training run ends early.

use std::fmt;
use std::path::PathBuf;

use cairn_artifacts::FileError;
use cairn_artifacts::run::{MetricsError, RecordError};
use cairn_artifacts::safetensors::WeightsError;
use cairn_data::corpus::ReadError;
use cairn_data::loader::LoaderError;
use cairn_eval::EvalError;
use cairn_model::{AdapterError, LoadError};
use cairn_program::{RunError, SessionError};
use cairn_spec::{Hint, SpecError};

use crate::checkpoint::StateError;
use crate::resume::ResumeError;
use crate::validation::ValidationError;

/// A run that cannot start, go on or be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The training data cannot be read.
    #[error(transparent)]
    Data(#[from] LoaderError),
    /// The corpus or its tokenizer cannot be read.
    #[error(transparent)]
    Corpus(#[from] ReadError),
    /// A file of the run folder cannot be written or read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The metrics cannot be written or read.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The record cannot be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Another process trains in this folder.
    #[error("another process is training in {}", folder.display())]
    Busy {
        /// The run's folder.
        folder: PathBuf,
    },
    /// The checkpoint belongs to another run.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// A checkpoint cannot be read.
    #[error(transparent)]
    Load(Box<StateError>),
    /// A checkpoint cannot be written. The one before it is untouched.
    #[error("the checkpoint of step {step} could not be saved")]
    Save {
        /// Finished steps.
        step: u64,
        /// What went wrong.
        source: Box<StateError>,
    },
    /// The memory of the plan cannot be had.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The weights to start from cannot be read.
    #[error("the weights to start from in {} cannot be read", folder.display())]
    InitialWeights {
        /// The model folder.
        folder: PathBuf,
        /// What went wrong.
        source: Box<WeightsError>,
    },
    /// The weights to start from are not those of the recipe's model.
    #[error("the weights to start from in {} do not fit the recipe's model", folder.display())]
    InitialModel {
        /// The model folder.
        folder: PathBuf,
        /// What does not fit.
        source: LoadError,
    },
    /// The adapter to go on from cannot be read, or is not of the recipe's form.
    #[error("the adapter to go on from in {} cannot be used", folder.display())]
    InitialAdapter {
        /// Its folder.
        folder: PathBuf,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The adapter does not fit the model.
    #[error("the adapter does not fit the model")]
    Adapter(#[from] AdapterError),
    /// An adapter is trained, and there is no model to train it for.
    #[error("an adapter is trained beside the weights of a model, and none is named")]
    NoBase,
    /// The weights to start from are described as a model that is not known.
    #[error("the model in {} cannot be started from", folder.display())]
    InitialConfig {
        /// The model folder.
        folder: PathBuf,
        /// What its description says.
        source: Box<SpecError>,
    },
    /// The weights to start from are those of a model that computes otherwise.
    #[error(
        "the model in {} is not the recipe's: {}",
        folder.display(),
        differences.join("; ")
    )]
    InitialSpec {
        /// The model folder.
        folder: PathBuf,
        /// Every difference, with both values.
        differences: Vec<String>,
    },
    /// The tokenizer has more tokens than the model.
    #[error("the model has {vocab_size} tokens, its corpus' tokenizer {tokenizer_vocab_size}")]
    Vocab {
        /// `vocab_size` of the model.
        vocab_size: usize,
        /// Tokens of the tokenizer.
        tokenizer_vocab_size: usize,
    },
    /// Tokens are to be masked, and the tokenizer has no token for it.
    #[error("the tokenizer has no mask token: none of {} is a token", spellings.join(", "))]
    NoMaskToken {
        /// The spellings looked for.
        spellings: Vec<String>,
    },
    /// A batch does not fit the model.
    #[error("the batch of step {step} does not fit the model")]
    Step {
        /// The step, from 0.
        step: u64,
        /// What does not fit.
        source: RunError,
    },
    /// Validation failed.
    #[error("validation failed")]
    Validation(#[from] ValidationError),
    /// The validation loss is no number, while the training loss is one.
    #[error("the validation loss after step {step} is no number")]
    ValidationNotFinite {
        /// Finished steps.
        step: u64,
        /// Which log-probability.
        source: Box<EvalError>,
    },
    /// A loss or gradient is no number. Nothing is saved; the batch is kept.
    #[error("the {what} of step {step} is {value}; its batch {batch}")]
    NotFinite {
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// The step, from 0.
        step: u64,
        /// What it is instead.
        value: f64,
        /// What became of its batch.
        batch: FailedBatch,
    },
}

/// What became of the batch of a step that failed.
#[derive(Debug)]
pub enum FailedBatch {
    /// It is in this file.
    Kept(PathBuf),
    /// It could not be written. What the step failed of matters more, so it is said beside it.
    Lost(FileError),
}

impl fmt::Display for FailedBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept(path) => write!(f, "is kept in {}", path.display()),
            Self::Lost(error) => write!(f, "is not kept: {error}: {}", error.source),
        }
    }
}

const LOWER_RATE: &str = "resuming would repeat it: start a new run with a lower \
                          optimizer.learning_rate, a longer schedule.warmup_steps or a smaller \
                          optimizer.max_grad_norm";

impl Hint for TrainError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Data(error) => error.hints(),
            Self::Corpus(error) => error.hints(),
            Self::File(error)
            | Self::Metrics(MetricsError::File(error))
            | Self::Record(RecordError::File(error)) => error.hints(),
            Self::Load(error) | Self::Save { source: error, .. } => error.hints(),
            Self::Resume(error) => error.hints(),
            Self::Adapter(error) => error.hints(),
            Self::NoBase => vec!["name its folder: model.initial=DIR".to_owned()],
            Self::InitialConfig { source, .. } => source.hints(),
            Self::InitialSpec { .. } => vec![
                "leave the keys of the recipe's [model] section out: the folder's config.json \
                 describes the model"
                    .to_owned(),
            ],
            Self::Vocab { tokenizer_vocab_size, .. } => {
                vec![format!("leave model.vocab_size out, or set it to {tokenizer_vocab_size}")]
            }
            Self::NoMaskToken { .. } => vec![
                "build the corpus with the model's own tokenizer (--tokenizer), or name a token: \
                 objective.mask_token=TOKEN"
                    .to_owned(),
            ],
            Self::Busy { .. } => vec!["wait for it, or give this run another folder".to_owned()],
            Self::NotFinite { batch: FailedBatch::Lost(error), .. } => {
                let mut hints = vec![LOWER_RATE.to_owned()];
                hints.extend(error.hints());
                hints
            }
            Self::NotFinite { .. } | Self::ValidationNotFinite { .. } => {
                vec![LOWER_RATE.to_owned()]
            }
            _ => Vec::new(),
        }
    }
}

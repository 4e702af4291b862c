//! What can be wrong with an engine, and with what is asked of it.

use cairn_model::{BuildError, LoadError};
use cairn_program::{RunError, SessionError};
use cairn_spec::Hint;

use crate::beam::BeamError;
use crate::block_pool::OutOfBlocks;
use crate::sampler::SampleError;
use crate::sampling::{SamplingError, TOP_LOGPROBS_MAX};

/// Why an engine cannot be made or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A limit is outside what the model or this engine allows.
    #[error("{name} is {value}, which is not between {min} and {max}")]
    Limit {
        /// The option.
        name: &'static str,
        /// What it was set to.
        value: usize,
        /// Smallest value.
        min: usize,
        /// Largest value.
        max: usize,
    },
    /// The model has no program.
    #[error("the model cannot be lowered to a program")]
    Build(#[from] BuildError),
    /// The program has no memory.
    #[error("the model's memory cannot be planned or reserved")]
    Session(#[from] SessionError),
    /// Its tokens see what comes after them, so there is no next token.
    #[error("the model is an encoder: it does not generate")]
    NotCausal,
    /// A draft model guesses tokens of another vocabulary.
    #[error("the draft model has {draft} tokens, the model {vocab_size}")]
    DraftVocabulary {
        /// Size of the draft model's vocabulary.
        draft: usize,
        /// Size of the model's.
        vocab_size: usize,
    },
    /// A draft model comes to an engine that was not planned for one.
    #[error("the engine was not planned for a draft model")]
    NoDraftPlanned,
    /// The weights do not load.
    #[error("the weights do not load")]
    Load(#[from] LoadError),
    /// The executor refused a step: the weights' file was changed meanwhile, or else a bug in the engine,
    /// since requests are checked first.
    #[error("a step was refused")]
    Run(#[from] RunError),
}

impl Hint for EngineError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Limit { name, value, min, .. } if value < min => {
                vec![format!("{name} must be at least {min}")]
            }
            Self::Limit { name, max, .. } => vec![format!("{name} can be at most {max}")],
            Self::Session(_) => {
                vec!["a smaller context or fewer sequences need less memory".to_owned()]
            }
            Self::NotCausal => vec!["its logits are in reach of cairn logits".to_owned()],
            Self::Build(BuildError::Compute { compute, .. }) => {
                vec![format!("hold the weights as {}, or compute in f32", compute.weights())]
            }
            Self::DraftVocabulary { .. } => {
                vec!["a draft model shares the tokenizer of the model it guesses for".to_owned()]
            }
            Self::Load(error) => error.hints(),
            Self::Run(RunError::Withdrawn { .. }) => {
                vec![
                    "load the model again; a pack that is in use is replaced by renaming"
                        .to_owned(),
                ]
            }
            Self::NoDraftPlanned | Self::Build(_) | Self::Run(_) => Vec::new(),
        }
    }
}

/// Why a request is refused. The engine goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// There is nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// Nothing is asked for: neither a token nor anything about the prompt.
    #[error("max_new_tokens is 0 and no prompt_logprobs are asked for")]
    NothingAsked,
    /// A token id is outside the vocabulary.
    #[error("{field}: token {token} at position {position} is not below {vocab_size}")]
    TokenRange {
        /// Where it stands: `prompt`, `stop_tokens` or `logit_bias`.
        field: &'static str,
        /// Its index there.
        position: usize,
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// Prompt and output do not fit the context.
    #[error(
        "{prompt} prompt tokens and {max_new_tokens} new ones exceed the context of {max_context}"
    )]
    Context {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_new_tokens: usize,
        /// The engine's limit.
        max_context: usize,
    },
    /// More alternatives are asked for than are reported.
    #[error("logprobs is {asked}, at most {TOP_LOGPROBS_MAX} are reported")]
    TooManyLogprobs {
        /// How many.
        asked: usize,
    },
    /// The cache would not hold it even if it were alone.
    #[error("{needed} KV-cache blocks are needed and there are {num_blocks}")]
    Blocks {
        /// Blocks for prompt and output.
        needed: usize,
        /// Blocks there are.
        num_blocks: usize,
    },
    /// More requests wait than the engine allows.
    #[error("{limit} requests are waiting already")]
    QueueFull {
        /// The engine's limit.
        limit: usize,
    },
}

impl Hint for RequestError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::EmptyPrompt => {
                vec!["give at least one token, such as the end of text".to_owned()]
            }
            Self::NothingAsked => vec!["ask for at least one token".to_owned()],
            Self::TokenRange { .. } => {
                vec!["is this the tokenizer the model was trained with?".to_owned()]
            }
            Self::Context { prompt, max_context, .. } => {
                match max_context.checked_sub(*prompt).filter(|room| 0 < *room) {
                    Some(room) => vec![format!("set max_new_tokens to at most {room}")],
                    None => vec![format!("shorten the prompt below {max_context} tokens")],
                }
            }
            Self::TooManyLogprobs { .. } => Vec::new(),
            Self::Blocks { .. } => vec!["shorten the prompt, or ask for fewer tokens".to_owned()],
            Self::QueueFull { .. } => vec!["try again later".to_owned()],
        }
    }
}

/// Why one generation ended without a result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The request is refused.
    #[error("the request is refused")]
    Request(#[from] RequestError),
    /// The sampling settings are refused.
    #[error("the sampling settings are refused")]
    Sampling(#[from] SamplingError),
    /// The beam settings are refused.
    #[error("the beam search is refused")]
    Beam(#[from] BeamError),
    /// No token could be chosen.
    #[error("no token could be chosen")]
    Sample(#[from] SampleError),
    /// The engine is serving other requests.
    #[error("{running} requests are running or waiting")]
    Busy {
        /// How many.
        running: usize,
    },
    /// The cache is too small.
    #[error("the KV cache is too small")]
    Blocks(#[from] OutOfBlocks),
    /// The engine cannot go on.
    #[error("the engine cannot go on")]
    Engine(#[from] EngineError),
}

impl Hint for GenerateError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Request(error) => error.hints(),
            Self::Sampling(error) => error.hints(),
            Self::Beam(error) => error.hints(),
            Self::Engine(error) => error.hints(),
            Self::Blocks(_) => vec!["plan more KV-cache blocks, or use fewer beams".to_owned()],
            Self::Sample(_) | Self::Busy { .. } => Vec::new(),
        }
    }
}

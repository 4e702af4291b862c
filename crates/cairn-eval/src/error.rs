//! What can keep a measurement from being made.

use cairn_data::corpus::ReadError;
use cairn_data::tokenizer::TokenizerError;
use cairn_engine::{EngineError, GenerateError, RequestError};
use cairn_model::{BuildError, LoadError};
use cairn_program::{RunError, SessionError};
use cairn_spec::Hint;

use crate::compress::Compressor;

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A setting is out of range.
    #[error("{name} is {value}, which is not between {min} and {max}")]
    Limit {
        /// The setting.
        name: &'static str,
        /// What it was set to.
        value: usize,
        /// Smallest value.
        min: usize,
        /// Largest value.
        max: usize,
    },
    /// Its tokens see what comes after them, so their probability says nothing.
    #[error("the model is an encoder: it does not predict the next token")]
    NotCausal,
    /// There is nothing to measure on.
    #[error("there are no documents to measure on")]
    NoDocuments,
    /// The model computed something that is not a number.
    #[error("the model's log-probability of token {position} of document {document} is {logprob}")]
    NotANumber {
        /// The document, counted as they came.
        document: u64,
        /// The token in it.
        position: usize,
        /// What was computed.
        logprob: String,
    },
    /// The tokens of a document do not give its text back, so bytes would be compared with others.
    #[error("the tokens of {path} decode to {found} bytes, the document has {expected}")]
    Text {
        /// The document.
        path: String,
        /// Bytes of the document.
        expected: u64,
        /// Bytes decoded.
        found: u64,
    },
    /// A compressor failed.
    #[error("{compressor} failed")]
    Compressor {
        /// Which.
        compressor: Compressor,
        /// Why.
        source: std::io::Error,
    },
    /// The caller asked to stop.
    #[error("stopped before the measurement was complete")]
    Stopped,
    /// The model has no program.
    #[error("the model cannot be lowered to a program")]
    Build(#[from] BuildError),
    /// The program has no memory.
    #[error("the model's memory cannot be planned or reserved")]
    Session(#[from] SessionError),
    /// The weights do not load.
    #[error("the weights do not load")]
    Load(#[from] LoadError),
    /// The model does not fit the data: a token outside its vocabulary.
    #[error("the model cannot read the data")]
    Run(#[from] RunError),
    /// The corpus cannot be read.
    #[error("the corpus cannot be read")]
    Corpus(#[from] ReadError),
    /// The tokenizer refuses the tokens.
    #[error("the tokens do not decode")]
    Tokenizer(#[from] TokenizerError),
    /// The engine cannot be made or go on.
    #[error("the engine cannot be made or go on")]
    Engine(#[from] EngineError),
    /// The engine refuses what the measurement asks.
    #[error("the engine refuses the request")]
    Request(#[from] RequestError),
    /// A generation failed.
    #[error("the generation failed")]
    Generate(#[source] GenerateError),
}

impl From<GenerateError> for EvalError {
    fn from(error: GenerateError) -> Self {
        match error {
            GenerateError::Request(error) => Self::Request(error),
            GenerateError::Engine(error) => Self::Engine(error),
            error => Self::Generate(error),
        }
    }
}

impl Hint for EvalError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Corpus(error) => error.hints(),
            Self::Tokenizer(error) => error.hints(),
            Self::Engine(error) => error.hints(),
            Self::Load(error) => error.hints(),
            Self::Request(error) => error.hints(),
            Self::Generate(error) => error.hints(),
            Self::Run(_) => vec!["was the corpus made with this model's tokenizer?".to_owned()],
            Self::Text { .. } => {
                vec!["bits per byte need a tokenizer that loses nothing, such as byte level".into()]
            }
            Self::Limit { .. }
            | Self::NoDocuments
            | Self::NotCausal
            | Self::NotANumber { .. }
            | Self::Compressor { .. }
            | Self::Stopped
            | Self::Build(_)
            | Self::Session(_) => Vec::new(),
        }
    }
}

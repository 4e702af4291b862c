//! What can be wrong with a tokenizer, and what to do about it.

use std::path::PathBuf;

use cairn_artifacts::FileError;
use cairn_artifacts::leanpack::PackError;
use cairn_spec::Hint;

/// A tokenizer that cannot be read, made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is inside a pack that is not sound.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// Its kind has no form in a GGUF file.
    #[error("the tokenizer cannot be written into a GGUF file: {reason}")]
    GgufExport {
        /// Why.
        reason: String,
    },
    /// The file is larger than any tokenizer.
    #[error("{path} has {bytes} bytes, more than the limit of {limit}", path = path.display())]
    FileTooLarge {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// `TOKENIZER_BYTES_MAX`.
        limit: u64,
    },
    /// The file is not a tokenizer.
    #[error("{path} is not a tokenizer.json: {reason}", path = path.display())]
    Parse {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// What the parser says.
        reason: String,
    },
    /// The tokenizer of a GGUF file is of a kind that is not read, or contradicts itself.
    #[error("the tokenizer in {path} is not read: {reason}", path = path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, by key.
        reason: String,
    },
    /// The vocabulary is empty or larger than the limit.
    #[error("tokenizer {path} has {vocab_size} token ids, expected 1 to {limit}", path = path.display())]
    Vocab {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// One more than its largest id.
        vocab_size: u64,
        /// `VOCAB_SIZE_MAX`.
        limit: u32,
    },
    /// A token without text, which would match everywhere.
    #[error("tokenizer {path}: token {id} is empty", path = path.display())]
    EmptyToken {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// Its id.
        id: u32,
    },
    /// There is too much of something: it may make far more of a text than the text is, or has more
    /// steps or longer tokens than any known one.
    #[error(
        "tokenizer {path}: {what}: {actual}, more than the limit of {limit}",
        path = path.display(), actual = shown(*actual)
    )]
    OverLimit {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// What there is too much of.
        what: &'static str,
        /// How much there is, or may be.
        actual: f64,
        /// The limit.
        limit: f64,
    },
    /// Two tokens share an id.
    #[error("tokenizer {path}: token id {id} is both {first:?} and {second:?}", path = path.display())]
    DuplicateId {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// The id.
        id: u32,
        /// One token.
        first: String,
        /// The other.
        second: String,
    },
    /// An added token's id cannot be what the file says.
    #[error(
        "tokenizer {path}: added token {token:?} is stated to be {stated} but comes out as {actual}",
        path = path.display()
    )]
    AddedTokenId {
        /// The file that states it.
        path: PathBuf,
        /// The token.
        token: String,
        /// Its id by the file.
        stated: u32,
        /// Its id by the vocabulary, or the next free one.
        actual: u32,
    },
    /// The tokenizer has ids that the model has no rows for.
    #[error("the tokenizer has {tokenizer} token ids, the model's vocab_size is {model}")]
    ModelVocab {
        /// One more than the tokenizer's largest id.
        tokenizer: u32,
        /// Rows of the model's embedding.
        model: usize,
    },
    /// A file beside the tokenizer says something that cannot be used.
    #[error("{path} cannot be used: {reason}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A vocabulary too small for the alphabet and the special token.
    #[error("a byte-level vocabulary needs at least {min} tokens, {vocab_size} asked for")]
    VocabTooSmall {
        /// What was asked for.
        vocab_size: u32,
        /// 256 bytes and the end of document.
        min: u32,
    },
    /// There was no text to train on.
    #[error("no text to train a tokenizer on")]
    NoText,
    /// The trainer failed.
    #[error("cannot train a tokenizer: {reason}")]
    Train {
        /// What the trainer says.
        reason: String,
    },
    /// The text cannot be encoded.
    #[error("cannot encode the text: {reason}")]
    Encode {
        /// What the model says.
        reason: String,
    },
    /// The tokens cannot be decoded.
    #[error("cannot decode the tokens: {reason}")]
    Decode {
        /// What the decoder says.
        reason: String,
    },
    /// An id that no token has.
    #[error("token id {id} is not in the vocabulary of {vocab_size}")]
    UnknownId {
        /// The id.
        id: u32,
        /// One more than the largest id.
        vocab_size: u32,
    },
}

/// A whole number, or its order of magnitude where nobody would count its digits.
fn shown(growth: f64) -> String {
    if growth < 1e12 { format!("{growth:.0}") } else { format!("{growth:.0e}") }
}

impl Hint for TokenizerError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::File(error) => error.hints(),
            Self::Pack(error) => error.hints(),
            Self::Parse { .. } => {
                vec!["`cairn tokenizer train` makes a tokenizer.json".to_owned()]
            }
            Self::VocabTooSmall { min, .. } => {
                vec![format!("set the vocabulary size to {min} or more")]
            }
            Self::NoText => vec!["the input has no readable text; name another one".to_owned()],
            Self::UnknownId { .. } => {
                vec![
                    "the ids come from another tokenizer; use the one they were made with"
                        .to_owned(),
                ]
            }
            Self::EmptyToken { .. } | Self::DuplicateId { .. } => {
                vec!["the file is damaged; fetch it again from where it was made".to_owned()]
            }
            Self::AddedTokenId { .. } => vec![
                "added tokens continue the vocabulary without a gap, in the order of their ids"
                    .to_owned(),
            ],
            Self::ModelVocab { .. } => {
                vec!["use the tokenizer.json that belongs to this config.json".to_owned()]
            }
            Self::Config { .. }
            | Self::FileTooLarge { .. }
            | Self::Gguf { .. }
            | Self::GgufExport { .. }
            | Self::Vocab { .. }
            | Self::OverLimit { .. }
            | Self::Train { .. }
            | Self::Encode { .. }
            | Self::Decode { .. } => Vec::new(),
        }
    }
}

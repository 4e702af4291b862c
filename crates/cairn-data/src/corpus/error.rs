//! What can go wrong while a corpus is made, and what to do about it.

use std::io;
use std::path::PathBuf;

use cairn_artifacts::FileError;
use cairn_spec::Hint;

/// A corpus that cannot be made. A single bad file is not among these: it is skipped and reported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CorpusError {
    /// Cargo's registry folder is not there or cannot be listed.
    #[error("no package sources in {path}", path = path.display())]
    NoRegistry {
        /// The folder that was looked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No document is left.
    #[error("the inputs have no document to take ({})", or_nothing(.skipped))]
    NoDocuments {
        /// What was skipped, by reason.
        skipped: String,
    },
    /// A named limit of the corpus format is passed.
    #[error("more than {limit} {what}")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many there may be.
        limit: u64,
    },
    /// One group cannot be on both sides of a split.
    #[error("all documents are in one group, {group:?}, which cannot be split")]
    OneGroup {
        /// The group.
        group: String,
    },
    /// A setting out of range.
    #[error("{name} is {value}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A name in the license filter that SPDX does not have.
    #[error("{name:?} is not an SPDX license: {reason}")]
    LicenseName {
        /// The name.
        name: String,
        /// What the parser says.
        reason: String,
    },
    /// The tokenizer has no token to end a document with.
    #[error("the tokenizer has no end-of-document token")]
    NoEndOfDocument,
    /// There is something at the place of the new corpus.
    #[error("{path} exists", path = path.display())]
    Exists {
        /// The folder of the new corpus.
        path: PathBuf,
    },
    /// Reading or writing the corpus folder failed; no half corpus is left.
    #[error(transparent)]
    File(#[from] FileError),
    /// The caller ended it; no half corpus is left.
    #[error("interrupted")]
    Interrupted,
}

impl Hint for CorpusError {
    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::NoRegistry { .. } => {
                "name a folder, a text file or a .jsonl file with --input".to_owned()
            }
            Self::NoDocuments { .. } => {
                "check --input, the file kinds, the limits and the license filter".to_owned()
            }
            Self::OneGroup { .. } => "add inputs, hold out single documents, or set the \
                                      validation fraction to 0"
                .to_owned(),
            Self::LicenseName { .. } => {
                "use SPDX identifiers such as MIT or Apache-2.0, or `unknown`".to_owned()
            }
            Self::NoEndOfDocument => {
                "train one with `cairn tokenizer train`, which has one".to_owned()
            }
            Self::Exists { .. } => {
                "name another folder, or let a corpus there be replaced (--replace); a folder that \
                 holds something else is never replaced"
                    .to_owned()
            }
            Self::File(error) => return error.hints(),
            Self::TooMany { .. } | Self::Setting { .. } | Self::Interrupted => return Vec::new(),
        };
        vec![hint]
    }
}

/// What was left out, in words that say so if there was nothing to leave out.
fn or_nothing(skipped: &str) -> &str {
    if skipped.is_empty() { "they are empty" } else { skipped }
}

//! What can be wrong with a chat template or a conversation.

use std::path::PathBuf;

use cairn_spec::Hint;

/// A template that cannot be read or does not give a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The template is longer than any template.
    #[error("chat template {path} has {bytes} bytes, more than the limit of {limit}", path = path.display())]
    TooLong {
        /// The file it came from.
        path: PathBuf,
        /// Its length.
        bytes: usize,
        /// `TEMPLATE_BYTES_MAX`.
        limit: usize,
    },
    /// The template has a mistake, or asks for what there is not.
    #[error("chat template {path}{at}: {reason}", path = path.display(), at = Line(*line))]
    Template {
        /// The file it came from.
        path: PathBuf,
        /// The line, from 1.
        line: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// The template refuses the conversation, by `raise_exception`.
    #[error("the chat template refuses the conversation: {message}")]
    Raised {
        /// The file it came from.
        path: PathBuf,
        /// The line, from 1.
        line: Option<usize>,
        /// What it says.
        message: String,
    },
    /// The template takes more steps, work or memory than any conversation needs.
    #[error("chat template {path}{at} takes too much: {reason}", path = path.display(), at = Line(*line))]
    TooMuch {
        /// The file it came from.
        path: PathBuf,
        /// The line, from 1.
        line: Option<usize>,
        /// Which bound it reached.
        reason: String,
    },
}

/// `, line 3`, where it is known.
struct Line(Option<usize>);

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(line) => write!(f, ", line {line}"),
            None => Ok(()),
        }
    }
}

impl Hint for ChatError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::TooLong { .. } | Self::Template { .. } | Self::TooMuch { .. } => {
                vec!["another template can be given with --template FILE".to_owned()]
            }
            Self::Raised { path, line, .. } => {
                vec![format!("the template is {}{}", path.display(), Line(*line))]
            }
        }
    }
}

//! What can be wrong with a pack.

use super::{
    ENCODINGS, FILE_BYTES_MAX, HEADER_BYTES_MAX, LAYOUTS, POLICIES, PROFILES, SCHEMA, VERSION,
};
use crate::FileError;
use crate::hash::Hash;
use cairn_spec::Hint;
use std::path::PathBuf;
use thiserror::Error;

/// A pack that cannot be read or written, and why.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PackError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is no sound pack.
    #[error("{} cannot be used", path.display())]
    Unsound {
        /// The pack.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        kind: PackErrorKind,
    },
}

impl PackError {
    /// Makes a closure for `map_err`.
    pub(super) fn on(path: &std::path::Path) -> impl Fn(PackErrorKind) -> Self + '_ {
        |kind| Self::Unsound { path: path.to_owned(), kind }
    }
}

/// What is wrong with a pack.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PackErrorKind {
    /// It does not begin as packs do.
    #[error("it is no leanpack: it does not begin with 'LEANPACK'")]
    NotAPack,
    /// It is of a version that this reader does not know.
    #[error("it is of version {found}; this reader knows version {VERSION}")]
    UnknownVersion {
        /// Its version.
        found: u32,
    },
    /// A part of it has other bytes than when it was written.
    #[error("{part} was altered: its hash is {actual} instead of {expected}")]
    Altered {
        /// The preamble, the header, or a chunk of a tensor or file.
        part: String,
        /// The hash it should have.
        expected: Hash,
        /// Its hash.
        actual: Hash,
    },
    /// Bytes that belong to nothing are not zero.
    #[error("the padding after {part} was altered: byte {at} of the file is {found}, not 0")]
    Padding {
        /// What lies before it.
        part: String,
        /// Where in the file.
        at: u64,
        /// The byte.
        found: u8,
    },
    /// It is shorter or longer than it says.
    #[error("it has {actual} bytes and should have {expected}")]
    Length {
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        actual: u64,
    },
    /// It ended while a part of it was read.
    #[error("it ends before {part} does")]
    CutShort {
        /// What was being read.
        part: String,
    },
    /// The preamble contradicts itself.
    #[error("the preamble is malformed: {reason}")]
    Preamble {
        /// What is wrong.
        reason: String,
    },
    /// The header is longer than any real one.
    #[error("the header is {bytes} bytes long; at most {HEADER_BYTES_MAX} are accepted")]
    HeaderTooLong {
        /// The length that the preamble states.
        bytes: u64,
    },
    /// The header is not JSON of the right form.
    #[error("the header is malformed: {reason}")]
    Header {
        /// What is wrong.
        reason: String,
    },
    /// The header names another schema.
    #[error("its header has schema '{found}'; this reader knows '{SCHEMA}'")]
    UnknownSchema {
        /// The schema.
        found: String,
    },
    /// A tensor is encoded in a way that this reader does not know.
    #[error("tensor {tensor} has unknown encoding '{found}'")]
    UnknownEncoding {
        /// The tensor.
        tensor: String,
        /// Its encoding.
        found: String,
    },
    /// A tensor is laid out in a way that this reader does not know.
    #[error("tensor {tensor} has unknown layout '{found}'")]
    UnknownLayout {
        /// The tensor.
        tensor: String,
        /// Its layout.
        found: String,
    },
    /// The pack is made for a kind of machine that this reader does not know.
    #[error("it is made for the unknown machine profile '{found}'")]
    UnknownProfile {
        /// The kind of profile.
        found: String,
    },
    /// The layout depends on something that is otherwise here.
    #[error("it is laid out for {what} {found}; this reader has {expected}")]
    ForeignLayout {
        /// What the layout depends on.
        what: &'static str,
        /// By the pack.
        found: String,
        /// Here.
        expected: String,
    },
    /// The pack wants sums in an order that this reader does not know.
    #[error("it asks for the unknown numeric policy '{found}'")]
    UnknownPolicy {
        /// The policy.
        found: String,
    },
    /// A tensor or file cannot be where or what the header says.
    #[error("{part}: {reason}")]
    Entry {
        /// The tensor or file.
        part: String,
        /// What is wrong.
        reason: String,
    },
    /// A tensor that is asked for is not there.
    #[error("there is no tensor {name}")]
    NoTensor {
        /// Its name.
        name: String,
    },
    /// A file that is asked for is not there.
    #[error("there is no file {name} in it")]
    NoFile {
        /// Its name.
        name: String,
    },
    /// There is more in it than any real model has.
    #[error("{found} {what}; at most {max} are accepted")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        found: usize,
        /// The limit.
        max: usize,
    },
}

impl Hint for PackError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::File(error) => error.hints(),
            Self::Unsound { kind, .. } => kind.hints(),
        }
    }
}

impl Hint for PackErrorKind {
    fn hints(&self) -> Vec<String> {
        let known = |what: &str, names: &[&str]| format!("known {what}: {}", names.join(", "));
        let hint = match self {
            Self::UnknownEncoding { .. } => known("encodings", &ENCODINGS),
            Self::UnknownLayout { .. } => known("layouts", &LAYOUTS),
            Self::UnknownProfile { .. } => known("profiles", &PROFILES),
            Self::UnknownPolicy { .. } => known("policies", &POLICIES),
            Self::UnknownVersion { .. } | Self::UnknownSchema { .. } => {
                "use a Cairn of the time it was packed, or pack the model again".to_owned()
            }
            Self::Altered { .. }
            | Self::Padding { .. }
            | Self::Length { .. }
            | Self::CutShort { .. } => "copy it again, or pack the model again".to_owned(),
            Self::NotAPack => "make one: cairn pack MODEL -o FILE.leanpack".to_owned(),
            Self::TooMany { what: "bytes in a file", .. } => {
                format!("tokenizers and texts have at most {} MiB", FILE_BYTES_MAX >> 20)
            }
            Self::Preamble { .. }
            | Self::HeaderTooLong { .. }
            | Self::Header { .. }
            | Self::ForeignLayout { .. }
            | Self::Entry { .. }
            | Self::NoTensor { .. }
            | Self::NoFile { .. }
            | Self::TooMany { .. } => return Vec::new(),
        };
        vec![hint]
    }
}

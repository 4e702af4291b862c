//! What can be wrong with tensor files.

use crate::FileError;
use cairn_spec::{DType, Hint};
use std::fmt;
use std::path::PathBuf;
use thiserror::Error;

/// A safetensors header that is not sound.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file is too short to hold a header length.
    #[error("the file has {file_bytes} bytes, too few for a header")]
    NoHeader {
        /// Size of the file.
        file_bytes: usize,
    },
    /// The header ends after the file does.
    #[error("the header should be {header_bytes} bytes long, but the file ends after {available}")]
    HeaderPastEnd {
        /// The length the file claims.
        header_bytes: u64,
        /// Bytes after the length.
        available: usize,
    },
    /// The header is longer than any real one.
    #[error("the header is {header_bytes} bytes long; at most {max} are accepted")]
    HeaderTooLong {
        /// The length the file claims.
        header_bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The header is not JSON of the right form.
    #[error("the header is malformed: {reason}")]
    Malformed {
        /// The parser's words.
        reason: String,
    },
    /// Two entries have one name.
    #[error("tensor '{name}' occurs twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// There are more tensors than any real model has.
    #[error("more than {max} tensors")]
    TooManyTensors {
        /// The limit.
        max: usize,
    },
    /// An element type that Cairn does not know.
    #[error("tensor '{name}' has unknown dtype '{dtype}'")]
    UnknownDType {
        /// The tensor.
        name: String,
        /// The type's name in the file.
        dtype: String,
    },
    /// A shape with too many dimensions, or more elements than an address can count.
    #[error("tensor '{name}' has impossible shape {shape:?}")]
    ImpossibleShape {
        /// The tensor.
        name: String,
        /// Its dimensions, or the first of them if there are too many.
        shape: Vec<usize>,
    },
    /// The byte range does not fit type and shape.
    #[error("tensor '{name}' ({dtype}, shape {shape:?}) needs {expected} bytes, but has {actual}")]
    SizeMismatch {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: DType,
        /// Its dimensions.
        shape: Vec<usize>,
        /// Bytes by type and shape.
        expected: usize,
        /// Bytes by the offsets; negative if they are swapped.
        actual: i128,
    },
    /// The byte range overlaps its predecessor or leaves a hole.
    #[error("tensor '{name}' begins at byte {begin}, but the previous one ends at {previous_end}")]
    NotContiguous {
        /// The tensor.
        name: String,
        /// Where it begins, counted from the end of the header.
        begin: usize,
        /// Where it should begin.
        previous_end: usize,
    },
    /// The bytes and the header do not end together.
    #[error("the tensors need {expected} bytes, but the file holds {actual}")]
    DataLength {
        /// Bytes by the header.
        expected: usize,
        /// Bytes after the header.
        actual: usize,
    },
}

/// A tensor file that cannot be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The header is not sound.
    #[error("{} is not a sound safetensors file", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<HeaderError>,
    },
}

impl Hint for ReadError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::File(error) => error.hints(),
            Self::Header { source, .. } => match **source {
                HeaderError::DataLength { expected, actual } if actual > expected => {
                    let rest = actual - expected;
                    vec![format!("{rest} bytes follow the last tensor; copy or download it again")]
                }
                HeaderError::HeaderPastEnd { .. }
                | HeaderError::DataLength { .. }
                | HeaderError::NoHeader { .. } => {
                    vec!["the file was probably cut short; copy or download it again".to_owned()]
                }
                _ => Vec::new(),
            },
        }
    }
}

/// A folder of weights that cannot be read, or that holds other tensors than the model needs.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// One of the files is not sound.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is neither a single file nor an index.
    #[error("{} holds neither {single} nor {index}", folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// Name of the single file.
        single: &'static str,
        /// Name of the index.
        index: &'static str,
    },
    /// The index is not JSON of the right form.
    #[error("{} is malformed: {reason}", path.display())]
    MalformedIndex {
        /// The index.
        path: PathBuf,
        /// The parser's words.
        reason: String,
    },
    /// The index names a file that is not simply a file of the same folder.
    #[error("{} names '{file}', which is not a file of its own folder", path.display())]
    OutsideFolder {
        /// The index.
        path: PathBuf,
        /// The file it names.
        file: String,
    },
    /// The index names more files than any real one.
    #[error("{} names more than {max} files", path.display())]
    TooManyShards {
        /// The index.
        path: PathBuf,
        /// The limit.
        max: usize,
    },
    /// Index and files disagree, or tensors and model do.
    #[error("{} does not hold the expected tensors:{mismatch}", folder.display())]
    Mismatch {
        /// The folder.
        folder: PathBuf,
        /// The tensors concerned.
        mismatch: TensorMismatch,
    },
    /// A tensor's elements cannot be turned into what was asked for.
    #[error("tensor '{name}' is {dtype}, which is not read as {wanted}")]
    Conversion {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: DType,
        /// What was asked for.
        wanted: &'static str,
    },
    /// A tensor has another number of elements than there is room for.
    #[error("tensor '{name}' has {actual} elements, not {expected}")]
    Elements {
        /// The tensor.
        name: String,
        /// Elements wanted.
        expected: usize,
        /// Elements found.
        actual: usize,
    },
}

impl Hint for WeightsError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::File(error) => error.hints(),
            Self::Read(error) => error.hints(),
            Self::NoWeights { .. } => {
                vec!["only safetensors files are read; convert other formats first".to_owned()]
            }
            Self::Mismatch { .. } => {
                vec!["check that config.json and the weights belong together".to_owned()]
            }
            _ => Vec::new(),
        }
    }
}

/// Tensors that are not as expected; shown as one line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorMismatch {
    /// Expected, but not there.
    pub missing: Vec<String>,
    /// There, but not expected.
    pub extra: Vec<String>,
    /// In more than one file: the tensor and the files.
    pub duplicate: Vec<(String, Vec<String>)>,
    /// Of another shape: the tensor, the expected and the actual shape.
    pub misshaped: Vec<(String, Vec<usize>, Vec<usize>)>,
}

/// Lines shown for each kind of mismatch; the rest is counted.
const LINES_MAX: usize = 20;

impl TensorMismatch {
    /// Whether everything was as expected.
    pub const fn is_empty(&self) -> bool {
        self.missing.is_empty()
            && self.extra.is_empty()
            && self.duplicate.is_empty()
            && self.misshaped.is_empty()
    }
}

impl fmt::Display for TensorMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        lines(f, &self.missing, |f, name| write!(f, "missing {name}"))?;
        lines(f, &self.extra, |f, name| write!(f, "extra {name}"))?;
        lines(f, &self.duplicate, |f, (name, files)| {
            write!(f, "duplicate {name} in {}", files.join(", "))
        })?;
        lines(f, &self.misshaped, |f, (name, expected, actual)| {
            write!(f, "misshaped {name}: {actual:?} instead of {expected:?}")
        })
    }
}

fn lines<T>(
    f: &mut fmt::Formatter<'_>,
    items: &[T],
    line: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    for item in items.iter().take(LINES_MAX) {
        f.write_str("\n  ")?;
        line(f, item)?;
    }
    match items.len().checked_sub(LINES_MAX) {
        Some(rest) if rest > 0 => write!(f, "\n  and {rest} more like the last"),
        _ => Ok(()),
    }
}

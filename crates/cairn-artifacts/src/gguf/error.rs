//! What can be wrong with GGUF files.

use super::{Format, ValueType};
use crate::FileError;
use cairn_spec::Hint;
use std::path::PathBuf;
use thiserror::Error;

/// A GGUF file that is not sound, or a part of it that is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The file does not begin as GGUF files do.
    #[error("it begins with {found:02x?} instead of 'GGUF'")]
    NotGguf {
        /// Its first bytes, four at most.
        found: Vec<u8>,
    },
    /// The file was written for machines of the other byte order.
    #[error("it is big endian (version {version}); only little endian files are read")]
    BigEndian {
        /// The version, read the other way round.
        version: u32,
    },
    /// A version that Cairn does not read.
    #[error("it has version {version}; versions 2 and 3 are read")]
    Version {
        /// The version.
        version: u32,
    },
    /// The file ends before what it announces.
    #[error("{what} at byte {offset} needs {needed} bytes, but the file ends after {available}")]
    PastEnd {
        /// What was being read: a key, the value of a key, a tensor's entry.
        what: String,
        /// Where, from the beginning of the file.
        offset: usize,
        /// Bytes it needs.
        needed: u64,
        /// Bytes that are left.
        available: usize,
    },
    /// More keys or tensors than any real file has, or than fit into the rest of the file.
    #[error("it announces {count} {what}; at most {max} are possible")]
    TooMany {
        /// `keys` or `tensors`.
        what: &'static str,
        /// How many it announces.
        count: u64,
        /// The limit, by the size of the file or by [`KEYS_MAX`](super::KEYS_MAX) and
        /// [`TENSORS_MAX`](super::TENSORS_MAX).
        max: usize,
    },
    /// A text that is not UTF-8.
    #[error("{what} at byte {offset} is not UTF-8")]
    NotUtf8 {
        /// Whose text it is.
        what: String,
        /// Where, from the beginning of the file.
        offset: usize,
    },
    /// A name longer than any real one.
    #[error("{what} at byte {offset} is {bytes} bytes long; at most {max} are accepted")]
    NameTooLong {
        /// `a key` or `the name of a tensor`.
        what: &'static str,
        /// Where, from the beginning of the file.
        offset: usize,
        /// Its length.
        bytes: u64,
        /// The limit.
        max: usize,
    },
    /// A type of value that the format does not have.
    #[error("{what} at byte {offset} has the unknown type {id}")]
    UnknownValueType {
        /// Whose value it is.
        what: String,
        /// Where, from the beginning of the file.
        offset: usize,
        /// The number in the file.
        id: u32,
    },
    /// Lists inside lists inside lists.
    #[error("{what} holds lists more than {max} deep")]
    NestedTooDeep {
        /// Whose value it is.
        what: String,
        /// The limit.
        max: u32,
    },
    /// A truth value that is neither 0 nor 1.
    #[error("{what} at byte {offset} is {byte}, neither true nor false")]
    NotBool {
        /// Whose value it is.
        what: String,
        /// Where, from the beginning of the file.
        offset: usize,
        /// The byte.
        byte: u8,
    },
    /// A key or a tensor that occurs twice.
    #[error("{what} '{name}' occurs twice")]
    Duplicate {
        /// `key` or `tensor`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// `general.alignment` is no power of two, or absurdly large.
    #[error("general.alignment is {alignment}; it must be a power of two, {max} at most")]
    Alignment {
        /// What it is.
        alignment: String,
        /// The limit.
        max: usize,
    },
    /// A tensor with too many dimensions, or more elements than an address can count.
    #[error("tensor '{name}' has impossible dimensions {dims:?}")]
    ImpossibleShape {
        /// The tensor.
        name: String,
        /// Its dimensions, innermost first; none if there are too many to list.
        dims: Vec<u64>,
    },
    /// A type of tensor that the format does not have, or no longer.
    #[error("tensor '{name}' has the unknown type {id}")]
    UnknownTensorType {
        /// The tensor.
        name: String,
        /// The number in the file.
        id: u32,
    },
    /// Rows are not whole blocks.
    #[error(
        "rows of tensor '{name}' have {row} elements, not a multiple of {block} ({tensor_type})"
    )]
    UnevenRow {
        /// The tensor.
        name: String,
        /// Elements of a row.
        row: usize,
        /// Elements of a block.
        block: usize,
        /// Its type.
        tensor_type: &'static str,
    },
    /// A tensor does not begin at a multiple of the alignment.
    #[error("tensor '{name}' begins at byte {offset} of the data, not a multiple of {alignment}")]
    Misaligned {
        /// The tensor.
        name: String,
        /// Where, from the beginning of the data.
        offset: u64,
        /// The file's alignment.
        alignment: usize,
    },
    /// A tensor reaches beyond the end of the file.
    #[error(
        "tensor '{name}' needs {bytes} bytes from byte {offset} of the data, which has {available}"
    )]
    TensorPastEnd {
        /// The tensor.
        name: String,
        /// Where, from the beginning of the data.
        offset: u64,
        /// Bytes it needs.
        bytes: usize,
        /// Bytes of all the data.
        available: usize,
    },
    /// Two tensors share bytes.
    #[error("tensors '{first}' and '{second}' overlap")]
    Overlap {
        /// The one that begins first.
        first: String,
        /// The other.
        second: String,
    },
    /// There is no tensor of this name.
    #[error("there is no tensor '{name}'")]
    NoTensor {
        /// The name.
        name: String,
    },
    /// A type of tensor that Cairn does not read.
    #[error("tensor '{name}' is {tensor_type}, which is not read")]
    Undecodable {
        /// The tensor.
        name: String,
        /// Its type.
        tensor_type: &'static str,
    },
    /// Elements that a tensor does not have.
    #[error("elements {start} to {end} lie outside of tensor '{name}', which has {elements}")]
    OutsideTensor {
        /// The tensor.
        name: String,
        /// The first element.
        start: usize,
        /// The one after the last.
        end: usize,
        /// Elements it has.
        elements: usize,
    },
    /// A value of another type than needed.
    #[error("{key} is {found}, not {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What it is.
        found: ValueType,
        /// What was needed.
        expected: &'static str,
    },
}

impl Hint for GgufError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::PastEnd { .. } | Self::TensorPastEnd { .. } => {
                vec!["the file was probably cut short; copy or download it again".to_owned()]
            }
            Self::Undecodable { .. } => {
                let names: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
                vec![format!("types that are read: {}", names.join(", "))]
            }
            Self::BigEndian { .. } => {
                vec!["convert the file with gguf-convert-endian of the gguf package".to_owned()]
            }
            _ => Vec::new(),
        }
    }
}

/// A GGUF file that cannot be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GgufReadError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The header is not sound.
    #[error("{} is not a sound GGUF file", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<GgufError>,
    },
}

impl Hint for GgufReadError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::File(error) => error.hints(),
            Self::Header { source, .. } => source.hints(),
        }
    }
}

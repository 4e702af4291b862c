//! Tensor files in the safetensors format, single or sharded, read through mappings.
//!
//! A file is an 8-byte little-endian header length, a JSON header that gives each tensor's type,
//! shape and byte range, and the bytes; ranges follow one another without holes
//! (<https://github.com/huggingface/safetensors#format>).
//!
//! The header is read by code of our own and not by the `safetensors` crate, whose errors do not
//! name the tensor, which keeps the last of two entries of one name, and whose writer wants every
//! tensor in memory as bytes. A test holds the two against each other: what one accepts, the other
//! reads the same.

mod convert;
mod error;
mod folder;
mod header;
mod write;

pub use convert::{bf16_to_f32, f16_to_f32, f32_to_bf16};
pub use error::{HeaderError, ReadError, TensorMismatch, WeightsError};
pub use folder::{INDEX_FILE, SHARDS_MAX, SINGLE_FILE, WeightFolder};
pub use header::{DIMS_MAX, HEADER_BYTES_MAX, Header, NAME_BYTES_MAX, TENSORS_MAX, TensorEntry};
pub use write::{ALIGNMENT_BYTES, Contents, OutTensor, WrittenFile, write, write_sharded};

use crate::MappedFile;
use cairn_spec::DType;
use std::path::Path;

/// One mapped safetensors file.
#[derive(Clone, Debug)]
pub struct SafetensorsFile {
    file: MappedFile,
    header: Header,
}

impl SafetensorsFile {
    /// Maps the file and checks its header completely; tensor bytes are not touched.
    ///
    /// # Errors
    ///
    /// [`ReadError`] if the file cannot be mapped or its header is not sound.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let file = MappedFile::open(path)?;
        let header = Header::parse(&file).map_err(|source| ReadError::Header {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        Ok(Self { file, header })
    }

    /// Where the file was found.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The tensors, in the order of their bytes.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.header.tensors().iter().map(|entry| self.view(entry))
    }

    /// The tensor of this name, or `None`.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.header.tensor(name).map(|entry| self.view(entry))
    }

    /// What the header says.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The mapping, for readers that keep offsets ([`TensorEntry::offset`]) instead of views.
    pub const fn file(&self) -> &MappedFile {
        &self.file
    }

    fn view<'a>(&'a self, entry: &'a TensorEntry) -> TensorView<'a> {
        TensorView {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &self.file[entry.offset..entry.offset + entry.bytes],
        }
    }
}

/// One stored tensor, row-major and little-endian, borrowed from a mapped file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorView<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// The type of its elements.
    pub dtype: DType,
    /// Its dimensions; no dimensions mean one element.
    pub shape: &'a [usize],
    /// Its elements; not aligned to anything in particular.
    pub bytes: &'a [u8],
}

#[cfg(test)]
mod tests;

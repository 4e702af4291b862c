//! Model files in the GGUF format, versions 2 and 3, little endian: read through a mapping, written as 3.
//!
//! A file is a magic number, two counts, typed key-value pairs, one entry per tensor (name,
//! dimensions, type, offset), and the bytes of the tensors, each aligned
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>). Everything up to the tensors is
//! checked when a file is opened; the bytes of tensors and of long lists stay in the file.
//!
//! - `header`: the checked header, by key and by tensor.
//! - `cursor`: bytes taken one after the other, with the limits.
//! - `value`: what a key may hold.
//! - `tensor_type`: the types of tensors, with the size of their blocks.
//! - `block`: what the blocks of the types that Cairn reads mean, as `f32`.
//! - `write`: a file written, and values as blocks of `F32`, `BF16` and `Q8_0`.
//!
//! **Limits:** opening allocates at most [`ALLOCATED_PER_BYTE`] bytes for each byte of the file and
//! [`ALLOCATED_BESIDES`] more, whatever the file says.

mod block;
mod cursor;
mod error;
mod header;
mod tensor_type;
#[cfg(test)]
mod tests;
mod value;
mod write;

pub use block::Format;
pub use error::{GgufError, GgufReadError};
pub use header::{ALIGNMENT_DEFAULT, DIMS_MAX, Header, KEYS_MAX, TENSORS_MAX, TensorInfo};
pub use tensor_type::TensorType;
pub use value::{Array, Value, ValueType};
pub use write::{OutTensor, OutValue, encode, write};

use crate::MappedFile;
use std::ops::Range;
use std::path::Path;

/// Most bytes allocated for each byte of the file when it is opened.
pub const ALLOCATED_PER_BYTE: usize = 8;
/// Most bytes allocated besides.
pub const ALLOCATED_BESIDES: usize = 4096;

/// One mapped GGUF file.
#[derive(Clone, Debug)]
pub struct GgufFile {
    file: MappedFile,
    header: Header,
}

impl GgufFile {
    /// Maps the file and checks everything but the tensors' bytes, which are not touched.
    ///
    /// # Errors
    ///
    /// [`GgufReadError`] if the file cannot be mapped or its header is not sound.
    pub fn open(path: &Path) -> Result<Self, GgufReadError> {
        let file = MappedFile::open(path)?;
        let header = Header::parse(&file).map_err(|source| GgufReadError::Header {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        Ok(Self { file, header })
    }

    /// Where the file was found.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What the header says.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The value of a key, or `None`.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.header.value(key)
    }

    /// The elements of a list of texts.
    ///
    /// # Errors
    ///
    /// [`GgufError::WrongType`] if it is another kind of list, [`GgufError::NotUtf8`] for a text
    /// that is none.
    pub fn texts<'a>(&'a self, key: &str, list: &Array) -> Result<Vec<&'a str>, GgufError> {
        list.texts(key, &self.file)
    }

    /// The elements of a list of numbers.
    ///
    /// # Errors
    ///
    /// [`GgufError::WrongType`] if it is another kind of list.
    pub fn numbers(&self, key: &str, list: &Array) -> Result<Vec<f64>, GgufError> {
        list.numbers(key, &self.file)
    }

    /// The tensors, in the order of the file's entries.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.header.tensors().iter()
    }

    /// The bytes of a tensor of this file.
    fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        &self.file[tensor.offset..tensor.offset + tensor.bytes]
    }

    /// Decodes elements of a tensor, row-major, to `f32`.
    ///
    /// # Errors
    ///
    /// [`GgufError::NoTensor`], [`GgufError::Undecodable`] for a type that Cairn does not read,
    /// [`GgufError::OutsideTensor`] if it has no such elements.
    ///
    /// # Panics
    ///
    /// Panics if `out` is not as long as `elements`.
    pub fn read_f32(
        &self,
        name: &str,
        elements: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), GgufError> {
        assert_eq!(elements.len(), out.len(), "room for the elements");
        let (tensor, format) = self.decodable(name, &elements)?;
        format.decode_range(self.bytes(tensor), elements, out);
        Ok(())
    }

    /// Reads elements of a tensor of `format`, `Q8_0` or `Q4_0`, as they are stored: values as signed
    /// bytes, those of `Q4_0` from -8 to 7, and the scale of every 32 of them. Returns `false`, and reads
    /// nothing, if the tensor is of another type or the format has no such codes.
    ///
    /// # Errors
    ///
    /// As [`read_f32`](Self::read_f32).
    ///
    /// # Panics
    ///
    /// Panics if the elements are not whole blocks, or `values` and `scales` have no room for
    /// exactly them.
    pub fn read_codes(
        &self,
        format: Format,
        name: &str,
        elements: Range<usize>,
        codes: (&mut [i8], &mut [f32]),
    ) -> Result<bool, GgufError> {
        assert_eq!(elements.len(), codes.0.len(), "room for the elements");
        let (tensor, stored) = self.decodable(name, &elements)?;
        Ok(stored == format && block::copy_codes(format, self.bytes(tensor), elements, codes))
    }

    /// The format of a tensor that Cairn reads, and its bytes; `None` for another, or none.
    pub fn stored(&self, name: &str) -> Option<(Format, &[u8])> {
        let tensor = self.header.tensor(name)?;
        Some((tensor.tensor_type.format()?, self.bytes(tensor)))
    }

    /// Takes the pages of a tensor out of this process's memory until they are read again.
    pub fn release(&self, name: &str) {
        if let Some(tensor) = self.header.tensor(name) {
            self.file.release(tensor.offset..tensor.offset + tensor.bytes);
        }
    }

    fn decodable(
        &self,
        name: &str,
        elements: &Range<usize>,
    ) -> Result<(&TensorInfo, Format), GgufError> {
        let tensor = self
            .header
            .tensor(name)
            .ok_or_else(|| GgufError::NoTensor { name: name.to_owned() })?;
        let format = tensor.tensor_type.format().ok_or_else(|| GgufError::Undecodable {
            name: name.to_owned(),
            tensor_type: tensor.tensor_type.name(),
        })?;
        if elements.end > tensor.elements() || elements.start > elements.end {
            return Err(GgufError::OutsideTensor {
                name: name.to_owned(),
                start: elements.start,
                end: elements.end,
                elements: tensor.elements(),
            });
        }
        Ok((tensor, format))
    }
}

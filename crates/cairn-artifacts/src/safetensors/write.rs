//! Writing safetensors: the same tensors always give the same bytes.
//!
//! Tensors are ordered by element size, widest first, then by name, which keeps each aligned to
//! its elements; the header is filled up so that the first tensor begins at a multiple of
//! [`ALIGNMENT_BYTES`].

use super::header::{LENGTH_BYTES, METADATA_KEY, RawTensor};
use super::{DIMS_MAX, HEADER_BYTES_MAX, INDEX_FILE, SINGLE_FILE};
use crate::hash::{Hash, HashingWriter};
use cairn_spec::DType;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};

/// Where the first tensor begins is a multiple of this: a cache line.
pub const ALIGNMENT_BYTES: usize = 64;
/// Elements converted at a time.
const CHUNK_ELEMENTS: usize = 1 << 14;

/// A tensor to be written.
pub struct OutTensor<'a> {
    /// Its name in the file.
    pub name: String,
    /// The type of its elements.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: Vec<usize>,
    source: Source<'a>,
}

enum Source<'a> {
    Bytes(&'a [u8]),
    F32(&'a [f32]),
    Bf16(&'a [u16]),
    Stream(Stream<'a>),
}

/// Writes exactly the tensor's bytes.
type Stream<'a> = Box<dyn Fn(&mut dyn Write) -> io::Result<()> + 'a>;

impl<'a> OutTensor<'a> {
    /// A tensor of f32 in memory.
    pub fn f32(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> Self {
        Self::new(name.into(), DType::F32, shape, Source::F32(values))
    }

    /// A tensor of bf16 in memory.
    pub fn bf16(name: impl Into<String>, shape: &[usize], bits: &'a [u16]) -> Self {
        Self::new(name.into(), DType::Bf16, shape, Source::Bf16(bits))
    }

    /// A tensor whose little-endian bytes are in memory.
    pub fn bytes(name: impl Into<String>, dtype: DType, shape: &[usize], bytes: &'a [u8]) -> Self {
        Self::new(name.into(), dtype, shape, Source::Bytes(bytes))
    }

    /// A tensor that `write` produces; it must write exactly as many little-endian bytes as type
    /// and shape say.
    pub fn stream(
        name: impl Into<String>,
        dtype: DType,
        shape: &[usize],
        write: impl Fn(&mut dyn Write) -> io::Result<()> + 'a,
    ) -> Self {
        Self::new(name.into(), dtype, shape, Source::Stream(Box::new(write)))
    }

    fn new(name: String, dtype: DType, shape: &[usize], source: Source<'a>) -> Self {
        Self { name, dtype, shape: shape.to_vec(), source }
    }

    /// Bytes by type and shape.
    pub fn size_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_bytes()
    }

    fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.source {
            Source::Bytes(bytes) => out.write_all(bytes),
            Source::F32(values) => write_converted(out, values, |value| value.to_le_bytes()),
            Source::Bf16(bits) => write_converted(out, bits, |value| value.to_le_bytes()),
            Source::Stream(write) => write(out),
        }
    }
}

impl fmt::Debug for OutTensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, dtype, shape, .. } = self;
        write!(f, "OutTensor({name}: {dtype} {shape:?})")
    }
}

fn write_converted<T: Copy, const N: usize>(
    out: &mut dyn Write,
    values: &[T],
    convert: impl Fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_ELEMENTS * N];
    for chunk in values.chunks(CHUNK_ELEMENTS) {
        let bytes = &mut buffer[..chunk.len() * N];
        for (bytes, value) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(chunk) {
            *bytes = convert(*value);
        }
        out.write_all(bytes)?;
    }
    Ok(())
}

/// What came of writing a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenFile {
    /// Its size.
    pub bytes: u64,
    /// The hash of its contents.
    pub hash: Hash,
}

/// Writes one safetensors file to `out`. `metadata` goes into the header beside `format` = `pt`,
/// which transformers asks for.
///
/// # Errors
///
/// Whatever `out` or a tensor's stream returns; [`io::ErrorKind::InvalidInput`] if two tensors have
/// one name, a tensor has another size than its type and shape say, or a limit is exceeded.
pub fn write(
    out: &mut dyn Write,
    tensors: Vec<OutTensor<'_>>,
    metadata: &BTreeMap<String, String>,
) -> io::Result<WrittenFile> {
    let tensors = in_file_order(tensors)?;
    let mut out = HashingWriter::new(out);
    let header = header(&tensors, metadata)?;
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for tensor in &tensors {
        let before = out.bytes();
        tensor.write_to(&mut out)?;
        let actual = out.bytes() - before;
        if actual != tensor.size_bytes() as u64 {
            return Err(invalid(format!("{tensor:?} wrote {actual} bytes")));
        }
    }
    Ok(WrittenFile { bytes: out.bytes(), hash: out.hash() })
}

/// Cuts tensors into shards of at most `shard_bytes_max` (a larger tensor gets its own) in name
/// order, and gives each shard's file name with its tensors, and the index if there are several.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] as from [`write()`].
pub fn write_sharded(
    tensors: Vec<OutTensor<'_>>,
    shard_bytes_max: usize,
    mut write_file: impl FnMut(&str, Contents<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let mut tensors = in_file_order(tensors)?;
    tensors.sort_by(|left, right| left.name.cmp(&right.name));
    let mut shards: Vec<(usize, Vec<OutTensor<'_>>)> = Vec::new();
    for tensor in tensors {
        let bytes = tensor.size_bytes();
        match shards.last_mut() {
            Some((held, shard)) if held.saturating_add(bytes) <= shard_bytes_max => {
                *held += bytes;
                shard.push(tensor);
            }
            _ => shards.push((bytes, vec![tensor])),
        }
    }
    let count = shards.len();
    if count <= 1 {
        let only = shards.pop().map(|(_, shard)| shard).unwrap_or_default();
        return write_file(SINGLE_FILE, Contents::Tensors(only));
    }
    let total: usize = shards.iter().map(|(bytes, _)| bytes).sum();
    let mut weight_map = BTreeMap::new();
    for (i, (_, shard)) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), file.clone())));
        write_file(&file, Contents::Tensors(shard))?;
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    write_file(INDEX_FILE, Contents::Index(index))
}

/// What belongs into one file of a sharded model.
#[derive(Debug)]
pub enum Contents<'a> {
    /// Tensors, for [`write()`].
    Tensors(Vec<OutTensor<'a>>),
    /// The index, as JSON.
    Index(Value),
}

fn in_file_order(mut tensors: Vec<OutTensor<'_>>) -> io::Result<Vec<OutTensor<'_>>> {
    tensors.sort_by(|left, right| {
        let sizes = right.dtype.size_bytes().cmp(&left.dtype.size_bytes());
        sizes.then_with(|| left.name.cmp(&right.name))
    });
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(invalid(format!("two tensors are called '{}'", twice[0])));
    }
    for tensor in &tensors {
        let mut elements = tensor.shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        elements = elements.and_then(|n| n.checked_mul(tensor.dtype.size_bytes()));
        if elements.is_none() || tensor.shape.len() > DIMS_MAX || tensor.name == METADATA_KEY {
            return Err(invalid(format!("{tensor:?} cannot be written")));
        }
    }
    Ok(tensors)
}

fn header(tensors: &[OutTensor<'_>], metadata: &BTreeMap<String, String>) -> io::Result<Vec<u8>> {
    let mut texts = Map::new();
    texts.insert("format".to_owned(), "pt".into());
    texts.extend(metadata.iter().map(|(key, value)| (key.clone(), value.as_str().into())));
    let mut entries = Map::new();
    entries.insert(METADATA_KEY.to_owned(), Value::Object(texts));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.size_bytes();
        let entry = RawTensor {
            dtype: tensor.dtype.safetensors_name().to_owned(),
            shape: tensor.shape.clone(),
            data_offsets: (offset, end),
        };
        entries.insert(tensor.name.clone(), serde_json::to_value(entry)?);
        offset = end;
    }
    let mut header = serde_json::to_vec(&entries)?;
    let start = (LENGTH_BYTES + header.len()).next_multiple_of(ALIGNMENT_BYTES);
    header.resize(start - LENGTH_BYTES, b' ');
    if header.len() as u64 > HEADER_BYTES_MAX {
        return Err(invalid(format!("the header would be {} bytes long", header.len())));
    }
    Ok(header)
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

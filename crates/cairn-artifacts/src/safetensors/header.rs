//! The header of a safetensors file, read with limits and named errors.

use super::HeaderError;
use cairn_spec::DType;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Longest accepted header, in bytes; the same as in the `safetensors` crate.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Most tensors accepted in one file.
pub const TENSORS_MAX: usize = 1 << 20;
/// Longest name of a tensor, in bytes.
pub const NAME_BYTES_MAX: usize = 4096;
/// Longest name of a type that is quoted, in characters.
const DTYPE_CHARS_MAX: usize = 40;
/// Most dimensions of a tensor.
pub const DIMS_MAX: usize = 16;
/// Bytes of the header's length.
pub(super) const LENGTH_BYTES: usize = 8;
/// The entry that holds texts instead of a tensor.
pub(super) const METADATA_KEY: &str = "__metadata__";

/// A checked header: byte ranges are in the file, follow one another, and fit type and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// In the order of their bytes.
    tensors: Vec<TensorEntry>,
    /// Positions in `tensors`, by name.
    by_name: BTreeMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

/// Where a tensor is, and what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// First byte, counted from the beginning of the file.
    pub offset: usize,
    /// Number of bytes.
    pub bytes: usize,
}

impl Header {
    /// Reads the header of a whole file's bytes.
    ///
    /// # Errors
    ///
    /// [`HeaderError`] saying what is wrong, by the tensor's name where one is concerned.
    pub fn parse(file: &[u8]) -> Result<Self, HeaderError> {
        let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(HeaderError::NoHeader { file_bytes: file.len() });
        };
        let header_bytes = u64::from_le_bytes(*length);
        if header_bytes > HEADER_BYTES_MAX {
            return Err(HeaderError::HeaderTooLong { header_bytes, max: HEADER_BYTES_MAX });
        }
        let past_end = HeaderError::HeaderPastEnd { header_bytes, available: rest.len() };
        let split = usize::try_from(header_bytes).ok().and_then(|at| rest.split_at_checked(at));
        let (json, data) = split.ok_or(past_end)?;
        let raw = RawHeader::parse(json)?;
        Self::check(raw, file.len() - data.len(), data.len())
    }

    fn check(raw: RawHeader, data_start: usize, data_len: usize) -> Result<Self, HeaderError> {
        let mut ranges = Vec::with_capacity(raw.tensors.len());
        for (name, tensor) in raw.tensors {
            ranges.push((tensor.data_offsets, check_tensor(name, tensor)?));
        }
        // Empty tensors may share their offset with the tensor that follows.
        ranges.sort_by(|(a, left), (b, right)| a.cmp(b).then_with(|| left.name.cmp(&right.name)));
        let mut previous_end = 0;
        let mut tensors = Vec::with_capacity(ranges.len());
        for ((begin, end), mut entry) in ranges {
            if begin != previous_end {
                return Err(HeaderError::NotContiguous { name: entry.name, begin, previous_end });
            }
            previous_end = end;
            entry.offset = data_start.saturating_add(begin);
            tensors.push(entry);
        }
        if previous_end != data_len {
            return Err(HeaderError::DataLength { expected: previous_end, actual: data_len });
        }
        let by_name = tensors.iter().enumerate().map(|(i, entry)| (entry.name.clone(), i));
        Ok(Self { by_name: by_name.collect(), metadata: raw.metadata, tensors })
    }

    /// The tensors, in the order of their bytes.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// The tensor of this name, or `None`.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.by_name.get(name).map(|&position| &self.tensors[position])
    }

    /// Free texts; transformers writes `format` = `pt`.
    pub const fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// Checks everything about a tensor that does not concern its neighbors.
fn check_tensor(name: String, raw: RawTensor) -> Result<TensorEntry, HeaderError> {
    let Some(dtype) = DType::from_safetensors_name(&raw.dtype) else {
        let dtype = raw.dtype.chars().take(DTYPE_CHARS_MAX).collect();
        return Err(HeaderError::UnknownDType { name, dtype });
    };
    let elements = raw.shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    let expected = elements.and_then(|elements| elements.checked_mul(dtype.size_bytes()));
    let expected = match expected {
        Some(expected) if raw.shape.len() <= DIMS_MAX => expected,
        _ => {
            let shape = raw.shape.into_iter().take(DIMS_MAX + 1).collect();
            return Err(HeaderError::ImpossibleShape { name, shape });
        }
    };
    let (begin, end) = raw.data_offsets;
    if end.checked_sub(begin) != Some(expected) {
        let wide = |offset: usize| i128::try_from(offset).expect("usize is at most 64 bits");
        let actual = wide(end) - wide(begin);
        return Err(HeaderError::SizeMismatch { name, dtype, shape: raw.shape, expected, actual });
    }
    Ok(TensorEntry { name, dtype, shape: raw.shape, offset: begin, bytes: expected })
}

/// The header as JSON has it, names in the order of the file.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

/// One tensor in the JSON of a header.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTensor {
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    /// From the end of the header.
    pub(super) data_offsets: (usize, usize),
}

impl RawHeader {
    fn parse(json: &[u8]) -> Result<Self, HeaderError> {
        let mut names_twice = None;
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let parsed = RawHeaderSeed { twice: &mut names_twice }.deserialize(&mut deserializer);
        let parsed = parsed.and_then(|raw| deserializer.end().map(|()| raw));
        if let Some(name) = names_twice {
            return Err(HeaderError::Duplicate { name });
        }
        let raw = parsed.map_err(|error| HeaderError::Malformed { reason: error.to_string() })?;
        if raw.tensors.len() > TENSORS_MAX {
            return Err(HeaderError::TooManyTensors { max: TENSORS_MAX });
        }
        Ok(raw)
    }
}

/// Reads the header's object and notes a name that occurs twice, which JSON itself permits.
struct RawHeaderSeed<'a> {
    twice: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for RawHeaderSeed<'_> {
    type Value = RawHeader;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RawHeader, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for RawHeaderSeed<'_> {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with one entry per tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut raw = RawHeader { tensors: Vec::new(), metadata: BTreeMap::new() };
        let mut seen = std::collections::BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if name.len() > NAME_BYTES_MAX {
                let bytes = name.len();
                return Err(de::Error::custom(format!("a name has {bytes} bytes")));
            }
            if !seen.insert(name.clone()) {
                *self.twice = Some(name);
                return Err(de::Error::custom("a name occurs twice"));
            }
            if name == METADATA_KEY {
                raw.metadata = map.next_value()?;
            } else if raw.tensors.len() > TENSORS_MAX {
                return Err(de::Error::custom("too many tensors"));
            } else {
                raw.tensors.push((name, map.next_value()?));
            }
        }
        Ok(raw)
    }
}

//! A pack → a folder that transformers loads.
//!
//! A tensor whose weights are exact comes back bit for bit, under its name and in its element type. One
//! whose weights were rounded comes back in f32, which holds what the pack computes with.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use cairn_artifacts::FileError;
use cairn_artifacts::atomic::FolderDraft;
use cairn_artifacts::checkpoint::CONFIG_FILE;
use cairn_artifacts::leanpack::{PackError, PackErrorKind, SourceTensor};
use cairn_artifacts::safetensors::{self, OutTensor};
use cairn_model::{
    LoadError, PackSource, Placement, TensorMap, TensorSlice, TensorSource, tensor_f32,
};
use cairn_spec::{DType, ModelSpec};
use serde_json::Value;

use crate::error::ConvertError;

/// Elements read and written at a time.
const PIECE_ELEMENTS: usize = 1 << 18;
/// Largest file of weights, in bytes; a larger tensor gets its own.
const SHARD_BYTES_MAX: usize = 5_000_000_000;

/// What came of unpacking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnpackReport {
    /// Tensors written.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Those that are not the source's, because the pack holds them rounded; they are f32.
    pub rounded: Vec<String>,
}

/// A tensor to be written, and the weights it is made of.
struct Unpacked<'a> {
    name: &'a str,
    shape: Vec<usize>,
    dtype: DType,
    slices: Vec<TensorSlice>,
}

/// Unpacks a pack into `folder`, which appears complete or not at all.
///
/// # Errors
///
/// [`ConvertError::Pack`] if the pack's source is not that of its spec or a chunk was altered,
/// [`ConvertError::File`] if a file cannot be written.
pub fn unpack(source: &PackSource, folder: &Path) -> Result<UnpackReport, ConvertError> {
    let pack = source.pack();
    let header = pack.header();
    let tensors = tensors(source)?;
    let is_rounded = |tensor: &&Unpacked<'_>| {
        let exact = |slice: &TensorSlice| pack.tensor(&slice.weight).is_some_and(|w| w.exact);
        !tensor.slices.iter().all(exact)
    };
    let rounded: Vec<String> =
        tensors.iter().filter(is_rounded).map(|tensor| tensor.name.to_owned()).collect();
    let draft = FolderDraft::new(folder)?;
    for file in &header.files {
        let mut contents = pack.read_file(&file.name)?.unwrap_or_default();
        if file.name == CONFIG_FILE && !rounded.is_empty() {
            contents = with_f32(&contents, &header.spec)?;
        }
        write_file(&draft, &file.name, &contents)?;
    }
    if pack.file(CONFIG_FILE).is_none() {
        write_file(&draft, CONFIG_FILE, &with_f32(b"", &header.spec)?)?;
    }
    let failure = RefCell::new(None);
    let out: Vec<OutTensor<'_>> =
        tensors.iter().map(|tensor| out_tensor(source, tensor, &failure)).collect();
    let (count, bytes) = (out.len(), out.iter().map(OutTensor::size_bytes).sum());
    let texts = BTreeMap::new();
    let written = safetensors::write_sharded(out, SHARD_BYTES_MAX, |name, contents| {
        let written = draft.write_file(name, |file| match contents {
            safetensors::Contents::Tensors(tensors) => {
                safetensors::write(file, tensors, &texts).map(drop)
            }
            safetensors::Contents::Index(index) => write!(file, "{index:#}"),
        });
        written.map_err(|error| {
            let text = error.to_string();
            failure.borrow_mut().get_or_insert(ConvertError::File(error));
            io::Error::other(text)
        })
    });
    if let Some(failure) = failure.into_inner() {
        return Err(failure);
    }
    written.map_err(FileError::on("write", folder))?;
    draft.publish()?;
    Ok(UnpackReport { tensors: count, bytes, rounded })
}

/// The source's tensors and what they are made of.
fn tensors(source: &PackSource) -> Result<Vec<Unpacked<'_>>, ConvertError> {
    let pack = source.pack();
    let header = pack.header();
    let stated: BTreeMap<&str, &SourceTensor> =
        header.source.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    let map = TensorMap::of_tensors(&header.spec, |name| stated.contains_key(name));
    let by_tensor = map.by_tensor();
    let mut unpacked = Vec::new();
    let wrong = |part: &str, reason: String| {
        let kind = PackErrorKind::Entry { part: part.to_owned(), reason };
        ConvertError::Pack(PackError::Unsound { path: pack.path().to_owned(), kind })
    };
    for (name, shape) in map.tensors() {
        let spellings = TensorMap::spellings(header.spec.family, name);
        let found = spellings.iter().find_map(|spelling| stated.get(spelling.as_str()));
        let tensor =
            found.ok_or_else(|| wrong(name, "the source has no such tensor".to_owned()))?;
        let dims: Vec<u64> = shape.iter().map(|&size| size as u64).collect();
        if tensor.dims != dims {
            let reason = format!("the source has it as {:?}, the model as {dims:?}", tensor.dims);
            return Err(wrong(name, reason));
        }
        let slices: Vec<TensorSlice> = by_tensor[name].iter().map(|&s| s.clone()).collect();
        for slice in &slices {
            let weight = pack.tensor(&slice.weight);
            let elements = weight.map(|weight| weight.dims.iter().product::<u64>());
            if elements.is_none_or(|elements| elements < slice.elements().end as u64) {
                return Err(wrong(&slice.weight, "it is missing or too small".to_owned()));
            }
        }
        let exact = slices.iter().all(|s| pack.tensor(&s.weight).is_some_and(|w| w.exact));
        let dtype = if exact { tensor.dtype } else { DType::F32 };
        unpacked.push(Unpacked { name: &tensor.name, shape: shape.to_vec(), dtype, slices });
    }
    Ok(unpacked)
}

fn write_file(draft: &FolderDraft, name: &str, contents: &[u8]) -> Result<(), ConvertError> {
    if let Some((folder, _)) = name.split_once('/') {
        let folder = draft.path().join(folder);
        std::fs::create_dir_all(&folder).map_err(FileError::on("create", &folder))?;
    }
    draft.write_file(name, |file| file.write_all(contents))?;
    Ok(())
}

/// A `config.json` whose weights are f32; made from the spec where there is none that can be read.
fn with_f32(config: &[u8], spec: &ModelSpec) -> Result<Vec<u8>, ConvertError> {
    let mut value: Value = match serde_json::from_slice(config) {
        Ok(value) => value,
        Err(_) => spec.to_hf_config().map_err(|error| {
            let source = io::Error::other(error);
            FileError { action: "describe the model in", path: CONFIG_FILE.into(), source }
        })?,
    };
    if let Value::Object(fields) = &mut value {
        for name in ["dtype", "torch_dtype"] {
            if fields.contains_key(name) {
                fields.insert(name.to_owned(), DType::F32.hf_name().into());
            }
        }
    }
    Ok(format!("{value:#}\n").into_bytes())
}

fn out_tensor<'a>(
    source: &'a PackSource,
    tensor: &'a Unpacked<'a>,
    failure: &'a RefCell<Option<ConvertError>>,
) -> OutTensor<'a> {
    OutTensor::stream(tensor.name, tensor.dtype, &tensor.shape, move |out| {
        let mut narrow = Vec::new();
        let mut write = |values: &[f32]| {
            narrow.clear();
            to_bytes(tensor.dtype, values, &mut narrow);
            out.write_all(&narrow)
        };
        let read = |weight: &str, elements: std::ops::Range<usize>, values: &mut [f32]| {
            source.read_f32(weight, elements, values).map_err(|problem| {
                let error = LoadError::Unreadable { name: weight.to_owned(), problem };
                failure.borrow_mut().get_or_insert(error.into());
                io::Error::other("a weight cannot be read")
            })
        };
        if let [only] = &tensor.slices[..]
            && only.placement == Placement::Whole
        {
            let mut values = vec![0.0; PIECE_ELEMENTS];
            let all = only.elements();
            for first in all.clone().step_by(PIECE_ELEMENTS) {
                let piece = first..all.end.min(first + PIECE_ELEMENTS);
                let values = &mut values[..piece.len()];
                read(&only.weight, piece, values)?;
                write(values)?;
            }
            return Ok(());
        }
        let mut weights: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
        for slice in &tensor.slices {
            let mut values = vec![0.0; slice.elements().end];
            read(&slice.weight, 0..values.len(), &mut values)?;
            weights.insert(&slice.weight, values);
        }
        let name = &tensor.slices[0].tensor;
        let map = TensorMap { slices: tensor.slices.clone() };
        let lookup = |weight: &str| weights.get(weight).map(Vec::as_slice);
        write(&tensor_f32(&map, name, &lookup).1)
    })
}

/// Values in the element type that they came in, which holds them exactly.
fn to_bytes(dtype: DType, values: &[f32], bytes: &mut Vec<u8>) {
    match dtype {
        DType::Bf16 => {
            bytes.extend(values.iter().flat_map(|value| upper_half(*value).to_le_bytes()));
        }
        DType::F16 => {
            bytes.extend(values.iter().flat_map(|value| exact_f16(*value).to_le_bytes()));
        }
        _ => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
    }
}

fn upper_half(value: f32) -> u16 {
    let [_, _, low, high] = value.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// The f16 of the same value, for a value that there is one of.
fn exact_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let exponent = (bits >> 23) & 0xff;
    let mantissa = bits & 0x007f_ffff;
    let magnitude = match exponent {
        0 => 0,
        0xff => 0x7c00 | (mantissa >> 13),
        113.. => ((exponent - 112) << 10) | (mantissa >> 13),
        // A subnormal is its mantissa times 2^-24.
        103..=112 => (mantissa | 0x0080_0000) >> (126 - exponent),
        _ => 0,
    };
    let half = sign | magnitude;
    u16::try_from(half).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_artifacts::safetensors::f16_to_f32;

    #[test]
    fn every_f16_and_bf16_comes_back() {
        for bits in 0..=u16::MAX {
            assert_eq!(exact_f16(f16_to_f32(bits)), bits, "{bits:#x}");
            assert_eq!(upper_half(f32::from_bits(u32::from(bits) << 16)), bits);
        }
    }
}

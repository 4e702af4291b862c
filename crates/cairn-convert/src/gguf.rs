//! A model → a GGUF file, so that llama.cpp runs the same weights.
//!
//! What can be written is what Cairn reads from such files, and that is tried: the file gets its name
//! only after it has been read back as the same model.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;

use cairn_artifacts::FileError;
use cairn_artifacts::atomic::FolderDraft;
use cairn_artifacts::gguf::{self as file, Format, GgufFile, OutTensor, OutValue};
use cairn_kernels::memory::bytes_of_mut;
use cairn_kernels::{Cpu, Encoding, Layout};
use cairn_model::gguf::{self as model, GgufExportError};
use cairn_model::{Naming, TensorMap, TensorSlice, TensorSource, WeightReader, tensor_f32};
use cairn_program::ValueType;
use cairn_spec::ModelSpec;

use crate::error::ConvertError;

/// Elements encoded at a time; whole blocks.
const PIECE_ELEMENTS: usize = 1 << 16;
/// Tensors that llama.cpp wants in f32 whatever the others are.
const PLAIN: [&str; 2] = ["position_embd.weight", "ffn_gate_inp.weight"];
/// The file within the draft.
const NAME: &str = "model.gguf";

/// A model to be written.
#[derive(Clone, Copy)]
#[expect(missing_debug_implementations, reason = "sources of tensors need not have one")]
pub struct GgufJob<'a> {
    /// What it computes.
    pub spec: &'a ModelSpec,
    /// Its tensors.
    pub source: &'a dyn TensorSource,
    /// The metadata of its tokenizer.
    pub tokenizer: &'a [(String, OutValue)],
    /// Threads that decode them.
    pub cpu: &'a Cpu,
}

/// What came of writing a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufReport {
    /// Size of the file.
    pub bytes: u64,
    /// Tensors in it.
    pub tensors: usize,
    /// Matrices that are f32 because their rows are not whole blocks of the type asked for.
    pub kept: Vec<String>,
}

/// Writes a model as the GGUF file `path`, which appears complete or not at all. `progress` is told
/// tensors done and in all.
///
/// # Errors
///
/// [`ConvertError::GgufExport`] for a family that is not read from such files, or a model that would
/// read back as another one; [`ConvertError::Stopped`] if `progress` breaks.
pub fn export_gguf(
    job: GgufJob<'_>,
    format: Format,
    path: &Path,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<GgufReport, ConvertError> {
    let mut metadata = model::metadata(job.spec)?;
    metadata.extend(general(format));
    metadata.extend_from_slice(job.tokenizer);
    let map =
        TensorMap::gguf(job.spec).ok_or(GgufExportError::Family { family: job.spec.family })?;
    let divisors = model::divisors(job.spec);
    let mut kept = Vec::new();
    let mut tensors: Vec<OutTensor> = divisors
        .iter()
        .map(|(name, values)| OutTensor {
            name: name.clone(),
            shape: vec![values.len()],
            format: Format::F32,
        })
        .collect();
    for (name, shape) in map.tensors() {
        let is_plain = shape.len() == 1 || PLAIN.iter().any(|plain| name.ends_with(plain));
        let columns = shape.last().copied().unwrap_or(0);
        let fits = columns.is_multiple_of(format.block_elements());
        if !is_plain && !fits {
            kept.push(name.to_owned());
        }
        let format = if is_plain || !fits { Format::F32 } else { format };
        tensors.push(OutTensor { name: name.to_owned(), shape: shape.to_vec(), format });
    }
    let reader = WeightReader::new(job.spec, job.source)?;
    let by_tensor = map.by_tensor();
    let mut failure = None;
    let mut fill = |index: usize, out: &mut dyn Write| {
        if progress(index, tensors.len()).is_break() {
            failure = Some(ConvertError::Stopped);
            return Err(io::Error::other("stopped"));
        }
        let OutTensor { name, format, .. } = &tensors[index];
        if let Some((_, values)) = divisors.get(index) {
            return write_values(*format, values, out);
        }
        match gather(&job, &reader, &by_tensor[name.as_str()]) {
            Ok(values) => write_values(*format, &values, out),
            Err(error) => {
                failure = Some(error);
                Err(io::Error::other("a tensor cannot be read"))
            }
        }
    };
    let draft = FolderDraft::new(path)?;
    let written = draft.write_file(NAME, |out| file::write(out, &metadata, &tensors, &mut fill));
    if let Some(failure) = failure {
        return Err(failure);
    }
    written?;
    let drafted = draft.path().join(NAME);
    let read = GgufFile::open(&drafted)?;
    model::same_model(job.spec, &model::spec(&read)?)?;
    drop(read);
    let bytes = fs::metadata(&drafted).map_err(FileError::on("read the size of", path))?.len();
    fs::rename(&drafted, path).map_err(FileError::on("rename a new file to", path))?;
    Ok(GgufReport { bytes, tensors: tensors.len(), kept })
}

/// Keys that say what kind of file it is.
fn general(format: Format) -> Vec<(String, OutValue)> {
    // `llama_ftype` of llama.h, and the version of ggml's quantized formats.
    let file_type = match format {
        Format::Bf16 => 32,
        Format::Q8_0 => 7,
        _ => 0,
    };
    let keys = [
        ("general.type", OutValue::Text("model".to_owned())),
        ("general.file_type", OutValue::U32(file_type)),
        ("general.quantization_version", OutValue::U32(2)),
    ];
    keys.map(|(key, value)| (key.to_owned(), value)).into()
}

/// The values of one tensor, from the weights it is made of.
fn gather(
    job: &GgufJob<'_>,
    reader: &WeightReader<'_>,
    slices: &[&TensorSlice],
) -> Result<Vec<f32>, ConvertError> {
    let mut weights: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
    for slice in slices {
        if !weights.contains_key(slice.weight.as_str()) {
            weights.insert(&slice.weight, read_weight(job, reader, &slice.weight)?);
        }
    }
    let only = &slices[0];
    if slices.len() == 1
        && only.placement == cairn_model::Placement::Whole
        && let Some(values) = weights.remove(only.weight.as_str())
    {
        return Ok(values);
    }
    let map = TensorMap { slices: slices.iter().map(|&slice| slice.clone()).collect() };
    let lookup = |weight: &str| weights.get(weight).map(Vec::as_slice);
    Ok(tensor_f32(&map, &only.tensor, &lookup).1)
}

/// A weight of the program in f32, as these files count it.
fn read_weight(
    job: &GgufJob<'_>,
    reader: &WeightReader<'_>,
    weight: &str,
) -> Result<Vec<f32>, ConvertError> {
    let (rows, columns) = reader.shape(weight).unwrap_or_default();
    let mut values = vec![0.0_f32; rows * columns];
    let plain = ValueType::weight(Encoding::F32, Layout::RowMajor, columns);
    reader.read(weight, plain, job.cpu, bytes_of_mut(&mut values))?;
    let offset = Naming::Gguf.offset(job.spec, weight);
    if offset != 0.0 {
        values.iter_mut().for_each(|value| *value -= offset);
    }
    Ok(values)
}

fn write_values(format: Format, values: &[f32], out: &mut dyn Write) -> io::Result<()> {
    let mut bytes = Vec::new();
    for piece in values.chunks(PIECE_ELEMENTS) {
        bytes.clear();
        file::encode(format, piece, &mut bytes)?;
        out.write_all(&bytes)?;
    }
    Ok(())
}

//! Tensors of a family's files → the weights of a session, and back.
//!
//! Weights are read piece by piece, so that loading needs the model's own bytes and one piece, never
//! a second copy of a tensor.

use std::ops::Range;

use cairn_artifacts::safetensors::{SafetensorsFile, TensorView, WeightFolder};
use cairn_kernels::encoding::{Q8_BLOCK, encode, store_q8};
use cairn_kernels::{Encoding, Layout, Weight};
use cairn_program::{Class, Session, ValueType};
use cairn_spec::ModelSpec;
use cairn_spec::model::Family;

use crate::adapter::{AdapterMap, is_adapter_weight};
use crate::names::{Placement, TensorMap, TensorSlice};

/// Rows encoded at a time; a multiple of every panel height.
const ROWS_AT_A_TIME: usize = 256;

/// A set of named tensors: a file, several shards, or memory.
pub trait TensorSource {
    /// Names of all tensors, in any order.
    fn names(&self) -> Vec<String>;

    /// The shape of a tensor; `None` if there is none of this name.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// Reads elements of a tensor, row-major, converted to `f32` without loss.
    ///
    /// # Errors
    ///
    /// A text that says why the tensor cannot be read as floats.
    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String>;

    /// Reads elements of a tensor that is stored as [`Encoding::Q8`] has it: signed bytes, and the
    /// scale of every 32 of them. Returns `false` where the tensor is stored otherwise.
    ///
    /// # Errors
    ///
    /// A text that says why the tensor cannot be read.
    fn read_q8(
        &self,
        _name: &str,
        _elements: Range<usize>,
        _values: &mut [i8],
        _scales: &mut [f32],
    ) -> Result<bool, String> {
        Ok(false)
    }

    /// Whose names the tensors have.
    fn naming(&self) -> Naming {
        Naming::HuggingFace
    }
}

/// Whose names the tensors of a source have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// Those of the family's own files on the Hugging Face Hub.
    HuggingFace,
    /// Those of GGUF files.
    Gguf,
    /// Those of adapters, as PEFT saves them.
    Peft,
}

impl Naming {
    fn map(self, spec: &ModelSpec, has: impl Fn(&str) -> bool) -> Result<TensorMap, LoadError> {
        match self {
            Self::HuggingFace => Ok(TensorMap::of_tensors(spec, has)),
            Self::Gguf => TensorMap::gguf(spec)
                .ok_or(LoadError::NoNames { family: spec.family, naming: "GGUF" }),
            Self::Peft => Err(LoadError::NoNames { family: spec.family, naming: "PEFT" }),
        }
    }

    fn spellings(self, family: Family, tensor: &str) -> Vec<String> {
        match self {
            Self::HuggingFace => TensorMap::spellings(family, tensor),
            Self::Gguf | Self::Peft => vec![tensor.to_owned()],
        }
    }

    fn is_ignorable(self, spec: &ModelSpec, tensor: &str) -> bool {
        match self {
            Self::HuggingFace => TensorMap::is_ignorable(spec, tensor),
            // Its factors are part of the spec.
            Self::Gguf => tensor == crate::gguf::ROPE_FACTORS,
            Self::Peft => false,
        }
    }
}

impl TensorSource for WeightFolder {
    fn names(&self) -> Vec<String> {
        self.tensors().map(|tensor| tensor.name.to_owned()).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensor(name).map(|tensor| tensor.shape.to_vec())
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        read_part(self.tensor(name), elements, out)
    }
}

impl TensorSource for SafetensorsFile {
    fn names(&self) -> Vec<String> {
        self.tensors().map(|tensor| tensor.name.to_owned()).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensor(name).map(|tensor| tensor.shape.to_vec())
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        read_part(self.tensor(name), elements, out)
    }
}

fn read_part(
    tensor: Option<TensorView<'_>>,
    elements: Range<usize>,
    out: &mut [f32],
) -> Result<(), String> {
    let tensor = tensor.ok_or("there is no such tensor")?;
    let size = tensor.dtype.size_bytes();
    let shape = [elements.len()];
    let bytes = tensor
        .bytes
        .get(elements.start * size..elements.end * size)
        .ok_or_else(|| format!("elements {elements:?} lie outside of it"))?;
    let part = TensorView { shape: &shape, bytes, ..tensor };
    part.copy_to_f32(out).map_err(|error| error.to_string())
}

/// Why tensors do not make a model's weights.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The tensors are not those of the spec.
    #[error("the tensors do not fit the configuration: {}", .problems.join("; "))]
    Mismatch {
        /// Every missing, extra and misshaped tensor.
        problems: Vec<String>,
    },
    /// A tensor cannot be read.
    #[error("tensor {name}: {problem}")]
    Unreadable {
        /// Its name.
        name: String,
        /// Why.
        problem: String,
    },
    /// Models of this family are not found under such names.
    #[error("the tensors of {family} models have no {naming} names here")]
    NoNames {
        /// The family.
        family: Family,
        /// Whose names.
        naming: &'static str,
    },
    /// A weight of the program has no tensor in the family's map: a bug in the map.
    #[error("weight {name} has no place in the family's tensors")]
    Unmapped {
        /// The weight.
        name: String,
    },
}

/// Fills the weights of a session from a family's tensors, encoding each as the session stores it.
///
/// # Errors
///
/// [`LoadError::Mismatch`] lists every missing, extra and misshaped tensor; nothing is loaded then.
pub fn load_weights(
    session: &mut Session,
    spec: &ModelSpec,
    source: &dyn TensorSource,
) -> Result<(), LoadError> {
    let map = source.naming().map(spec, |tensor| source.shape(tensor).is_some())?;
    let spelled = check_tensors(spec, &map, (source, source.naming()))?;
    fill(session, &map, |name| !is_adapter_weight(name), source, spelled)
}

/// Fills the adapters' weights of a session from PEFT's tensors.
///
/// # Errors
///
/// [`LoadError::Mismatch`] lists every missing, extra and misshaped tensor; nothing is loaded then.
pub fn load_adapter(
    session: &mut Session,
    spec: &ModelSpec,
    adapters: &AdapterMap,
    source: &dyn TensorSource,
) -> Result<(), LoadError> {
    let map = adapters.tensor_map();
    let spelled = check_tensors(spec, &map, (source, Naming::Peft))?;
    fill(session, &map, is_adapter_weight, source, spelled)
}

/// Fills the weights of a session that `select` picks.
fn fill(
    session: &mut Session,
    map: &TensorMap,
    select: impl Fn(&str) -> bool,
    source: &dyn TensorSource,
    spelled: impl Fn(&str) -> String,
) -> Result<(), LoadError> {
    let weights: Vec<(String, ValueType)> = session
        .persistent()
        .filter(|(name, class, ..)| *class == Class::Weight && select(name))
        .map(|(name, _, value_type, _)| (name.to_owned(), value_type))
        .collect();
    for (name, value_type) in weights {
        let slices = map.slices_of(&name);
        if slices.is_empty() {
            return Err(LoadError::Unmapped { name });
        }
        let stored = session.stored_mut(&name).expect("listed by the session");
        if value_type.encoding() == Some(Encoding::Q8)
            && load_q8(slices, value_type.layout(), stored, source)?
        {
            continue;
        }
        load_weight(slices, value_type, stored, &|tensor, range, out| {
            let tensor = spelled(tensor);
            source
                .read_f32(&tensor, range, out)
                .map_err(|problem| LoadError::Unreadable { name: tensor.clone(), problem })
        })?;
    }
    Ok(())
}

/// Compares the tensors at hand with those the spec needs; returns how each is spelled.
pub(crate) fn check_tensors(
    spec: &ModelSpec,
    map: &TensorMap,
    (source, naming): (&dyn TensorSource, Naming),
) -> Result<impl Fn(&str) -> String + use<>, LoadError> {
    let mut problems = Vec::new();
    let mut spellings = std::collections::BTreeMap::new();
    for (name, expected) in map.tensors() {
        let found = naming
            .spellings(spec.family, name)
            .into_iter()
            .find_map(|spelling| source.shape(&spelling).map(|shape| (spelling, shape)));
        match found {
            None => problems.push(format!("{name} {expected:?} is missing")),
            Some((spelling, shape)) => {
                if shape != expected {
                    problems.push(format!("{name} is {shape:?}, expected {expected:?}"));
                }
                spellings.insert(name.to_owned(), spelling);
            }
        }
    }
    let known: std::collections::BTreeSet<&String> = spellings.values().collect();
    let mut extra: Vec<String> = source.names();
    extra.retain(|name| !known.contains(name) && !naming.is_ignorable(spec, name));
    if problems.is_empty() {
        // With tensors missing, the extra ones are most likely the same under other names.
        problems.extend(extra.into_iter().map(|name| format!("{name} has no place in the model")));
    } else {
        problems.extend(extra.into_iter().map(|name| format!("{name} is there instead")));
    }
    if problems.is_empty() {
        Ok(move |name: &str| spellings[name].clone())
    } else {
        Err(LoadError::Mismatch { problems })
    }
}

type Read<'a> = dyn Fn(&str, Range<usize>, &mut [f32]) -> Result<(), LoadError> + 'a;

fn load_weight(
    slices: &[TensorSlice],
    value_type: ValueType,
    stored: &mut [u8],
    read: &Read<'_>,
) -> Result<(), LoadError> {
    let rows: usize = slices.iter().map(|slice| slice.rows).sum();
    let columns = slices[0].columns;
    let encoding = value_type.encoding().expect("a weight has an encoding");
    let layout = value_type.layout();
    let at_a_time = ROWS_AT_A_TIME.min(rows);
    let mut piece = vec![0.0; at_a_time * columns];
    for first in (0..rows).step_by(at_a_time.max(1)) {
        let count = at_a_time.min(rows - first);
        let values = &mut piece[..count * columns];
        for slice in slices {
            let from = first.max(slice.first_row);
            let to = (first + count).min(slice.first_row + slice.rows);
            if from < to {
                let values = &mut values[(from - first) * columns..(to - first) * columns];
                read_rows(slice, from - slice.first_row, values, read)?;
            }
        }
        encode_rows((encoding, layout), (rows, columns), first, values, stored);
    }
    Ok(())
}

/// Encodes rows of a weight of `rows` rows, from row `first` on, a multiple of every panel height, into
/// its bytes `stored`.
pub(crate) fn encode_rows(
    (encoding, layout): (Encoding, Layout),
    (rows, columns): (usize, usize),
    first: usize,
    values: &[f32],
    stored: &mut [u8],
) {
    let count = values.len() / columns;
    let bytes = |rows| Weight::stored_bytes(encoding, layout, rows, columns);
    if encoding != Encoding::Q8 || count == rows {
        let target = &mut stored[bytes(first)..][..bytes(count)];
        return encode((encoding, layout), (count, columns), values, target);
    }
    // The scales of a q8 weight lie behind all of its values.
    let scale_bytes = |rows: usize| layout.stored_rows(rows) * columns.div_ceil(Q8_BLOCK) * 4;
    let mut piece = vec![0; bytes(count)];
    encode((encoding, layout), (count, columns), values, &mut piece);
    let value_bytes = layout.stored_rows(count) * columns;
    let scales = &piece[bytes(count) - scale_bytes(count)..];
    stored[layout.stored_rows(first) * columns..][..value_bytes]
        .copy_from_slice(&piece[..value_bytes]);
    let behind = bytes(rows) - scale_bytes(rows) + scale_bytes(first);
    stored[behind..][..scales.len()].copy_from_slice(scales);
}

/// Keeps a weight as the source has it, if all of it lies there in blocks of [`Encoding::Q8`];
/// otherwise changes nothing and returns `false`.
fn load_q8(
    slices: &[TensorSlice],
    layout: Layout,
    stored: &mut [u8],
    source: &dyn TensorSource,
) -> Result<bool, LoadError> {
    let (rows, columns) = (slices.iter().map(|slice| slice.rows).sum(), slices[0].columns);
    let plain =
        |slice: &TensorSlice| !matches!(slice.placement, Placement::TransposedColumns { .. });
    if !columns.is_multiple_of(Q8_BLOCK) || !slices.iter().all(plain) {
        return Ok(false);
    }
    let blocks = columns / Q8_BLOCK;
    let (mut values, mut scales) = (vec![0; rows * columns], vec![0.0; rows * blocks]);
    for slice in slices {
        let mut done = 0;
        while done < slice.rows {
            let (row, run) = slice.run_at(done);
            let first = slice.first_row + done;
            let read = source
                .read_q8(
                    &slice.tensor,
                    row * columns..(row + run) * columns,
                    &mut values[first * columns..(first + run) * columns],
                    &mut scales[first * blocks..(first + run) * blocks],
                )
                .map_err(|problem| LoadError::Unreadable { name: slice.tensor.clone(), problem })?;
            if !read {
                return Ok(false);
            }
            done += run;
        }
    }
    store_q8(layout, (rows, columns), (&values, &scales), stored);
    Ok(true)
}

/// Reads rows out of the tensor that holds them, from the slice's row `first` on, as many as fill
/// `values`.
fn read_rows(
    slice: &TensorSlice,
    first: usize,
    values: &mut [f32],
    read: &Read<'_>,
) -> Result<(), LoadError> {
    let columns = slice.columns;
    let count = values.len() / columns;
    if let Placement::TransposedColumns { start } = slice.placement {
        let width = slice.shape[1];
        let mut outputs = vec![0.0; count];
        for input in 0..columns {
            let at = input * width + start + first;
            read(&slice.tensor, at..at + count, &mut outputs)?;
            for (row, &value) in outputs.iter().enumerate() {
                values[row * columns + input] = value;
            }
        }
        return Ok(());
    }
    let mut done = 0;
    while done < count {
        let (row, run) = slice.run_at(first + done);
        let run = run.min(count - done);
        let values = &mut values[done * columns..(done + run) * columns];
        read(&slice.tensor, row * columns..(row + run) * columns, values)?;
        done += run;
    }
    Ok(())
}

/// One tensor of the family's files, gathered from a lookup of the weights' `f32` values: the
/// weights themselves, their gradients or their moments.
///
/// # Panics
///
/// Panics if `tensor` is not in the map or `value` lacks one of its weights.
pub fn tensor_f32<'a>(
    map: &TensorMap,
    tensor: &str,
    value: &dyn Fn(&str) -> Option<&'a [f32]>,
) -> (Vec<usize>, Vec<f32>) {
    let slices: Vec<&TensorSlice> =
        map.slices.iter().filter(|slice| slice.tensor == tensor).collect();
    let shape = slices.first().expect("the tensor is in the map").shape.clone();
    let mut out = vec![0.0; shape.iter().product()];
    for slice in slices {
        let columns = slice.columns;
        let values = value(&slice.weight).expect("every weight of the tensor has values");
        let values = &values[slice.first_row * columns..][..slice.rows * columns];
        if let Placement::TransposedColumns { start } = slice.placement {
            let width = slice.shape[1];
            for (row, inputs) in values.chunks_exact(columns).enumerate() {
                for (input, &value) in inputs.iter().enumerate() {
                    out[input * width + start + row] = value;
                }
            }
            continue;
        }
        let mut done = 0;
        while done < slice.rows {
            let (row, run) = slice.run_at(done);
            let values = &values[done * columns..(done + run) * columns];
            out[row * columns..(row + run) * columns].copy_from_slice(values);
            done += run;
        }
    }
    (shape, out)
}

/// The names of a model's tensors, as saved.
pub fn tensors(spec: &ModelSpec) -> Vec<(String, Vec<usize>)> {
    let map = TensorMap::new(spec);
    map.tensors().into_iter().map(|(name, shape)| (name.to_owned(), shape.to_vec())).collect()
}

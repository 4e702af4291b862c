//! Tensors of a family's files → the weights of a session, and back.
//!
//! Weights are read piece by piece, so that loading needs the model's own bytes and a piece for each
//! thread, never a second copy of a tensor. What has been read of a mapped file is given back to the
//! page cache, so that no more of the file than one tensor counts as this process's memory.
//!
//! - `fill`: one weight after the other, kept as it is stored where that is the encoding wanted.
//! - `copies`: tensors that repeat another are compared with it.
//! - `lent`: weights that are read where the file has them, and not loaded at all.
//! - `reader`: the same for one weight, into memory of the caller's.
//! - `stored`: which encodings keep all that a source holds.

mod copies;
mod fill;
pub(crate) mod lent;
mod reader;
mod stored;

use std::ops::Range;

use cairn_artifacts::safetensors::{SafetensorsFile, TensorView, WeightFolder};
use cairn_kernels::encoding::{EncodeError, encode};
use cairn_kernels::{Cpu, Encoding, Layout, Weight};
use cairn_program::{LentWeights, MemoryPlan, Session};
use cairn_spec::model::Family;
use cairn_spec::{DType, Hint, ModelSpec};

use crate::adapter::{AdapterMap, is_adapter_weight, kept_base};
use crate::names::{Placement, TensorMap, TensorSlice};

use fill::Coverage;
pub(crate) use fill::read_weight;

pub use lent::FolderSource;
pub use reader::WeightReader;
pub use stored::{StoredError, StoredWeights, Widening, stored_weights};

/// A set of named tensors: a file, several shards, or memory.
pub trait TensorSource: Sync {
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

    /// Reads elements of a tensor that is stored as `encoding` has it, [`Encoding::Q8`] or
    /// [`Encoding::Q4`]: values as signed bytes, those of `q4` from -8 to 7, and the scale of every 32 of
    /// them. Returns `false`, and reads nothing, where the tensor is stored otherwise.
    ///
    /// # Errors
    ///
    /// A text that says why the tensor cannot be read.
    fn read_codes(
        &self,
        _encoding: Encoding,
        _name: &str,
        _elements: Range<usize>,
        (_values, _scales): (&mut [i8], &mut [f32]),
    ) -> Result<bool, String> {
        Ok(false)
    }

    /// The encoding that has every element of a tensor exactly as it is stored; `None` if there is none
    /// such.
    fn encoding(&self, _name: &str) -> Option<Encoding> {
        None
    }

    /// Reads elements of a tensor whose [`encoding`](Self::encoding) is `bf16` or `f16` as their bits.
    ///
    /// # Errors
    ///
    /// A text that says why the tensor cannot be read so.
    fn read_bits(
        &self,
        _name: &str,
        _elements: Range<usize>,
        _out: &mut [u16],
    ) -> Result<(), String> {
        Err("its elements do not have sixteen bits".to_owned())
    }

    /// Is told that a tensor has been read, so that its memory may be given back. It may still be read
    /// again.
    fn release(&self, _name: &str) {}

    /// Fills a weight from a tensor that is stored byte for byte as it wants it. Returns `false` where
    /// the tensor is stored otherwise.
    ///
    /// # Errors
    ///
    /// A text that says why the tensor cannot be read.
    fn read_stored(
        &self,
        _name: &str,
        _form: (Encoding, Layout),
        _cpu: &Cpu,
        _out: &mut [u8],
    ) -> Result<bool, String> {
        Ok(false)
    }

    /// Lends weights of the plan's programs where they lie, those that lie as programs can read them and
    /// that nobody can change meanwhile; the others are read by copies.
    ///
    /// # Errors
    ///
    /// [`LoadError::Unreadable`] naming a tensor that is not what it should be.
    fn lend(
        &self,
        _spec: &ModelSpec,
        _plan: &MemoryPlan,
        _cpu: &Cpu,
    ) -> Result<Vec<LentWeights>, LoadError> {
        Ok(Vec::new())
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
    /// Those of the program's own weights.
    Program,
}

impl Naming {
    fn map(self, spec: &ModelSpec, has: impl Fn(&str) -> bool) -> Result<TensorMap, LoadError> {
        match self {
            Self::HuggingFace => Ok(TensorMap::of_tensors(spec, has)),
            Self::Gguf => TensorMap::gguf_of_tensors(spec, has)
                .ok_or(LoadError::NoNames { family: spec.family, naming: "GGUF" }),
            Self::Peft => Err(LoadError::NoNames { family: spec.family, naming: "PEFT" }),
            Self::Program => Ok(TensorMap::of_program(spec)),
        }
    }

    fn spellings(self, family: Family, tensor: &str) -> Vec<String> {
        match self {
            Self::HuggingFace => TensorMap::spellings(family, tensor),
            Self::Gguf | Self::Peft | Self::Program => vec![tensor.to_owned()],
        }
    }

    fn is_ignorable(self, spec: &ModelSpec, tensor: &str) -> bool {
        match self {
            Self::HuggingFace => TensorMap::is_ignorable(spec, tensor),
            // Their factors are part of the spec.
            Self::Gguf => {
                tensor == crate::gguf::ROPE_FACTORS
                    || crate::gguf::ROPE_FACTORS_LONG.contains(&tensor)
            }
            Self::Peft | Self::Program => false,
        }
    }

    /// Tensors that files may hold besides the weights and that repeat one of them: the copy, and
    /// what it repeats.
    fn copies(self, spec: &ModelSpec) -> Vec<(String, String)> {
        match self {
            Self::HuggingFace => TensorMap::copies(spec),
            Self::Gguf | Self::Peft | Self::Program => Vec::new(),
        }
    }

    /// What is added to a vector of the source: GGUF files hold Gemma's norms counted from zero, its
    /// own files and programs count from one. Where the sum is at least 1/2, subtracting 1 is exact,
    /// and what the norm multiplies by is the file's number; below, it is within 2⁻²⁵ of it.
    pub fn offset(self, spec: &ModelSpec, weight: &str) -> f32 {
        let shifted = self == Self::Gguf && spec.norm.plus_one && weight.ends_with("norm.weight");
        if shifted { -1.0 } else { 0.0 }
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
        let part = part(self.tensor(name), elements)?;
        part.copy_to_f32(out).map_err(|error| error.to_string())
    }

    fn encoding(&self, name: &str) -> Option<Encoding> {
        encoding_of(self.tensor(name)?.dtype)
    }

    fn read_bits(&self, name: &str, elements: Range<usize>, out: &mut [u16]) -> Result<(), String> {
        copy_bits(part(self.tensor(name), elements)?.bytes, out)
    }

    fn release(&self, name: &str) {
        if let Some(file) = self.file_of(name) {
            TensorSource::release(file, name);
        }
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
        let part = part(self.tensor(name), elements)?;
        part.copy_to_f32(out).map_err(|error| error.to_string())
    }

    fn encoding(&self, name: &str) -> Option<Encoding> {
        encoding_of(self.tensor(name)?.dtype)
    }

    fn read_bits(&self, name: &str, elements: Range<usize>, out: &mut [u16]) -> Result<(), String> {
        copy_bits(part(self.tensor(name), elements)?.bytes, out)
    }

    fn release(&self, name: &str) {
        if let Some(tensor) = self.header().tensor(name) {
            self.file().release(tensor.offset..tensor.offset + tensor.bytes);
        }
    }
}

/// Elements of a tensor, as a tensor of one dimension but for its shape.
fn part(tensor: Option<TensorView<'_>>, elements: Range<usize>) -> Result<TensorView<'_>, String> {
    let tensor = tensor.ok_or("there is no such tensor")?;
    let size = tensor.dtype.size_bytes();
    let bytes = tensor
        .bytes
        .get(elements.start * size..elements.end * size)
        .ok_or_else(|| format!("elements {elements:?} lie outside of it"))?;
    Ok(TensorView { bytes, ..tensor })
}

/// The encoding of a tensor file's type.
fn encoding_of(dtype: DType) -> Option<Encoding> {
    match dtype {
        DType::F32 => Some(Encoding::F32),
        DType::Bf16 => Some(Encoding::Bf16),
        DType::F16 => Some(Encoding::F16),
        _ => None,
    }
}

/// Copies little-endian words of sixteen bits.
pub(crate) fn copy_bits(bytes: &[u8], out: &mut [u16]) -> Result<(), String> {
    let (words, rest) = bytes.as_chunks::<2>();
    if words.len() != out.len() || !rest.is_empty() {
        return Err(format!("{} bytes are not {} elements", bytes.len(), out.len()));
    }
    for (out, word) in out.iter_mut().zip(words) {
        *out = u16::from_le_bytes(*word);
    }
    Ok(())
}

/// Why tensors do not make a model's weights.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The tensors are not those of the spec.
    #[error("the tensors do not fit the configuration:{}", listed(.problems))]
    Mismatch {
        /// Every missing, extra and misshaped tensor.
        problems: Vec<String>,
    },
    /// A tensor that must repeat another is a different one.
    #[error(
        "{copy} must be the same as {original}, but its element {element} is {copied} instead of {expected}"
    )]
    Copy {
        /// The copy, which is not used.
        copy: String,
        /// The tensor that is used.
        original: String,
        /// The first element that differs.
        element: usize,
        /// What it is in the copy.
        copied: Box<str>,
        /// What it is in the tensor that is used.
        expected: Box<str>,
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
    /// Values are beyond what the encoding that was asked for can hold.
    #[error("as {encoding} these would be infinite:{}", listed(.tensors))]
    Overflow {
        /// The encoding.
        encoding: Encoding,
        /// How many values of each weight, and the largest.
        tensors: Vec<String>,
    },
    /// A weight cannot be encoded as was asked for.
    #[error("{name} cannot be stored as {encoding}: {problem}")]
    Unencodable {
        /// The weight's first tensor.
        name: String,
        /// The encoding.
        encoding: Encoding,
        /// Why.
        problem: EncodeError,
    },
    /// The family's map has not every row of a weight once: a bug in the map.
    #[error("not all of the {rows} rows of weight {name} have one place in the family's tensors")]
    Rows {
        /// The weight.
        name: String,
        /// Its rows.
        rows: usize,
    },
    /// A weight of the program has no tensor in the family's map: a bug in the map.
    #[error("weight {name} has no place in the family's tensors")]
    Unmapped {
        /// The weight.
        name: String,
    },
}

/// Problems that a message shows; the rest is counted.
const PROBLEMS_SHOWN_MAX: usize = 10;

/// One problem on the line, several on a line each.
fn listed(problems: &[String]) -> String {
    if let [only] = problems {
        return format!(" {only}");
    }
    let shown = problems.iter().take(PROBLEMS_SHOWN_MAX);
    let mut text: String = shown.flat_map(|problem| ["\n  ", problem]).collect();
    if problems.len() > PROBLEMS_SHOWN_MAX {
        text.push_str(&format!("\n  and {} more", problems.len() - PROBLEMS_SHOWN_MAX));
    }
    text
}

impl Hint for LoadError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Copy { copy, original, .. } => {
                let mut hints = Vec::new();
                if copy.ends_with(".weight") {
                    let say = "set tie_word_embeddings to false in config.json";
                    hints.push(format!("if {copy} is a head of its own, {say}"));
                }
                hints.push(format!("if {original} is meant, remove {copy} from the file"));
                hints
            }
            Self::Overflow { encoding: Encoding::F16, .. } => {
                vec!["bf16 has the range of f32 and takes as many bytes as f16".to_owned()]
            }
            Self::Overflow { .. } => vec!["f32 holds them".to_owned()],
            Self::Unencodable { encoding: Encoding::Bf16z, .. } => {
                vec!["bf16 holds the same values in 16 bits instead of 12".to_owned()]
            }
            Self::Mismatch { .. }
            | Self::Unreadable { .. }
            | Self::NoNames { .. }
            | Self::Unencodable { .. }
            | Self::Rows { .. }
            | Self::Unmapped { .. } => Vec::new(),
        }
    }
}

/// Fills the weights of a session from a family's tensors, but for those that it was lent, encoding each
/// as the session stores it: kept bit for bit where the tensor is stored so, otherwise rounded to the
/// nearest, ties to even.
///
/// # Errors
///
/// [`LoadError::Mismatch`] lists every missing, extra and misshaped tensor, [`LoadError::Copy`] names a
/// second head that a tied model would not use; nothing is loaded then. [`LoadError::Overflow`] lists the
/// weights with finite values that the encoding makes infinite.
pub fn load_weights(
    session: &mut Session,
    spec: &ModelSpec,
    source: &dyn TensorSource,
) -> Result<(), LoadError> {
    let map = source.naming().map(spec, |tensor| source.shape(tensor).is_some())?;
    let spelled = check_tensors(spec, &map, (source, source.naming()))?;
    copies::check(spec, source)?;
    let offset = |weight: &str| source.naming().offset(spec, weight);
    let select = |name: &str| !is_adapter_weight(name);
    fill::fill(session, (&map, Coverage::All), select, (source, &spelled), &offset)
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
    let map = (&map, Coverage::Some);
    fill::fill(session, map, is_adapter_weight, (source, &spelled), &|_| 0.0)
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
    // A copy of what is not there is no copy: it is one of the extra tensors.
    let copies: std::collections::BTreeMap<String, String> =
        naming.copies(spec).into_iter().filter(|(_, of)| spellings.contains_key(of)).collect();
    for (copy, original) in &copies {
        let (shape, expected) = (source.shape(copy), source.shape(&spellings[original]));
        if let (Some(shape), Some(expected)) = (shape, expected)
            && shape != expected
        {
            problems.push(format!("{copy} is {shape:?}, expected {expected:?} as {original}"));
        }
    }
    let kept = if naming == Naming::Peft { kept_base(map) } else { Vec::new() };
    for (name, expected) in &kept {
        if let Some(shape) = source.shape(name).filter(|shape| shape != expected) {
            problems.push(format!("{name} is {shape:?}, expected {expected:?}"));
        }
    }
    let kept_names = kept.iter().map(|(name, _)| name);
    let known: std::collections::BTreeSet<&String> =
        spellings.values().chain(copies.keys()).chain(kept_names).collect();
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

/// Encodes rows of a weight, from row `first` on, a multiple of every panel height, into its bytes
/// `stored`.
pub(crate) fn encode_rows(
    (encoding, layout): (Encoding, Layout),
    columns: usize,
    first: usize,
    values: &[f32],
    stored: &mut [u8],
) {
    let count = values.len() / columns;
    let bytes = |rows| Weight::stored_bytes(encoding, layout, rows, columns);
    let target = &mut stored[bytes(first)..][..bytes(count)];
    encode((encoding, layout), (count, columns), values, target);
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
            let width = slice.width();
            for (row, inputs) in values.chunks_exact(columns).enumerate() {
                for (input, &value) in inputs.iter().enumerate() {
                    out[input * width + start + row] = value;
                }
            }
            continue;
        }
        if let Placement::ColumnsByTurns { start, parts } = slice.placement {
            let (width, rows) = (slice.width(), slice.rows / parts);
            for (row, inputs) in values.chunks_exact(columns).enumerate() {
                let first = (start + row % rows) * width + row / rows;
                for (input, &value) in inputs.iter().enumerate() {
                    out[first + input * parts] = value;
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

//! A leanpack as a source of tensors: the program's own weights, stored as kernels read them.
//!
//! A weight that a session wants in the pack's form is read where it lies, in the mapped file, if the
//! system keeps others from changing it (`cairn_artifacts::lease`); otherwise it is copied, by all
//! threads, with no other work on it. In any other form it is decoded and encoded again, which a
//! strict source refuses.
//!
//! Whether lists of exceptions name what the codes say is checked however they are read: a list that does
//! not would be read in more than one way.

mod mapped;

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use cairn_artifacts::LeaseError;
use cairn_artifacts::leanpack::{CHUNK_BYTES, PackError, PackErrorKind, PackFile, TensorEntry};
use cairn_kernels::encoding::{DamagedList, Q8_BLOCK, convert_layout, load_q8};
use cairn_kernels::memory::{bytes_of, bytes_of_mut};
use cairn_kernels::{Cpu, Encoding, Layout, Weight};
use cairn_program::{LentWeights, MemoryPlan, ValueType};
use cairn_spec::ModelSpec;

use crate::load::lent::{LentFile, Notice, populate};
use crate::load::{LoadError, Naming, TensorSource};

/// Rows converted at a time; a multiple of [`PANEL_ROWS`].
const ROWS_AT_A_TIME: usize = 256;
/// A part of a weight begins at a multiple of this: the height of a panel.
const PANEL_ROWS: usize = 16;
/// Bytes that a thread reads at a time: what was read is still in its cache when it is hashed, and
/// even a small matrix is work for several threads.
const READ_BYTES: usize = CHUNK_BYTES;

/// How carefully a pack is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackCheck {
    /// Compares every chunk with its hash as it is read. Without it, the header, the sizes and the
    /// small files are checked and the weights are not.
    pub verify: bool,
    /// Refuses to give a weight in another form than it is stored in.
    pub strict: bool,
}

/// A pack whose weights can be loaded.
#[derive(Debug)]
pub struct PackSource {
    pack: PackFile,
    check: PackCheck,
    /// Why its weights were not lent, where they were asked for.
    copied: OnceLock<String>,
    /// Who is told that lent weights were copied after all.
    notice: Option<Notice>,
}

/// The form of a weight, in the kernels' terms.
#[derive(Clone, Copy)]
struct Form {
    encoding: Encoding,
    layout: Layout,
    rows: usize,
    columns: usize,
}

impl PackSource {
    /// Takes a pack whose encodings and layouts there are kernels for.
    ///
    /// # Errors
    ///
    /// [`PackErrorKind::UnknownEncoding`] or [`PackErrorKind::UnknownLayout`] naming the tensor.
    pub fn new(pack: PackFile, check: PackCheck) -> Result<Self, PackError> {
        for tensor in &pack.header().tensors {
            let form = form_of(tensor);
            form.map_err(|kind| PackError::Unsound { path: pack.path().to_owned(), kind })?;
        }
        Ok(Self { pack, check, copied: OnceLock::new(), notice: None })
    }

    /// Has somebody told when weights that were lent are copied amid a run, because somebody else wants to
    /// change the file.
    #[must_use]
    pub fn with_notice(self, notice: impl Fn() + Send + Sync + 'static) -> Self {
        Self { notice: Some(Notice(Arc::new(notice))), ..self }
    }

    /// The pack.
    pub fn pack(&self) -> &PackFile {
        &self.pack
    }

    /// How carefully it is read.
    pub fn check(&self) -> PackCheck {
        self.check
    }

    /// Why the weights were copied where they could have been lent; `None` where they were lent, or
    /// nobody asked.
    pub fn copied_because(&self) -> Option<&str> {
        self.copied.get().map(String::as_str)
    }

    /// Has the weights copied, for a reason.
    fn copies(&self, reason: impl Into<String>) -> Option<LentWeights> {
        // What was found first stays: every session of this process copies for the same reason.
        let _known = self.copied.set(reason.into());
        None
    }

    /// Encoding and layout of the weight matrices: where they differ, those that have most of the bytes.
    pub fn storage(&self) -> (Encoding, Layout) {
        let mut bytes: Vec<((Encoding, Layout), u64)> = Vec::new();
        for (tensor, form) in self.matrices() {
            let form = (form.encoding, form.layout);
            match bytes.iter_mut().find(|(known, _)| *known == form) {
                Some((_, sum)) => *sum += tensor.bytes,
                None => bytes.push((form, tensor.bytes)),
            }
        }
        let most = bytes.into_iter().max_by_key(|(_, bytes)| *bytes);
        most.map_or((Encoding::F32, Layout::RowMajor), |(form, _)| form)
    }

    /// The encoding of each weight matrix.
    pub fn encodings(&self) -> BTreeMap<String, Encoding> {
        self.matrices().map(|(tensor, form)| (tensor.name.clone(), form.encoding)).collect()
    }

    fn matrices(&self) -> impl Iterator<Item = (&TensorEntry, Form)> {
        let matrices = self.pack.header().tensors.iter().filter(|tensor| tensor.dims.len() == 2);
        matrices.filter_map(|tensor| Some((tensor, form_of(tensor).ok()?)))
    }

    /// The weights where they lie, if nobody can change them meanwhile.
    ///
    /// # Errors
    ///
    /// [`LoadError::Unreadable`] naming a tensor that is not what it should be.
    pub fn map(&self, cpu: &Cpu) -> Result<Option<LentWeights>, LoadError> {
        let mapped = match self.pack.map_weights() {
            Ok(mapped) => mapped,
            Err(error @ LeaseError::Changed) => {
                let first = self.pack.header().tensors.first();
                let name = first.map(|tensor| tensor.name.clone()).unwrap_or_default();
                return Err(LoadError::Unreadable { name, problem: error.to_string() });
            }
            Err(error) => return Ok(self.copies(error.to_string())),
        };
        let all = 0..mapped.bytes().len();
        if !populate(&mapped, &[all], cpu) {
            return Ok(self.copies("not all of it could be read where it lies"));
        }
        let is_verified = !self.check.verify || self.check_mapped(&mapped, cpu)?;
        if !is_verified || !self.check_lists(&mapped, cpu)? {
            return Ok(self.copies("somebody wants to change the file"));
        }
        let mut places = BTreeMap::new();
        for tensor in &self.pack.header().tensors {
            let Ok(form) = form_of(tensor) else { continue };
            let value_type = ValueType::weight(form.encoding, form.layout, form.columns);
            let (offset, bytes) = (usize::try_from(tensor.offset), usize::try_from(tensor.bytes));
            if let (Ok(offset), Ok(bytes)) = (offset, bytes) {
                places.insert(tensor.name.clone(), (value_type, offset..offset + bytes));
            }
        }
        let lent = LentFile { mapped, notice: self.notice.clone() };
        Ok(Some(LentWeights { memory: Box::new(lent), places }))
    }

    fn tensor(&self, name: &str) -> Result<(&TensorEntry, Form), String> {
        let tensor = self.pack.tensor(name).ok_or("there is no such tensor")?;
        let form = form_of(tensor).map_err(|kind| kind.to_string())?;
        Ok((tensor, form))
    }

    /// Reads rows of a weight, as a weight of their own whose first row is `rows.start`; `rows.start`
    /// is a multiple of the panel height. `buffer` becomes the bytes.
    fn read_rows(
        &self,
        (tensor, form): (&TensorEntry, Form),
        rows: Range<usize>,
        buffer: &mut Vec<f32>,
    ) -> Result<Form, PackError> {
        let Form { encoding, layout, columns, .. } = form;
        let part = Form { rows: rows.len(), ..form };
        let bytes = Weight::stored_bytes(encoding, layout, part.rows, columns);
        buffer.resize(bytes.div_ceil(4), 0.0);
        let out = &mut bytes_of_mut(buffer)[..bytes];
        let before = Weight::stored_bytes(encoding, layout, rows.start, columns);
        self.pack.read_at(tensor, before as u64, out)?;
        Ok(part)
    }

    /// Hands rows of a weight to `take`, in its own encoding and row-major if that has such, until it has
    /// had `elements`:
    /// with each part of them, which elements of the weight it holds.
    fn parts(
        &self,
        (tensor, form): (&TensorEntry, Form),
        elements: &Range<usize>,
        take: &mut dyn FnMut(Weight<'_>, Range<usize>),
    ) -> Result<(), String> {
        let (encoding, columns) = (form.encoding, form.columns);
        if self.check.strict {
            let layout = form.layout.name();
            return Err(format!(
                "it is stored as {encoding} {layout} and would be converted, which a strict source refuses"
            ));
        }
        if elements.end > form.rows * columns {
            return Err(format!("elements {elements:?} lie outside of it"));
        }
        let (mut buffer, mut plain) = (Vec::new(), Vec::new());
        let last_row = elements.end.div_ceil(columns.max(1));
        let mut first_row = elements.start / columns.max(1) / PANEL_ROWS * PANEL_ROWS;
        while first_row < last_row {
            let end = last_row.next_multiple_of(PANEL_ROWS).min(form.rows);
            let rows = first_row..end.min(first_row + ROWS_AT_A_TIME);
            let read = self.read_rows((tensor, form), rows.clone(), &mut buffer);
            let part = read.map_err(|error| told(&error))?;
            let size = |layout| Weight::stored_bytes(encoding, layout, part.rows, columns);
            let bytes = &bytes_of(&buffer)[..size(part.layout)];
            let stored = Weight { encoding, layout: part.layout, n: part.rows, k: columns, bytes };
            stored.check_lists(0..part.rows.div_ceil(PANEL_ROWS)).map_err(|damaged| {
                let [first_row, last_row] =
                    [damaged.first_row, damaged.last_row].map(|row| row + rows.start);
                DamagedList { first_row, last_row, ..damaged }.to_string()
            })?;
            let layout = encoding.layout_near(Layout::RowMajor);
            plain.resize(size(layout).div_ceil(4), 0.0_f32);
            let bytes = &mut bytes_of_mut(&mut plain)[..size(layout)];
            convert_layout(stored, layout, bytes);
            take(Weight { layout, bytes, ..stored }, rows.start * columns..rows.end * columns);
            first_row = rows.end;
        }
        // Bytes of a file that was changed meanwhile are not those of its header.
        self.pack.check_unchanged().map_err(|error| told(&error))
    }
}

/// Copies what a part of a tensor has of the elements that are asked for.
fn copy_common<T: Copy>(from: (&[T], &Range<usize>), to: (&mut [T], &Range<usize>)) {
    let begin = to.1.start.max(from.1.start);
    let end = to.1.end.min(from.1.end);
    if begin < end {
        to.0[begin - to.1.start..end - to.1.start]
            .copy_from_slice(&from.0[begin - from.1.start..end - from.1.start]);
    }
}

impl TensorSource for PackSource {
    fn names(&self) -> Vec<String> {
        self.pack.header().tensors.iter().map(|tensor| tensor.name.clone()).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let dims = self.pack.tensor(name)?.dims.iter();
        dims.map(|&dim| usize::try_from(dim).ok()).collect()
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        let mut values = Vec::new();
        self.parts(self.tensor(name)?, &elements, &mut |weight, held| {
            values.resize(held.len(), 0.0);
            weight.decode(&mut values);
            copy_common((&values, &held), (out, &elements));
        })
    }

    fn encoding(&self, name: &str) -> Option<Encoding> {
        self.tensor(name).ok().map(|(_, form)| form.encoding)
    }

    fn read_bits(&self, name: &str, elements: Range<usize>, out: &mut [u16]) -> Result<(), String> {
        let (tensor, form) = self.tensor(name)?;
        if !matches!(form.encoding, Encoding::Bf16 | Encoding::F16) {
            return Err(format!("it is stored as {}", form.encoding));
        }
        self.parts((tensor, form), &elements, &mut |weight, held| {
            let (words, _) = weight.bytes.as_chunks::<2>();
            let words: Vec<u16> = words.iter().map(|&word| u16::from_le_bytes(word)).collect();
            copy_common((&words, &held), (out, &elements));
        })
    }

    fn read_codes(
        &self,
        encoding: Encoding,
        name: &str,
        elements: Range<usize>,
        (values, scales): (&mut [i8], &mut [f32]),
    ) -> Result<bool, String> {
        let (tensor, form) = self.tensor(name)?;
        // Codes of four bits leave a pack only as they are stored.
        let is_q8 = (encoding, form.encoding) == (Encoding::Q8, Encoding::Q8);
        if !is_q8 || !form.columns.is_multiple_of(Q8_BLOCK) {
            return Ok(false);
        }
        let blocks = elements.start / Q8_BLOCK..elements.end / Q8_BLOCK;
        self.parts((tensor, form), &elements, &mut |weight, held| {
            let (mut bytes, mut words) = (vec![0; held.len()], vec![0.0; held.len() / Q8_BLOCK]);
            load_q8(weight, &mut bytes, &mut words);
            copy_common((&bytes, &held), (values, &elements));
            let held = held.start / Q8_BLOCK..held.end / Q8_BLOCK;
            copy_common((&words, &held), (scales, &blocks));
        })?;
        Ok(true)
    }

    fn read_stored(
        &self,
        name: &str,
        (encoding, layout): (Encoding, Layout),
        cpu: &Cpu,
        out: &mut [u8],
    ) -> Result<bool, String> {
        let (tensor, form) = self.tensor(name)?;
        if (form.encoding, form.layout) != (encoding, layout) || tensor.bytes != out.len() as u64 {
            return Ok(false);
        }
        let failure = Mutex::new(None);
        cpu.parallel_chunks(out, READ_BYTES, |first, bytes, _| {
            let read = match self.check.verify {
                true => self.pack.read_checked_at(tensor, first as u64, bytes),
                false => self.pack.read_at(tensor, first as u64, bytes),
            };
            if let (Err(error), Ok(mut failure)) = (read, failure.lock()) {
                failure.get_or_insert(error);
            }
        });
        match failure.into_inner() {
            Ok(None) => {
                self.pack.check_unchanged().map_err(|error| told(&error))?;
                Self::check_own_lists(form, out, cpu).map(|()| true)
            }
            Ok(Some(error)) => Err(told(&error)),
            Err(_) => Err("a thread that read it ended".to_owned()),
        }
    }

    fn lend(
        &self,
        _spec: &ModelSpec,
        _plan: &MemoryPlan,
        cpu: &Cpu,
    ) -> Result<Vec<LentWeights>, LoadError> {
        Ok(self.map(cpu)?.into_iter().collect())
    }

    fn naming(&self) -> Naming {
        Naming::Program
    }
}

/// The kernels' names for a tensor's form.
fn form_of(tensor: &TensorEntry) -> Result<Form, PackErrorKind> {
    let encoding = Encoding::ALL.into_iter().find(|known| known.name() == tensor.encoding);
    let layout = Layout::ALL.into_iter().find(|known| known.name() == tensor.layout);
    let encoding = encoding.ok_or_else(|| PackErrorKind::UnknownEncoding {
        tensor: tensor.name.clone(),
        found: tensor.encoding.clone(),
    })?;
    let layout = layout.ok_or_else(|| PackErrorKind::UnknownLayout {
        tensor: tensor.name.clone(),
        found: tensor.layout.clone(),
    })?;
    let size = |index: usize| {
        let dim = tensor.dims.get(index).copied().unwrap_or(1);
        usize::try_from(dim).unwrap_or(usize::MAX)
    };
    Ok(Form { encoding, layout, rows: size(0), columns: size(1) })
}

/// An error with its causes in one line.
fn told(error: &PackError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;

//! Weights that programs read where a file has them: mapped, under a lease.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use cairn_artifacts::lease::LeasedFile;
use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_kernels::{Cpu, Encoding, Layout, Lent};
use cairn_program::{LentWeights, MemoryPlan, ValueType};
use cairn_spec::ModelSpec;

use super::{LoadError, TensorSource, check_tensors, encoding_of};
use crate::names::{Placement, TensorSlice};

/// Bytes that a thread makes resident at a time: many pages, and many for each thread.
const POPULATE_BYTES: usize = 16 << 20;

/// The form of each weight, and where in its file it lies.
type Places = BTreeMap<String, (ValueType, Range<usize>)>;

/// Is called when weights that were lent have been copied, because somebody wants to change their file.
#[derive(Clone)]
pub(crate) struct Notice(pub(crate) Arc<dyn Fn() + Send + Sync>);

impl fmt::Debug for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Notice")
    }
}

/// A file of weights, mapped.
#[derive(Debug)]
pub(crate) struct LentFile {
    pub(crate) mapped: LeasedFile,
    pub(crate) notice: Option<Notice>,
}

impl Lent for LentFile {
    fn bytes(&self) -> &[u8] {
        self.mapped.bytes()
    }

    fn stays(&self) -> bool {
        self.mapped.holds()
    }

    fn copy(&self, first: usize, out: &mut [u8]) -> std::io::Result<()> {
        self.mapped.copy(first, out)
    }

    fn check_copied(&self) -> std::io::Result<()> {
        self.mapped.check_unchanged()?;
        if let Some(Notice(notice)) = &self.notice {
            notice();
        }
        Ok(())
    }
}

/// Makes parts of a mapped file resident; `false` where that fails, so that copying tells why.
pub(crate) fn populate(mapped: &LeasedFile, parts: &[Range<usize>], cpu: &Cpu) -> bool {
    let pieces: Vec<(usize, usize)> = parts
        .iter()
        .flat_map(|part| {
            let firsts = part.clone().step_by(POPULATE_BYTES);
            firsts.map(|first| (first, POPULATE_BYTES.min(part.end - first)))
        })
        .collect();
    let failed = AtomicBool::new(false);
    cpu.parallel(pieces.len(), |piece, _| {
        let (first, bytes) = pieces[piece];
        if mapped.populate(first, bytes).is_err() {
            failed.store(true, Ordering::Relaxed);
        }
    });
    !failed.into_inner()
}

/// A model folder whose weights are read where they lie, as far as they can be. Whoever loads from it looks
/// after what was lent: each run does, and between runs
/// [`Session::keep_lent`](cairn_program::Session::keep_lent).
#[derive(Debug)]
pub struct FolderSource {
    folder: WeightFolder,
    /// Why weights were not lent that could have been.
    copied: OnceLock<String>,
    notice: Option<Notice>,
}

impl FolderSource {
    /// A folder that nobody has read from.
    pub fn new(folder: WeightFolder) -> Self {
        Self { folder, copied: OnceLock::new(), notice: None }
    }

    /// Has somebody told when weights that were lent are copied amid a run, because somebody else wants to
    /// change a file.
    #[must_use]
    pub fn with_notice(self, notice: impl Fn() + Send + Sync + 'static) -> Self {
        Self { notice: Some(Notice(Arc::new(notice))), ..self }
    }

    /// The folder.
    pub fn folder(&self) -> &WeightFolder {
        &self.folder
    }

    /// Why weights were copied that could have been read where they lie; `None` if there were none such.
    pub fn copied_because(&self) -> Option<&str> {
        self.copied.get().map(String::as_str)
    }

    /// The tensors that are whole weights in a form that the plan takes, by file. Whatever is amiss is found,
    /// and told, by loading: then there are none.
    fn places(&self, spec: &ModelSpec, plan: &MemoryPlan) -> BTreeMap<&Path, Places> {
        let (folder, naming) = (&self.folder, self.folder.naming());
        let mut places: BTreeMap<&Path, Places> = BTreeMap::new();
        let Ok(map) = naming.map(spec, |tensor| folder.shape(tensor).is_some()) else {
            return places;
        };
        let Ok(spelled) = check_tensors(spec, &map, (folder, naming)) else { return places };
        for (weight, slices) in map.weights() {
            let [slice @ TensorSlice { placement: Placement::Whole, .. }] = slices else {
                continue;
            };
            let name = spelled(&slice.tensor);
            let Some(file) = folder.file_of(&name) else { continue };
            let Some((value_type, range)) = place(file, &name, slice.columns) else { continue };
            let is_plain = naming.offset(spec, weight) == 0.0;
            if is_plain && plan.takes(weight, value_type, range.len()) {
                let of_file = places.entry(file.path()).or_default();
                of_file.insert(weight.to_owned(), (value_type, range));
            }
        }
        places
    }

    /// Maps what a plan takes of one file; `None` where too little of it is wanted.
    fn map(
        &self,
        file: &SafetensorsFile,
        places: Places,
        cpu: &Cpu,
    ) -> Result<Option<LentWeights>, String> {
        let wanted: usize = places.values().map(|(_, range)| range.len()).sum();
        // If it is asked back, all of the file is copied: then nearly all of it must be of use.
        if wanted < file.file().len() / 10 * 9 {
            return Ok(None);
        }
        let mapped = file.file().leased().map_err(|error| error.to_string())?;
        let parts = joined(places.values().map(|(_, range)| range.clone()).collect());
        if !populate(&mapped, &parts, cpu) {
            return Err("not all of it could be read where it lies".to_owned());
        }
        // Many files take long, and nobody looks after this one meanwhile.
        if !mapped.holds() {
            return Err("somebody wants to change the file".to_owned());
        }
        let memory: Box<dyn Lent> = Box::new(LentFile { mapped, notice: self.notice.clone() });
        Ok(Some(LentWeights { memory, places }))
    }
}

impl TensorSource for FolderSource {
    fn names(&self) -> Vec<String> {
        TensorSource::names(&self.folder)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.folder.shape(name)
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        self.folder.read_f32(name, elements, out)
    }

    fn encoding(&self, name: &str) -> Option<Encoding> {
        self.folder.encoding(name)
    }

    fn read_bits(&self, name: &str, elements: Range<usize>, out: &mut [u16]) -> Result<(), String> {
        self.folder.read_bits(name, elements, out)
    }

    fn release(&self, name: &str) {
        self.folder.release(name);
    }

    fn lend(
        &self,
        spec: &ModelSpec,
        plan: &MemoryPlan,
        cpu: &Cpu,
    ) -> Result<Vec<LentWeights>, LoadError> {
        let mut places = self.places(spec, plan);
        let mut lent = Vec::new();
        for file in self.folder.files() {
            let Some(places) = places.remove(file.path()) else { continue };
            match self.map(file, places, cpu) {
                Ok(mapped) => lent.extend(mapped),
                Err(reason) => {
                    // The first reason is told.
                    let _known = self.copied.set(reason);
                }
            }
        }
        Ok(lent)
    }
}

/// The form of a stored tensor and its bytes in the file, if it is one that kernels read.
fn place(file: &SafetensorsFile, name: &str, columns: usize) -> Option<(ValueType, Range<usize>)> {
    let entry = file.header().tensor(name)?;
    let encoding = encoding_of(entry.dtype)?;
    // Files begin at a page, and elements have to lie at multiples of their size.
    let is_aligned = entry.offset.is_multiple_of(entry.dtype.size_bytes());
    let value_type = ValueType::weight(encoding, Layout::RowMajor, columns);
    (is_aligned && entry.bytes > 0).then(|| (value_type, entry.offset..entry.offset + entry.bytes))
}

/// Ranges in order, those that touch as one.
fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

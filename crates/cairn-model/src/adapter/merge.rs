//! An adapter added to a model's tensors, or taken out of them.
//!
//! Where the head is the embedding and the adapter has a part for the head, the merged model has a head
//! of its own: its source holds one tensor more, and [`MergedSource::spec`] says so.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use cairn_spec::ModelSpec;

use super::{Adapted, AdapterMap, module, modules_map};
use crate::load::{LoadError, Naming, TensorSource, check_tensors, read_weight};
use crate::names::{Placement, Role, TensorMap, TensorSlice};

/// Whether an adapter is added to a model or taken out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// `W + s · B · A`.
    Merge,
    /// `W − s · B · A`.
    Unmerge,
}

/// A model's tensors with an adapter added to them, or taken out.
#[expect(missing_debug_implementations, reason = "sources of tensors need not have one")]
pub struct MergedSource<'a> {
    base: &'a dyn TensorSource,
    spec: ModelSpec,
    deltas: BTreeMap<String, Delta>,
    /// The head that the base does not have, and the table it is made of.
    new_head: Option<(String, String)>,
    /// What has to be repeated beside a new head, and what it repeats.
    new_copies: Vec<(String, String)>,
}

/// What is added to one tensor.
struct Delta {
    /// `[rank, inputs]`.
    a: Vec<f32>,
    /// `[outputs, rank]`, of all projections of the tensor; zeros for those without an adapter.
    b: Vec<f32>,
    rank: usize,
    scale: f32,
    /// Elements of a row of the tensor.
    columns: usize,
    /// The tensor is stored `[inputs, outputs]`.
    transposed: bool,
}

impl<'a> MergedSource<'a> {
    /// Adds the adapter in `adapter` to the tensors in `base`.
    ///
    /// # Errors
    ///
    /// [`LoadError::Mismatch`] if the adapter's tensors are not those that `lora` asks for, or the base
    /// lacks one that the adapter changes.
    pub fn new(
        spec: &ModelSpec,
        adapters: &AdapterMap,
        (base, adapter): (&'a dyn TensorSource, &dyn TensorSource),
        merge: Merge,
    ) -> Result<Self, LoadError> {
        let tensors = adapters.tensor_map();
        let _names = check_tensors(spec, &tensors, (adapter, Naming::Peft))?;
        if base.naming() != Naming::HuggingFace {
            return Err(LoadError::NoNames { family: spec.family, naming: "PEFT" });
        }
        let parts = Parts { adapter, tensors, merge };
        let (own, deltas) = (spec.clone(), BTreeMap::new());
        let mut merged = Self { base, spec: own, deltas, new_head: None, new_copies: Vec::new() };
        let mut missing = Vec::new();
        for slice in &modules_map(spec).slices {
            let Some(module) = module(slice) else { continue };
            let Some(of) = adapters.get(&slice.weight) else { continue };
            if !adapters.modules.contains(module) {
                continue;
            }
            if slice.role == Role::Head && spec.tie_word_embeddings {
                merged.new_head = merged.table_of(slice).filter(|_| merge == Merge::Merge);
            }
            let spellings = match &merged.new_head {
                Some((head, _)) if slice.role == Role::Head => vec![head.clone()],
                _ => TensorMap::spellings(spec.family, &slice.tensor),
            };
            let known = |name: &String| merged.shape(name).is_some();
            let is_own = slice.role != Role::Head || !merged.is_tied();
            let found: Vec<String> =
                spellings.into_iter().filter(|name| is_own && known(name)).collect();
            if found.is_empty() {
                let is_table = spec.tie_word_embeddings && slice.role == Role::Head;
                let why = if is_table && merge == Merge::Unmerge {
                    "is the embedding in this model (tie_word_embeddings), so nothing was merged into it"
                } else {
                    "is missing"
                };
                missing.push(format!("{} {why}", slice.tensor));
            }
            for spelling in found {
                let delta = match merged.deltas.entry(spelling) {
                    Entry::Occupied(place) => place.into_mut(),
                    Entry::Vacant(place) => place.insert(parts.delta(slice, of)?),
                };
                delta.place(
                    slice,
                    &parts.rows(&of.b, slice.first_row..slice.first_row + slice.rows)?,
                );
            }
        }
        if !missing.is_empty() {
            return Err(LoadError::Mismatch { problems: missing });
        }
        if merged.new_head.is_some() {
            merged.spec = spec.untied();
            merged.new_copies = TensorMap::saved_copies(&merged.spec);
        }
        Ok(merged)
    }

    /// The model that the tensors make: with a head of its own where the adapter changes a head that was
    /// the embedding.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Whether a tensor is another one than in the base.
    pub fn changes(&self, tensor: &str) -> bool {
        self.deltas.contains_key(tensor)
    }

    /// The tensor that the base does not have, and the one of the base whose shape and type it has.
    pub fn new_head(&self) -> Option<(&str, &str)> {
        self.new_head.as_ref().map(|(head, table)| (head.as_str(), table.as_str()))
    }

    /// Tensors that a folder with the new head must repeat by another name, and what they repeat.
    pub fn new_copies(&self) -> &[(String, String)] {
        &self.new_copies
    }

    fn is_tied(&self) -> bool {
        self.spec.tie_word_embeddings && self.new_head.is_none()
    }

    /// A head's name and the base's name of the embedding.
    fn table_of(&self, head: &TensorSlice) -> Option<(String, String)> {
        let map = TensorMap::new(&self.spec);
        let table = map.slices.iter().find(|slice| slice.role == Role::Table)?;
        let mut spellings = TensorMap::spellings(self.spec.family, &table.tensor).into_iter();
        let table = spellings.find(|name| self.base.shape(name).is_some())?;
        Some((head.tensor.clone(), table))
    }
}

/// An adapter's tensors, to be read.
struct Parts<'a> {
    adapter: &'a dyn TensorSource,
    tensors: TensorMap,
    merge: Merge,
}

impl Parts<'_> {
    /// What is added to the tensor of a module, its `B` still to be placed.
    fn delta(&self, slice: &TensorSlice, of: &Adapted) -> Result<Delta, LoadError> {
        // Experts' matrices lie in one weight, and so do their adapters.
        let part =
            if slice.role == Role::Experts { slice.first_row / slice.rows.max(1) } else { 0 };
        let transposed = matches!(slice.placement, Placement::TransposedColumns { .. });
        let outputs = slice.shape[usize::from(transposed)];
        Ok(Delta {
            a: self.rows(&of.a, part * of.rank..(part + 1) * of.rank)?,
            b: vec![0.0; outputs * of.rank],
            rank: of.rank,
            scale: if self.merge == Merge::Merge { of.scale } else { -of.scale },
            columns: slice.shape[1],
            transposed,
        })
    }

    /// Rows of one of the adapter's weights.
    fn rows(&self, weight: &str, rows: Range<usize>) -> Result<Vec<f32>, LoadError> {
        read_weight(self.tensors.slices_of(weight), rows, self.adapter)
    }
}

impl MergedSource<'_> {
    /// The base's name of a tensor.
    fn origin<'a>(&'a self, name: &'a str) -> &'a str {
        match &self.new_head {
            Some((head, table)) if head == name => table,
            _ => name,
        }
    }
}

impl TensorSource for MergedSource<'_> {
    fn names(&self) -> Vec<String> {
        let mut names = self.base.names();
        // A copy of the embedding may lie where the head now is.
        let head = self.new_head.iter().map(|(head, _)| head.clone());
        names.extend(head.filter(|head| self.base.shape(head).is_none()));
        names
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.base.shape(self.origin(name))
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        self.base.read_f32(self.origin(name), elements.clone(), out)?;
        if let Some(delta) = self.deltas.get(name) {
            for (index, value) in elements.zip(out) {
                *value += delta.at(index);
            }
        }
        Ok(())
    }

    fn release(&self, name: &str) {
        self.base.release(self.origin(name));
    }
}

impl Delta {
    /// Puts a projection's rows of `B` where its outputs are in the tensor.
    fn place(&mut self, slice: &TensorSlice, rows: &[f32]) {
        for (index, row) in rows.chunks_exact(self.rank).enumerate() {
            let output = match slice.placement {
                Placement::TransposedColumns { start } => start + index,
                _ => slice.run_at(index).0,
            };
            self.b[output * self.rank..(output + 1) * self.rank].copy_from_slice(row);
        }
    }

    fn at(&self, index: usize) -> f32 {
        let (row, column) = (index / self.columns, index % self.columns);
        let (output, input) = if self.transposed { (column, row) } else { (row, column) };
        let inputs = self.a.len() / self.rank;
        let b = &self.b[output * self.rank..(output + 1) * self.rank];
        let product = b
            .iter()
            .enumerate()
            .fold(0.0_f32, |sum, (r, &b)| b.mul_add(self.a[r * inputs + input], sum));
        self.scale * product
    }
}

//! Low-rank adapters: their weights in the program and in PEFT's files, and merging.
//!
//! A projection with an adapter computes `x·Wᵀ + (s · x·Aᵀ)·Bᵀ`: three plain instructions beside the
//! product, so that it is differentiated, planned and run like everything else. `A` belongs to a
//! module of the family's files; where that module holds several projections (GPT-2's `c_attn`), they
//! share it and each has its rows of `B`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use cairn_spec::model::Mlp;
use cairn_spec::{Hint, LoraSpec, ModelSpec, TargetModules};

use crate::load::{LoadError, Naming, TensorSource, check_tensors};
use crate::names::{Placement, TensorMap, TensorSlice};

/// What PEFT writes before a module's name.
const WRAPPER: &str = "base_model.model.";
const A_SUFFIX: &str = ".lora_A.weight";
const B_SUFFIX: &str = ".lora_B.weight";
/// What an embedding is, whose adapters are of another kind.
const TABLE: &str = "a table";

/// An adapter that a model cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A target names no projection of the model.
    #[error("no projection of this model is named '{target}'")]
    NoSuchModule {
        /// The target.
        target: String,
        /// The names there are.
        modules: Vec<String>,
    },
    /// No projection at all has one.
    #[error("no projection of this model has an adapter")]
    Nothing {
        /// Blocks that may have some, where not all may.
        layers_to_transform: Option<Vec<usize>>,
    },
    /// A target that is no plain projection.
    #[error("{module} cannot have an adapter: it is {what}")]
    NotAProjection {
        /// The module.
        module: String,
        /// What it is.
        what: &'static str,
    },
}

impl Hint for AdapterError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::NoSuchModule { modules, .. } => vec![format!("there are {}", modules.join(", "))],
            Self::Nothing { layers_to_transform: Some(layers) } => {
                vec![format!("layers_to_transform is {layers:?}, counted from 0")]
            }
            Self::NotAProjection { what, .. } if *what != TABLE => vec![
                "merge it into the model: cairn adapter merge --model DIR --adapter DIR --output DIR"
                    .to_owned(),
            ],
            Self::Nothing { .. } | Self::NotAProjection { .. } => Vec::new(),
        }
    }
}

/// The adapter of one weight of the program.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapted {
    /// Name of `A`, `[rank, inputs]`, in the program.
    pub a: String,
    /// Name of `B`, `[outputs, rank]`, in the program.
    pub b: String,
    /// Its rank.
    pub rank: usize,
    /// The factor on `B · A`.
    pub scale: f32,
}

/// Every adapter of a model, with its place in PEFT's files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterMap {
    adapted: BTreeMap<String, Adapted>,
    /// Rank and factor of each of the family's modules that has an adapter.
    modules: BTreeMap<String, (usize, f32)>,
    tensors: Vec<TensorSlice>,
    dropout: f64,
}

impl AdapterMap {
    /// The adapters that `lora` puts on a model.
    ///
    /// # Errors
    ///
    /// [`AdapterError`] naming a target that is not there or cannot have one.
    pub fn new(spec: &ModelSpec, lora: &LoraSpec) -> Result<Self, AdapterError> {
        Self::of(spec, lora, Err)
    }

    /// As [`new`](Self::new), to be merged and not to be run: every matrix of the files may have one,
    /// also those of single experts, what latent attention absorbs, routers and the head.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn to_merge(spec: &ModelSpec, lora: &LoraSpec) -> Result<Self, AdapterError> {
        Self::of(spec, lora, |what| if what == TABLE { Err(what) } else { Ok(()) })
    }

    fn of(
        spec: &ModelSpec,
        lora: &LoraSpec,
        admit: impl Fn(&'static str) -> Result<(), &'static str>,
    ) -> Result<Self, AdapterError> {
        let map = TensorMap::new(spec);
        check_targets(&map, &lora.target_modules)?;
        let mut adapters = Self { dropout: lora.lora_dropout, ..Self::default() };
        let mut shared = BTreeSet::new();
        let all = lora.target_modules == TargetModules::AllLinear;
        // PEFT (0.21) takes every `gate_proj` of such a model for the experts' own, also that of the
        // experts that all tokens share, and could not load the adapter.
        let has_experts = matches!(spec.mlp, Mlp::Moe(_));
        for slice in &map.slices {
            let Some((module, layer)) = projection(slice) else { continue };
            let Some(rank) = lora.rank(module, layer) else { continue };
            if all && has_experts && slice.weight.contains(".mlp.") {
                continue;
            }
            let other = not_a_projection(&map, slice);
            if all && other.is_some() {
                continue;
            }
            if let Some(Err(what)) = other.map(&admit) {
                return Err(AdapterError::NotAProjection { module: module.to_owned(), what });
            }
            let weight = slice.weight.strip_suffix(".weight").expect("a projection's weight");
            #[expect(clippy::cast_possible_truncation, reason = "applied to f32 values")]
            let scale = lora.scale(module, rank) as f32;
            let (a, b) = (format!("{module}{A_SUFFIX}"), format!("{weight}{B_SUFFIX}"));
            adapters.modules.insert(module.to_owned(), (rank, scale));
            if shared.insert(module.to_owned()) {
                adapters.tensors.push(slice_a(slice, module, &a, rank));
            }
            adapters.tensors.push(slice_b(slice, module, &b, rank));
            adapters.adapted.insert(slice.weight.clone(), Adapted { a, b, rank, scale });
        }
        if adapters.is_empty() {
            let layers_to_transform = lora.layers_to_transform.clone();
            return Err(AdapterError::Nothing { layers_to_transform });
        }
        Ok(adapters)
    }

    /// The adapter of a weight of the program, if it has one.
    pub fn get(&self, weight: &str) -> Option<&Adapted> {
        self.adapted.get(weight)
    }

    /// Probability with which inputs of an adapter are zeroed in training.
    pub fn dropout(&self) -> f64 {
        self.dropout
    }

    /// Names of the adapters' weights in the program.
    pub fn weights(&self) -> BTreeSet<String> {
        self.tensors.iter().map(|slice| slice.weight.clone()).collect()
    }

    /// Names of the family's modules that have an adapter.
    pub fn modules(&self) -> Vec<&str> {
        let names = self.tensors.iter().filter_map(|slice| slice.tensor.strip_prefix(WRAPPER));
        names.filter_map(|name| name.strip_suffix(A_SUFFIX)).collect()
    }

    /// Whether there is no adapter.
    pub fn is_empty(&self) -> bool {
        self.adapted.is_empty()
    }

    /// Whether projections share an `A`, whose gradient they then add to by turns.
    pub fn shares_weights(&self) -> bool {
        self.tensors.len() < 2 * self.adapted.len()
    }

    /// The adapters' weights with their places in `adapter_model.safetensors`.
    pub fn tensor_map(&self) -> TensorMap {
        TensorMap { slices: self.tensors.clone() }
    }
}

/// Whether a weight of a program is part of an adapter.
pub fn is_adapter_weight(name: &str) -> bool {
    name.ends_with(A_SUFFIX) || name.ends_with(B_SUFFIX)
}

/// What a slice is instead of a matrix that a program multiplies its rows by.
fn not_a_projection(map: &TensorMap, slice: &TensorSlice) -> Option<&'static str> {
    let is = |module: &str| slice.weight.ends_with(&format!(".{module}.weight"));
    if is("self_attn.k_b_proj") || is("self_attn.v_b_proj") {
        Some("absorbed into the queries and results of latent attention")
    } else if slice.weight == "lm_head.weight" {
        Some("the head over the vocabulary, whose logits are never all there")
    } else if is("mlp.gate") {
        Some("a router")
    } else if slice.weight.starts_with("model.embed_") {
        Some(TABLE)
    } else if map.slices_of(&slice.weight).len() > 1 || slice.shape.len() != 2 {
        Some("one of several experts")
    } else {
        None
    }
}

/// The family's module that a slice is the matrix of, and its block.
fn projection(slice: &TensorSlice) -> Option<(&str, Option<usize>)> {
    if slice.shape.len() < 2 || !slice.weight.ends_with(".weight") {
        return None;
    }
    let module = slice.tensor.strip_suffix(".weight")?;
    let number = slice.weight.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
    Some((module, number.and_then(|number| number.parse().ok())))
}

fn check_targets(map: &TensorMap, targets: &TargetModules) -> Result<(), AdapterError> {
    let TargetModules::Named(targets) = targets else { return Ok(()) };
    let modules: BTreeSet<&str> =
        map.slices.iter().filter_map(projection).map(|(module, _)| module).collect();
    let is_there = |target: &str| {
        modules.iter().any(|module| *module == target || module.ends_with(&format!(".{target}")))
    };
    match targets.iter().find(|target| !is_there(target)) {
        None => Ok(()),
        Some(target) => {
            let last = |module: &&str| module.rsplit('.').next().unwrap_or(module).to_owned();
            let names: BTreeSet<String> = modules.iter().map(last).collect();
            let modules = names.into_iter().collect();
            Err(AdapterError::NoSuchModule { target: target.clone(), modules })
        }
    }
}

fn slice_a(of: &TensorSlice, module: &str, weight: &str, rank: usize) -> TensorSlice {
    TensorSlice {
        weight: weight.to_owned(),
        first_row: 0,
        rows: rank,
        columns: of.columns,
        tensor: format!("{WRAPPER}{module}{A_SUFFIX}"),
        shape: vec![rank, of.columns],
        placement: Placement::Whole,
    }
}

/// The rows of `B` follow those of the weight; PEFT's own matrices are never transposed.
fn slice_b(of: &TensorSlice, module: &str, weight: &str, rank: usize) -> TensorSlice {
    let (total, placement) = match of.placement {
        Placement::TransposedColumns { start } => {
            (of.shape[1], Placement::Rows { start, run: of.rows, stride: of.rows })
        }
        placement => (of.shape[0], placement),
    };
    let placement = if total == of.rows { Placement::Whole } else { placement };
    TensorSlice {
        weight: weight.to_owned(),
        first_row: 0,
        rows: of.rows,
        columns: rank,
        tensor: format!("{WRAPPER}{module}{B_SUFFIX}"),
        shape: vec![total, rank],
        placement,
    }
}

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
    deltas: BTreeMap<String, Delta>,
}

/// What is added to one tensor.
struct Delta {
    /// `[rank, inputs]`.
    a: Vec<f32>,
    /// `[outputs, rank]`.
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
    /// [`LoadError::Mismatch`] if the adapter's tensors are not those that `lora` asks for.
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
        let read = |name: &str, shape: &[usize]| -> Result<Vec<f32>, LoadError> {
            let mut values = vec![0.0; shape.iter().product()];
            let all = 0..values.len();
            let unreadable = |problem| LoadError::Unreadable { name: name.to_owned(), problem };
            adapter.read_f32(name, all, &mut values).map_err(unreadable)?;
            Ok(values)
        };
        let shapes: BTreeMap<&str, &[usize]> = tensors.tensors().into_iter().collect();
        let mut deltas = BTreeMap::new();
        let mut missing = Vec::new();
        for slice in &TensorMap::new(spec).slices {
            let Some((module, _)) = projection(slice) else { continue };
            let Some(&(rank, scale)) = adapters.modules.get(module) else { continue };
            let [a, b] = [A_SUFFIX, B_SUFFIX].map(|suffix| format!("{WRAPPER}{module}{suffix}"));
            let transposed = matches!(slice.placement, Placement::TransposedColumns { .. });
            let scale = if merge == Merge::Merge { scale } else { -scale };
            let spellings = TensorMap::spellings(spec.family, &slice.tensor);
            if !spellings.iter().any(|spelling| base.shape(spelling).is_some()) {
                missing.push(format!("{} is missing", slice.tensor));
            }
            for spelling in spellings {
                if base.shape(&spelling).is_none() || deltas.contains_key(&spelling) {
                    continue;
                }
                let delta = Delta {
                    a: read(&a, shapes[a.as_str()])?,
                    b: read(&b, shapes[b.as_str()])?,
                    rank,
                    scale,
                    columns: slice.shape[1],
                    transposed,
                };
                deltas.insert(spelling, delta);
            }
        }
        if !missing.is_empty() {
            return Err(LoadError::Mismatch { problems: missing });
        }
        Ok(Self { base, deltas })
    }

    /// Whether a tensor is another one than in the base.
    pub fn changes(&self, tensor: &str) -> bool {
        self.deltas.contains_key(tensor)
    }
}

impl TensorSource for MergedSource<'_> {
    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.base.shape(name)
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        self.base.read_f32(name, elements.clone(), out)?;
        if let Some(delta) = self.deltas.get(name) {
            for (index, value) in elements.zip(out) {
                *value += delta.at(index);
            }
        }
        Ok(())
    }

    fn release(&self, name: &str) {
        self.base.release(name);
    }
}

impl Delta {
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

#[cfg(test)]
mod tests;

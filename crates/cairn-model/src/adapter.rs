//! Low-rank adapters: which weights have one, where it lies in the program and in PEFT's files, and
//! merging.
//!
//! A projection with an adapter computes `x·Wᵀ + (s · x·Aᵀ)·Bᵀ`: three plain instructions beside the
//! product, so that it is differentiated, planned and run like everything else. `A` belongs to a
//! module of the family's files; where that module holds several projections (GPT-2's `c_attn`, the two
//! parts of `kv_b_proj`), they share it and each has its rows of `B`. Experts' adapters are stacked as
//! their matrices are; experts without one have zeros, which stay zeros in training. PEFT's files hold
//! them in a pair of tensors for each module, as older models have them, or stacked (`stacked`).

mod merge;
mod stacked;

use std::collections::{BTreeMap, BTreeSet};

use cairn_spec::model::{Family, Mlp};
use cairn_spec::{Hint, LoraSpec, ModelSpec, TargetModules};

use crate::names::{Placement, Role, TensorMap, TensorSlice};

pub use merge::{Merge, MergedSource};

/// What PEFT writes before a module's name.
const WRAPPER: &str = "base_model.model.";
pub(crate) const A_SUFFIX: &str = ".lora_A.weight";
const B_SUFFIX: &str = ".lora_B.weight";

/// An adapter that a model cannot have.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
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
    /// A target is an embedding, whose adapters are of another kind.
    #[error("{module} cannot have an adapter: it is a table")]
    Table {
        /// The module.
        module: String,
    },
    /// A parameter is stored `[inputs, outputs]`, so that PEFT would give it another kind of adapter than
    /// its module.
    #[error("{parameter} is stored transposed: its module can have an adapter, it cannot")]
    Transposed {
        /// The parameter.
        parameter: String,
    },
    /// A module is adapted, and so is the parameter that holds it.
    #[error("{module} is among target_modules, and {parameter} among target_parameters")]
    Twice {
        /// The module.
        module: String,
        /// The parameter.
        parameter: String,
    },
    /// Experts of one layer are adapted unlike each other.
    #[error("adapters of experts of one layer differ: {}, {}", told(.one), told(.other))]
    UnlikeExperts {
        /// A module, its rank and its factor.
        one: (String, usize, f32),
        /// A module beside it.
        other: (String, usize, f32),
    },
}

fn told((module, rank, scale): &(String, usize, f32)) -> String {
    format!("{module} has rank {rank} and scale {scale}")
}

impl Hint for AdapterError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::NoSuchModule { modules, .. } => vec![format!("there are {}", modules.join(", "))],
            Self::Nothing { layers_to_transform: Some(layers) } => {
                vec![format!("layers_to_transform is {layers:?}, counted from 0")]
            }
            Self::UnlikeExperts { .. } => {
                let of = "rank_pattern and alpha_pattern";
                vec![format!("let {of} say the same of all experts of a layer")]
            }
            Self::Transposed { .. } => vec!["name it in target_modules".to_owned()],
            Self::Twice { .. } => vec!["name it in one of the two".to_owned()],
            Self::Nothing { .. } | Self::Table { .. } => Vec::new(),
        }
    }
}

/// The adapter of one weight of the program.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapted {
    /// Name of `A`, `[rank, inputs]`, in the program; of experts, `[experts, rank, inputs]`.
    pub a: String,
    /// Name of `B`, `[outputs, rank]`, in the program; of experts, `[experts, outputs, rank]`.
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
    /// Each of the family's modules that has an adapter.
    modules: BTreeSet<String>,
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
        let map = modules_map(spec);
        check_targets((spec.family, &map), lora)?;
        let mut adapters = Self { dropout: lora.lora_dropout, ..Self::default() };
        for slice in &map.slices {
            let Some(module) = module(slice) else { continue };
            let is_all = lora.target_modules == TargetModules::AllLinear;
            let may_have_one = !is_all || is_linear(spec, slice.role);
            let named = names(spec.family, module)
                .into_iter()
                .find_map(|name| lora.rank(&name, slice.block).map(|rank| (name, rank)))
                .filter(|_| may_have_one);
            let parameter = stacked::parameter(spec.family, slice, module);
            let stacked = lora.parameter_rank(&parameter);
            if slice.role == Role::Table && (named.is_some() || stacked.is_some()) {
                return Err(AdapterError::Table { module: module.to_owned() });
            }
            match (named, stacked) {
                (None, None) => {}
                (Some(_), Some(_)) => {
                    return Err(AdapterError::Twice { module: module.to_owned(), parameter });
                }
                (None, Some(rank)) => {
                    adapters.add_parameter((spec, lora), slice, module, rank)?;
                }
                (Some((name, rank)), None) => {
                    #[expect(clippy::cast_possible_truncation, reason = "applied to f32 values")]
                    let scale = lora.scale(&name, rank) as f32;
                    adapters.add(slice, module, (name, rank, scale))?;
                }
            }
        }
        if adapters.is_empty() {
            let layers = lora.layers_to_transform.clone();
            let layers_to_transform = layers.filter(|layers| !layers.is_empty());
            return Err(AdapterError::Nothing { layers_to_transform });
        }
        adapters.gather_slices();
        Ok(adapters)
    }

    /// Adds the adapter of a module: what PEFT calls it, its rank and its factor.
    fn add(
        &mut self,
        slice: &TensorSlice,
        module: &str,
        (name, rank, scale): (String, usize, f32),
    ) -> Result<(), AdapterError> {
        let weight = slice.weight.strip_suffix(".weight").expect("a projection's weight");
        let b = format!("{weight}{B_SUFFIX}");
        let is_first = self.modules.insert(module.to_owned());
        // A module's projections share its A; experts are modules whose matrices lie in one weight.
        let (a, part) = match slice.role {
            Role::Experts => (format!("{weight}{A_SUFFIX}"), slice.first_row / slice.rows.max(1)),
            _ => (format!("{module}{A_SUFFIX}"), 0),
        };
        if is_first {
            self.tensors.push(slice_a(slice, &name, (&a, rank), part));
        }
        self.tensors.push(slice_b(slice, &name, &b, rank));
        let adapted = Adapted { a, b, rank, scale };
        match self.adapted.insert(slice.weight.clone(), adapted.clone()) {
            Some(before) if before != adapted => Err(AdapterError::UnlikeExperts {
                one: self.neighbor(&before, &name),
                other: (name, rank, scale),
            }),
            _ => Ok(()),
        }
    }

    /// Another module whose adapter lies in the same weight.
    fn neighbor(&self, adapted: &Adapted, module: &str) -> (String, usize, f32) {
        let of_weight = |slice: &&TensorSlice| slice.weight == adapted.b;
        let mut names = self.tensors.iter().filter(of_weight).filter_map(|slice| {
            slice.tensor.strip_prefix(WRAPPER).and_then(|name| name.strip_suffix(B_SUFFIX))
        });
        let other = names.find(|name| *name != module).unwrap_or(&adapted.b);
        (other.to_owned(), adapted.rank, adapted.scale)
    }

    /// Puts the slices of one weight together, in the order in which weights first occur.
    fn gather_slices(&mut self) {
        let mut order = BTreeMap::new();
        for slice in &self.tensors {
            let next = order.len();
            order.entry(slice.weight.clone()).or_insert(next);
        }
        self.tensors.sort_by_key(|slice| order[&slice.weight]);
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

    /// Names of the adapters' weights inside of the blocks.
    pub(crate) fn weights_of_blocks(&self) -> BTreeSet<&str> {
        let inside = self.tensors.iter().filter(|slice| slice.block.is_some());
        inside.map(|slice| slice.weight.as_str()).collect()
    }

    /// What PEFT calls the modules that have an adapter.
    pub fn modules(&self) -> Vec<&str> {
        let names = self.tensors.iter().filter_map(|slice| slice.tensor.strip_prefix(WRAPPER));
        names.filter_map(|name| name.strip_suffix(A_SUFFIX)).collect()
    }

    /// Whether transformers 5 holds a matrix that has an adapter as a parameter beside modules, experts and
    /// routers: there PEFT refuses dropout.
    pub fn has_parameters(&self) -> bool {
        self.tensors.iter().any(|slice| matches!(slice.role, Role::Experts | Role::Router))
    }

    /// Whether there is no adapter.
    pub fn is_empty(&self) -> bool {
        self.adapted.is_empty()
    }

    /// Whether projections share an `A`, whose gradient they then add to by turns.
    pub fn shares_weights(&self) -> bool {
        let distinct: BTreeSet<&str> = self.adapted.values().map(|of| of.a.as_str()).collect();
        distinct.len() < self.adapted.len()
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

/// Tensors of the base that PEFT's files may hold beside an adapter's own, with their shapes: of a head
/// that has an adapter, PEFT saves what is frozen as well. The base model has them, and they are not
/// read.
pub(crate) fn kept_base(map: &TensorMap) -> Vec<(String, Vec<usize>)> {
    let shapes: BTreeMap<&str, &[usize]> = map.tensors().into_iter().collect();
    let modules = shapes.iter().filter_map(|(name, b)| Some((name.strip_suffix(B_SUFFIX)?, b[0])));
    let tensors = modules.filter_map(|(module, outputs)| {
        let inputs = *shapes.get(format!("{module}{A_SUFFIX}").as_str())?.last()?;
        let weight = (format!("{module}.base_layer.weight"), vec![outputs, inputs]);
        Some([weight, (format!("{module}.base_layer.bias"), vec![outputs])])
    });
    tensors.flatten().collect()
}

/// The modules of a model: PEFT has a head of its own where the model's is the embedding.
fn modules_map(spec: &ModelSpec) -> TensorMap {
    TensorMap::new(&spec.untied())
}

/// Whether PEFT's `all-linear` means a weight of this model. In models with experts PEFT (0.21, with
/// transformers 5) takes the names `gate_proj`, `up_proj` and `down_proj` for those of the experts alone,
/// so that dense blocks and the experts that all tokens share have none.
fn is_linear(spec: &ModelSpec, role: Role) -> bool {
    match role {
        Role::Attention | Role::Absorbed | Role::Router | Role::Experts | Role::Transform => true,
        Role::FeedForward => !matches!(spec.mlp, Mlp::Moe(_)),
        Role::Vector | Role::Table | Role::Head => false,
    }
}

/// The family's module that a slice is the matrix of.
fn module(slice: &TensorSlice) -> Option<&str> {
    match slice.role {
        Role::Vector => None,
        _ => slice.tensor.strip_suffix(".weight"),
    }
}

/// What PEFT may call a module: by the files' names, or by those of transformers 5 where these are
/// others.
fn names(family: Family, module: &str) -> Vec<String> {
    let newer = match family {
        Family::GptNeox if module == "embed_out" => Some("lm_head".to_owned()),
        Family::Mixtral => {
            let layer = module.strip_suffix(".block_sparse_moe.gate");
            layer.map(|layer| format!("{layer}.mlp.gate"))
        }
        _ => None,
    };
    std::iter::once(module.to_owned()).chain(newer).collect()
}

/// Refuses what names nothing.
fn check_targets((family, map): (Family, &TensorMap), lora: &LoraSpec) -> Result<(), AdapterError> {
    let with_modules = |slice| module(slice).map(|module| (slice, module));
    if let TargetModules::Named(targets) = &lora.target_modules {
        let modules = map.slices.iter().filter_map(module).flat_map(|name| names(family, name));
        check_named(targets, modules.collect())?;
    }
    let parameters = map.slices.iter().filter_map(with_modules);
    let parameters = parameters.map(|(slice, module)| stacked::parameter(family, slice, module));
    check_named(&lora.target_parameters, parameters.collect())
}

fn check_named(targets: &[String], names: BTreeSet<String>) -> Result<(), AdapterError> {
    let is_there = |target: &str| {
        names.iter().any(|name| name == target || name.ends_with(&format!(".{target}")))
    };
    match targets.iter().find(|target| !is_there(target)) {
        None => Ok(()),
        Some(target) => {
            // What tells them apart: of a parameter its module too.
            let parts = |name: &String| if name.ends_with(".weight") { 2 } else { 1 };
            let last = |name: &String| {
                let from = name.rmatch_indices('.').nth(parts(name) - 1);
                name[from.map_or(0, |(at, _)| at + 1)..].to_owned()
            };
            let modules: BTreeSet<String> = names.iter().map(last).collect();
            let modules = modules.into_iter().collect();
            Err(AdapterError::NoSuchModule { target: target.clone(), modules })
        }
    }
}

/// `part` counts the modules whose matrices lie in one weight.
fn slice_a(
    of: &TensorSlice,
    module: &str,
    (weight, rank): (&str, usize),
    part: usize,
) -> TensorSlice {
    TensorSlice {
        weight: weight.to_owned(),
        role: of.role,
        block: of.block,
        first_row: part * rank,
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
        role: of.role,
        block: of.block,
        first_row: of.first_row,
        rows: of.rows,
        columns: rank,
        tensor: format!("{WRAPPER}{module}{B_SUFFIX}"),
        shape: vec![total, rank],
        placement,
    }
}

#[cfg(test)]
mod tests;

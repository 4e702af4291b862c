//! Tensor names: the program's weights against a family's files.
//!
//! A program names its weights after the LLaMA layout. A family's file may name a tensor
//! differently, store it transposed (GPT-2's `Conv1D` keeps `[inputs, outputs]`), hold several
//! weights in one tensor (GPT-2's `c_attn` is query, key and value), or one weight in several
//! tensors (one for each expert). A family's [`Names`] say so as data; a [`TensorMap`] says it for
//! every weight of a model, both for loading and for saving.

mod bert;
mod experts;
mod gguf;
mod gpt2;
mod gpt_neox;
mod llama;
mod modernbert;
mod phi3;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use cairn_spec::ModelSpec;
use cairn_spec::model::{Family, Mlp};

use crate::weights::{self, WeightShape};

pub use crate::weights::Role;

/// How a family names and stores the weights. Modules not listed keep their name.
pub(crate) struct Names {
    /// What stands before the modules of a block; `{}` is the block's number.
    block: &'static str,
    /// Our module, or `module.part` where weight and bias go different ways, and where it is.
    places: &'static [(&'static str, Place)],
    /// A prefix that files in the wild may lack.
    wrapper: Option<&'static str>,
    /// Endings of tensors that files may hold besides the weights.
    ignorable: &'static [&'static str],
    /// A tensor that repeats the bias of the head.
    head_bias_copy: Option<&'static str>,
    /// Endings of our tensors and how older files spell them.
    older: &'static [(&'static str, &'static str)],
}

/// Where a family keeps a module. In a name, `{}` is an expert's number.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// Under this name, as it is.
    Module(&'static str),
    /// Under this name, matrices stored `[inputs, outputs]`.
    Transposed(&'static str),
    /// In one tensor with other modules: the rows of all of them in this order.
    Fused(&'static str, &'static [&'static str]),
    /// In one tensor with other modules, a head of each in turn: this one is the `.1`th of `.2`.
    PerHead(&'static str, usize, usize),
    /// As [`Place::Fused`], stored `[inputs, outputs]`.
    FusedTransposed(&'static str, &'static [&'static str]),
    /// In one matrix with other modules: the first part of each in this order, then the second part
    /// of each, and so on.
    Interleaved(&'static str, &'static [&'static str]),
    /// As `Interleaved`, but the parts are the tensor's first axis, and the name is the tensor's whole
    /// name.
    Stacked(&'static str, &'static [&'static str]),
    /// In one tensor whose first axis are the parts, each of them `[inputs, outputs]`; the name is the
    /// tensor's whole name.
    StackedTransposed(&'static str),
    /// As `Module`, but the name is the tensor's whole name.
    Tensor(&'static str),
}

const fn names(family: Family) -> &'static Names {
    match family {
        Family::Llama
        | Family::Mistral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Olmo2
        | Family::Gemma2
        | Family::Gemma3Text => &llama::NAMES,
        Family::Gpt2 => &gpt2::NAMES,
        Family::Mixtral => &experts::MIXTRAL,
        Family::Qwen3Moe | Family::DeepseekV2 | Family::DeepseekV3 => &experts::SEPARATE,
        Family::GptNeox => &gpt_neox::NAMES,
        Family::Phi3 => &phi3::NAMES,
        Family::Bert => &bert::NAMES,
        Family::ModernBert => &modernbert::NAMES,
    }
}

/// Where in a family's tensor rows of a weight lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// They are the whole tensor, as it is.
    Whole,
    /// Rows of a matrix, or elements of a vector, in runs: `run` of them from row `start` on, the
    /// next run `stride` rows after the first began, and so on.
    Rows {
        /// First row.
        start: usize,
        /// Rows that follow one another.
        run: usize,
        /// From the beginning of a run to the beginning of the next.
        stride: usize,
    },
    /// Part of a tensor stored `[…, inputs, outputs]`: columns `start .. start + outputs` of the matrix,
    /// or of all matrices of the tensor read as if laid side by side.
    TransposedColumns {
        /// The element that holds the first output's first input.
        start: usize,
    },
    /// All of `parts` equal parts of the weight, in a matrix that has their columns by turns: column `j`
    /// of part `p` is column `j · parts + p`, and each part's rows are those from `start` on.
    ColumnsByTurns {
        /// First row.
        start: usize,
        /// How many take turns.
        parts: usize,
    },
}

/// Rows of one weight and their place in a family's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSlice {
    /// The weight's name in the program.
    pub weight: String,
    /// What the weight is.
    pub role: Role,
    /// The block it belongs to; `None` before the first and after the last.
    pub block: Option<usize>,
    /// The first of the weight's rows that lie here; 0 unless the weight lies in several tensors.
    pub first_row: usize,
    /// Rows (outputs) that lie here; the length of a vector.
    pub rows: usize,
    /// Elements of one row (inputs); 1 for a vector.
    pub columns: usize,
    /// Name of the tensor in the family's files.
    pub tensor: String,
    /// Shape of that tensor.
    pub shape: Vec<usize>,
    /// Which part of it.
    pub placement: Placement,
}

impl TensorSlice {
    /// Which elements of the weight lie here.
    pub fn elements(&self) -> Range<usize> {
        self.first_row * self.columns..(self.first_row + self.rows) * self.columns
    }

    /// Elements from one input to the next where the tensor is stored `[…, inputs, outputs]`.
    pub(crate) fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Whether each row of the slice is a row of the tensor.
    pub(crate) fn keeps_rows(&self) -> bool {
        matches!(self.placement, Placement::Whole | Placement::Rows { .. })
    }

    /// For row `row` of the slice, which keeps its rows: its row in the tensor, and how many
    /// rows of the slice follow one another from there on.
    pub(crate) fn run_at(&self, row: usize) -> (usize, usize) {
        match self.placement {
            Placement::Whole => (row, self.rows - row),
            Placement::Rows { start, run, stride } => {
                let (number, within) = (row / run, row % run);
                (start + number * stride + within, (run - within).min(self.rows - row))
            }
            Placement::TransposedColumns { .. } | Placement::ColumnsByTurns { .. } => {
                unreachable!("rows are no rows there")
            }
        }
    }
}

/// Every weight of a model with its place in its family's files, in program order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// The weights, one after the other; a weight that lies in several tensors has one entry for
    /// each.
    pub slices: Vec<TensorSlice>,
}

impl TensorMap {
    /// The map for a model.
    pub fn new(spec: &ModelSpec) -> Self {
        Self::with(spec, names(spec.family))
    }

    /// The map for a model among whose tensors are those that `has` knows: experts may lie in tensors
    /// of their own, as files have them, or stacked, as transformers 5 holds them in memory.
    pub fn of_tensors(spec: &ModelSpec, has: impl Fn(&str) -> bool) -> Self {
        let Mlp::Moe(moe) = &spec.mlp else { return Self::new(spec) };
        let first = (0..spec.num_hidden_layers).find(|&layer| moe.has_experts(layer));
        let stacked = |layer| has(&format!("model.layers.{layer}.mlp.experts.gate_up_proj"));
        if first.is_some_and(stacked) {
            return Self::with(spec, &experts::STACKED);
        }
        Self::new(spec)
    }

    /// The map of the program itself: every weight is a tensor of its own name, whole; stacked
    /// experts are one.
    pub fn of_program(spec: &ModelSpec) -> Self {
        let blocks =
            (0..spec.num_hidden_layers).map(|layer| (Some(layer), weights::block(spec, layer)));
        let outside = |list| (None, list);
        let all = std::iter::once(outside(weights::embedding(spec)))
            .chain(blocks)
            .chain(std::iter::once(outside(weights::head(spec))));
        let slices = all.flat_map(|(block, list)| {
            let prefix = block.map_or_else(String::new, |n| format!("model.layers.{n}."));
            list.into_iter().map(move |weight| {
                let name = format!("{prefix}{}.{}", weight.module, weight.part);
                let rows = weight.parts.unwrap_or(1) * weight.rows;
                TensorSlice {
                    weight: name.clone(),
                    role: weight.role,
                    block,
                    first_row: 0,
                    rows,
                    columns: weight.columns.unwrap_or(1),
                    tensor: name,
                    shape: std::iter::once(rows).chain(weight.columns).collect(),
                    placement: Placement::Whole,
                }
            })
        });
        Self { slices: slices.collect() }
    }

    fn with(spec: &ModelSpec, names: &Names) -> Self {
        let mut map = Self { slices: Vec::new() };
        let head_dim = spec.attention.form.key_dim();
        map.place(names, None, head_dim, &weights::embedding(spec));
        for layer in 0..spec.num_hidden_layers {
            map.place(names, Some(layer), head_dim, &weights::block(spec, layer));
        }
        map.place(names, None, head_dim, &weights::head(spec));
        map
    }

    /// The entries of a weight, in the order of its rows; empty if there is no such weight.
    pub fn slices_of(&self, weight: &str) -> &[TensorSlice] {
        let Some(first) = self.slices.iter().position(|slice| slice.weight == weight) else {
            return &[];
        };
        let rest = &self.slices[first..];
        let count = rest.iter().take_while(|slice| slice.weight == weight).count();
        &rest[..count]
    }

    /// The entries of every weight.
    pub(crate) fn by_weight(&self) -> HashMap<&str, &[TensorSlice]> {
        self.weights().collect()
    }

    /// Every weight with its entries, in program order.
    pub(crate) fn weights(&self) -> impl Iterator<Item = (&str, &[TensorSlice])> {
        let of_one = self.slices.chunk_by(|slice, next| slice.weight == next.weight);
        of_one.map(|slices| (slices[0].weight.as_str(), slices))
    }

    /// The entries of every tensor, in the order of names.
    pub fn by_tensor(&self) -> BTreeMap<&str, Vec<&TensorSlice>> {
        let mut tensors: BTreeMap<&str, Vec<&TensorSlice>> = BTreeMap::new();
        for slice in &self.slices {
            tensors.entry(&slice.tensor).or_default().push(slice);
        }
        tensors
    }

    /// Each tensor of the family's files once, with its shape, in program order.
    pub fn tensors(&self) -> Vec<(&str, &[usize])> {
        let mut seen = BTreeSet::new();
        let first = self.slices.iter().filter(|slice| seen.insert(&slice.tensor));
        first.map(|slice| (slice.tensor.as_str(), slice.shape.as_slice())).collect()
    }

    /// Spellings under which files in the wild hold a tensor of this family: the name itself, then
    /// alternatives (GPT-2 files may lack the `transformer.` prefix, old BERT files say `gamma`).
    pub fn spellings(family: Family, tensor: &str) -> Vec<String> {
        let names = names(family);
        let mut spellings = vec![tensor.to_owned()];
        for (ours, older) in names.older {
            spellings.extend(tensor.strip_suffix(ours).map(|stem| format!("{stem}{older}")));
        }
        let prefix = names.wrapper.unwrap_or_default();
        let bare: Vec<String> = spellings
            .iter()
            .filter_map(|name| name.strip_prefix(prefix).map(str::to_owned))
            .filter(|_| !prefix.is_empty())
            .collect();
        spellings.extend(bare);
        spellings
    }

    /// Tensors that files of this family may hold besides the weights: masks that older versions
    /// saved with the model.
    pub fn is_ignorable(spec: &ModelSpec, tensor: &str) -> bool {
        let names = names(spec.family);
        names.ignorable.iter().any(|suffix| tensor.ends_with(suffix))
            || (spec.family == Family::DeepseekV3 && is_beyond_the_last_layer(spec, tensor))
    }

    /// Tensors that files of this family may hold besides the weights and that repeat one of them:
    /// the copy, and what it repeats.
    pub(crate) fn copies(spec: &ModelSpec) -> Vec<(String, String)> {
        let names = names(spec.family);
        let tensor = |module, part| {
            let weight = WeightShape { module, part, ..WeightShape::EMPTY };
            format!("{}.{part}", names.place(&weight).module())
        };
        let head = tensor("lm_head", "weight");
        let mut copies = Vec::new();
        // BERT's files name the bias of the head twice.
        if let Some(stem) = names.head_bias_copy {
            copies.push((stem.to_owned(), tensor("lm_head", "bias")));
        }
        if spec.tie_word_embeddings {
            copies.push((head, tensor("model.embed_tokens", "weight")));
        }
        copies
    }

    /// Copies that a saved folder needs: the copy, and what it repeats. transformers ties the two names of
    /// the bias of BERT's head only where the head is the embedding, and else begins the one that is not
    /// there with zeros.
    pub fn saved_copies(spec: &ModelSpec) -> Vec<(String, String)> {
        let is_own_head = spec.head.is_some_and(|head| head.bias) && !spec.tie_word_embeddings;
        let copies = Self::copies(spec).into_iter();
        copies.filter(|(copy, _)| is_own_head && copy.ends_with(".bias")).collect()
    }

    /// Adds the weights of one block, or some outside the blocks.
    fn place(
        &mut self,
        names: &Names,
        layer: Option<usize>,
        head_dim: usize,
        weights: &[WeightShape],
    ) {
        let number = layer.map(|layer| layer.to_string()).unwrap_or_default();
        let (ours, theirs) = match layer {
            None => (String::new(), String::new()),
            Some(_) => (format!("model.layers.{number}."), names.block.replace("{}", &number)),
        };
        for weight in weights {
            let name = format!("{ours}{}.{}", weight.module, weight.part);
            let place = names.place(weight);
            // Parts that lie in one tensor are one entry.
            let all_parts = weight.parts.unwrap_or(1);
            let (entries, parts) =
                if place.joins_parts() { (1, all_parts) } else { (all_parts, 1) };
            for entry in 0..entries {
                let module = place.module().replace("{}", &entry.to_string());
                let (shape, placement) = place.within((weight, entry), weights, head_dim);
                let suffix = match place {
                    Place::Stacked(..) | Place::StackedTransposed(_) | Place::Tensor(_) => {
                        String::new()
                    }
                    _ => format!(".{}", weight.part),
                };
                self.slices.push(TensorSlice {
                    weight: name.clone(),
                    role: weight.role,
                    block: layer,
                    first_row: entry * weight.rows,
                    rows: parts * weight.rows,
                    columns: weight.columns.unwrap_or(1),
                    tensor: format!("{theirs}{module}{suffix}"),
                    shape,
                    placement,
                });
            }
        }
    }
}

impl Names {
    fn place(&self, weight: &WeightShape) -> Place {
        let exact = |name: &str| {
            name.strip_prefix(weight.module).and_then(|rest| rest.strip_prefix('.'))
                == Some(weight.part)
        };
        let found = self.places.iter().find(|(name, _)| exact(name));
        let found = found.or_else(|| self.places.iter().find(|(name, _)| *name == weight.module));
        found.map_or(Place::Module(weight.module), |(_, place)| *place)
    }
}

impl Place {
    const fn module(self) -> &'static str {
        match self {
            Self::Module(name)
            | Self::Tensor(name)
            | Self::StackedTransposed(name)
            | Self::Transposed(name)
            | Self::Fused(name, _)
            | Self::PerHead(name, ..)
            | Self::FusedTransposed(name, _)
            | Self::Interleaved(name, _)
            | Self::Stacked(name, _) => name,
        }
    }

    /// Whether all parts of a weight lie in one tensor.
    const fn joins_parts(self) -> bool {
        matches!(self, Self::Interleaved(..) | Self::Stacked(..))
    }

    /// The shape of the tensor, and where in it the weight is, or the part of it that has an entry of
    /// its own; `all` are the weights beside it.
    fn within(
        self,
        (weight, entry): (&WeightShape, usize),
        all: &[WeightShape],
        head_dim: usize,
    ) -> (Vec<usize>, Placement) {
        let (rows, columns) = (weight.rows, weight.columns);
        match (self, columns) {
            (Self::Module(_) | Self::Tensor(_), Some(columns)) => {
                (vec![rows, columns], Placement::Whole)
            }
            (
                Self::Module(_)
                | Self::Tensor(_)
                | Self::Transposed(_)
                | Self::StackedTransposed(_),
                None,
            ) => (vec![rows], Placement::Whole),
            (Self::StackedTransposed(_), Some(columns)) => {
                let shape = vec![weight.parts.unwrap_or(1), columns, rows];
                let start = entry * columns * rows;
                (shape, Placement::TransposedColumns { start })
            }
            (Self::Transposed(_), Some(columns)) => {
                (vec![columns, rows], Placement::TransposedColumns { start: 0 })
            }
            (Self::Interleaved(_, modules) | Self::Stacked(_, modules), columns) => {
                let (start, stride) = fused(weight, all, modules);
                let (parts, columns) = (weight.parts.unwrap_or(1), columns.unwrap_or(1));
                let shape = match self {
                    Self::Stacked(..) => vec![parts, stride, columns],
                    _ => vec![parts * stride, columns],
                };
                (shape, Placement::Rows { start, run: rows, stride })
            }
            (Self::Fused(_, modules), columns) => {
                let (start, total) = fused(weight, all, modules);
                let shape = std::iter::once(total).chain(columns).collect();
                (shape, Placement::Rows { start, run: rows, stride: rows })
            }
            (Self::PerHead(_, index, count), columns) => {
                let shape = std::iter::once(count * rows).chain(columns).collect();
                let start = index * head_dim;
                (shape, Placement::Rows { start, run: head_dim, stride: count * head_dim })
            }
            (Self::FusedTransposed(_, modules), columns) => {
                let (start, total) = fused(weight, all, modules);
                match columns {
                    Some(columns) => (vec![columns, total], Placement::TransposedColumns { start }),
                    None => (vec![total], Placement::Rows { start, run: rows, stride: rows }),
                }
            }
        }
    }
}

/// The first row of `weight` where the rows of `modules` follow one another, and all their rows.
fn fused(weight: &WeightShape, all: &[WeightShape], modules: &[&str]) -> (usize, usize) {
    let (mut start, mut total) = (0, 0);
    for module in modules {
        let part = all.iter().find(|w| w.module == *module && w.part == weight.part);
        if *module == weight.module {
            start = total;
        }
        total += part.map_or(0, |part| part.rows);
    }
    (start, total)
}

/// Whether a tensor is of a layer past the model's own: DeepSeek-V3's files append layers that predict
/// further tokens.
fn is_beyond_the_last_layer(spec: &ModelSpec, tensor: &str) -> bool {
    let layer = tensor.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
    let layer = layer.and_then(|number| number.parse::<usize>().ok());
    layer.is_some_and(|layer| layer >= spec.num_hidden_layers)
}

//! Tensor names: the program's weights against a family's files.
//!
//! A program names its weights after the LLaMA layout. A family's file may name a tensor
//! differently, store it transposed (GPT-2's `Conv1D` keeps `[inputs, outputs]`), or hold several
//! weights in one tensor (GPT-2's `c_attn` is query, key and value). A [`TensorMap`] says so for
//! every weight, both for loading and for saving.

use cairn_spec::ModelSpec;
use cairn_spec::model::{AttentionForm, Family, Mlp, NormKind, Position, QkNorm};

/// Where in a family's tensor a weight of the program lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// The whole tensor, as it is.
    Whole,
    /// Part of a tensor stored `[inputs, outputs]`: columns `start .. start + outputs`.
    TransposedColumns {
        /// First column.
        start: usize,
    },
    /// Elements `start ..` of a vector.
    Elements {
        /// First element.
        start: usize,
    },
}

/// One weight's place in a family's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSlice {
    /// The weight's name in the program.
    pub weight: String,
    /// Rows of the weight (outputs); the length of a vector.
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

/// Every weight of a model with its place in its family's files, in program order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// One entry per weight of the program.
    pub slices: Vec<TensorSlice>,
}

impl TensorMap {
    /// The map for a model.
    pub fn new(spec: &ModelSpec) -> Self {
        let mut map = Self { slices: Vec::new() };
        let namer = Namer { spec, family: spec.family };
        namer.fill(&mut map.slices);
        map
    }

    /// The entry of a weight.
    pub fn get(&self, weight: &str) -> Option<&TensorSlice> {
        self.slices.iter().find(|slice| slice.weight == weight)
    }

    /// Each tensor of the family's files once, with its shape, in program order.
    pub fn tensors(&self) -> Vec<(&str, &[usize])> {
        let mut tensors: Vec<(&str, &[usize])> = Vec::new();
        for slice in &self.slices {
            if tensors.last().is_none_or(|(name, _)| *name != slice.tensor) {
                tensors.push((&slice.tensor, &slice.shape));
            }
        }
        tensors
    }

    /// Spellings under which files in the wild hold a tensor of this family: the name itself, then
    /// alternatives (GPT-2 files may lack the `transformer.` prefix).
    pub fn spellings(family: Family, tensor: &str) -> Vec<&str> {
        let mut names = vec![tensor];
        if family == Family::Gpt2 {
            names.extend(tensor.strip_prefix("transformer."));
        }
        names
    }

    /// Tensors that files of this family may hold besides the weights: masks that older versions
    /// saved with the model, and copies of tied weights.
    pub fn is_ignorable(spec: &ModelSpec, tensor: &str) -> bool {
        let mask = [".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"];
        mask.iter().any(|suffix| tensor.ends_with(suffix))
            || (spec.tie_word_embeddings && tensor == "lm_head.weight")
    }
}

struct Namer<'a> {
    spec: &'a ModelSpec,
    family: Family,
}

impl Namer<'_> {
    fn fill(&self, slices: &mut Vec<TensorSlice>) {
        let spec = self.spec;
        let d = spec.hidden_size;
        let (embed, norm) = match self.family {
            Family::Gpt2 => ("transformer.wte", "transformer.ln_f"),
            Family::Llama => ("model.embed_tokens", "model.norm"),
        };
        slices.push(matrix("model.embed_tokens", spec.vocab_size, d, embed));
        if spec.position == Position::Learned {
            let rows = spec.max_position_embeddings;
            slices.push(matrix("model.embed_positions", rows, d, "transformer.wpe"));
        }
        for layer in 0..spec.num_hidden_layers {
            self.block(layer, slices);
        }
        self.norm("model.norm", norm, d, slices);
        if !spec.tie_word_embeddings {
            slices.push(matrix("lm_head", spec.vocab_size, d, "lm_head"));
        }
    }

    fn norm(&self, weight: &str, tensor: &str, width: usize, slices: &mut Vec<TensorSlice>) {
        slices.push(vector(&format!("{weight}.weight"), width, &format!("{tensor}.weight")));
        if self.spec.norm.kind == NormKind::Layer && self.spec.norm.bias {
            slices.push(vector(&format!("{weight}.bias"), width, &format!("{tensor}.bias")));
        }
    }

    fn block(&self, layer: usize, slices: &mut Vec<TensorSlice>) {
        let ours = format!("model.layers.{layer}");
        let (theirs, norms) = match self.family {
            Family::Gpt2 => (format!("transformer.h.{layer}"), ["ln_1", "ln_2"]),
            Family::Llama => (ours.clone(), ["input_layernorm", "post_attention_layernorm"]),
        };
        let d = self.spec.hidden_size;
        let norm = |which: usize, name: &str, slices: &mut Vec<TensorSlice>| {
            self.norm(&format!("{ours}.{name}"), &format!("{theirs}.{}", norms[which]), d, slices);
        };
        norm(0, "input_layernorm", slices);
        match self.family {
            Family::Gpt2 => self.gpt2_attention(&ours, &theirs, slices),
            Family::Llama => self.attention(&ours, slices),
        }
        norm(1, "post_attention_layernorm", slices);
        match self.family {
            Family::Gpt2 => self.gpt2_mlp(&ours, &theirs, slices),
            Family::Llama => self.mlp(&ours, slices),
        }
    }

    fn attention(&self, ours: &str, slices: &mut Vec<TensorSlice>) {
        let AttentionForm::Gqa(gqa) = self.spec.attention.form else { return };
        let d = self.spec.hidden_size;
        let (q, kv) =
            (gqa.num_attention_heads * gqa.head_dim, gqa.num_key_value_heads * gqa.head_dim);
        let projections = [
            ("q_proj", q, d, gqa.qkv_bias),
            ("k_proj", kv, d, gqa.qkv_bias),
            ("v_proj", kv, d, gqa.qkv_bias),
            ("o_proj", d, q, gqa.o_bias),
        ];
        for (name, rows, columns, bias) in projections {
            linear(&format!("{ours}.self_attn.{name}"), (rows, columns), bias, slices);
        }
        if gqa.qk_norm == Some(QkNorm::PerHead) {
            for name in ["q_norm", "k_norm"] {
                let name = format!("{ours}.self_attn.{name}.weight");
                slices.push(vector(&name, gqa.head_dim, &name));
            }
        }
    }

    fn mlp(&self, ours: &str, slices: &mut Vec<TensorSlice>) {
        let (d, f) = (self.spec.hidden_size, self.spec.mlp.intermediate_size());
        let (names, bias): (&[&str], bool) = match self.spec.mlp {
            Mlp::Glu { bias, .. } => (&["gate_proj", "up_proj"], bias),
            Mlp::Plain { bias, .. } => (&["up_proj"], bias),
        };
        for name in names {
            linear(&format!("{ours}.mlp.{name}"), (f, d), bias, slices);
        }
        linear(&format!("{ours}.mlp.down_proj"), (d, f), bias, slices);
    }

    fn gpt2_attention(&self, ours: &str, theirs: &str, slices: &mut Vec<TensorSlice>) {
        let d = self.spec.hidden_size;
        for (index, name) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
            let weight = format!("{ours}.self_attn.{name}");
            slices.push(columns(&weight, (d, d), &format!("{theirs}.attn.c_attn"), (index, 3)));
        }
        for (index, name) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
            slices.push(TensorSlice {
                weight: format!("{ours}.self_attn.{name}.bias"),
                rows: d,
                columns: 1,
                tensor: format!("{theirs}.attn.c_attn.bias"),
                shape: vec![3 * d],
                placement: Placement::Elements { start: index * d },
            });
        }
        let (weight, tensor) =
            (format!("{ours}.self_attn.o_proj"), format!("{theirs}.attn.c_proj"));
        slices.push(columns(&weight, (d, d), &tensor, (0, 1)));
        slices.push(vector(&format!("{weight}.bias"), d, &format!("{tensor}.bias")));
    }

    fn gpt2_mlp(&self, ours: &str, theirs: &str, slices: &mut Vec<TensorSlice>) {
        let (d, f) = (self.spec.hidden_size, self.spec.mlp.intermediate_size());
        for (name, rows, inputs, tensor) in
            [("up_proj", f, d, "c_fc"), ("down_proj", d, f, "c_proj")]
        {
            let (weight, tensor) = (format!("{ours}.mlp.{name}"), format!("{theirs}.mlp.{tensor}"));
            slices.push(columns(&weight, (rows, inputs), &tensor, (0, 1)));
            slices.push(vector(&format!("{weight}.bias"), rows, &format!("{tensor}.bias")));
        }
    }
}

fn matrix(weight: &str, rows: usize, columns: usize, tensor: &str) -> TensorSlice {
    TensorSlice {
        weight: format!("{weight}.weight"),
        rows,
        columns,
        tensor: format!("{tensor}.weight"),
        shape: vec![rows, columns],
        placement: Placement::Whole,
    }
}

fn vector(weight: &str, length: usize, tensor: &str) -> TensorSlice {
    TensorSlice {
        weight: weight.to_owned(),
        rows: length,
        columns: 1,
        tensor: tensor.to_owned(),
        shape: vec![length],
        placement: Placement::Whole,
    }
}

fn linear(name: &str, (rows, columns): (usize, usize), bias: bool, slices: &mut Vec<TensorSlice>) {
    slices.push(matrix(name, rows, columns, name));
    if bias {
        let name = format!("{name}.bias");
        slices.push(vector(&name, rows, &name));
    }
}

/// Part `index` of `count` equal parts of a transposed tensor.
fn columns(
    weight: &str,
    (rows, inputs): (usize, usize),
    tensor: &str,
    (index, count): (usize, usize),
) -> TensorSlice {
    TensorSlice {
        weight: format!("{weight}.weight"),
        rows,
        columns: inputs,
        tensor: format!("{tensor}.weight"),
        shape: vec![inputs, count * rows],
        placement: Placement::TransposedColumns { start: index * rows },
    }
}

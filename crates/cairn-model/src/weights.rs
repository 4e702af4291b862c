//! The weights that a spec's program has, by name and size: one list for every family.
//!
//! Names are those of the LLaMA layout. A block's modules are listed without their prefix
//! `model.layers.N.`; the weights of experts are stacked, expert after expert.

use cairn_spec::ModelSpec;
use cairn_spec::model::{AttentionForm, BlockForm, Gqa, Mlp, NormKind, Position, QkNorm};

/// One weight of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WeightShape {
    /// Whose weight it is: `self_attn.q_proj`.
    pub(crate) module: &'static str,
    /// `weight` or `bias`.
    pub(crate) part: &'static str,
    /// Experts stacked in it, if it holds experts; `rows` are those of one expert.
    pub(crate) experts: Option<usize>,
    /// Outputs; the length of a vector.
    pub(crate) rows: usize,
    /// Inputs; `None` for a vector.
    pub(crate) columns: Option<usize>,
}

/// Weights before the first block.
pub(crate) fn embedding(spec: &ModelSpec) -> Vec<WeightShape> {
    let d = spec.hidden_size;
    let mut list = List::default();
    list.matrix("model.embed_tokens", spec.vocab_size, d);
    if spec.position == Position::Learned {
        list.matrix("model.embed_positions", spec.max_position_embeddings, d);
    }
    list.0
}

/// Weights of the block of layer `layer_idx`.
pub(crate) fn block(spec: &ModelSpec, _layer_idx: usize) -> Vec<WeightShape> {
    let mut list = List::default();
    let norms = block_norms(spec.block);
    let (before, after) = norms.split_at(norms.len() / 2);
    for name in before {
        list.norm(spec, name, spec.hidden_size);
    }
    match &spec.attention.form {
        AttentionForm::Gqa(gqa) => list.grouped(spec, gqa),
        // Refused when the program is built.
        AttentionForm::Mla(_) => {}
    }
    for name in after {
        list.norm(spec, name, spec.hidden_size);
    }
    let (d, f) = (spec.hidden_size, spec.mlp.intermediate_size());
    match &spec.mlp {
        Mlp::Glu { bias, .. } => {
            list.linear("mlp.gate_proj", (f, d), *bias);
            list.linear("mlp.up_proj", (f, d), *bias);
            list.linear("mlp.down_proj", (d, f), *bias);
        }
        Mlp::Plain { bias, .. } => {
            list.linear("mlp.up_proj", (f, d), *bias);
            list.linear("mlp.down_proj", (d, f), *bias);
        }
        // Refused when the program is built.
        Mlp::Moe(_) => {}
    }
    list.0
}

/// Weights after the last block.
pub(crate) fn head(spec: &ModelSpec) -> Vec<WeightShape> {
    let mut list = List::default();
    if spec.block.final_norm() {
        list.norm(spec, "model.norm", spec.hidden_size);
    }
    if !spec.tie_word_embeddings {
        list.matrix("lm_head", spec.vocab_size, spec.hidden_size);
    }
    list.0
}

/// Norms of a block over the residual stream: those of the attention, then those of the
/// feed-forward part, each in the order in which they are computed.
pub(crate) const fn block_norms(form: BlockForm) -> &'static [&'static str] {
    match form {
        BlockForm::PreNorm | BlockForm::ParallelResidual => {
            &["input_layernorm", "post_attention_layernorm"]
        }
        BlockForm::PostNorm | BlockForm::ResidualNorm => {
            &["post_attention_layernorm", "post_feedforward_layernorm"]
        }
        BlockForm::SandwichNorm => &[
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ],
    }
}

#[derive(Default)]
struct List(Vec<WeightShape>);

impl List {
    fn matrix(&mut self, module: &'static str, rows: usize, columns: usize) {
        let columns = Some(columns);
        self.0.push(WeightShape { module, part: "weight", experts: None, rows, columns });
    }

    fn vector(&mut self, module: &'static str, part: &'static str, rows: usize) {
        self.0.push(WeightShape { module, part, experts: None, rows, columns: None });
    }

    fn linear(&mut self, module: &'static str, (rows, columns): (usize, usize), bias: bool) {
        self.matrix(module, rows, columns);
        if bias {
            self.vector(module, "bias", rows);
        }
    }

    fn norm(&mut self, spec: &ModelSpec, module: &'static str, width: usize) {
        self.vector(module, "weight", width);
        if spec.norm.kind == NormKind::Layer && spec.norm.bias {
            self.vector(module, "bias", width);
        }
    }

    fn grouped(&mut self, spec: &ModelSpec, gqa: &Gqa) {
        let d = spec.hidden_size;
        let q = gqa.num_attention_heads * gqa.head_dim;
        let kv = gqa.num_key_value_heads * gqa.head_dim;
        self.linear("self_attn.q_proj", (q, d), gqa.qkv_bias);
        self.linear("self_attn.k_proj", (kv, d), gqa.qkv_bias);
        self.linear("self_attn.v_proj", (kv, d), gqa.qkv_bias);
        self.linear("self_attn.o_proj", (d, q), gqa.o_bias);
        let widths = match gqa.qk_norm {
            None => return,
            Some(QkNorm::PerHead) => (gqa.head_dim, gqa.head_dim),
            Some(QkNorm::AllHeads) => (q, kv),
        };
        self.norm(spec, "self_attn.q_norm", widths.0);
        self.norm(spec, "self_attn.k_norm", widths.1);
    }
}

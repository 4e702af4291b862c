//! The weights that a spec's program has, by name and size: one list for every family.
//!
//! Names are those of the LLaMA layout. A block's modules are listed without their prefix
//! `model.layers.N.`; the weights of experts are stacked, expert after expert.

use cairn_spec::ModelSpec;
use cairn_spec::model::{AttentionForm, BlockForm, Gqa, Mla, Mlp, Moe, NormKind, Position, QkNorm};

/// What a weight is in its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The weight or the bias of a norm, or a bias.
    Vector,
    /// Rows that are looked up.
    Table,
    /// A matrix of attention.
    Attention,
    /// A matrix for each head, which queries or results of latent attention meet: part of `kv_b_proj`.
    Absorbed,
    /// A matrix of a feed-forward part that all tokens go through.
    FeedForward,
    /// What chooses experts.
    Router,
    /// A matrix of each expert.
    Experts,
    /// A matrix between the last block and the head.
    Transform,
    /// The head over the vocabulary.
    Head,
}

/// One weight of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WeightShape {
    /// What it is.
    pub(crate) role: Role,
    /// Whose weight it is: `self_attn.q_proj`.
    pub(crate) module: &'static str,
    /// `weight` or `bias`.
    pub(crate) part: &'static str,
    /// Equal parts stacked in it, if it has parts: experts, or heads; `rows` are those of one.
    pub(crate) parts: Option<usize>,
    /// Outputs; the length of a vector.
    pub(crate) rows: usize,
    /// Inputs; `None` for a vector.
    pub(crate) columns: Option<usize>,
}

impl WeightShape {
    /// No weight, to be told more about.
    pub(crate) const EMPTY: Self =
        Self { role: Role::Vector, module: "", part: "", parts: None, rows: 0, columns: None };
}

/// Weights before the first block.
pub(crate) fn embedding(spec: &ModelSpec) -> Vec<WeightShape> {
    let d = spec.hidden_size;
    let mut list = List::default();
    list.matrix(Role::Table, "model.embed_tokens", (spec.vocab_size, d));
    if spec.position == Position::Learned {
        list.matrix(Role::Table, "model.embed_positions", (spec.max_position_embeddings, d));
    }
    if let Some(rows) = spec.embedding.type_vocab_size {
        list.matrix(Role::Table, "model.embed_token_types", (rows, d));
    }
    if spec.embedding.norm {
        list.norm(spec, "model.embed_norm", d);
    }
    list.0
}

/// Weights of the block of layer `layer_idx`.
pub(crate) fn block(spec: &ModelSpec, layer_idx: usize) -> Vec<WeightShape> {
    let mut list = List::default();
    let norms = block_norms(spec.block);
    let (before, after) = norms.split_at(norms.len() / 2);
    let first = spec.block == BlockForm::PreNorm && !spec.has_attention_norm(layer_idx);
    for name in before.iter().skip(usize::from(first)) {
        list.norm(spec, name, spec.hidden_size);
    }
    match &spec.attention.form {
        AttentionForm::Gqa(gqa) => list.grouped(spec, gqa),
        AttentionForm::Mla(mla) => list.latent(spec, mla),
    }
    for name in after {
        list.norm(spec, name, spec.hidden_size);
    }
    let (d, f) = (spec.hidden_size, spec.mlp.intermediate_size());
    match &spec.mlp {
        Mlp::Glu { bias, .. } => {
            list.linear(Role::FeedForward, "mlp.gate_proj", (f, d), *bias);
            list.linear(Role::FeedForward, "mlp.up_proj", (f, d), *bias);
            list.linear(Role::FeedForward, "mlp.down_proj", (d, f), *bias);
        }
        Mlp::Plain { bias, .. } => {
            list.linear(Role::FeedForward, "mlp.up_proj", (f, d), *bias);
            list.linear(Role::FeedForward, "mlp.down_proj", (d, f), *bias);
        }
        Mlp::Moe(moe) if moe.has_experts(layer_idx) => list.mixture(moe, d),
        Mlp::Moe(_) => {
            list.matrix(Role::FeedForward, "mlp.gate_proj", (f, d));
            list.matrix(Role::FeedForward, "mlp.up_proj", (f, d));
            list.matrix(Role::FeedForward, "mlp.down_proj", (d, f));
        }
    }
    list.0
}

/// The weight that logits are products with: the embedding where the head is tied to it. `None` for a
/// model without a head.
pub fn head_weight(spec: &ModelSpec) -> Option<&'static str> {
    spec.head?;
    Some(if spec.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" })
}

/// Weights after the last block.
pub(crate) fn head(spec: &ModelSpec) -> Vec<WeightShape> {
    let mut list = List::default();
    if spec.block.final_norm() {
        list.norm(spec, "model.norm", spec.hidden_size);
    }
    let Some(head) = spec.head else { return list.0 };
    let d = spec.hidden_size;
    if let Some(transform) = head.transform {
        list.linear(Role::Transform, "head.dense", (d, d), transform.bias);
        list.norm(spec, "head.norm", d);
    }
    if !spec.tie_word_embeddings {
        list.matrix(Role::Head, "lm_head", (spec.vocab_size, d));
    }
    if head.bias {
        list.vector("lm_head", "bias", spec.vocab_size);
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
    fn matrix(&mut self, role: Role, module: &'static str, (rows, columns): (usize, usize)) {
        let (part, columns) = ("weight", Some(columns));
        self.0.push(WeightShape { role, module, part, parts: None, rows, columns });
    }

    fn stacked(
        &mut self,
        role: Role,
        module: &'static str,
        parts: usize,
        (rows, columns): (usize, usize),
    ) {
        let (part, parts, columns) = ("weight", Some(parts), Some(columns));
        self.0.push(WeightShape { role, module, part, parts, rows, columns });
    }

    fn vector(&mut self, module: &'static str, part: &'static str, rows: usize) {
        let role = Role::Vector;
        self.0.push(WeightShape { role, module, part, parts: None, rows, columns: None });
    }

    fn linear(&mut self, role: Role, module: &'static str, size: (usize, usize), bias: bool) {
        self.matrix(role, module, size);
        if bias {
            self.vector(module, "bias", size.0);
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
        self.linear(Role::Attention, "self_attn.q_proj", (q, d), gqa.qkv_bias);
        self.linear(Role::Attention, "self_attn.k_proj", (kv, d), gqa.qkv_bias);
        self.linear(Role::Attention, "self_attn.v_proj", (kv, d), gqa.qkv_bias);
        self.linear(Role::Attention, "self_attn.o_proj", (d, q), gqa.o_bias);
        let widths = match gqa.qk_norm {
            None => return,
            Some(QkNorm::PerHead) => (gqa.head_dim, gqa.head_dim),
            Some(QkNorm::AllHeads) => (q, kv),
        };
        self.norm(spec, "self_attn.q_norm", widths.0);
        self.norm(spec, "self_attn.k_norm", widths.1);
    }

    /// Latent attention. The keys' and the values' part of `kv_b_proj` are weights of their own, which
    /// queries and results meet instead.
    fn latent(&mut self, spec: &ModelSpec, mla: &Mla) {
        let (d, h, latent) = (spec.hidden_size, mla.num_attention_heads, mla.kv_lora_rank);
        let queries = h * (mla.qk_nope_head_dim + mla.qk_rope_head_dim);
        match mla.q_lora_rank {
            None => self.matrix(Role::Attention, "self_attn.q_proj", (queries, d)),
            Some(rank) => {
                self.linear(Role::Attention, "self_attn.q_a_proj", (rank, d), mla.bias);
                self.vector("self_attn.q_a_layernorm", "weight", rank);
                self.matrix(Role::Attention, "self_attn.q_b_proj", (queries, rank));
            }
        }
        let down = latent + mla.qk_rope_head_dim;
        self.linear(Role::Attention, "self_attn.kv_a_proj_with_mqa", (down, d), mla.bias);
        self.vector("self_attn.kv_a_layernorm", "weight", latent);
        self.stacked(Role::Absorbed, "self_attn.k_b_proj", h, (mla.qk_nope_head_dim, latent));
        self.stacked(Role::Absorbed, "self_attn.v_b_proj", h, (mla.v_head_dim, latent));
        self.linear(Role::Attention, "self_attn.o_proj", (d, h * mla.v_head_dim), mla.bias);
    }

    fn mixture(&mut self, moe: &Moe, d: usize) {
        let (e, f) = (moe.num_experts, moe.moe_intermediate_size);
        self.matrix(Role::Router, "mlp.gate", (e, d));
        if moe.router.correction_bias {
            self.vector("mlp.gate", "e_score_correction_bias", e);
        }
        self.stacked(Role::Experts, "mlp.experts.gate_proj", e, (f, d));
        self.stacked(Role::Experts, "mlp.experts.up_proj", e, (f, d));
        self.stacked(Role::Experts, "mlp.experts.down_proj", e, (d, f));
        if let Some(shared) = moe.shared_intermediate_size {
            self.matrix(Role::FeedForward, "mlp.shared_experts.gate_proj", (shared, d));
            self.matrix(Role::FeedForward, "mlp.shared_experts.up_proj", (shared, d));
            self.matrix(Role::FeedForward, "mlp.shared_experts.down_proj", (d, shared));
        }
    }
}

//! How many parameters a spec describes.

use super::{AttentionForm, Gqa, Mla, Mlp, ModelFields, Moe, NormKind, Position, QkNorm};
use serde::Serialize;

/// Parameters of a model, by part. Tied weights count once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ParameterCount {
    /// Token, position and token-type embeddings and their norm.
    pub embedding: u64,
    /// Attention of one block.
    pub attention: u64,
    /// Feed-forward part of one block; of a block with experts, where some have them.
    pub mlp: u64,
    /// Norms of one block over the residual stream.
    pub block_norms: u64,
    /// All blocks together, which need not be alike.
    pub blocks: u64,
    /// The norm after the last block.
    pub final_norm: u64,
    /// The head, where it is not the embedding.
    pub head: u64,
}

impl ParameterCount {
    /// The whole model.
    pub const fn total(&self) -> u64 {
        self.embedding + self.blocks + self.final_norm + self.head
    }
}

impl ModelFields {
    /// Counts the parameters, by part. The limits of [`ModelSpec`](super::ModelSpec) keep every
    /// product inside u64.
    pub fn parameter_count(&self) -> ParameterCount {
        let d = wide(self.hidden_size);
        let v = wide(self.vocab_size);
        let norm = self.norm_parameters();
        let mut embedding = v * d;
        if matches!(self.position, Position::Learned) {
            embedding += wide(self.max_position_embeddings) * d;
        }
        embedding += self.embedding.type_vocab_size.map_or(0, |rows| wide(rows) * d);
        embedding += if self.embedding.norm { norm } else { 0 };
        let head = self.head.map_or(0, |head| {
            let transform = head
                .transform
                .map_or(0, |transform| d * d + if transform.bias { d } else { 0 } + norm);
            let weight = if self.tie_word_embeddings { 0 } else { v * d };
            weight + if head.bias { v } else { 0 } + transform
        });
        let blocks = (0..self.num_hidden_layers).map(|layer| self.block_parameters(layer));
        ParameterCount {
            embedding,
            attention: self.attention_parameters(),
            mlp: feed_forward(&self.mlp, d),
            block_norms: wide(self.block.norms_per_block()) * norm,
            // Only mixtures of experts beyond every file seen could pass 2^64.
            blocks: blocks.fold(0, u64::saturating_add),
            final_norm: if self.block.final_norm() { norm } else { 0 },
            head,
        }
    }

    /// Parameters of the block of layer `layer_idx`.
    pub fn block_parameters(&self, layer_idx: usize) -> u64 {
        let d = wide(self.hidden_size);
        let mlp = match &self.mlp {
            Mlp::Moe(moe) if !moe.has_experts(layer_idx) => 3 * d * wide(moe.intermediate_size),
            mlp => feed_forward(mlp, d),
        };
        let missing = if self.has_attention_norm(layer_idx) { 0 } else { 1 };
        let norms = wide(self.block.norms_per_block() - missing) * self.norm_parameters();
        self.attention_parameters() + mlp + norms
    }

    fn attention_parameters(&self) -> u64 {
        let d = wide(self.hidden_size);
        match &self.attention.form {
            AttentionForm::Gqa(gqa) => grouped(gqa, d),
            AttentionForm::Mla(mla) => latent(mla, d),
        }
    }

    /// Parameters of one norm over the residual stream.
    fn norm_parameters(&self) -> u64 {
        let d = wide(self.hidden_size);
        match (self.norm.kind, self.norm.bias) {
            (NormKind::Rms | NormKind::Layer, true) => 2 * d,
            (NormKind::Rms | NormKind::Layer, false) => d,
        }
    }
}

fn grouped(gqa: &Gqa, d: u64) -> u64 {
    let k = wide(gqa.head_dim);
    let q_rows = wide(gqa.num_attention_heads) * k;
    let kv_rows = wide(gqa.num_key_value_heads) * k;
    let qkv_rows = q_rows + 2 * kv_rows;
    let biases = if gqa.qkv_bias { qkv_rows } else { 0 } + if gqa.o_bias { d } else { 0 };
    let norms = match gqa.qk_norm {
        None => 0,
        Some(QkNorm::PerHead) => 2 * k,
        Some(QkNorm::AllHeads) => q_rows + kv_rows,
    };
    d * qkv_rows + q_rows * d + biases + norms
}

/// As in DeepSeek-V2 and V3: biases, where there are any, on the projections down and out.
fn latent(mla: &Mla, d: u64) -> u64 {
    let h = wide(mla.num_attention_heads);
    let key = wide(mla.qk_nope_head_dim + mla.qk_rope_head_dim);
    let latent = wide(mla.kv_lora_rank);
    let latent_and_rope = latent + wide(mla.qk_rope_head_dim);
    let value = wide(mla.v_head_dim);
    let queries = match mla.q_lora_rank.map(wide) {
        Some(rank) => d * rank + rank + rank * h * key,
        None => d * h * key,
    };
    let down_biases = mla.q_lora_rank.map_or(0, wide) + latent_and_rope;
    let biases = if mla.bias { down_biases + d } else { 0 };
    let expand = latent * h * (wide(mla.qk_nope_head_dim) + value);
    queries + d * latent_and_rope + latent + expand + h * value * d + biases
}

fn feed_forward(mlp: &Mlp, d: u64) -> u64 {
    match mlp {
        Mlp::Glu { intermediate_size, bias, .. } => {
            let f = wide(*intermediate_size);
            3 * d * f + if *bias { 2 * f + d } else { 0 }
        }
        Mlp::Plain { intermediate_size, bias, .. } => {
            let f = wide(*intermediate_size);
            2 * d * f + if *bias { f + d } else { 0 }
        }
        Mlp::Moe(moe) => experts(moe, d),
    }
}

/// Router, experts and shared experts of one layer.
fn experts(moe: &Moe, d: u64) -> u64 {
    let e = wide(moe.num_experts);
    let router = e * d + if moe.router.correction_bias { e } else { 0 };
    let shared = 3 * d * moe.shared_intermediate_size.map_or(0, wide);
    router + e * 3 * d * wide(moe.moe_intermediate_size) + shared
}

fn wide(size: usize) -> u64 {
    u64::try_from(size).expect("usize is at most 64 bits")
}

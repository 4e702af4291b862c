//! Attention over ragged batches: dense, from the paged cache, and backward.
//!
//! Dimensions: `t` query tokens, `s` keys, `h` query heads, `g` key/value heads (h a multiple of
//! g: query head i reads key/value head i / (h/g)), `k` key dim, `v` value dim.
//!
//! **Order of sums** (what the reference in `attention/reference.rs` computes and every kernel
//! reproduces bit for bit). Keys come in tiles of [`KEY_TILE`](crate::KEY_TILE) aligned to the sequence's own position 0.
//! A score is one chain over the key dim, times the key's factor where the cache has some, times the
//! scale, soft-capped if asked, −∞ where the mask hides the key. A tile has its maximum m, its weights `e^(score − m)`, their 16-lane sum l and
//! their product o with the values, one chain over the tile's keys, each weight times its value's factor. Tiles combine in a binary tree
//! over the tile *index* (2i with 2i + 1, then pairs of pairs); a tile without visible keys is the
//! identity. So a query's result depends neither on the chunk it was prefilled in, nor on the
//! other sequences, nor on where its keys are stored, given equal keys and values.
//!
//! The backward pass recomputes weights as `e^(score − lse)`; `dq` is one chain over the keys,
//! `dk` and `dv` one chain over the group's query heads and, inside, the queries, ascending.
//!
//! **Dropout** of probabilities (Srivastava et al. 2014; Vaswani et al. 2017, section 5.4): a weight is
//! zeroed or divided by 1 − p before it meets its value; sums and log-sum-exps stay those of all
//! weights. The mask is made again wherever it is needed, sixteen keys a hash, from the (token, query
//! head) and the key's position in its sequence.
//!
//! A key that is not a number reaches the queries that see it, and may reach others of its own
//! sequence and tile; it never reaches another sequence.
//!
//! Sources: Dao et al. 2022 and 2023 (FlashAttention), Milakov and Gimelshein 2018 (online softmax).

mod backward;
pub(crate) mod bench;
mod cache;
mod forward;
mod grid;
mod mask;
mod product;
mod reference;
mod scoring;
mod tiles;
mod tree;

pub use cache::{CacheSpec, CacheType, KvWrite, PAGE_TOKENS, kv_write, kv_write_reference};
pub use mask::Mask;
pub use reference::{attention_grad_reference, attention_reference};

use crate::cpu::Cpu;
use crate::dropout::DropoutMask;

/// Shapes and rules of one attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a query and a key.
    pub key_dim: usize,
    /// Width of a value and of a head's output.
    pub value_dim: usize,
    /// Whether a value is the first `value_dim` columns of its key (MLA's latent): no values are
    /// passed, and their gradient is added to those columns of the keys' gradient.
    pub values_in_keys: bool,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Factor on the scores, usually one over the root of the key dim.
    pub scale: f32,
    /// Bounds scores to ±cap by `cap · tanh(score / cap)` after the scale.
    pub softcap: Option<f32>,
}

impl AttentionSpec {
    /// Query heads that share a key/value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Checks that the sizes fit together.
    ///
    /// # Panics
    /// If they do not: a program with such a layer is refused when it is verified.
    pub fn check(&self) {
        let Self { heads, kv_heads, key_dim, value_dim, .. } = *self;
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "{heads} query heads do not divide among {kv_heads} key/value heads"
        );
        assert!(key_dim > 0 && value_dim > 0, "a head without width");
        assert!(!self.values_in_keys || value_dim <= key_dim, "a value leaves its key");
    }
}

/// Sequences laid end to end.
#[derive(Debug, Clone, Copy)]
pub struct RaggedBatch<'a> {
    /// The sequences, in the order of their rows, which do not overlap.
    pub sequences: &'a [SeqSlot<'a>],
}

/// One sequence of a [`RaggedBatch`].
#[derive(Debug, Clone, Copy)]
pub struct SeqSlot<'a> {
    /// Its first row among the tokens of the run.
    pub start: usize,
    /// Its tokens in this run.
    pub len: usize,
    /// Keys that the cache held before this run: the position of the first of its tokens. 0 with
    /// dense keys.
    pub cached: usize,
    /// Its pages, in order of position; empty with dense keys.
    pub blocks: &'a [u32],
}

impl SeqSlot<'_> {
    /// Keys there are: cached and new.
    pub fn keys(&self) -> usize {
        self.cached + self.len
    }
}

/// Where keys and values are read.
#[derive(Debug, Clone, Copy)]
pub enum Keys<'a> {
    /// The tokens of this run, in the batch's layout.
    Dense {
        /// Keys, `[t, g, k]`.
        k_tgk: &'a [f32],
        /// Values, `[t, g, v]`; empty if they are in the keys.
        v_tgv: &'a [f32],
    },
    /// A paged cache, to which [`kv_write`] has added the tokens of this run.
    Paged {
        /// All pages.
        pages: &'a [u8],
        /// Their layout.
        cache: CacheSpec,
    },
}

/// Attention of the tokens of a run.
#[derive(Debug)]
pub struct Attention<'a> {
    /// Queries, `[t, h, k]`.
    pub q_thk: &'a [f32],
    /// Keys and values.
    pub keys: Keys<'a>,
    /// Outputs, `[t, h, v]`, overwritten in the rows of the batch's sequences; 0 for a query that
    /// sees nothing.
    pub out_thv: &'a mut [f32],
    /// Log-sum-exp of each query's scores, `[t, h]`, for the backward pass; −∞ for a query that
    /// sees nothing.
    pub lse_th: Option<&'a mut [f32]>,
    /// The sequences.
    pub batch: RaggedBatch<'a>,
    /// Shapes and rules.
    pub spec: AttentionSpec,
    /// Which probabilities are dropped; only of dense keys.
    pub dropout: Option<DropoutMask>,
}

/// The gradients of [`Attention`] with dense keys.
#[derive(Debug)]
pub struct AttentionGrad<'a> {
    /// Gradient of the output, `[t, h, v]`.
    pub dout_thv: &'a [f32],
    /// Queries of the forward call, `[t, h, k]`.
    pub q_thk: &'a [f32],
    /// Keys of the forward call, `[t, g, k]`.
    pub k_tgk: &'a [f32],
    /// Values of the forward call, `[t, g, v]`; empty if they are in the keys.
    pub v_tgv: &'a [f32],
    /// Outputs of the forward call, `[t, h, v]`.
    pub out_thv: &'a [f32],
    /// Log-sum-exp of the forward call, `[t, h]`.
    pub lse_th: &'a [f32],
    /// Gradient of the queries, overwritten in the rows of the batch's sequences.
    pub dq_thk: &'a mut [f32],
    /// Gradient of the keys, likewise.
    pub dk_tgk: &'a mut [f32],
    /// Gradient of the values, likewise; empty if they are in the keys.
    pub dv_tgv: &'a mut [f32],
    /// The sequences; nothing may be cached.
    pub batch: RaggedBatch<'a>,
    /// Shapes and rules.
    pub spec: AttentionSpec,
    /// The dropout of the forward call.
    pub dropout: Option<DropoutMask>,
}

/// Attends.
pub fn attention(cpu: &Cpu, args: Attention<'_>) {
    forward::attention_blocks(cpu, args);
}

/// The gradients of [`attention`].
pub fn attention_grad(cpu: &Cpu, args: AttentionGrad<'_>) {
    backward::attention_grad_blocks(cpu, args);
}

#[cfg(test)]
mod tests;

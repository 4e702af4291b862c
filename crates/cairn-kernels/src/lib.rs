//! Kernels, the registry that names them, the thread pool, the arena and the tuner.
//!
//! Layer 1: knows no other Cairn crate. A kernel is a function over slices; whatever it computes is
//! defined by the plain `*_reference` function in the same file, bit for bit, under the f32 numeric
//! policy (or, where an instruction of a program says so, the bf16 policy of [`compute`]): every sum has
//! one fixed order, so results depend neither on the batch, the threads nor the instruction set.
//!
//! Reading order: [`isa`] (what the machine can do), [`cpu`] and [`pool`] (threads and scratch),
//! [`memory`] (regions and spans), `simd` (sixteen lanes, three ways), [`encoding`] (how
//! weights are stored), [`mod@matmul`] (the three products), the other operators, then [`registry`],
//! [`tuner`], [`bandwidth`], [`peak`] and [`profile`] (what exists, what is chosen, what the machine
//! can do, and what of it is kept).

pub mod activation;
pub mod attention;
pub mod bandwidth;
pub mod bench;
pub mod compute;
pub mod cpu;
mod disjoint;
pub mod dropout;
pub mod embed;
pub mod encoding;
mod expert_bench;
pub mod expert_sum;
pub mod isa;
mod lanes;
pub mod layer_norm;
mod math;
pub mod matmul;
pub mod memory;
pub mod normal;
pub mod optimizer;
pub mod peak;
pub mod pointwise;
pub mod pool;
pub mod profile;
mod random;
pub mod registry;
pub mod rms_norm;
pub mod rope;
pub mod route;
pub mod rows;
mod simd;
#[cfg(test)]
mod testing;
mod token_blocks;
pub mod token_logprob;
pub mod tuner;

pub use activation::{
    Act, Activation, ActivationGrad, Glu, GluGrad, activation, activation_grad, glu, glu_grad,
};
pub use attention::{
    Attention, AttentionGrad, AttentionSpec, CacheSpec, CacheType, Keys, KvWrite, Mask,
    PAGE_TOKENS, RaggedBatch, SeqSlot, attention, attention_grad, kv_write,
};
pub use compute::Compute;
pub use cpu::{Cpu, CpuError, SharedSlice};
pub use dropout::{Dropout, DropoutAssign, DropoutMask, dropout, dropout_assign};
pub use embed::{Embed, EmbedGrad, PositionEmbed, embed, embed_grad, position_embed};
pub use encoding::{Encoding, Layout, Weight};
pub use expert_sum::{ExpertSum, ExpertSumGrad, expert_sum, expert_sum_grad};
pub use isa::Isa;
pub use layer_norm::{LayerNorm, LayerNormGrad, layer_norm, layer_norm_grad};
pub use matmul::{
    BiasGrad, ExpertMatmul, ExpertMatmulDw, ExpertMatmulDx, HeadMatmul, HeadMatmulDw, HeadMatmulDx,
    Matmul, MatmulDw, MatmulDx, bias_grad, expert_matmul, expert_matmul_dw, expert_matmul_dx,
    expert_scratch_len, head_matmul, head_matmul_dw, head_matmul_dx, matmul, matmul_dw, matmul_dx,
    matmul_each,
};
pub use memory::{Bytes, BytesMut, Lent, Memory, MemoryError, Span};
pub use normal::{FillNormal, fill_normal};
pub use optimizer::{AdamW, AdamWStep, Ema, SumSquares, adamw, ema, sum_squares};
pub use pointwise::{
    Add, AddAssign, Fill, Scale, ScaleAssign, Softcap, SoftcapGrad, add, add_assign, fill, scale,
    scale_assign, softcap, softcap_grad,
};
pub use pool::Scratch;
pub use random::splitmix;
pub use rms_norm::{RmsNorm, RmsNormGrad, rms_norm, rms_norm_grad};
pub use rope::{Rope, RopePairing, rope};
pub use route::balance::{Balance, ExpertLoad, ExpertLoadGrad, expert_load, expert_load_grad};
pub use route::{ExpertGroups, GroupScore, Route, RouteGrad, Routing, Scoring, route, route_grad};
pub use rows::{Concat, GatherRows, ScatterRows, Split, concat, gather_rows, scatter_rows, split};
pub use token_logprob::{
    CrossEntropy, Head, HeadGrads, LowRank, LowRankGrads, TokenLogprob, TokenLogprobGrad,
    cross_entropy, head_scratch_len, log_sum_exp, token_logprob, token_logprob_grad,
};

/// Tokens whose weight-gradient products form one chain; blocks are folded in order.
pub const TOKEN_BLOCK: usize = 256;
/// Keys per attention tile, aligned to the sequence's own position 0.
pub const KEY_TILE: usize = 64;
/// Rows of the output head computed at a time; logits of more rows never exist.
pub const HEAD_CHUNK: usize = 256;

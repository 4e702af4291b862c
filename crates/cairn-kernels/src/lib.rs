//! Kernels, the registry that names them, the thread pool, the arena and the tuner.
//!
//! Layer 1: knows no other Cairn crate. A kernel is a function over slices; whatever it computes is
//! defined by the plain `*_reference` function in the same file, bit for bit, under the f32 numeric
//! policy: every sum has one fixed order, so results depend neither on the batch, the threads nor
//! the instruction set.
//!
//! Reading order: [`isa`] (what the machine can do), [`cpu`] and [`pool`] (threads and scratch),
//! [`memory`] (regions and spans), [`simd`](self) (sixteen lanes, three ways), [`encoding`] (how
//! weights are stored), [`matmul`] (the three products), the other operators, then [`registry`],
//! [`tuner`], [`bandwidth`] and [`peak`] (what exists, what is chosen, what the machine can do).

pub mod cpu;
pub mod encoding;
pub mod isa;
pub mod matmul;
pub mod memory;
pub mod pool;
pub mod registry;
mod simd;

pub use cpu::{Cpu, SharedSlice};
pub use encoding::{Encoding, Layout, Weight};
pub use isa::Isa;
pub use matmul::{
    BiasGrad, HeadMatmul, HeadMatmulDw, HeadMatmulDx, Matmul, MatmulDw, MatmulDx, bias_grad,
    head_matmul, head_matmul_dw, head_matmul_dx, matmul, matmul_dw, matmul_dx,
};
pub use memory::{Bytes, BytesMut, Memory, MemoryError, Span};
pub use pool::Scratch;

/// Tokens whose weight-gradient products form one chain; blocks are folded in order.
pub const TOKEN_BLOCK: usize = 256;
/// Keys per attention tile, aligned to the sequence's own position 0.
pub const KEY_TILE: usize = 64;
/// Rows of the output head computed at a time; logits of more rows never exist.
pub const HEAD_CHUNK: usize = 256;

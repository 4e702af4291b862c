//! The three matrix products of a linear layer, and the definitions they are tested against.
//!
//! Letters: `t` tokens, `n` outputs, `k` inputs, `h` heads, `i`/`o` inputs and outputs of a head.
//!
//! - forward `y = x · Wᵀ`: each `y[t][n]` is one chain of fused multiply-adds over `k`, ascending,
//!   from 0, from the bias or from the value already there;
//! - input gradient `dx = dy · W`: one chain over `n`, ascending;
//! - weight gradient `dw = dyᵀ · x`: a chain over the tokens of each block of
//!   [`TOKEN_BLOCK`](crate::TOKEN_BLOCK) tokens, from 0; blocks are aligned to the start of each batch
//!   row of `row_tokens` tokens and added to the total in order.
//!
//! The `*_reference` functions are those sentences as loops. The kernels share one blocked product
//! with sources that are strided or decoded on the way in; which outputs share a vector,
//! a tile or a thread changes no bit.

use crate::cpu::Cpu;
use crate::encoding::Weight;

mod heads;
mod reference;

pub use heads::{
    HeadMatmul, HeadMatmulDw, HeadMatmulDx, head_matmul, head_matmul_dw, head_matmul_dw_reference,
    head_matmul_dx, head_matmul_dx_reference, head_matmul_reference,
};
pub use reference::{
    bias_grad_reference, matmul_dw_reference, matmul_dx_reference, matmul_reference,
};

/// `y = x · Wᵀ`, from 0, from a bias or added to what is there.
#[derive(Debug)]
pub struct Matmul<'a> {
    /// Inputs, `[t][k]`.
    pub x_tk: &'a [f32],
    /// The weight, any encoding and layout.
    pub weight: Weight<'a>,
    /// Where each output's chain starts; not together with `accumulate`.
    pub bias_n: Option<&'a [f32]>,
    /// Outputs, `[t][n]`.
    pub y_tn: &'a mut [f32],
    /// Tokens.
    pub t: usize,
    /// Whether each chain starts from the value already in `y_tn`.
    pub accumulate: bool,
}

/// `dx = dy · W`, the gradient of [`Matmul`] for its input.
#[derive(Debug)]
pub struct MatmulDx<'a> {
    /// Gradient of the outputs, `[t][n]`.
    pub dy_tn: &'a [f32],
    /// The weight, any encoding and layout.
    pub weight: Weight<'a>,
    /// Gradient of the inputs, `[t][k]`.
    pub dx_tk: &'a mut [f32],
    /// Tokens.
    pub t: usize,
    /// Whether each chain starts from the value already in `dx_tk`.
    pub accumulate: bool,
}

/// `dw = dyᵀ · x`, the gradient of [`Matmul`] for its weight.
#[derive(Debug)]
pub struct MatmulDw<'a> {
    /// Gradient of the outputs, `[t][n]`.
    pub dy_tn: &'a [f32],
    /// Inputs, `[t][k]`.
    pub x_tk: &'a [f32],
    /// Gradient of the weight, `[n][k]`.
    pub dw_nk: &'a mut [f32],
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Tokens.
    pub t: usize,
    /// Tokens of a batch row, to which token blocks are aligned.
    pub row_tokens: usize,
    /// Whether the blocks are added to what is there, or to 0.
    pub accumulate: bool,
}

/// `db = Σ dy` over tokens, the gradient of [`Matmul`] for its bias.
#[derive(Debug)]
pub struct BiasGrad<'a> {
    /// Gradient of the outputs, `[t][n]`.
    pub dy_tn: &'a [f32],
    /// Gradient of the bias.
    pub db_n: &'a mut [f32],
    /// Tokens.
    pub t: usize,
    /// Tokens of a batch row, to which token blocks are aligned.
    pub row_tokens: usize,
    /// Whether the blocks are added to what is there, or to 0.
    pub accumulate: bool,
}

impl Matmul<'_> {
    fn check(&self) {
        let Weight { n, k, .. } = self.weight;
        self.weight.check();
        assert_eq!(self.x_tk.len(), self.t * k, "x_tk of a {n}×{k} weight");
        assert_eq!(self.y_tn.len(), self.t * n, "y_tn of a {n}×{k} weight");
        if let Some(bias_n) = self.bias_n {
            assert_eq!(bias_n.len(), n, "bias_n");
            assert!(!self.accumulate, "a chain starts from the bias or from y, not both");
        }
    }
}

impl MatmulDx<'_> {
    fn check(&self) {
        let Weight { n, k, .. } = self.weight;
        self.weight.check();
        assert_eq!(self.dy_tn.len(), self.t * n, "dy_tn of a {n}×{k} weight");
        assert_eq!(self.dx_tk.len(), self.t * k, "dx_tk of a {n}×{k} weight");
    }
}

impl MatmulDw<'_> {
    fn check(&self) {
        assert_eq!(self.dy_tn.len(), self.t * self.n, "dy_tn");
        assert_eq!(self.x_tk.len(), self.t * self.k, "x_tk");
        assert_eq!(self.dw_nk.len(), self.n * self.k, "dw_nk");
        assert!(self.row_tokens > 0 || self.t == 0, "row_tokens of a weight gradient");
    }
}

impl BiasGrad<'_> {
    fn check(&self) {
        assert_eq!(self.dy_tn.len(), self.t * self.db_n.len(), "dy_tn");
        assert!(self.row_tokens > 0 || self.t == 0, "row_tokens of a bias gradient");
    }
}

/// The forward product. See [`matmul_reference`] for its definition.
pub fn matmul(cpu: &Cpu, args: Matmul<'_>) {
    args.check();
    let _ = cpu;
    matmul_reference(args);
}

/// The input gradient. See [`matmul_dx_reference`] for its definition.
pub fn matmul_dx(cpu: &Cpu, args: MatmulDx<'_>) {
    args.check();
    let _ = cpu;
    matmul_dx_reference(args);
}

/// The weight gradient. See [`matmul_dw_reference`] for its definition.
pub fn matmul_dw(cpu: &Cpu, args: MatmulDw<'_>) {
    args.check();
    let _ = cpu;
    matmul_dw_reference(args);
}

/// The bias gradient. See [`bias_grad_reference`] for its definition.
pub fn bias_grad(cpu: &Cpu, args: BiasGrad<'_>) {
    args.check();
    let _ = cpu;
    bias_grad_reference(args);
}

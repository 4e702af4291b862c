//! One product a head: what the absorbed form of latent attention is made of.
//!
//! Each head has its own `[o][i]` weight; the chains are those of [`super::matmul`].

use super::arithmetic::Form;
use super::blocking::Blocking;
use super::pack::{Left, Right};
use super::product::{self, Contraction, Product, Start};
use super::reference::token_blocks;
use super::rows::WeightRows;
use crate::TOKEN_BLOCK;
use crate::cpu::Cpu;
use crate::encoding::Weight;

/// `y[t][h][o] = Σ_i x[t][h][i] · w[h][o][i]`.
#[derive(Debug)]
pub struct HeadMatmul<'a> {
    /// Inputs, `[t][h][i]`.
    pub x_thi: &'a [f32],
    /// One weight a head, `[h][o][i]`.
    pub w_hoi: &'a [f32],
    /// Outputs, `[t][h][o]`.
    pub y_tho: &'a mut [f32],
    /// Tokens.
    pub t: usize,
    /// Heads.
    pub heads: usize,
    /// Inputs of a head.
    pub inputs: usize,
    /// Outputs of a head.
    pub outputs: usize,
}

/// `dx[t][h][i] = Σ_o dy[t][h][o] · w[h][o][i]`.
#[derive(Debug)]
pub struct HeadMatmulDx<'a> {
    /// Gradient of the outputs, `[t][h][o]`.
    pub dy_tho: &'a [f32],
    /// One weight a head, `[h][o][i]`.
    pub w_hoi: &'a [f32],
    /// Gradient of the inputs, `[t][h][i]`.
    pub dx_thi: &'a mut [f32],
    /// Tokens.
    pub t: usize,
    /// Heads.
    pub heads: usize,
    /// Inputs of a head.
    pub inputs: usize,
    /// Outputs of a head.
    pub outputs: usize,
    /// Whether each chain starts from the value already in `dx_thi`.
    pub accumulate: bool,
}

/// `dw[h][o][i] = Σ_t dy[t][h][o] · x[t][h][i]`, tokens in folded blocks.
#[derive(Debug)]
pub struct HeadMatmulDw<'a> {
    /// Gradient of the outputs, `[t][h][o]`.
    pub dy_tho: &'a [f32],
    /// Inputs, `[t][h][i]`.
    pub x_thi: &'a [f32],
    /// Gradient of the weights, `[h][o][i]`.
    pub dw_hoi: &'a mut [f32],
    /// Tokens.
    pub t: usize,
    /// Heads.
    pub heads: usize,
    /// Inputs of a head.
    pub inputs: usize,
    /// Outputs of a head.
    pub outputs: usize,
    /// Tokens of a batch row, to which token blocks are aligned.
    pub row_tokens: usize,
    /// Whether the blocks are added to what is there, or to 0.
    pub accumulate: bool,
}

impl HeadMatmul<'_> {
    fn check(&self) {
        let Self { t, heads, inputs, outputs, .. } = *self;
        assert_eq!(self.x_thi.len(), t * heads * inputs, "x_thi");
        assert_eq!(self.w_hoi.len(), heads * outputs * inputs, "w_hoi");
        assert_eq!(self.y_tho.len(), t * heads * outputs, "y_tho");
    }
}

impl HeadMatmulDx<'_> {
    fn check(&self) {
        let Self { t, heads, inputs, outputs, .. } = *self;
        assert_eq!(self.dy_tho.len(), t * heads * outputs, "dy_tho");
        assert_eq!(self.w_hoi.len(), heads * outputs * inputs, "w_hoi");
        assert_eq!(self.dx_thi.len(), t * heads * inputs, "dx_thi");
    }
}

impl HeadMatmulDw<'_> {
    fn check(&self) {
        let Self { t, heads, inputs, outputs, .. } = *self;
        assert_eq!(self.dy_tho.len(), t * heads * outputs, "dy_tho");
        assert_eq!(self.x_thi.len(), t * heads * inputs, "x_thi");
        assert_eq!(self.dw_hoi.len(), heads * outputs * inputs, "dw_hoi");
        assert!(self.row_tokens > 0 || t == 0, "row_tokens of a weight gradient");
    }
}

/// The per-head product. See [`head_matmul_reference`] for its definition.
pub fn head_matmul(cpu: &Cpu, args: HeadMatmul<'_>) {
    args.check();
    let HeadMatmul { x_thi, w_hoi, y_tho, t, heads, inputs, outputs } = args;
    let count = if t * outputs == 0 { 0 } else { heads };
    let product = |head: usize| Product {
        left: Left::Rows { values: head_of(x_thi, head * inputs), stride: heads * inputs },
        right: Right::Outputs(head_weight(w_hoi, head, outputs, inputs)),
        form: Form::Floats,
        rows: t,
        columns: outputs,
        contraction: Contraction::Chain(inputs),
        start: Start::Zero,
        out_first: head * outputs,
        out_stride: heads * outputs,
        out_rows: None,
    };
    product::run_each(cpu, (count, product), y_tho, &Blocking::guess(t, outputs, inputs, cpu));
}

/// The per-head input gradient. See [`head_matmul_dx_reference`] for its definition.
pub fn head_matmul_dx(cpu: &Cpu, args: HeadMatmulDx<'_>) {
    args.check();
    let HeadMatmulDx { dy_tho, w_hoi, dx_thi, t, heads, inputs, outputs, accumulate } = args;
    let count = if t * inputs == 0 { 0 } else { heads };
    let product = |head: usize| Product {
        left: Left::Rows { values: head_of(dy_tho, head * outputs), stride: heads * outputs },
        right: Right::Inputs(head_weight(w_hoi, head, outputs, inputs)),
        form: Form::Floats,
        rows: t,
        columns: inputs,
        contraction: Contraction::Chain(outputs),
        start: if accumulate { Start::Keep } else { Start::Zero },
        out_first: head * inputs,
        out_stride: heads * inputs,
        out_rows: None,
    };
    product::run_each(cpu, (count, product), dx_thi, &Blocking::guess(t, inputs, outputs, cpu));
}

/// The per-head weight gradient. See [`head_matmul_dw_reference`] for its definition.
pub fn head_matmul_dw(cpu: &Cpu, args: HeadMatmulDw<'_>) {
    args.check();
    let HeadMatmulDw { dy_tho, x_thi, dw_hoi, t, heads, inputs, outputs, .. } = args;
    if t == 0 {
        if !args.accumulate {
            dw_hoi.fill(0.0);
        }
        return;
    }
    let count = if inputs * outputs == 0 { 0 } else { heads };
    let product = |head: usize| Product {
        left: Left::Steps { values: head_of(dy_tho, head * outputs), stride: heads * outputs },
        right: Right::Matrix { values: head_of(x_thi, head * inputs), stride: heads * inputs },
        form: Form::Floats,
        rows: outputs,
        columns: inputs,
        contraction: Contraction::TokenBlocks { t, row_tokens: args.row_tokens },
        start: if args.accumulate { Start::Keep } else { Start::Zero },
        out_first: head * outputs * inputs,
        out_stride: inputs,
        out_rows: None,
    };
    product::run_each(
        cpu,
        (count, product),
        dw_hoi,
        &Blocking::guess(outputs, inputs, TOKEN_BLOCK, cpu),
    );
}

/// A matrix of several heads from one head's first column on.
fn head_of(values: &[f32], first: usize) -> &[f32] {
    &values[first.min(values.len())..]
}

fn head_weight(w_hoi: &[f32], head: usize, outputs: usize, inputs: usize) -> WeightRows<'_> {
    let w_oi = &w_hoi[head * outputs * inputs..][..outputs * inputs];
    WeightRows::all(Weight::f32(outputs, inputs, w_oi))
}

/// Defines [`head_matmul`]: plain loops in the canonical order.
pub fn head_matmul_reference(args: HeadMatmul<'_>) {
    args.check();
    let HeadMatmul { x_thi, w_hoi, y_tho, t, heads, inputs, outputs } = args;
    for row in 0..t * heads {
        let head = row % heads;
        for output in 0..outputs {
            let x = &x_thi[row * inputs..(row + 1) * inputs];
            let w = &w_hoi[(head * outputs + output) * inputs..][..inputs];
            y_tho[row * outputs + output] =
                x.iter().zip(w).fold(0.0, |sum, (x, w)| x.mul_add(*w, sum));
        }
    }
}

/// Defines [`head_matmul_dx`]: plain loops in the canonical order.
pub fn head_matmul_dx_reference(args: HeadMatmulDx<'_>) {
    args.check();
    let HeadMatmulDx { dy_tho, w_hoi, dx_thi, t, heads, inputs, outputs, accumulate } = args;
    for row in 0..t * heads {
        let head = row % heads;
        for input in 0..inputs {
            let dx = &mut dx_thi[row * inputs + input];
            let start = if accumulate { *dx } else { 0.0 };
            *dx = (0..outputs).fold(start, |sum, output| {
                let w = w_hoi[(head * outputs + output) * inputs + input];
                dy_tho[row * outputs + output].mul_add(w, sum)
            });
        }
    }
}

/// Defines [`head_matmul_dw`]: plain loops in the canonical order.
pub fn head_matmul_dw_reference(args: HeadMatmulDw<'_>) {
    args.check();
    let HeadMatmulDw { dy_tho, x_thi, dw_hoi, t, heads, inputs, outputs, .. } = args;
    for (index, dw) in dw_hoi.iter_mut().enumerate() {
        let (row, input) = (index / inputs, index % inputs);
        let (head, output) = (row / outputs, row % outputs);
        let start = if args.accumulate { *dw } else { 0.0 };
        *dw = token_blocks(t, args.row_tokens).fold(start, |total, block| {
            total
                + block.fold(0.0, |sum: f32, token| {
                    let row = token * heads + head;
                    dy_tho[row * outputs + output].mul_add(x_thi[row * inputs + input], sum)
                })
        });
    }
}

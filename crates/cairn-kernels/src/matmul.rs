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
//! The forward product has two more arithmetics, [`Compute::Bf16`] and [`Compute::Int8`], as
//! [`crate::compute`] defines them.
//!
//! The `*_reference` functions are those sentences as loops. The kernels share one blocked product
//! with sources that are strided or decoded on the way in; which outputs share a vector,
//! a tile or a thread changes no bit.

use crate::compute::Compute;
use crate::cpu::Cpu;
use crate::encoding::{Encoding, Weight};
use crate::simd::{LANES, kernel};
use crate::tuner::{ProductKind, TuneCase};

mod arithmetic;
pub(crate) mod bench;
mod blocking;
mod experts;
mod heads;
mod int8;
mod pack;
mod pack_bf16;
mod pack_bf16z;
mod pack_grouped;
mod product;
mod reference;
mod rows;
mod shares;
mod stream;
mod stream_rows;
mod tile;
pub(crate) mod tune;

use arithmetic::Form;
pub use blocking::Blocking;
pub(crate) use blocking::Estimates;
use pack::{Left, Right};
use product::{Contraction, Product, Start};
use reference::token_blocks;
use rows::WeightRows;
use stream::{Inputs, STREAM_TOKENS_MAX, StreamProduct};

pub use experts::{
    ExpertMatmul, ExpertMatmulDw, ExpertMatmulDx, expert_matmul, expert_matmul_dw,
    expert_matmul_dw_reference, expert_matmul_dx, expert_matmul_dx_reference,
    expert_matmul_reference, expert_scratch_len,
};
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
    /// The arithmetic; anything but f32 wants a weight of that encoding.
    pub compute: Compute,
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

impl<'a> Matmul<'a> {
    fn start(&self) -> Start<'a> {
        match (self.accumulate, self.bias_n) {
            (true, _) => Start::Keep,
            (false, Some(bias_n)) => Start::Bias(bias_n),
            (false, None) => Start::Zero,
        }
    }

    fn check(&self) {
        let Weight { n, k, .. } = self.weight;
        self.weight.check();
        check_compute(self.compute, self.weight);
        assert_eq!(self.x_tk.len(), self.t * k, "x_tk of a {n}×{k} weight");
        assert_eq!(self.y_tn.len(), self.t * n, "y_tn of a {n}×{k} weight");
        if let Some(bias_n) = self.bias_n {
            assert_eq!(bias_n.len(), n, "bias_n");
            assert!(!self.accumulate, "a chain starts from the bias or from y, not both");
        }
    }
}

/// # Panics
/// If the weight is not stored in what the arithmetic multiplies: the program was verified.
fn check_compute(compute: Compute, weight: Weight<'_>) {
    assert!(
        compute.multiplies(weight.encoding),
        "{compute} products of a weight stored as {}",
        weight.encoding
    );
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
    if args.compute == Compute::Int8 {
        return int8::run(cpu, args);
    }
    let Weight { encoding, n, k, .. } = args.weight;
    let (t, form) = (args.t, Form::new(args.compute, cpu.simd()));
    if t <= STREAM_TOKENS_MAX
        && let Some(inputs) = Inputs::new(cpu, form, args.x_tk, k)
    {
        return stream_each(cpu, inputs, [args]);
    }
    let product = match args.compute {
        Compute::F32 | Compute::Int8 => ProductKind::Matmul,
        Compute::Bf16 => ProductKind::MatmulBf16,
    };
    let blocking = Blocking::choose(cpu, TuneCase { product, encoding, t, n, k });
    matmul_cut(cpu, args, &blocking);
}

/// As [`matmul`] of each. Products of the same few inputs, stored and multiplied alike, share out the threads
/// together, so that these wait for each other once.
pub fn matmul_each<const N: usize>(cpu: &Cpu, products: [Matmul<'_>; N]) {
    let Some(first) = products.first() else { return };
    let is_like_first = |other: &Matmul<'_>| {
        let of = |args: &Matmul<'_>| (args.x_tk.as_ptr(), args.t, args.compute);
        let Weight { encoding, layout, k, .. } = other.weight;
        of(other) == of(first)
            && (encoding, layout, k) == (first.weight.encoding, first.weight.layout, first.weight.k)
    };
    let is_int8 = first.compute == Compute::Int8;
    if first.t > STREAM_TOKENS_MAX && !is_int8 || !products.iter().all(is_like_first) {
        return products.into_iter().for_each(|args| matmul(cpu, args));
    }
    products.iter().for_each(Matmul::check);
    if is_int8 {
        return int8::run_each(cpu, products);
    }
    match Inputs::new(cpu, Form::new(first.compute, cpu.simd()), first.x_tk, first.weight.k) {
        Some(inputs) => stream_each(cpu, inputs, products),
        None => products.into_iter().for_each(|args| matmul(cpu, args)),
    }
}

/// Products of the same few inputs.
fn stream_each<const N: usize>(cpu: &Cpu, mut inputs: Inputs<'_>, products: [Matmul<'_>; N]) {
    let form = inputs.form;
    let x = inputs.get();
    let streams = products.each_ref().map(|args| {
        let (rows, start) = (WeightRows::all(args.weight), args.start());
        StreamProduct { x, form, rows, start, t: args.t, routed: None }
    });
    stream::run(cpu, &streams, products.map(|args| args.y_tn));
}

/// The forward product, cut as told.
fn matmul_cut(cpu: &Cpu, args: Matmul<'_>, blocking: &Blocking) {
    let start = args.start();
    let Matmul { x_tk, weight, y_tn, t, compute, .. } = args;
    let Weight { n, k, .. } = weight;
    let form = Form::new(compute, cpu.simd());
    let product = Product {
        left: Left::Rows { values: x_tk, stride: k },
        right: Right::Outputs(WeightRows::all(weight)),
        form,
        rows: t,
        columns: n,
        contraction: Contraction::Chain(form.steps(k)),
        start,
        out_first: 0,
        out_stride: n,
        out_rows: None,
    };
    product::run(cpu, product, y_tn, blocking);
}

/// The input gradient. See [`matmul_dx_reference`] for its definition.
pub fn matmul_dx(cpu: &Cpu, args: MatmulDx<'_>) {
    args.check();
    let Weight { encoding, n, k, .. } = args.weight;
    let case = TuneCase { product: ProductKind::MatmulDx, encoding, t: args.t, n, k };
    let blocking = Blocking::choose(cpu, case);
    matmul_dx_cut(cpu, args, &blocking);
}

/// The input gradient, cut as told.
fn matmul_dx_cut(cpu: &Cpu, args: MatmulDx<'_>, blocking: &Blocking) {
    let MatmulDx { dy_tn, weight, dx_tk, t, accumulate } = args;
    let Weight { n, k, .. } = weight;
    let product = Product {
        left: Left::Rows { values: dy_tn, stride: n },
        right: Right::Inputs(WeightRows::all(weight)),
        form: Form::Floats,
        rows: t,
        columns: k,
        contraction: Contraction::Chain(n),
        start: if accumulate { Start::Keep } else { Start::Zero },
        out_first: 0,
        out_stride: k,
        out_rows: None,
    };
    product::run(cpu, product, dx_tk, blocking);
}

/// The weight gradient. See [`matmul_dw_reference`] for its definition.
pub fn matmul_dw(cpu: &Cpu, args: MatmulDw<'_>) {
    args.check();
    let MatmulDw { n, k, t, .. } = args;
    if t == 0 {
        if !args.accumulate {
            args.dw_nk.fill(0.0);
        }
        return;
    }
    let encoding = Encoding::F32;
    let case = TuneCase { product: ProductKind::MatmulDw, encoding, t, n, k };
    let blocking = Blocking::choose(cpu, case);
    matmul_dw_cut(cpu, args, &blocking);
}

/// The weight gradient, cut as told. There are tokens.
fn matmul_dw_cut(cpu: &Cpu, args: MatmulDw<'_>, blocking: &Blocking) {
    let MatmulDw { dy_tn, x_tk, dw_nk, n, k, t, row_tokens, accumulate } = args;
    let product = Product {
        left: Left::Steps { values: dy_tn, stride: n },
        right: Right::Matrix { values: x_tk, stride: k },
        form: Form::Floats,
        rows: n,
        columns: k,
        contraction: Contraction::TokenBlocks { t, row_tokens },
        start: if accumulate { Start::Keep } else { Start::Zero },
        out_first: 0,
        out_stride: k,
        out_rows: None,
    };
    product::run(cpu, product, dw_nk, blocking);
}

/// The bias gradient. See [`bias_grad_reference`] for its definition.
pub fn bias_grad(cpu: &Cpu, args: BiasGrad<'_>) {
    args.check();
    let BiasGrad { dy_tn, db_n, t, row_tokens, accumulate } = args;
    let n = db_n.len();
    let simd = cpu.simd();
    let columns = n.div_ceil(cpu.threads()).next_multiple_of(4 * LANES);
    cpu.parallel_chunks(db_n, columns, |first, db, _| {
        if !accumulate {
            db.fill(0.0);
        }
        for block in token_blocks(t, row_tokens) {
            add_block(simd, &dy_tn[block.start * n..block.end * n], n, first, db);
        }
    });
}

kernel! {
    /// Adds the column sums of some rows, from column `first` on, to `db`.
    fn add_block<V>(dy_tn: &[f32], n: usize, first: usize, db: &mut [f32]) {
        for (i, chunk) in db.chunks_mut(4 * LANES).enumerate() {
            let column = first + i * 4 * LANES;
            let mut sums = [V::zero(); 4];
            for row in dy_tn.chunks_exact(n) {
                let from = &row[column..column + chunk.len()];
                for (sum, lanes) in sums.iter_mut().zip(from.chunks(LANES)) {
                    *sum = *sum + V::load_partial(lanes, 0.0);
                }
            }
            for (sum, lanes) in sums.into_iter().zip(chunk.chunks_mut(LANES)) {
                (V::load_partial(lanes, 0.0) + sum).store_partial(lanes);
            }
        }
    }
}

#[cfg(test)]
mod tests;

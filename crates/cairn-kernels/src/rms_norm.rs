//! RMSNorm and its gradients.
//!
//! Dimensions: `n` rows (tokens, or tokens × heads for head norms), `d` width of a row.
//!
//! Per row, in f32: `r = 1 / √(Σx²/d + eps)`, `y = (x · r) · w` with `w` the weight or, with
//! `plus_one` (Gemma), 1 + weight. The sum is a 16-lane row reduction.
//!
//! Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
//! <https://arxiv.org/abs/1910.07467>

pub(crate) mod bench;

use crate::TOKEN_BLOCK;
use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows, rows_per_task};
use crate::lanes::{self, at, put, vectors};
use crate::simd::{F32x16, kernel};
use crate::token_blocks::{BlockSums, TokenBlocks};

/// Normalizes rows by their root mean square.
#[derive(Debug)]
pub struct RmsNorm<'a> {
    /// Inputs, `[n, d]`.
    pub x_nd: &'a [f32],
    /// Weight, `[d]`.
    pub weight_d: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
    /// Whether rows are multiplied by 1 + weight instead of the weight.
    pub plus_one: bool,
    /// Outputs, `[n, d]`, overwritten.
    pub y_nd: &'a mut [f32],
}

/// The gradients of [`RmsNorm`].
///
/// With `g = dy · w`: `dx = r·g − (r³/d · Σ g·x) · x`; `dw = Σ dy · (x · r)` over the rows, one
/// chain inside blocks of [`TOKEN_BLOCK`] tokens that start anew at each batch row, folded in order.
#[derive(Debug)]
pub struct RmsNormGrad<'a> {
    /// Gradient of the output, `[n, d]`.
    pub dy_nd: &'a [f32],
    /// The input of the forward call, `[n, d]`.
    pub x_nd: &'a [f32],
    /// Weight, `[d]`.
    pub weight_d: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
    /// Whether rows are multiplied by 1 + weight instead of the weight.
    pub plus_one: bool,
    /// Gradient of the input, `[n, d]`.
    pub dx_nd: &'a mut [f32],
    /// Whether the input's gradient is added to what `dx_nd` holds.
    pub accumulate_dx: bool,
    /// Gradient of the weight, `[d]`; `None` where the weight is frozen.
    pub dw_d: Option<&'a mut [f32]>,
    /// Rows of one token: 1, or the number of heads of a head norm.
    pub rows_per_token: usize,
    /// Tokens of one batch row.
    pub row_tokens: usize,
    /// Whether the weight's gradient is added to what `dw_d` holds.
    pub accumulate_dw: bool,
}

/// What a row is multiplied by, from the mean of its squares.
fn reciprocal_rms(x_d: &[f32], eps: f32) -> f32 {
    let sum = lanes::dot(x_d.iter().map(|&x| (x, x)));
    1.0 / (sum / x_d.len() as f32 + eps).sqrt()
}

/// Normalizes rows by their root mean square.
pub fn rms_norm(cpu: &Cpu, args: RmsNorm<'_>) {
    let RmsNorm { x_nd, weight_d, eps, plus_one, y_nd } = args;
    let (simd, d) = (cpu.simd(), weight_d.len());
    assert_eq!(x_nd.len(), y_nd.len(), "rms_norm: x and y differ in length");
    assert_eq!(x_nd.len() % d, 0, "rms_norm: x is not a whole number of rows");
    let weight = NormWeight { weight_d, plus_one };
    let rows = y_nd.len() / d;
    parallel_rows(cpu, rows, rows_per_task(d), RowSlice::new(y_nd, d), |rows, y_nd, _| {
        normalize_rows(simd, &x_nd[rows.start * d..rows.end * d], weight, eps, y_nd);
    });
}

/// A weight, or 1 + weight.
#[derive(Clone, Copy)]
struct NormWeight<'a> {
    weight_d: &'a [f32],
    plus_one: bool,
}

impl NormWeight<'_> {
    #[inline(always)]
    fn at<V: F32x16>(&self, i: usize) -> V {
        let weight = at::<V>(self.weight_d, i);
        if self.plus_one { V::splat(1.0) + weight } else { weight }
    }
}

/// [`reciprocal_rms`] with vectors.
#[inline(always)]
fn row_reciprocal_rms<V: F32x16>(x_d: &[f32], eps: f32) -> f32 {
    1.0 / (lanes::row_dot::<V>(x_d, x_d) / x_d.len() as f32 + eps).sqrt()
}

kernel! {
    fn normalize_rows<V>(x_nd: &[f32], weight: NormWeight<'_>, eps: f32, y_nd: &mut [f32]) {
        let d = weight.weight_d.len();
        for (x_d, y_d) in x_nd.chunks_exact(d).zip(y_nd.chunks_exact_mut(d)) {
            let r = V::splat(row_reciprocal_rms::<V>(x_d, eps));
            for i in vectors(d) {
                put(at::<V>(x_d, i) * r * weight.at::<V>(i), y_d, i);
            }
        }
    }
}

/// [`rms_norm`] in plain loops.
pub fn rms_norm_reference(args: RmsNorm<'_>) {
    let RmsNorm { x_nd, weight_d, eps, plus_one, y_nd } = args;
    let d = weight_d.len();
    assert_eq!(x_nd.len(), y_nd.len(), "rms_norm: x and y differ in length");
    assert_eq!(x_nd.len() % d, 0, "rms_norm: x is not a whole number of rows");
    for (x_d, y_d) in x_nd.chunks_exact(d).zip(y_nd.chunks_exact_mut(d)) {
        let r = reciprocal_rms(x_d, eps);
        for i in 0..d {
            let w = if plus_one { 1.0 + weight_d[i] } else { weight_d[i] };
            y_d[i] = (x_d[i] * r) * w;
        }
    }
}

/// The gradients of [`rms_norm`].
pub fn rms_norm_grad(cpu: &Cpu, args: RmsNormGrad<'_>) {
    let RmsNormGrad { dy_nd, x_nd, weight_d, eps, plus_one, dx_nd, accumulate_dx, .. } = args;
    let (simd, d) = (cpu.simd(), weight_d.len());
    assert_eq!((dy_nd.len(), x_nd.len()), (dx_nd.len(), dx_nd.len()), "rms_norm_grad: lengths");
    assert_eq!(dx_nd.len() % d, 0, "rms_norm_grad: not a whole number of rows");
    let job = GradJob { weight: NormWeight { weight_d, plus_one }, eps, accumulate_dx };
    let dx_rows = RowSlice::new(dx_nd, d);
    let rows = dy_nd.len() / d;
    let Some(dw_d) = args.dw_d else {
        parallel_rows(cpu, rows, rows_per_task(d), dx_rows, |rows, dx_nd, _| {
            let range = rows.start * d..rows.end * d;
            grad_rows(simd, job, [&dy_nd[range.clone()], &x_nd[range]], dx_nd, None);
        });
        return;
    };
    let blocks =
        TokenBlocks { rows, rows_per_token: args.rows_per_token, row_tokens: args.row_tokens };
    let sums = BlockSums { totals: [dw_d], accumulate: args.accumulate_dw };
    blocks.fold(cpu, sums, dx_rows, |rows, dx_nd, [dw_d]| {
        let range = rows.start * d..rows.end * d;
        grad_rows(simd, job, [&dy_nd[range.clone()], &x_nd[range]], dx_nd, Some(dw_d));
    });
}

/// What all rows of a gradient share.
#[derive(Clone, Copy)]
struct GradJob<'a> {
    weight: NormWeight<'a>,
    eps: f32,
    accumulate_dx: bool,
}

kernel! {
    /// The gradients of some rows; the weight's is added to one chain.
    fn grad_rows<V>(
        job: GradJob<'_>,
        inputs: [&[f32]; 2],
        dx_nd: &mut [f32],
        dw_d: Option<&mut [f32]>,
    ) {
        let d = job.weight.weight_d.len();
        let rows = inputs[0].chunks_exact(d).zip(inputs[1].chunks_exact(d));
        let mut dw_d = dw_d;
        for ((dy_d, x_d), dx_d) in rows.zip(dx_nd.chunks_exact_mut(d)) {
            let r = row_reciprocal_rms::<V>(x_d, job.eps);
            let mut dot = V::zero();
            for i in vectors(d) {
                let g = at::<V>(dy_d, i) * job.weight.at::<V>(i);
                dot = g.mul_add(lanes::at_or(x_d, i, -0.0), dot);
            }
            let c = V::splat(-(dot.sum() * r * r * r / d as f32));
            let r = V::splat(r);
            for i in vectors(d) {
                let (dy, x) = (at::<V>(dy_d, i), at::<V>(x_d, i));
                let dx = c.mul_add(x, r * (dy * job.weight.at::<V>(i)));
                let dx = if job.accumulate_dx { at::<V>(dx_d, i) + dx } else { dx };
                put(dx, dx_d, i);
                if let Some(dw_d) = dw_d.as_deref_mut() {
                    put(dy.mul_add(x * r, at::<V>(dw_d, i)), dw_d, i);
                }
            }
        }
    }
}

/// [`rms_norm_grad`] in plain loops.
pub fn rms_norm_grad_reference(args: RmsNormGrad<'_>) {
    let RmsNormGrad { dy_nd, x_nd, weight_d, eps, plus_one, dx_nd, .. } = args;
    let d = weight_d.len();
    assert_eq!((dy_nd.len(), x_nd.len()), (dx_nd.len(), dx_nd.len()), "rms_norm_grad: lengths");
    for n in 0..x_nd.len() / d {
        let (dy_d, x_d, dx_d) =
            (&dy_nd[n * d..][..d], &x_nd[n * d..][..d], &mut dx_nd[n * d..][..d]);
        let r = reciprocal_rms(x_d, eps);
        let weight = |i: usize| if plus_one { 1.0 + weight_d[i] } else { weight_d[i] };
        let dot = lanes::dot((0..d).map(|i| (dy_d[i] * weight(i), x_d[i])));
        let c = dot * r * r * r / d as f32;
        for i in 0..d {
            let dx = (-c).mul_add(x_d[i], r * (dy_d[i] * weight(i)));
            dx_d[i] = if args.accumulate_dx { dx_d[i] + dx } else { dx };
        }
    }
    let Some(dw_d) = args.dw_d else { return };
    if !args.accumulate_dw {
        dw_d.fill(0.0);
    }
    let batch_row = args.row_tokens * args.rows_per_token * d;
    let block = TOKEN_BLOCK * args.rows_per_token * d;
    for (dy_row, x_row) in dy_nd.chunks(batch_row).zip(x_nd.chunks(batch_row)) {
        for (dy_block, x_block) in dy_row.chunks(block).zip(x_row.chunks(block)) {
            let mut sum_d = vec![0.0_f32; d];
            for (dy_d, x_d) in dy_block.chunks_exact(d).zip(x_block.chunks_exact(d)) {
                let r = reciprocal_rms(x_d, eps);
                for i in 0..d {
                    sum_d[i] = dy_d[i].mul_add(x_d[i] * r, sum_d[i]);
                }
            }
            for (dw, sum) in dw_d.iter_mut().zip(sum_d) {
                *dw += sum;
            }
        }
    }
}

#[cfg(test)]
mod tests;

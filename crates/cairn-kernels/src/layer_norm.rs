//! LayerNorm and its gradients.
//!
//! Dimensions: `n` rows (tokens, or tokens × heads), `d` width of a row.
//!
//! Per row, in f32: `mean = Σx/d`, `r = 1 / √(Σ(x − mean)²/d + eps)`, `x̂ = (x − mean) · r`,
//! `y = x̂ · w + b` in one fused multiply-add. Both sums are 16-lane row reductions.
//!
//! Source: Ba, Kiros and Hinton, "Layer Normalization", 2016. <https://arxiv.org/abs/1607.06450>

pub(crate) mod bench;

use crate::TOKEN_BLOCK;
use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows, rows_per_task};
use crate::lanes::{self, at, at_or, put, vectors};
use crate::simd::{F32x16, kernel};
use crate::token_blocks::{BlockSums, TokenBlocks};

/// Normalizes rows to mean 0 and variance 1.
#[derive(Debug)]
pub struct LayerNorm<'a> {
    /// Inputs, `[n, d]`.
    pub x_nd: &'a [f32],
    /// Weight, `[d]`.
    pub weight_d: &'a [f32],
    /// Bias, `[d]`.
    pub bias_d: Option<&'a [f32]>,
    /// Added to the variance.
    pub eps: f32,
    /// Outputs, `[n, d]`, overwritten.
    pub y_nd: &'a mut [f32],
}

/// The gradients of [`LayerNorm`].
///
/// With `g = dy · w`: `dx = r · (g − Σg/d − x̂ · Σ(g·x̂)/d)`; `dw = Σ dy · x̂` and `db = Σ dy` over the
/// rows, one chain inside blocks of [`TOKEN_BLOCK`] tokens that start anew at each batch row,
/// folded in order.
#[derive(Debug)]
pub struct LayerNormGrad<'a> {
    /// Gradient of the output, `[n, d]`.
    pub dy_nd: &'a [f32],
    /// The input of the forward call, `[n, d]`.
    pub x_nd: &'a [f32],
    /// Weight, `[d]`.
    pub weight_d: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
    /// Gradient of the input, `[n, d]`.
    pub dx_nd: &'a mut [f32],
    /// Whether the input's gradient is added to what `dx_nd` holds.
    pub accumulate_dx: bool,
    /// Gradient of the weight, `[d]`; `None` where it is frozen.
    pub dw_d: Option<&'a mut [f32]>,
    /// Gradient of the bias, `[d]`; `None` where there is none or it is frozen.
    pub db_d: Option<&'a mut [f32]>,
    /// Rows of one token: 1, or the number of heads of a head norm.
    pub rows_per_token: usize,
    /// Tokens of one batch row.
    pub row_tokens: usize,
    /// Whether the parameters' gradients are added to what is there.
    pub accumulate_dw: bool,
}

/// A row's mean and the reciprocal of its standard deviation.
fn moments(x_d: &[f32], eps: f32) -> (f32, f32) {
    let d = x_d.len() as f32;
    let mean = lanes::sum(x_d.iter().copied()) / d;
    let sum = lanes::dot(x_d.iter().map(|&x| (x - mean, x - mean)));
    (mean, 1.0 / (sum / d + eps).sqrt())
}

/// Normalizes rows to mean 0 and variance 1.
pub fn layer_norm(cpu: &Cpu, args: LayerNorm<'_>) {
    let LayerNorm { x_nd, weight_d, bias_d, eps, y_nd } = args;
    let (simd, d) = (cpu.simd(), weight_d.len());
    assert_eq!(x_nd.len(), y_nd.len(), "layer_norm: x and y differ in length");
    assert_eq!(x_nd.len() % d, 0, "layer_norm: x is not a whole number of rows");
    assert!(bias_d.is_none_or(|bias_d| bias_d.len() == d), "layer_norm: bias");
    let rows = y_nd.len() / d;
    parallel_rows(cpu, rows, rows_per_task(d), RowSlice::new(y_nd, d), |rows, y_nd, _| {
        normalize_rows(simd, &x_nd[rows.start * d..rows.end * d], (weight_d, bias_d), eps, y_nd);
    });
}

/// [`moments`] with vectors.
#[inline(always)]
fn row_moments<V: F32x16>(x_d: &[f32], eps: f32) -> (f32, f32) {
    let d = x_d.len() as f32;
    let mean = lanes::row_sum::<V>(x_d) / d;
    let center = V::splat(mean);
    let mut sum = V::zero();
    for i in vectors(x_d.len()) {
        // Past the end x is the mean: its deviation is 0, whose product with −0 is −0.
        let a = at_or::<V>(x_d, i, mean) - center;
        let b =
            if i + crate::simd::LANES <= x_d.len() { a } else { tail_deviation::<V>(x_d, i, mean) };
        sum = a.mul_add(b, sum);
    }
    (mean, 1.0 / (sum.sum() / d + eps).sqrt())
}

/// The deviations from `i` to the end, −0 past it.
#[inline(always)]
fn tail_deviation<V: F32x16>(x_d: &[f32], i: usize, mean: f32) -> V {
    let mut deviations = [-0.0; crate::simd::LANES];
    for (deviation, x) in deviations.iter_mut().zip(&x_d[i..]) {
        *deviation = x - mean;
    }
    V::load(&deviations)
}

kernel! {
    fn normalize_rows<V>(
        x_nd: &[f32],
        parameters: (&[f32], Option<&[f32]>),
        eps: f32,
        y_nd: &mut [f32],
    ) {
        let (weight_d, bias_d) = parameters;
        let d = weight_d.len();
        for (x_d, y_d) in x_nd.chunks_exact(d).zip(y_nd.chunks_exact_mut(d)) {
            let (mean, r) = row_moments::<V>(x_d, eps);
            let (mean, r) = (V::splat(mean), V::splat(r));
            for i in vectors(d) {
                let (normal, weight) = ((at::<V>(x_d, i) - mean) * r, at::<V>(weight_d, i));
                let y = match bias_d {
                    Some(bias_d) => normal.mul_add(weight, at(bias_d, i)),
                    None => normal * weight,
                };
                put(y, y_d, i);
            }
        }
    }
}

/// [`layer_norm`] in plain loops.
pub fn layer_norm_reference(args: LayerNorm<'_>) {
    let LayerNorm { x_nd, weight_d, bias_d, eps, y_nd } = args;
    let d = weight_d.len();
    assert_eq!(x_nd.len(), y_nd.len(), "layer_norm: x and y differ in length");
    assert_eq!(x_nd.len() % d, 0, "layer_norm: x is not a whole number of rows");
    for (x_d, y_d) in x_nd.chunks_exact(d).zip(y_nd.chunks_exact_mut(d)) {
        let (mean, r) = moments(x_d, eps);
        for i in 0..d {
            let normal = (x_d[i] - mean) * r;
            y_d[i] = match bias_d {
                Some(bias_d) => normal.mul_add(weight_d[i], bias_d[i]),
                None => normal * weight_d[i],
            };
        }
    }
}

/// The gradients of [`layer_norm`].
pub fn layer_norm_grad(cpu: &Cpu, args: LayerNormGrad<'_>) {
    let LayerNormGrad { dy_nd, x_nd, weight_d, eps, dx_nd, accumulate_dx, dw_d, db_d, .. } = args;
    let (simd, d) = (cpu.simd(), weight_d.len());
    assert_eq!((dy_nd.len(), x_nd.len()), (dx_nd.len(), dx_nd.len()), "layer_norm_grad: lengths");
    assert_eq!(dx_nd.len() % d, 0, "layer_norm_grad: not a whole number of rows");
    let job = GradJob { weight_d, eps, accumulate_dx };
    let dx_rows = RowSlice::new(dx_nd, d);
    let rows = dy_nd.len() / d;
    let inputs = |rows: std::ops::Range<usize>| {
        let range = rows.start * d..rows.end * d;
        [&dy_nd[range.clone()], &x_nd[range]]
    };
    if dw_d.is_none() && db_d.is_none() {
        parallel_rows(cpu, rows, rows_per_task(d), dx_rows, |rows, dx_nd, _| {
            grad_rows(simd, job, inputs(rows), dx_nd, [None, None]);
        });
        return;
    }
    let blocks =
        TokenBlocks { rows, rows_per_token: args.rows_per_token, row_tokens: args.row_tokens };
    let wanted = [dw_d.is_some(), db_d.is_some()];
    let totals = [dw_d.unwrap_or_default(), db_d.unwrap_or_default()];
    let sums = BlockSums { totals, accumulate: args.accumulate_dw };
    blocks.fold(cpu, sums, dx_rows, |rows, dx_nd, [dw_d, db_d]| {
        let sums = [wanted[0].then_some(dw_d), wanted[1].then_some(db_d)];
        grad_rows(simd, job, inputs(rows), dx_nd, sums);
    });
}

/// What all rows of a gradient share.
#[derive(Clone, Copy)]
struct GradJob<'a> {
    weight_d: &'a [f32],
    eps: f32,
    accumulate_dx: bool,
}

kernel! {
    /// The gradients of some rows; the parameters' are added to one chain each.
    fn grad_rows<V>(
        job: GradJob<'_>,
        inputs: [&[f32]; 2],
        dx_nd: &mut [f32],
        sums: [Option<&mut [f32]>; 2],
    ) {
        let d = job.weight_d.len();
        let rows = inputs[0].chunks_exact(d).zip(inputs[1].chunks_exact(d));
        let [mut dw_d, mut db_d] = sums;
        for ((dy_d, x_d), dx_d) in rows.zip(dx_nd.chunks_exact_mut(d)) {
            let (mean, r) = row_moments::<V>(x_d, job.eps);
            let (mean, r) = (V::splat(mean), V::splat(r));
            let (mut sum_g, mut sum_gx) = (V::zero(), V::zero());
            for i in vectors(d) {
                let normal = (at::<V>(x_d, i) - mean) * r;
                // Past the end: 0 · −0 = −0, which changes no lane. `normal` is finite there.
                let g = at_or::<V>(dy_d, i, -0.0) * at_or::<V>(job.weight_d, i, 0.0);
                sum_g = sum_g + g;
                sum_gx = g.mul_add(normal, sum_gx);
            }
            let (mean_g, mean_gx) = (sum_g.sum() / d as f32, sum_gx.sum() / d as f32);
            let (mean_g, minus_gx) = (V::splat(mean_g), V::splat(-mean_gx));
            for i in vectors(d) {
                let dy = at::<V>(dy_d, i);
                let normal = (at::<V>(x_d, i) - mean) * r;
                let dx = r * minus_gx.mul_add(normal, dy * at(job.weight_d, i) - mean_g);
                let dx = if job.accumulate_dx { at::<V>(dx_d, i) + dx } else { dx };
                put(dx, dx_d, i);
                if let Some(dw_d) = dw_d.as_deref_mut() {
                    put(dy.mul_add(normal, at::<V>(dw_d, i)), dw_d, i);
                }
                if let Some(db_d) = db_d.as_deref_mut() {
                    put(at::<V>(db_d, i) + dy, db_d, i);
                }
            }
        }
    }
}

/// [`layer_norm_grad`] in plain loops.
pub fn layer_norm_grad_reference(args: LayerNormGrad<'_>) {
    let LayerNormGrad { dy_nd, x_nd, weight_d, eps, dx_nd, accumulate_dx, .. } = args;
    let d = weight_d.len();
    assert_eq!((dy_nd.len(), x_nd.len()), (dx_nd.len(), dx_nd.len()), "layer_norm_grad: lengths");
    for n in 0..x_nd.len() / d {
        let (dy_d, x_d, dx_d) =
            (&dy_nd[n * d..][..d], &x_nd[n * d..][..d], &mut dx_nd[n * d..][..d]);
        let (mean, r) = moments(x_d, eps);
        let g = |i: usize| dy_d[i] * weight_d[i];
        let normal = |i: usize| (x_d[i] - mean) * r;
        let mean_g = lanes::sum((0..d).map(g)) / d as f32;
        let mean_gx = lanes::dot((0..d).map(|i| (g(i), normal(i)))) / d as f32;
        for (i, to) in dx_d.iter_mut().enumerate() {
            let dx = r * (-mean_gx).mul_add(normal(i), g(i) - mean_g);
            *to = if accumulate_dx { *to + dx } else { dx };
        }
    }
    let sums = ParameterSums {
        dy_nd,
        x_nd,
        d,
        eps,
        block: TOKEN_BLOCK * args.rows_per_token * d,
        batch_row: args.row_tokens * args.rows_per_token * d,
        accumulate: args.accumulate_dw,
    };
    if let Some(dw_d) = args.dw_d {
        sums.fold(dw_d, |dy, normal, sum| dy.mul_add(normal, sum));
    }
    if let Some(db_d) = args.db_d {
        sums.fold(db_d, |dy, _normal, sum| sum + dy);
    }
}

/// The sum over tokens behind both parameter gradients.
struct ParameterSums<'a> {
    dy_nd: &'a [f32],
    x_nd: &'a [f32],
    d: usize,
    eps: f32,
    block: usize,
    batch_row: usize,
    accumulate: bool,
}

impl ParameterSums<'_> {
    fn fold(&self, total_d: &mut [f32], term: impl Fn(f32, f32, f32) -> f32) {
        if !self.accumulate {
            total_d.fill(0.0);
        }
        let rows = self.dy_nd.chunks(self.batch_row).zip(self.x_nd.chunks(self.batch_row));
        for (dy_row, x_row) in rows {
            for (dy_block, x_block) in dy_row.chunks(self.block).zip(x_row.chunks(self.block)) {
                let mut sum_d = vec![0.0_f32; self.d];
                let pairs = dy_block.chunks_exact(self.d).zip(x_block.chunks_exact(self.d));
                for (dy_d, x_d) in pairs {
                    let (mean, r) = moments(x_d, self.eps);
                    for i in 0..self.d {
                        sum_d[i] = term(dy_d[i], (x_d[i] - mean) * r, sum_d[i]);
                    }
                }
                for (total, sum) in total_d.iter_mut().zip(sum_d) {
                    *total += sum;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

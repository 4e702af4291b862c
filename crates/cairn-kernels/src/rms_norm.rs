//! RMSNorm and its gradients.
//!
//! Dimensions: `n` rows (tokens, or tokens × heads for head norms), `d` width of a row.
//!
//! Per row, in f32: `r = 1 / √(Σx²/d + eps)`, `y = (x · r) · w` with `w` the weight or, with
//! `plus_one` (Gemma), 1 + weight. The sum is a 16-lane row reduction.
//!
//! Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
//! <https://arxiv.org/abs/1910.07467>

use crate::TOKEN_BLOCK;
use crate::cpu::Cpu;
use crate::lanes;

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
pub fn rms_norm(_cpu: &Cpu, args: RmsNorm<'_>) {
    rms_norm_reference(args);
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
pub fn rms_norm_grad(_cpu: &Cpu, args: RmsNormGrad<'_>) {
    rms_norm_grad_reference(args);
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

//! LayerNorm and its gradients.
//!
//! Dimensions: `n` rows (tokens, or tokens × heads), `d` width of a row.
//!
//! Per row, in f32: `mean = Σx/d`, `r = 1 / √(Σ(x − mean)²/d + eps)`, `x̂ = (x − mean) · r`,
//! `y = x̂ · w + b` in one fused multiply-add. Both sums are 16-lane row reductions.
//!
//! Source: Ba, Kiros and Hinton, "Layer Normalization", 2016. <https://arxiv.org/abs/1607.06450>

use crate::TOKEN_BLOCK;
use crate::cpu::Cpu;
use crate::lanes;

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
pub fn layer_norm(_cpu: &Cpu, args: LayerNorm<'_>) {
    layer_norm_reference(args);
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
pub fn layer_norm_grad(_cpu: &Cpu, args: LayerNormGrad<'_>) {
    layer_norm_grad_reference(args);
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
        for i in 0..d {
            let dx = r * (-mean_gx).mul_add(normal(i), g(i) - mean_g);
            dx_d[i] = if accumulate_dx { dx_d[i] + dx } else { dx };
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

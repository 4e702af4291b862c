//! What a token's experts say, together: the weighted sum of its routed rows in order of rank.
//!
//! Letters: `t` tokens, `a` experts of a token, `d` width. Each element is one chain of fused
//! multiply-adds over the ranks from 0, so it does not depend on how rows were grouped for their
//! products. Without weights the chain is of additions.

use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows, rows_per_task};
use crate::lanes;
use crate::lanes::{at, put, row_dot, sweep, vectors};
use crate::simd::kernel;

/// `out[t] = Σ_a weight[t][a] · y[t][a]`.
#[derive(Debug)]
pub struct ExpertSum<'a> {
    /// Routed rows, `[t, a, d]`.
    pub y_tad: &'a [f32],
    /// Their weights, `[t, a]`; 1 if absent.
    pub weights_ta: Option<&'a [f32]>,
    /// Experts of a token.
    pub top_k: usize,
    /// Width of a row.
    pub d: usize,
    /// Sums, `[t, d]`, overwritten.
    pub out_td: &'a mut [f32],
}

/// The gradients of [`ExpertSum`]: `dy = weight · dout`, `dweight = dout · y` (16 lanes and the tree).
#[derive(Debug)]
pub struct ExpertSumGrad<'a> {
    /// Gradient of the sums, `[t, d]`.
    pub dout_td: &'a [f32],
    /// The rows of the forward call, `[t, a, d]`; needed for the weights' gradient.
    pub y_tad: Option<&'a [f32]>,
    /// The weights of the forward call; 1 if absent.
    pub weights_ta: Option<&'a [f32]>,
    /// Experts of a token.
    pub top_k: usize,
    /// Width of a row.
    pub d: usize,
    /// Gradient of the rows, `[t, a, d]`, overwritten if asked for.
    pub dy_tad: Option<&'a mut [f32]>,
    /// Gradient of the weights, `[t, a]`, overwritten if asked for.
    pub dweights_ta: Option<&'a mut [f32]>,
}

impl ExpertSum<'_> {
    fn check(&self) -> usize {
        let (a, d) = (self.top_k, self.d);
        let t = self.out_td.len() / d.max(1);
        assert_eq!((self.out_td.len(), self.y_tad.len()), (t * d, t * a * d), "expert_sum: rows");
        assert!(self.weights_ta.is_none_or(|w| w.len() == t * a), "expert_sum: weights");
        t
    }
}

impl ExpertSumGrad<'_> {
    fn check(&self) -> usize {
        let (a, d) = (self.top_k, self.d);
        let t = self.dout_td.len() / d.max(1);
        assert_eq!(self.dout_td.len(), t * d, "expert_sum_grad: sums");
        assert!(self.y_tad.is_none_or(|y| y.len() == t * a * d), "expert_sum_grad: rows");
        assert!(self.y_tad.is_some() || self.dweights_ta.is_none(), "dweights without rows");
        assert!(self.weights_ta.is_none_or(|w| w.len() == t * a), "expert_sum_grad: weights");
        assert!(self.dy_tad.as_ref().is_none_or(|dy| dy.len() == t * a * d), "expert_sum_grad: dy");
        assert!(self.dweights_ta.as_ref().is_none_or(|dw| dw.len() == t * a), "dweights");
        t
    }
}

/// Adds up routed rows.
pub fn expert_sum(cpu: &Cpu, args: ExpertSum<'_>) {
    let t = args.check();
    let ExpertSum { y_tad, weights_ta, top_k: a, d, out_td } = args;
    let simd = cpu.simd();
    parallel_rows(cpu, t, rows_per_task(a * d), RowSlice::new(out_td, d), |rows, out, _| {
        for (row, out_d) in rows.zip(out.chunks_exact_mut(d.max(1))) {
            let y_ad = &y_tad[row * a * d..][..a * d];
            match weights_ta {
                Some(weights) => weighted(simd, y_ad, &weights[row * a..][..a], out_d),
                None => plain(simd, y_ad, out_d),
            }
        }
    });
}

kernel! {
    fn weighted<V>(y_ad: &[f32], weights_a: &[f32], out_d: &mut [f32]) {
        let d = out_d.len();
        for i in vectors(d) {
            let mut sum = V::zero();
            for (y_d, &weight) in y_ad.chunks_exact(d).zip(weights_a) {
                sum = at::<V>(y_d, i).mul_add(V::splat(weight), sum);
            }
            put(sum, out_d, i);
        }
    }
}

kernel! {
    fn plain<V>(y_ad: &[f32], out_d: &mut [f32]) {
        let d = out_d.len();
        for i in vectors(d) {
            let mut sum = V::zero();
            for y_d in y_ad.chunks_exact(d) {
                sum = sum + at::<V>(y_d, i);
            }
            put(sum, out_d, i);
        }
    }
}

/// [`expert_sum`] in plain loops.
pub fn expert_sum_reference(args: ExpertSum<'_>) {
    args.check();
    let ExpertSum { y_tad, weights_ta, top_k: a, d, out_td } = args;
    for (index, out) in out_td.iter_mut().enumerate() {
        let (token, column) = (index / d, index % d);
        *out = (token * a..(token + 1) * a).fold(0.0, |sum, row| {
            let y = y_tad[row * d + column];
            weights_ta.map_or(sum + y, |weights| y.mul_add(weights[row], sum))
        });
    }
}

/// The gradients of [`expert_sum`].
pub fn expert_sum_grad(cpu: &Cpu, args: ExpertSumGrad<'_>) {
    let t = args.check();
    let ExpertSumGrad { dout_td, y_tad, weights_ta, top_k: a, d, dy_tad, dweights_ta } = args;
    let simd = cpu.simd();
    let outputs =
        (dy_tad.map(|dy| RowSlice::new(dy, a * d)), dweights_ta.map(|dw| RowSlice::new(dw, a)));
    parallel_rows(cpu, t, rows_per_task(a * d), outputs, |rows, (mut dy, mut dweights), _| {
        for (part, token) in rows.enumerate() {
            let dout_d = &dout_td[token * d..][..d];
            for rank in 0..a {
                let (row, own) = (token * a + rank, part * a + rank);
                if let Some(dy) = &mut dy {
                    let weight = weights_ta.map_or(1.0, |weights| weights[row]);
                    scaled(simd, dout_d, weight, &mut dy[own * d..][..d]);
                }
                if let (Some(dweights), Some(y_tad)) = (&mut dweights, y_tad) {
                    dweights[own] = dot(simd, dout_d, &y_tad[row * d..][..d]);
                }
            }
        }
    });
}

kernel! {
    fn scaled<V>(dout_d: &[f32], weight: f32, dy_d: &mut [f32]) {
        let weight = V::splat(weight);
        sweep!(dy_d, i => at::<V>(dout_d, i) * weight);
    }
}

kernel! {
    fn dot<V>(a: &[f32], b: &[f32]) -> f32 {
        row_dot::<V>(a, b)
    }
}

/// [`expert_sum_grad`] in plain loops.
pub fn expert_sum_grad_reference(args: ExpertSumGrad<'_>) {
    let t = args.check();
    let ExpertSumGrad { dout_td, y_tad, weights_ta, top_k: a, d, mut dy_tad, dweights_ta } = args;
    if let Some(dy) = &mut dy_tad {
        for (index, dy) in dy.iter_mut().enumerate() {
            let (row, column) = (index / d, index % d);
            let weight = weights_ta.map_or(1.0, |weights| weights[row]);
            *dy = dout_td[row / a * d + column] * weight;
        }
    }
    if let (Some(dweights), Some(y_tad)) = (dweights_ta, y_tad) {
        for (row, dweight) in dweights[..t * a].iter_mut().enumerate() {
            let (dout_d, y_d) = (&dout_td[row / a * d..][..d], &y_tad[row * d..][..d]);
            *dweight = lanes::dot(dout_d.iter().copied().zip(y_d.iter().copied()));
        }
    }
}

#[cfg(test)]
mod tests;

//! The update of a parameter: squared gradient norm, AdamW, and the moving average of weights.

pub(crate) mod bench;

use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_elements};
use crate::lanes::{self, at, put, vectors};
use crate::simd::{LANES, bf16_from_f32, kernel};

/// Elements whose squares form one f32 reduction of [`SumSquares`].
pub const SUM_SQUARES_CHUNK: usize = 65_536;

/// Adds the sum of the squares of a tensor to a running total.
///
/// Chunks of [`SUM_SQUARES_CHUNK`] elements are 16-lane f32 reductions, added to the f64 total in order.
#[derive(Debug)]
pub struct SumSquares<'a> {
    /// The tensor.
    pub x: &'a [f32],
    /// The total that is added to.
    pub total: &'a mut f64,
}

/// One step of AdamW on one tensor, in PyTorch's order of operations.
///
/// `w ·= 1 − lr·weight_decay`, `m += (1 − β₁)(g − m)`, `v = β₂·v + (1 − β₂)g²`,
/// `w −= lr/(1 − β₁ˢ) · m / (√v / √(1 − β₂ˢ) + eps)`, with `g = grad · grad_scale`. The scalars are
/// computed in f64 and rounded once.
///
/// Source: Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>, and `torch.optim.AdamW`.
#[derive(Debug)]
pub struct AdamW<'a> {
    /// The parameter.
    pub w: &'a mut [f32],
    /// A copy of the updated parameter rounded to bf16 (nearest even).
    pub bf16_copy: Option<&'a mut [u16]>,
    /// Its gradient.
    pub grad: &'a [f32],
    /// First moment.
    pub m: &'a mut [f32],
    /// Second moment.
    pub v: &'a mut [f32],
    /// Settings of the step.
    pub step: AdamWStep,
}

/// What is the same for every tensor of an AdamW step, but for the decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, 0 for tensors that are not decayed.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// What the gradient is multiplied by first: clipping and loss scale.
    pub grad_scale: f32,
}

/// The scalars of a step, rounded to f32.
#[derive(Debug, Clone, Copy)]
struct Scalars {
    decay: f32,
    grad_scale: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    minus_step_size: f32,
    sqrt_correction: f32,
    eps: f32,
}

impl AdamWStep {
    #[expect(clippy::cast_possible_truncation, reason = "the rounding to f32 is the point")]
    fn scalars(&self) -> Scalars {
        assert!(self.step > 0, "AdamW counts steps from 1");
        Scalars {
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            grad_scale: self.grad_scale,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            minus_step_size: -(self.lr / (1.0 - power(self.beta1, self.step))) as f32,
            sqrt_correction: (1.0 - power(self.beta2, self.step)).sqrt() as f32,
            eps: self.eps as f32,
        }
    }
}

/// `base^exponent` by repeated squaring: the same bits everywhere, which `powf` does not promise.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// `ema = decay·ema + (1 − decay)·w`, as `ema += (1 − decay)(w − ema)`.
#[derive(Debug)]
pub struct Ema<'a> {
    /// The parameter.
    pub w: &'a [f32],
    /// Its moving average.
    pub ema: &'a mut [f32],
    /// How much of the average is kept.
    pub decay: f32,
}

/// Adds the sum of squares to a total.
pub fn sum_squares(cpu: &Cpu, args: SumSquares<'_>) {
    let simd = cpu.simd();
    // A window of chunks at a time, so that their sums fit on the stack whatever the length.
    const WINDOW: usize = 128;
    let SumSquares { x, total } = args;
    for window in x.chunks(WINDOW * SUM_SQUARES_CHUNK) {
        let mut sums = [0.0_f32; WINDOW];
        let chunks = window.len().div_ceil(SUM_SQUARES_CHUNK);
        cpu.parallel_chunks(&mut sums[..chunks], 1, |chunk, sum, _scratch| {
            let start = chunk * SUM_SQUARES_CHUNK;
            let end = window.len().min(start + SUM_SQUARES_CHUNK);
            sum[0] = squares(simd, &window[start..end]);
        });
        for sum in &sums[..chunks] {
            *total += f64::from(*sum);
        }
    }
}

kernel! {
    fn squares<V>(x: &[f32]) -> f32 {
        lanes::row_dot::<V>(x, x)
    }
}

/// [`sum_squares`] in plain loops.
pub fn sum_squares_reference(args: SumSquares<'_>) {
    for chunk in args.x.chunks(SUM_SQUARES_CHUNK) {
        *args.total += f64::from(lanes::dot(chunk.iter().map(|&x| (x, x))));
    }
}

/// Updates one parameter.
pub fn adamw(cpu: &Cpu, args: AdamW<'_>) {
    let simd = cpu.simd();
    let AdamW { w, bf16_copy, grad, m, v, step } = args;
    let n = w.len();
    assert_eq!((grad.len(), m.len(), v.len()), (n, n, n), "adamw: lengths differ");
    assert!(bf16_copy.as_ref().is_none_or(|copy| copy.len() == n), "adamw: bf16 copy");
    let scalars = step.scalars();
    let state = [RowSlice::new(w, 1), RowSlice::new(m, 1), RowSlice::new(v, 1)];
    let copy = bf16_copy.map(|copy| RowSlice::new(copy, 1));
    parallel_elements(cpu, n, (state, copy), |range, (state, copy)| {
        adamw_part(simd, scalars, &grad[range], state, copy);
    });
}

kernel! {
    fn adamw_part<V>(
        scalars: Scalars,
        grad: &[f32],
        state: [&mut [f32]; 3],
        bf16_copy: Option<&mut [u16]>,
    ) {
        let [w, m, v] = state;
        let s = scalars;
        for i in vectors(w.len()) {
            let g = at::<V>(grad, i) * V::splat(s.grad_scale);
            let decayed = at::<V>(w, i) * V::splat(s.decay);
            let m_old = at::<V>(m, i);
            let m_new = V::splat(s.one_minus_beta1).mul_add(g - m_old, m_old);
            let kept = V::splat(s.beta2) * at(v, i);
            let v_new = (V::splat(s.one_minus_beta2) * g).mul_add(g, kept);
            let denominator = v_new.sqrt() / V::splat(s.sqrt_correction) + V::splat(s.eps);
            put(V::splat(s.minus_step_size).mul_add(m_new / denominator, decayed), w, i);
            put(m_new, m, i);
            put(v_new, v, i);
        }
        if let Some(copy) = bf16_copy {
            let (blocks, tail) = copy.as_chunks_mut::<LANES>();
            let done = blocks.len() * LANES;
            for (block, i) in blocks.iter_mut().zip((0..).step_by(LANES)) {
                at::<V>(w, i).to_bf16(block);
            }
            for (copy, &w) in tail.iter_mut().zip(&w[done..]) {
                *copy = bf16_from_f32(w);
            }
        }
    }
}

/// [`adamw`] in plain loops.
pub fn adamw_reference(args: AdamW<'_>) {
    let AdamW { w, bf16_copy, grad, m, v, step } = args;
    let n = w.len();
    assert_eq!((grad.len(), m.len(), v.len()), (n, n, n), "adamw: lengths differ");
    let s = step.scalars();
    for i in 0..n {
        let g = grad[i] * s.grad_scale;
        let decayed = w[i] * s.decay;
        m[i] = s.one_minus_beta1.mul_add(g - m[i], m[i]);
        v[i] = (s.one_minus_beta2 * g).mul_add(g, s.beta2 * v[i]);
        let denominator = v[i].sqrt() / s.sqrt_correction + s.eps;
        w[i] = s.minus_step_size.mul_add(m[i] / denominator, decayed);
    }
    if let Some(copy) = bf16_copy {
        assert_eq!(copy.len(), n, "adamw: the bf16 copy differs in length");
        for (copy, &w) in copy.iter_mut().zip(&*w) {
            *copy = bf16_from_f32(w);
        }
    }
}

/// Updates the moving average of one parameter.
pub fn ema(cpu: &Cpu, args: Ema<'_>) {
    let simd = cpu.simd();
    let Ema { w, ema, decay } = args;
    assert_eq!(w.len(), ema.len(), "ema: lengths differ");
    parallel_elements(cpu, w.len(), RowSlice::new(ema, 1), |range, ema| {
        ema_part(simd, 1.0 - decay, &w[range], ema);
    });
}

kernel! {
    fn ema_part<V>(rate: f32, w: &[f32], ema: &mut [f32]) {
        for i in vectors(w.len()) {
            let old = at::<V>(ema, i);
            put(V::splat(rate).mul_add(at::<V>(w, i) - old, old), ema, i);
        }
    }
}

/// [`ema`] in plain loops.
pub fn ema_reference(args: Ema<'_>) {
    let Ema { w, ema, decay } = args;
    assert_eq!(w.len(), ema.len(), "ema: lengths differ");
    for (ema, &w) in ema.iter_mut().zip(w) {
        *ema = (1.0 - decay).mul_add(w - *ema, *ema);
    }
}

#[cfg(test)]
mod tests;

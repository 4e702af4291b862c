//! Element-wise activation functions and the gated pair (GLU) built on them, with gradients.
//!
//! Shapes: every slice of one call has the same length, any number of rows of any width.
//!
//! Sources: Hendrycks and Gimpel 2016 (GELU), Shazeer 2020 (GLU variants), So et al. 2021 (squared rectifier).

pub(crate) mod bench;

use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_elements};
use crate::lanes::{at, put, sweep, vectors};
use crate::math::{self, Real};
use crate::simd::kernel;

/// An activation function.
#[derive(serde::Serialize, serde::Deserialize, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)` through the error function.
    Gelu,
    /// The tanh approximation of GELU (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    ReluSquared,
    /// `x · sigmoid(1.702 x)`.
    QuickGelu,
    /// The hyperbolic tangent.
    Tanh,
    /// The logistic function.
    Sigmoid,
}

/// √½.
const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// 1 / √(2π).
const INV_SQRT_TAU: f32 = 0.398_942_3;
/// √(2/π).
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// The cubic coefficient of the tanh approximation of GELU.
const GELU_CUBIC: f32 = 0.044_715;

impl Act {
    /// The value at `x`.
    #[inline(always)]
    pub(crate) fn value<R: Real>(self, x: R) -> R {
        let zero = R::splat(0.0);
        match self {
            Self::Silu => x.times(math::sigmoid(x)),
            Self::Gelu => {
                let e = math::erf(x.times(R::splat(SQRT_HALF)));
                R::splat(0.5).times(x).times(R::splat(1.0).plus(e))
            }
            Self::GeluTanh => {
                let t = math::tanh(gelu_tanh_argument(x));
                R::splat(0.5).times(x).times(R::splat(1.0).plus(t))
            }
            Self::Relu => x.select_lt(zero, zero, x),
            Self::ReluSquared => {
                let y = x.select_lt(zero, zero, x);
                y.times(y)
            }
            Self::QuickGelu => x.times(math::sigmoid(x.times(R::splat(1.702)))),
            Self::Tanh => math::tanh(x),
            Self::Sigmoid => math::sigmoid(x),
        }
    }

    /// The value and the derivative at `x`. The derivative of the rectifiers at 0 is 0, as in PyTorch.
    #[inline(always)]
    pub(crate) fn value_and_slope<R: Real>(self, x: R) -> (R, R) {
        let (zero, half, one) = (R::splat(0.0), R::splat(0.5), R::splat(1.0));
        match self {
            Self::Silu => {
                let s = math::sigmoid(x);
                let y = x.times(s);
                (y, y.fma(one.minus(s), s))
            }
            Self::Gelu => {
                let e = math::erf(x.times(R::splat(SQRT_HALF)));
                let density =
                    math::exp(x.times(x).times(R::splat(-0.5))).times(R::splat(INV_SQRT_TAU));
                let cumulative = half.times(one.plus(e));
                (half.times(x).times(one.plus(e)), x.fma(density, cumulative))
            }
            Self::GeluTanh => {
                let t = math::tanh(gelu_tanh_argument(x));
                let slope = R::splat(3.0 * GELU_CUBIC).times(x).fma(x, one);
                let inner = R::splat(SQRT_2_OVER_PI).times(slope);
                let hx = half.times(x);
                let bell = one.minus(t.times(t)).times(inner);
                (hx.times(one.plus(t)), hx.fma(bell, half.times(one.plus(t))))
            }
            Self::Relu => (x.select_lt(zero, zero, x), zero.select_lt(x, one, zero)),
            Self::ReluSquared => {
                let y = x.select_lt(zero, zero, x);
                (y.times(y), y.plus(y))
            }
            Self::QuickGelu => {
                let s = math::sigmoid(x.times(R::splat(1.702)));
                let y = x.times(s);
                (y, R::splat(1.702).times(y).fma(one.minus(s), s))
            }
            Self::Tanh => {
                let t = math::tanh(x);
                (t, one.minus(t.times(t)))
            }
            Self::Sigmoid => {
                let s = math::sigmoid(x);
                (s, s.times(one.minus(s)))
            }
        }
    }
}

/// √(2/π) · (x + 0.044715 x³).
#[inline(always)]
fn gelu_tanh_argument<R: Real>(x: R) -> R {
    let cubic = R::splat(GELU_CUBIC).times(x).times(x);
    R::splat(SQRT_2_OVER_PI).times(cubic.fma(x, x))
}

/// `y = act(x)`.
#[derive(Debug)]
pub struct Activation<'a> {
    /// Inputs.
    pub x: &'a [f32],
    /// The function.
    pub act: Act,
    /// Outputs, overwritten.
    pub y: &'a mut [f32],
}

/// `dx = dy · act'(x)`.
#[derive(Debug)]
pub struct ActivationGrad<'a> {
    /// Gradient of the output.
    pub dy: &'a [f32],
    /// The input of the forward call.
    pub x: &'a [f32],
    /// The function.
    pub act: Act,
    /// Gradient of the input, overwritten.
    pub dx: &'a mut [f32],
}

/// `y = act(gate) · up`.
#[derive(Debug)]
pub struct Glu<'a> {
    /// The gate, before its activation.
    pub gate_nf: &'a [f32],
    /// What is gated.
    pub up_nf: &'a [f32],
    /// The gate's activation.
    pub act: Act,
    /// Outputs, overwritten.
    pub y_nf: &'a mut [f32],
}

/// The gradients of [`Glu`]: `dgate = dy · up · act'(gate)`, `dup = dy · act(gate)`.
#[derive(Debug)]
pub struct GluGrad<'a> {
    /// Gradient of the output.
    pub dy_nf: &'a [f32],
    /// The gate of the forward call.
    pub gate_nf: &'a [f32],
    /// The gated values of the forward call.
    pub up_nf: &'a [f32],
    /// The gate's activation.
    pub act: Act,
    /// Gradient of the gate, overwritten.
    pub dgate_nf: &'a mut [f32],
    /// Gradient of what is gated, overwritten.
    pub dup_nf: &'a mut [f32],
}

/// Applies an activation function.
pub fn activation(cpu: &Cpu, args: Activation<'_>) {
    let simd = cpu.simd();
    let Activation { x, act, y } = args;
    assert_eq!(x.len(), y.len(), "activation: x and y differ in length");
    parallel_elements(cpu, y.len(), RowSlice::new(y, 1), |range, y| {
        activation_part(simd, act, &x[range], y);
    });
}

/// Runs an expression with the function as a constant, so that each has its own loop.
macro_rules! with_constant_act {
    ($act:expr, $name:ident => $body:expr) => {
        with_constant_act!(@each $act, $name, $body,
            Silu Gelu GeluTanh Relu ReluSquared QuickGelu Tanh Sigmoid)
    };
    (@each $act:expr, $name:ident, $body:expr, $($variant:ident)*) => {
        match $act { $(Act::$variant => { let $name = Act::$variant; $body })* }
    };
}

kernel! {
    fn activation_part<V>(act: Act, x: &[f32], y: &mut [f32]) {
        with_constant_act!(act, act => sweep!(y, i => act.value(at::<V>(x, i))));
    }
}

/// [`activation`] in plain loops.
pub fn activation_reference(args: Activation<'_>) {
    let Activation { x, act, y } = args;
    assert_eq!(x.len(), y.len(), "activation: x and y differ in length");
    for (y, &x) in y.iter_mut().zip(x) {
        *y = act.value(x);
    }
}

/// The gradient of [`activation`].
pub fn activation_grad(cpu: &Cpu, args: ActivationGrad<'_>) {
    let simd = cpu.simd();
    let ActivationGrad { dy, x, act, dx } = args;
    assert_eq!((dy.len(), x.len()), (dx.len(), dx.len()), "activation_grad: lengths differ");
    parallel_elements(cpu, dx.len(), RowSlice::new(dx, 1), |range, dx| {
        activation_grad_part(simd, act, &dy[range.clone()], &x[range], dx);
    });
}

kernel! {
    fn activation_grad_part<V>(act: Act, dy: &[f32], x: &[f32], dx: &mut [f32]) {
        with_constant_act!(act, act => {
            sweep!(dx, i => at::<V>(dy, i) * act.value_and_slope(at::<V>(x, i)).1);
        });
    }
}

/// [`activation_grad`] in plain loops.
pub fn activation_grad_reference(args: ActivationGrad<'_>) {
    let ActivationGrad { dy, x, act, dx } = args;
    assert_eq!((dy.len(), x.len()), (dx.len(), dx.len()), "activation_grad: lengths differ");
    for (i, dx) in dx.iter_mut().enumerate() {
        *dx = dy[i] * act.value_and_slope(x[i]).1;
    }
}

/// Gates one row with another.
pub fn glu(cpu: &Cpu, args: Glu<'_>) {
    let simd = cpu.simd();
    let Glu { gate_nf, up_nf, act, y_nf } = args;
    assert_eq!((gate_nf.len(), up_nf.len()), (y_nf.len(), y_nf.len()), "glu: lengths differ");
    parallel_elements(cpu, y_nf.len(), RowSlice::new(y_nf, 1), |range, y| {
        glu_part(simd, act, &gate_nf[range.clone()], &up_nf[range], y);
    });
}

kernel! {
    fn glu_part<V>(act: Act, gate: &[f32], up: &[f32], y: &mut [f32]) {
        with_constant_act!(act, act => {
            sweep!(y, i => act.value(at::<V>(gate, i)) * at(up, i));
        });
    }
}

/// [`glu`] in plain loops.
pub fn glu_reference(args: Glu<'_>) {
    let Glu { gate_nf, up_nf, act, y_nf } = args;
    assert_eq!((gate_nf.len(), up_nf.len()), (y_nf.len(), y_nf.len()), "glu: lengths differ");
    for (i, y) in y_nf.iter_mut().enumerate() {
        *y = act.value(gate_nf[i]) * up_nf[i];
    }
}

/// The gradients of [`glu`].
pub fn glu_grad(cpu: &Cpu, args: GluGrad<'_>) {
    let simd = cpu.simd();
    let GluGrad { dy_nf, gate_nf, up_nf, act, dgate_nf, dup_nf } = args;
    let n = dy_nf.len();
    assert_eq!((gate_nf.len(), up_nf.len()), (n, n), "glu_grad: inputs differ in length");
    assert_eq!((dgate_nf.len(), dup_nf.len()), (n, n), "glu_grad: outputs differ in length");
    let outputs = [RowSlice::new(dgate_nf, 1), RowSlice::new(dup_nf, 1)];
    parallel_elements(cpu, n, outputs, |range, outputs| {
        let inputs = [&dy_nf[range.clone()], &gate_nf[range.clone()], &up_nf[range]];
        glu_grad_part(simd, act, inputs, outputs);
    });
}

kernel! {
    fn glu_grad_part<V>(act: Act, inputs: [&[f32]; 3], outputs: [&mut [f32]; 2]) {
        let ([dy, gate, up], [dgate, dup]) = (inputs, outputs);
        with_constant_act!(act, act => for i in vectors(dgate.len()) {
            let dy = at::<V>(dy, i);
            let (value, slope) = act.value_and_slope(at::<V>(gate, i));
            put(dy * at(up, i) * slope, dgate, i);
            put(dy * value, dup, i);
        });
    }
}

/// [`glu_grad`] in plain loops.
pub fn glu_grad_reference(args: GluGrad<'_>) {
    let GluGrad { dy_nf, gate_nf, up_nf, act, dgate_nf, dup_nf } = args;
    let n = dy_nf.len();
    assert_eq!((gate_nf.len(), up_nf.len()), (n, n), "glu_grad: inputs differ in length");
    assert_eq!((dgate_nf.len(), dup_nf.len()), (n, n), "glu_grad: outputs differ in length");
    for i in 0..n {
        let (value, slope) = act.value_and_slope(gate_nf[i]);
        dgate_nf[i] = dy_nf[i] * up_nf[i] * slope;
        dup_nf[i] = dy_nf[i] * value;
    }
}

#[cfg(test)]
mod tests;

//! Sums, scales and caps of whole tensors, element by element.
//!
//! Shapes: every slice of one call has the same length.

pub(crate) mod bench;

use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_elements};
use crate::lanes::{at, sweep};
use crate::math;
use crate::simd::kernel;

/// `y = a + b`.
#[derive(Debug)]
pub struct Add<'a> {
    /// First term.
    pub a: &'a [f32],
    /// Second term.
    pub b: &'a [f32],
    /// Sum, overwritten.
    pub y: &'a mut [f32],
}

/// `y += x`.
#[derive(Debug)]
pub struct AddAssign<'a> {
    /// What is added.
    pub x: &'a [f32],
    /// The running sum.
    pub y: &'a mut [f32],
}

/// `y = x · factor`.
#[derive(Debug)]
pub struct Scale<'a> {
    /// Inputs.
    pub x: &'a [f32],
    /// The factor.
    pub factor: f32,
    /// Outputs, overwritten.
    pub y: &'a mut [f32],
}

/// `y *= factor`.
#[derive(Debug)]
pub struct ScaleAssign<'a> {
    /// The factor.
    pub factor: f32,
    /// Scaled in place.
    pub y: &'a mut [f32],
}

/// `y = cap · tanh(x / cap)`, the division as a product with the rounded `1 / cap`.
#[derive(Debug)]
pub struct Softcap<'a> {
    /// Inputs.
    pub x: &'a [f32],
    /// The bound that outputs approach.
    pub cap: f32,
    /// Outputs, overwritten.
    pub y: &'a mut [f32],
}

/// `dx = dy · (1 − (y / cap)²)`, from the output of the forward call.
#[derive(Debug)]
pub struct SoftcapGrad<'a> {
    /// Gradient of the output.
    pub dy: &'a [f32],
    /// The output of the forward call.
    pub y: &'a [f32],
    /// The bound.
    pub cap: f32,
    /// Gradient of the input, overwritten.
    pub dx: &'a mut [f32],
}

/// Sets every element to one value.
#[derive(Debug)]
pub struct Fill<'a> {
    /// The value.
    pub value: f32,
    /// Overwritten.
    pub y: &'a mut [f32],
}

/// Adds two tensors.
pub fn add(cpu: &Cpu, args: Add<'_>) {
    let simd = cpu.simd();
    let Add { a, b, y } = args;
    assert_eq!((a.len(), b.len()), (y.len(), y.len()), "add: lengths differ");
    parallel_elements(cpu, y.len(), RowSlice::new(y, 1), |range, y| {
        add_part(simd, &a[range.clone()], &b[range], y);
    });
}

kernel! {
    fn add_part<V>(a: &[f32], b: &[f32], y: &mut [f32]) {
        sweep!(y, i => at::<V>(a, i) + at(b, i));
    }
}

/// [`add`] in plain loops.
pub fn add_reference(args: Add<'_>) {
    let Add { a, b, y } = args;
    assert_eq!((a.len(), b.len()), (y.len(), y.len()), "add: lengths differ");
    for (i, y) in y.iter_mut().enumerate() {
        *y = a[i] + b[i];
    }
}

/// Adds a tensor to another in place.
pub fn add_assign(cpu: &Cpu, args: AddAssign<'_>) {
    let simd = cpu.simd();
    let AddAssign { x, y } = args;
    assert_eq!(x.len(), y.len(), "add_assign: lengths differ");
    parallel_elements(cpu, y.len(), RowSlice::new(y, 1), |range, y| {
        add_assign_part(simd, &x[range], y);
    });
}

kernel! {
    fn add_assign_part<V>(x: &[f32], y: &mut [f32]) {
        sweep!(y, i => at::<V>(y, i) + at(x, i));
    }
}

/// [`add_assign`] in plain loops.
pub fn add_assign_reference(args: AddAssign<'_>) {
    let AddAssign { x, y } = args;
    assert_eq!(x.len(), y.len(), "add_assign: lengths differ");
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// Multiplies a tensor by a number.
pub fn scale(cpu: &Cpu, args: Scale<'_>) {
    let simd = cpu.simd();
    let Scale { x, factor, y } = args;
    assert_eq!(x.len(), y.len(), "scale: lengths differ");
    parallel_elements(cpu, y.len(), RowSlice::new(y, 1), |range, y| {
        scale_part(simd, factor, &x[range], y);
    });
}

kernel! {
    fn scale_part<V>(factor: f32, x: &[f32], y: &mut [f32]) {
        let factor = V::splat(factor);
        sweep!(y, i => at::<V>(x, i) * factor);
    }
}

/// [`scale`] in plain loops.
pub fn scale_reference(args: Scale<'_>) {
    let Scale { x, factor, y } = args;
    assert_eq!(x.len(), y.len(), "scale: lengths differ");
    for (y, x) in y.iter_mut().zip(x) {
        *y = x * factor;
    }
}

/// Multiplies a tensor by a number in place.
pub fn scale_assign(cpu: &Cpu, args: ScaleAssign<'_>) {
    let simd = cpu.simd();
    let ScaleAssign { factor, y } = args;
    parallel_elements(cpu, y.len(), RowSlice::new(y, 1), |_range, y| {
        scale_assign_part(simd, factor, y);
    });
}

kernel! {
    fn scale_assign_part<V>(factor: f32, y: &mut [f32]) {
        let factor = V::splat(factor);
        sweep!(y, i => at::<V>(y, i) * factor);
    }
}

/// [`scale_assign`] in plain loops.
pub fn scale_assign_reference(args: ScaleAssign<'_>) {
    for y in args.y {
        *y *= args.factor;
    }
}

/// Bounds a tensor smoothly.
pub fn softcap(cpu: &Cpu, args: Softcap<'_>) {
    let simd = cpu.simd();
    let Softcap { x, cap, y } = args;
    assert_eq!(x.len(), y.len(), "softcap: lengths differ");
    parallel_elements(cpu, y.len(), RowSlice::new(y, 1), |range, y| {
        softcap_part(simd, cap, &x[range], y);
    });
}

kernel! {
    fn softcap_part<V>(cap: f32, x: &[f32], y: &mut [f32]) {
        let (inverse, cap) = (V::splat(1.0 / cap), V::splat(cap));
        sweep!(y, i => cap * math::tanh(at::<V>(x, i) * inverse));
    }
}

/// [`softcap`] in plain loops.
pub fn softcap_reference(args: Softcap<'_>) {
    let Softcap { x, cap, y } = args;
    assert_eq!(x.len(), y.len(), "softcap: lengths differ");
    for (y, &x) in y.iter_mut().zip(x) {
        *y = cap * math::tanh(x * (1.0 / cap));
    }
}

/// The gradient of [`softcap`].
pub fn softcap_grad(cpu: &Cpu, args: SoftcapGrad<'_>) {
    let simd = cpu.simd();
    let SoftcapGrad { dy, y, cap, dx } = args;
    assert_eq!((dy.len(), y.len()), (dx.len(), dx.len()), "softcap_grad: lengths differ");
    parallel_elements(cpu, dx.len(), RowSlice::new(dx, 1), |range, dx| {
        softcap_grad_part(simd, cap, [&dy[range.clone()], &y[range]], dx);
    });
}

kernel! {
    fn softcap_grad_part<V>(cap: f32, inputs: [&[f32]; 2], dx: &mut [f32]) {
        let (inverse, one) = (V::splat(1.0 / cap), V::splat(1.0));
        let [dy, y] = inputs;
        sweep!(dx, i => {
            let t = at::<V>(y, i) * inverse;
            at::<V>(dy, i) * (-t).mul_add(t, one)
        });
    }
}

/// [`softcap_grad`] in plain loops.
pub fn softcap_grad_reference(args: SoftcapGrad<'_>) {
    let SoftcapGrad { dy, y, cap, dx } = args;
    assert_eq!((dy.len(), y.len()), (dx.len(), dx.len()), "softcap_grad: lengths differ");
    for (i, dx) in dx.iter_mut().enumerate() {
        let t = y[i] * (1.0 / cap);
        *dx = dy[i] * (-t).mul_add(t, 1.0);
    }
}

/// Sets every element to one value.
pub fn fill(cpu: &Cpu, args: Fill<'_>) {
    let Fill { value, y } = args;
    parallel_elements(cpu, y.len(), RowSlice::new(y, 1), |_range, y| y.fill(value));
}

/// [`fill`] in plain loops.
pub fn fill_reference(args: Fill<'_>) {
    args.y.fill(args.value);
}

#[cfg(test)]
mod tests;

//! Sums, scales and caps of whole tensors, element by element.
//!
//! Shapes: every slice of one call has the same length.

use crate::cpu::Cpu;
use crate::math;

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
pub fn add(_cpu: &Cpu, args: Add<'_>) {
    add_reference(args);
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
pub fn add_assign(_cpu: &Cpu, args: AddAssign<'_>) {
    add_assign_reference(args);
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
pub fn scale(_cpu: &Cpu, args: Scale<'_>) {
    scale_reference(args);
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
pub fn scale_assign(_cpu: &Cpu, args: ScaleAssign<'_>) {
    scale_assign_reference(args);
}

/// [`scale_assign`] in plain loops.
pub fn scale_assign_reference(args: ScaleAssign<'_>) {
    for y in args.y {
        *y *= args.factor;
    }
}

/// Bounds a tensor smoothly.
pub fn softcap(_cpu: &Cpu, args: Softcap<'_>) {
    softcap_reference(args);
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
pub fn softcap_grad(_cpu: &Cpu, args: SoftcapGrad<'_>) {
    softcap_grad_reference(args);
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
pub fn fill(_cpu: &Cpu, args: Fill<'_>) {
    fill_reference(args);
}

/// [`fill`] in plain loops.
pub fn fill_reference(args: Fill<'_>) {
    args.y.fill(args.value);
}

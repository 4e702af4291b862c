//! The arithmetic that a product is computed in: part of an instruction's numeric policy.
//!
//! Both policies give each output one chain over the inputs in one fixed order, so neither threads, the
//! batch, the instruction set nor blocking changes a bit.
//!
//! - [`Compute::F32`]: `sum = fma(x, w, sum)` over the inputs, ascending.
//! - [`Compute::Bf16`]: what `vdpbf16ps` computes, on every machine. Operands are bf16: the weight is
//!   stored so, the activation is rounded (`bf16_operand`). Inputs go in pairs, ascending; within a
//!   pair **the odd input comes first**: `sum = fma(x₁, w₁, sum)`, then `sum = fma(x₀, w₀, sum)`,
//!   each rounded to nearest even. A subnormal operand counts as a zero of its sign, and so does a
//!   subnormal result (`fma_flushed`). An odd last input has a partner of +0 · +0. What is no number is
//!   stored as the one NaN `0x7fc00000`: which payload survives is nobody's business.
//! - [`Compute::Int8`]: whole numbers inside a group of 32 inputs, where the order does not matter, and
//!   one chain over the groups. With `largest` the largest magnitude of a group of activations,
//!   `q = round(x · (127 / largest))`, ties to even, and `s = largest / 127`, each operation rounded
//!   to `f32`; `sum = fma(f32(Σ q·c), s · scale, sum)` over the groups, ascending, where `c · scale` are the
//!   weights. A group with nothing of at least 2⁻¹⁰⁰ has `s = 0`; one with an infinity or no number has
//!   `s = NaN`; both have `q = 0`.
//!
//! Sources: Intel's Software Developer's Manual on VDPBF16PS (order of a pair, "DAZ in, FTZ out and
//! RNE rounding; MXCSR is neither consulted nor updated"); checked on a Zen 4 with 12 million random
//! operands of every kind, and by the tests on every machine that has the instruction.

use std::fmt;

use crate::encoding::Encoding;
use crate::simd::{bf16_from_f32, f32_from_bf16};

/// In which arithmetic a product is computed.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// 32-bit floats; an encoded weight is decoded first.
    #[default]
    F32,
    /// bf16 operands, pairs of products summed in 32-bit floats. The weight is stored as bf16 or bf16z.
    Bf16,
    /// Bytes: activations are rounded by groups of 32, the weight is stored as q8 or q4.
    Int8,
}

impl Compute {
    /// Every arithmetic.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    /// The name used in program text and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// The encodings of weights that it multiplies, in words.
    pub fn weights(self) -> &'static str {
        match self {
            Self::F32 => "anything",
            Self::Bf16 => "bf16 or bf16z",
            Self::Int8 => "q8 or q4",
        }
    }

    /// Whether it has products by weights so stored.
    pub fn multiplies(self, encoding: Encoding) -> bool {
        match self {
            Self::F32 => true,
            Self::Bf16 => matches!(encoding, Encoding::Bf16 | Encoding::Bf16z),
            Self::Int8 => matches!(encoding, Encoding::Q8 | Encoding::Q4),
        }
    }

    /// Whether it is the default, which texts and files leave out.
    pub fn is_f32(&self) -> bool {
        *self == Self::F32
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The one NaN that a bf16 product stores.
pub(crate) const NAN: f32 = f32::from_bits(0x7fc0_0000);
/// What tiny results are looked at through, without rounding them on the subnormal grid.
pub(crate) const MAGNIFIER: f32 = f32::from_bits((127 + 64) << 23);
/// The smallest normal number, magnified.
pub(crate) const MAGNIFIED_MIN: f32 = f32::from_bits((1 + 64) << 23);

/// `x`, or a zero of its sign where `x` is subnormal.
pub(crate) fn flushed(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(x) } else { x }
}

/// An activation as a bf16 product sees it: rounded to nearest, ties to even; zero if subnormal.
pub(crate) fn bf16_operand(x: f32) -> f32 {
    f32_from_bf16(bf16_from_f32(flushed(x)))
}

/// `x · w + sum`, rounded once; a zero of the result's sign where the result, rounded as if exponents
/// had no end, is below the normal numbers. `x` and `w` are bf16 values, none of the three subnormal.
///
/// The same sum 2⁶⁴ times as large decides, where it is exact to look: it overflows only where `x · w`
/// and `sum` are far too large for their difference to be tiny, and a comparison with NaN is false.
pub(crate) fn fma_flushed(x: f32, w: f32, sum: f32) -> f32 {
    let total = x.mul_add(w, sum);
    let magnified = (x * MAGNIFIER).mul_add(w, sum * MAGNIFIER);
    if magnified.abs() < MAGNIFIED_MIN { 0.0_f32.copysign(total) } else { total }
}

/// One pair of inputs added to a chain: the odd one first.
pub(crate) fn pair_step(sum: f32, [x0, x1]: [f32; 2], [w0, w1]: [f32; 2]) -> f32 {
    fma_flushed(x0, w0, fma_flushed(x1, w1, sum))
}

/// A whole chain: `k` inputs from `start`.
pub(crate) fn bf16_chain(
    start: f32,
    k: usize,
    x: impl Fn(usize) -> f32,
    w: impl Fn(usize) -> f32,
) -> f32 {
    let operand = |i: usize| if i < k { [bf16_operand(x(i)), flushed(w(i))] } else { [0.0; 2] };
    let sum = (0..k).step_by(2).fold(flushed(start), |sum, i| {
        let ([x0, w0], [x1, w1]) = (operand(i), operand(i + 1));
        pair_step(sum, [x0, x1], [w0, w1])
    });
    if sum.is_nan() { NAN } else { sum }
}

/// Inputs of a group of an int8 product.
pub(crate) const GROUP: usize = 32;
/// The largest byte of an activation.
pub(crate) const BYTE_MAX: f32 = 127.0;
/// A group of smaller magnitudes counts as zeros: 2⁻¹⁰⁰.
pub(crate) const MAGNITUDE_MIN: f32 = f32::from_bits((127 - 100) << 23);
/// Adding it rounds numbers below 2²² to whole ones, ties to even; the low bits then are those of the
/// whole number.
pub(crate) const ROUNDER: f32 = 12_582_912.0;

/// What an int8 product multiplies instead of a group of activations: whole numbers and their scale.
pub(crate) fn bytes_of_group(x: &[f32]) -> (Vec<f32>, f32) {
    let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    if !x.iter().all(|x| x.is_finite()) {
        return (vec![0.0; x.len()], f32::NAN);
    }
    if largest < MAGNITUDE_MIN {
        return (vec![0.0; x.len()], 0.0);
    }
    let inverse = BYTE_MAX / largest;
    (x.iter().map(|x| (x * inverse).round_ties_even()).collect(), largest / BYTE_MAX)
}

/// A whole chain of an int8 product from `start`; `weight` gives a code's value and its scale.
pub(crate) fn int8_chain(start: f32, x_k: &[f32], weight: impl Fn(usize) -> (f32, f32)) -> f32 {
    x_k.chunks(GROUP).enumerate().fold(start, |sum, (group, x)| {
        let (bytes, x_scale) = bytes_of_group(x);
        let scale = weight(group * GROUP).1;
        let products = bytes.iter().enumerate().map(|(i, byte)| byte * weight(group * GROUP + i).0);
        // Whole numbers below 2²⁴: exact in any order.
        let total = products.sum::<f32>() + 0.0;
        total.mul_add(x_scale * scale, sum)
    })
}

#[cfg(test)]
mod tests;

//! How the tiles and the stream extend their chains: one type for each arithmetic.
//!
//! | type | policy | operands are packed as |
//! |---|---|---|
//! | [`Fused`] | f32 | floats |
//! | [`PairDot`] | bf16, by the instruction | pairs of bf16 values, in the bits of a float |
//! | [`PairFused`] | bf16, where nothing can be subnormal | floats |
//! | [`PairFlushed`] | bf16 | floats |
//!
//! The last three give the same bits wherever they may be used.

use crate::compute::{Compute, MAGNIFIED_MIN, MAGNIFIER, NAN};
use crate::isa::Simd;
use crate::simd::{F32x16, Kernel};

/// What a step of a chain is.
pub(super) trait Arithmetic {
    /// Steps that are taken together, the last first.
    const TOGETHER: usize = 1;
    /// Runs a kernel that takes such steps.
    #[inline(always)]
    fn call<V: F32x16, K: Kernel>(kernel: K) -> K::Output {
        V::call(kernel)
    }
    /// What a chain goes on with, from memory.
    #[inline(always)]
    fn begin<V: F32x16>(sum: V) -> V {
        sum.flushed()
    }
    /// One step.
    fn step<V: F32x16>(x: V, w: V, sum: V) -> V;
    /// What a chain leaves in memory.
    #[inline(always)]
    fn finish<V: F32x16>(sum: V) -> V {
        V::select(sum.eq(sum), sum, V::splat(NAN))
    }
}

/// The f32 policy.
pub(super) struct Fused;

impl Arithmetic for Fused {
    #[inline(always)]
    fn begin<V: F32x16>(sum: V) -> V {
        sum
    }
    #[inline(always)]
    fn step<V: F32x16>(x: V, w: V, sum: V) -> V {
        x.mul_add(w, sum)
    }
    #[inline(always)]
    fn finish<V: F32x16>(sum: V) -> V {
        sum
    }
}

/// The bf16 policy by `vdpbf16ps`. Used only behind [`Simd::has_pair_dot`].
pub(super) struct PairDot;

impl Arithmetic for PairDot {
    #[inline(always)]
    fn call<V: F32x16, K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: a product has `Form::Pairs` only where the instruction is (`Form::new`).
        unsafe { V::call_pair_dot(kernel) }
    }
    #[inline(always)]
    fn step<V: F32x16>(x: V, w: V, sum: V) -> V {
        x.pair_dot(w, sum)
    }
}

/// The bf16 policy by multiply-adds, for chains in which nothing subnormal can occur
/// ([`LeastMagnitudes`]).
pub(super) struct PairFused;

impl Arithmetic for PairFused {
    const TOGETHER: usize = 2;
    #[inline(always)]
    fn step<V: F32x16>(x: V, w: V, sum: V) -> V {
        x.mul_add(w, sum)
    }
}

/// The bf16 policy by multiply-adds: [`crate::compute::fma_flushed`] in sixteen lanes.
pub(super) struct PairFlushed;

impl Arithmetic for PairFlushed {
    const TOGETHER: usize = 2;
    #[inline(always)]
    fn step<V: F32x16>(x: V, w: V, sum: V) -> V {
        let magnifier = V::splat(MAGNIFIER);
        let total = x.mul_add(w, sum);
        let magnified = (x * magnifier).mul_add(w, sum * magnifier);
        let is_tiny = magnified.abs().lt(V::splat(MAGNIFIED_MIN));
        V::select(is_tiny, total.zero_of_its_sign(), total)
    }
}

/// How a product's operands are packed, and so which arithmetic its tiles use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Floats, for [`Fused`].
    Floats,
    /// Pairs of bf16 values, for [`PairDot`].
    Pairs,
    /// bf16 values as floats, for [`PairFused`] and [`PairFlushed`].
    Bf16Floats,
}

impl Form {
    pub(super) fn new(compute: Compute, simd: Simd) -> Self {
        match compute {
            // Products of bytes are none of these (`super::int8`).
            Compute::F32 | Compute::Int8 => Self::Floats,
            Compute::Bf16 if simd.has_pair_dot() => Self::Pairs,
            Compute::Bf16 => Self::Bf16Floats,
        }
    }

    /// Steps of a chain over `k` inputs.
    pub(super) fn steps(self, k: usize) -> usize {
        if self == Self::Pairs { k.div_ceil(2) } else { k }
    }
}

/// The smallest magnitudes other than 0 among the operands of some chains: what proves that nothing in
/// them can be subnormal.
///
/// A bf16 number of at least 2ᵃ is a multiple of 2ᵃ⁻⁷, so products are multiples of 2ᵃ⁺ᵇ⁻¹⁴. Sums of
/// multiples of 2^−126, rounded or not, are multiples of 2^−126: zero or a normal number.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeastMagnitudes {
    pub(super) x: f32,
    pub(super) w: f32,
}

/// Starts of at least this magnitude, or 0, are multiples of 2^−126.
const START_MIN: f32 = f32::from_bits((127 - 103) << 23);

impl LeastMagnitudes {
    /// Whether all products are multiples of 2^−126.
    pub(super) fn keep_normal(self) -> bool {
        const EXPONENTS: u32 = 2 * 127 - 112;
        (self.x.to_bits() >> 23) + (self.w.to_bits() >> 23) >= EXPONENTS
    }
}

/// Whether chains that start from these values start from multiples of 2^−126.
pub(super) fn starts_normal(values: &[f32]) -> bool {
    values.iter().all(|x| *x == 0.0 || x.abs() >= START_MIN)
}

#[cfg(test)]
mod tests;

//! `exp`, `ln`, `tanh`, `erf`, `sigmoid`, `sin` and `cos`: our own polynomials, the same bits on every ISA.
//!
//! Every function is written once, over [`Real`], which `f32` and the vectors implement with the
//! same roundings: one IEEE operation or one fused multiply-add each. The platform's libm is never
//! asked, because its results change with the version and with the instructions of the machine.
//!
//! Polynomials are near-minimax fits made for this file (weighted least squares iterated towards
//! the Chebyshev error, double precision); each function states the error measured against f64.

use crate::simd::{F32x16, I32x16};

/// The operations the polynomials are made of. A vector does in each lane what `f32` does.
pub(crate) trait Real: Copy {
    /// The same number in every lane.
    fn splat(value: f32) -> Self;
    /// `self + other`.
    fn plus(self, other: Self) -> Self;
    /// `self - other`.
    fn minus(self, other: Self) -> Self;
    /// `self * other`.
    fn times(self, other: Self) -> Self;
    /// `self / other`.
    fn over(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once.
    fn fma(self, factor: Self, addend: Self) -> Self;
    /// `if self < other { self } else { other }`: `other` wins when either is not a number.
    fn lesser(self, other: Self) -> Self;
    /// `if self < limit { below } else { otherwise }`.
    fn select_lt(self, limit: Self, below: Self, otherwise: Self) -> Self;
    /// The magnitude of `self` with the sign of `sign`.
    fn with_sign(self, sign: Self) -> Self;
    /// Adds the low bits of the *representation* of `shifted` to the exponent: `self · 2^n` where
    /// `shifted = n + 1.5·2²³`. The caller keeps the result normal.
    fn times_power_of_two(self, shifted: Self) -> Self;
}

impl<V: F32x16> Real for V {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        <V as F32x16>::splat(value)
    }
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self + other
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        self - other
    }
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        self * other
    }
    #[inline(always)]
    fn over(self, other: Self) -> Self {
        self / other
    }
    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        self.mul_add(factor, addend)
    }
    #[inline(always)]
    fn lesser(self, other: Self) -> Self {
        self.min(other)
    }
    #[inline(always)]
    fn select_lt(self, limit: Self, below: Self, otherwise: Self) -> Self {
        V::select(self.lt(limit), below, otherwise)
    }
    #[inline(always)]
    fn with_sign(self, sign: Self) -> Self {
        let sign_bit = V::Int::splat(i32::MIN);
        self.abs().bits().or(sign.bits().and(sign_bit)).as_float()
    }
    #[inline(always)]
    fn times_power_of_two(self, shifted: Self) -> Self {
        (self.bits() + shifted.bits().shl(23)).as_float()
    }
}

impl Real for f32 {
    fn splat(value: f32) -> Self {
        value
    }
    fn plus(self, other: Self) -> Self {
        self + other
    }
    fn minus(self, other: Self) -> Self {
        self - other
    }
    fn times(self, other: Self) -> Self {
        self * other
    }
    fn over(self, other: Self) -> Self {
        self / other
    }
    fn fma(self, factor: Self, addend: Self) -> Self {
        self.mul_add(factor, addend)
    }
    fn lesser(self, other: Self) -> Self {
        if self < other { self } else { other }
    }
    fn select_lt(self, limit: Self, below: Self, otherwise: Self) -> Self {
        if self < limit { below } else { otherwise }
    }
    fn with_sign(self, sign: Self) -> Self {
        self.copysign(sign)
    }
    fn times_power_of_two(self, shifted: Self) -> Self {
        Self::from_bits(self.to_bits().wrapping_add(shifted.to_bits() << 23))
    }
}

/// 1.5·2²³: adding it rounds a number below 2²² to an integer that sits in the low mantissa bits.
const ROUNDER: f32 = 12_582_912.0;
/// At and above this `exp` is infinite (the exponent 127 is the last that one shift reaches).
const EXP_MAX: f32 = 88.37;
/// Below this `exp` is zero: results that would be subnormal, or nearly, are flushed.
const EXP_MIN: f32 = -86.98;

/// `e^x`, at most 1 ulp off; exactly 1 at 0, 0 below −86.98, infinite from 88.37 on.
#[inline(always)]
pub(crate) fn exp<R: Real>(x: R) -> R {
    let shifted = x.fma(R::splat(std::f32::consts::LOG2_E), R::splat(ROUNDER));
    let n = shifted.minus(R::splat(ROUNDER));
    let r = n.fma(R::splat(-std::f32::consts::LN_2), x);
    let r = n.fma(R::splat(1.904_654_2e-9), r);
    let p = R::splat(0.001_381_314_5);
    let p = p.fma(r, R::splat(0.008_369_419));
    let p = p.fma(r, R::splat(0.041_668_456));
    let p = p.fma(r, R::splat(0.166_665_15));
    let p = p.fma(r, R::splat(0.499_999_94));
    let p = p.fma(r.times(r), r).plus(R::splat(1.0));
    let y = p.times_power_of_two(shifted);
    // Out of range the bits above are noise. The sum keeps a not-a-number one.
    let y = x.select_lt(R::splat(EXP_MAX), y, x.plus(R::splat(f32::INFINITY)));
    x.select_lt(R::splat(EXP_MIN), R::splat(0.0), y)
}

/// The natural logarithm of a positive normal number, at most 1 ulp off. Scalar: once per row.
///
/// 0 gives −∞, infinity gives itself, below 0 is not a number.
#[inline(always)]
pub(crate) fn ln(x: f32) -> f32 {
    if x.is_nan() || x < 0.0 {
        return f32::NAN;
    }
    if x == 0.0 {
        return f32::NEG_INFINITY;
    }
    if x == f32::INFINITY {
        return x;
    }
    // Scale so that the mantissa lies in [√½, √2): 0x3f3504f3 is √½.
    let (x, bias) = if x < f32::MIN_POSITIVE { (x * 8_388_608.0, 23.0) } else { (x, 0.0) };
    let bits = x.to_bits().wrapping_sub(0x3f35_04f3);
    let e = f32::from(i16::try_from(bits.cast_signed() >> 23).expect("an exponent has 9 bits"));
    let m = f32::from_bits((bits & 0x007f_ffff) + 0x3f35_04f3);
    let e = e - bias;
    let f = m - 1.0;
    let p = 0.067_465_99_f32;
    let p = p.mul_add(f, -0.116_796_54);
    let p = p.mul_add(f, 0.118_903_235);
    let p = p.mul_add(f, -0.124_051_355);
    let p = p.mul_add(f, 0.142_192_24);
    let p = p.mul_add(f, -0.166_680_07);
    let p = p.mul_add(f, 0.200_021_34);
    let p = p.mul_add(f, -0.250_000_1);
    let p = p.mul_add(f, 0.333_333_13);
    let f2 = f * f;
    let tail = (f2 * f).mul_add(p, (-0.5_f32).mul_add(f2, e * -1.904_654_2e-9));
    e.mul_add(std::f32::consts::LN_2, f + tail)
}

/// [`ln`] of positive normal numbers in every lane, the same bits.
#[inline(always)]
pub(crate) fn ln_normal<V: F32x16>(x: V) -> V {
    let shift = V::Int::splat(0x3f35_04f3);
    // One biased exponent more, so that the shift need not keep a sign.
    let e = x.bits() + V::Int::splat((127 << 23) - 0x3f35_04f3);
    let e = (e.shr(23) - V::Int::splat(127)).to_float();
    let m = ((x.bits() - shift).and(V::Int::splat(0x007f_ffff)) + shift).as_float();
    let f = m - V::splat(1.0);
    let p = V::splat(0.067_465_99);
    let p = p.mul_add(f, V::splat(-0.116_796_54));
    let p = p.mul_add(f, V::splat(0.118_903_235));
    let p = p.mul_add(f, V::splat(-0.124_051_355));
    let p = p.mul_add(f, V::splat(0.142_192_24));
    let p = p.mul_add(f, V::splat(-0.166_680_07));
    let p = p.mul_add(f, V::splat(0.200_021_34));
    let p = p.mul_add(f, V::splat(-0.250_000_1));
    let p = p.mul_add(f, V::splat(0.333_333_13));
    let f2 = f * f;
    let tail = V::splat(-0.5).mul_add(f2, e * V::splat(-1.904_654_2e-9));
    let tail = (f2 * f).mul_add(p, tail);
    e.mul_add(V::splat(std::f32::consts::LN_2), f + tail)
}

/// `1 / (1 + e^−x)`, at most 2 ulp off.
#[inline(always)]
pub(crate) fn sigmoid<R: Real>(x: R) -> R {
    let e = exp(R::splat(0.0).minus(x));
    R::splat(1.0).over(R::splat(1.0).plus(e))
}

/// The hyperbolic tangent, at most 2 ulp off.
#[inline(always)]
pub(crate) fn tanh<R: Real>(x: R) -> R {
    let s = x.times(x);
    let p = R::splat(-0.005_697_392_4);
    let p = p.fma(s, R::splat(0.020_632_554));
    let p = p.fma(s, R::splat(-0.053_737_8));
    let p = p.fma(s, R::splat(0.133_314_2));
    let p = p.fma(s, R::splat(-0.333_332_8));
    let near = p.fma(s.times(x), x);
    let magnitude = x.with_sign(R::splat(1.0));
    let e = exp(magnitude.plus(magnitude));
    let far = R::splat(1.0).minus(R::splat(2.0).over(e.plus(R::splat(1.0)))).with_sign(x);
    magnitude.select_lt(R::splat(0.625), near, far)
}

/// The error function, at most 2 ulp off.
#[inline(always)]
pub(crate) fn erf<R: Real>(x: R) -> R {
    let s = x.times(x);
    let p = R::splat(-0.000_595_374_5);
    let p = p.fma(s, R::splat(0.004_985_941_6));
    let p = p.fma(s, R::splat(-0.026_761_72));
    let p = p.fma(s, R::splat(0.112_816_826));
    let p = p.fma(s, R::splat(-0.376_124_8));
    let p = p.fma(s, R::splat(0.128_379_15));
    let near = p.fma(x, x);
    // Beyond 4 the complement is below half an ulp of 1.
    let magnitude = x.with_sign(R::splat(1.0));
    let t = R::splat(4.0).lesser(magnitude);
    let q = R::splat(0.000_213_532_14);
    let q = q.fma(t, R::splat(-0.003_211_311_8));
    let q = q.fma(t, R::splat(0.022_878_593));
    let q = q.fma(t, R::splat(-0.105_244_64));
    let q = q.fma(t, R::splat(-0.635_730_9));
    let q = q.fma(t, R::splat(-0.128_510_76));
    let far = R::splat(1.0).minus(exp(q.fma(t, R::splat(0.0).minus(t)))).with_sign(x);
    magnitude.select_lt(R::splat(0.93), near, far)
}

/// `(sin x, cos x)` for |x| below 2²², at most 2 ulp off each.
///
/// The quadrant count is exact in the low bits of a float below 2²², and three parts of π/2 with
/// fused multiply-adds leave a remainder good to its last bit even next to a zero.
#[inline(always)]
pub(crate) fn sin_cos<R: Real>(x: R) -> (R, R) {
    let rounder = R::splat(ROUNDER);
    let k = x.fma(R::splat(std::f32::consts::FRAC_2_PI), rounder).minus(rounder);
    let r = k.fma(R::splat(-1.570_796_4), x);
    let r = k.fma(R::splat(4.371_139e-8), r);
    let r = k.fma(R::splat(1.715_124_5e-15), r);
    let s = r.times(r);
    let p = R::splat(2.718_046_5e-6);
    let p = p.fma(s, R::splat(-0.000_198_393_04));
    let p = p.fma(s, R::splat(0.008_333_329));
    let p = p.fma(s, R::splat(-0.166_666_67));
    let sin = p.fma(s.times(r), r);
    let q = R::splat(-2.720_504_7e-7);
    let q = q.fma(s, R::splat(2.479_945_2e-5));
    let q = q.fma(s, R::splat(-0.001_388_888_3));
    let q = q.fma(s, R::splat(0.041_666_668));
    let cos = q.fma(s.times(s), R::splat(-0.5).fma(s, R::splat(1.0)));
    // The quadrant as −2 … 2, from which the swap and the signs follow by comparisons.
    let turns = k.fma(R::splat(0.25), rounder).minus(rounder);
    let quadrant = turns.fma(R::splat(-4.0), k);
    let distance = quadrant.with_sign(R::splat(1.0));
    let off_axis = distance.minus(R::splat(1.0)).with_sign(R::splat(1.0));
    let half = R::splat(0.5);
    let sin_part = off_axis.select_lt(half, cos, sin);
    let cos_part = off_axis.select_lt(half, sin, cos);
    let minus_sin = R::splat(0.0).minus(sin_part);
    let minus_cos = R::splat(0.0).minus(cos_part);
    // sin: negative in quadrants 2 and −1; cos: negative in quadrants 1 and ±2.
    let sin_y = distance.select_lt(R::splat(1.5), sin_part, minus_sin);
    let sin_y =
        off_axis.select_lt(half, quadrant.select_lt(R::splat(0.0), minus_sin, sin_part), sin_y);
    let cos_y = distance.select_lt(R::splat(1.5), cos_part, minus_cos);
    let cos_y =
        off_axis.select_lt(half, quadrant.select_lt(R::splat(0.0), cos_part, minus_cos), cos_y);
    (sin_y, cos_y)
}

#[cfg(test)]
mod tests;

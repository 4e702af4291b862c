//! Exponential and logarithm in `f64` with the same bits on every machine.
//!
//! The platform's `exp` and `log` may differ in the last bit between C libraries and processors,
//! and a sampled token may not. Only additions, products and divisions happen here, in a fixed
//! order and without fusion, so IEEE 754 leaves no choice. Errors are below 2 units in the last
//! place, which the tests check against the platform.

use std::f64::consts::LOG2_E;

/// ln 2 in two parts; the first has zeros enough that products with exponents are exact.
const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// 1/2!, 1/3!, … 1/13!: what `e^r` needs for |r| ≤ ln 2 / 2.
const EXP_TERMS: [f64; 12] = [
    1.0 / 2.0,
    1.0 / 6.0,
    1.0 / 24.0,
    1.0 / 120.0,
    1.0 / 720.0,
    1.0 / 5_040.0,
    1.0 / 40_320.0,
    1.0 / 362_880.0,
    1.0 / 3_628_800.0,
    1.0 / 39_916_800.0,
    1.0 / 479_001_600.0,
    1.0 / 6_227_020_800.0,
];

/// Below this the result of [`exp`] would be subnormal; it is 0.
pub(crate) const EXP_MIN: f64 = -708.0;
/// 1.5 · 2⁵²: the sum with it has no room for a fraction, and its last bits are the integer.
const TO_INTEGER: f64 = 6_755_399_441_055_744.0;

/// `e^x` for `x ≤ 0`; 0 below [`EXP_MIN`].
pub(crate) fn exp(x: f64) -> f64 {
    debug_assert!(x <= 0.0, "weights are at most 1, not e^{x}");
    if x < EXP_MIN {
        return 0.0;
    }
    // The nearest integer without a call of the platform's `round`, which a vocabulary of 150,000
    // tokens would notice.
    let shifted = x * LOG2_E + TO_INTEGER;
    let exponent = shifted - TO_INTEGER;
    let r = (x - exponent * LN2_HIGH) - exponent * LN2_LOW;
    let tail = EXP_TERMS.iter().rev().fold(0.0, |sum, term| sum * r + term);
    let mantissa = 1.0 + (r + r * r * tail);
    // 2^exponent, −1022 ≤ exponent ≤ 0, by its bits.
    let biased = shifted.to_bits().wrapping_add(1023);
    mantissa * f64::from_bits(biased << 52)
}

/// `ln y` for a normal, positive `y`.
pub(crate) fn ln(y: f64) -> f64 {
    debug_assert!(y.is_normal() && 0.0 < y, "ln {y}");
    let bits = y.to_bits();
    let mut exponent = (bits >> 52) as f64 - 1023.0;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if std::f64::consts::SQRT_2 < mantissa {
        mantissa *= 0.5;
        exponent += 1.0;
    }
    // 2 atanh(s), |s| ≤ 0.1716.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let s2 = s * s;
    let series = (1..=12).rev().fold(0.0, |sum, n| sum * s2 + 1.0 / f64::from(2 * n + 1));
    let small = 2.0 * (s + s * s2 * series);
    exponent * LN2_HIGH + (small + exponent * LN2_LOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(actual: f64, expected: f64, what: &str) {
        let bound = 4.0 * f64::EPSILON * expected.abs();
        assert!((actual - expected).abs() <= bound, "{what}: {actual:e}, not {expected:e}");
    }

    #[test]
    fn exp_and_ln_agree_with_the_platform() {
        assert_eq!(exp(0.0).to_bits(), 1.0_f64.to_bits());
        assert_eq!(exp(-1000.0).to_bits(), 0.0_f64.to_bits());
        assert_eq!(exp(f64::NEG_INFINITY).to_bits(), 0.0_f64.to_bits());
        for step in 1..70_000 {
            let x = -f64::from(step) * 0.010_007;
            check(exp(x), x.exp(), "exp");
            let y = f64::from(step) * 0.003;
            if 1e-3 < (y - 1.0).abs() {
                check(ln(y), y.ln(), "ln");
            }
        }
        check(ln(1e-300), 1e-300_f64.ln(), "ln");
    }
}

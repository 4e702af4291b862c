//! The rules of bf16 products against the instruction they describe, and against exact arithmetic.

use super::*;
use crate::testing::Numbers;

/// Operands that make every rule of the policy matter.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Any,
    Ordinary,
    /// Products among the smallest normal numbers, with sums to cancel.
    Tiny,
    /// Products among the largest numbers.
    Huge,
    Special,
}

const KINDS: [Kind; 5] = [Kind::Any, Kind::Ordinary, Kind::Tiny, Kind::Huge, Kind::Special];

fn with_exponent(numbers: &mut Numbers, first: u32, count: usize) -> u32 {
    let bits = u32::try_from(numbers.bits() >> 32).unwrap();
    (bits & 0x807f_ffff) | ((first + u32::try_from(numbers.below(count)).unwrap()) << 23)
}

fn bf16(numbers: &mut Numbers, kind: Kind) -> u32 {
    const SPECIAL: [u32; 16] = [
        0, 0x8000, 0x7f80, 0xff80, 0x7fc0, 0x7f81, 0xffc1, 0x7fff, 0x0001, 0x8001, 0x007f, 0x0080,
        0x7f7f, 0xff7f, 0x3f80, 0xbf80,
    ];
    let bits = match kind {
        Kind::Any => u32::try_from(numbers.bits() >> 32).unwrap(),
        Kind::Ordinary => with_exponent(numbers, 120, 14),
        Kind::Tiny => with_exponent(numbers, 58, 12),
        Kind::Huge => with_exponent(numbers, 185, 12),
        Kind::Special => SPECIAL[numbers.below(SPECIAL.len())] << 16,
    };
    bits & 0xffff_0000
}

fn start(numbers: &mut Numbers, kind: Kind) -> u32 {
    const SPECIAL: [u32; 12] = [
        0,
        0x8000_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x7f80_0001,
        1,
        0x8000_0001,
        0x007f_ffff,
        0x0080_0000,
        0x8080_0000,
        0x7f7f_ffff,
    ];
    match kind {
        Kind::Any => u32::try_from(numbers.bits() >> 32).unwrap(),
        Kind::Ordinary => with_exponent(numbers, 120, 14),
        Kind::Tiny => with_exponent(numbers, 0, 12),
        Kind::Huge => with_exponent(numbers, 243, 12),
        Kind::Special => SPECIAL[numbers.below(SPECIAL.len())],
    }
}

fn canonical(x: f32) -> u32 {
    if x.is_nan() { NAN.to_bits() } else { x.to_bits() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn instruction(sum: f32, x: [u32; 2], w: [u32; 2]) -> f32 {
    use std::arch::x86_64::*;
    let pair = |[even, odd]: [u32; 2]| _mm512_set1_epi32((even >> 16 | odd).cast_signed());
    // SAFETY: both are 64 bytes without invalid patterns.
    let x: __m512bh = unsafe { std::mem::transmute(pair(x)) };
    // SAFETY: as above.
    let w: __m512bh = unsafe { std::mem::transmute(pair(w)) };
    _mm512_cvtss_f32(_mm512_dpbf16_ps(_mm512_set1_ps(sum), x, w))
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_pair_is_what_the_instruction_computes() {
    if !is_x86_feature_detected!("avx512bf16") {
        return; // this machine does not have vdpbf16ps
    }
    let mut numbers = Numbers::new(11);
    for round in 0..1_000_000 {
        let kind = KINDS[round % KINDS.len()];
        let [x0, x1, w0, w1] = std::array::from_fn(|_| bf16(&mut numbers, kind));
        let sum = f32::from_bits(start(&mut numbers, kind));
        // SAFETY: the machine has it.
        let expected = unsafe { instruction(sum, [x0, x1], [w0, w1]) };
        let operand = |bits: u32| flushed(f32::from_bits(bits));
        let found = pair_step(flushed(sum), [x0, x1].map(operand), [w0, w1].map(operand));
        assert_eq!(
            canonical(found),
            canonical(expected),
            "{kind:?}: {sum:e} + [{x0:x} {x1:x}] · [{w0:x} {w1:x}]: {found:e} and {expected:e}"
        );
    }
}

/// Tininess is judged after rounding with exponents without end: exactly what 53 bits can tell.
#[test]
fn what_is_flushed_is_what_is_tiny() {
    let mut numbers = Numbers::new(5);
    let (limit, mut flushes) = (f64::from(f32::MIN_POSITIVE), 0);
    // From halfway below the smallest normal number on, rounding reaches it.
    let tiny_below = limit * (1.0 - 2.0_f64.powi(-25));
    for _ in 0..400_000 {
        let [x, w] = std::array::from_fn(|_| f32::from_bits(bf16(&mut numbers, Kind::Tiny)));
        let sum = flushed(f32::from_bits(start(&mut numbers, Kind::Tiny)));
        let product = f64::from(x) * f64::from(w);
        let exact = product + f64::from(sum);
        let held = [exact - product, exact - f64::from(sum)].map(f64::abs).map(f64::to_bits);
        if held != [f64::from(sum), product].map(f64::abs).map(f64::to_bits) {
            continue; // 53 bits did not hold the sum
        }
        let found = fma_flushed(x, w, sum);
        if exact.abs() < tiny_below {
            flushes += 1;
            let zero: f32 = if exact.is_sign_negative() { -0.0 } else { 0.0 };
            assert_eq!(found.to_bits(), zero.to_bits(), "{exact:e}");
        } else {
            assert!(found.abs() >= f32::MIN_POSITIVE, "{exact:e}: {found:e}");
        }
    }
    assert!(flushes > 10_000, "{flushes} results were tiny");
    // Just below the smallest normal number: the subnormal grid would round up to it.
    let (x, w) = (1.5 * 2.0_f32.powi(-75), -2.0_f32.powi(-76));
    let rounded = x.mul_add(w, f32::MIN_POSITIVE);
    assert_eq!(rounded.to_bits(), f32::MIN_POSITIVE.to_bits());
    assert_eq!(fma_flushed(x, w, f32::MIN_POSITIVE).to_bits(), 0);
}

#[test]
fn activations_round_to_the_nearest_bf16() {
    for (x, expected) in [
        (1.0 + 2.0_f32.powi(-8), 1.0),
        (1.0 + 3.0 * 2.0_f32.powi(-8), 1.0 + 2.0_f32.powi(-6)),
        (f32::from_bits(0x007f_ffff), 0.0),
        (-f32::from_bits(0x007f_ffff), -0.0),
        (f32::MAX, f32::INFINITY),
    ] {
        assert_eq!(bf16_operand(x).to_bits(), expected.to_bits(), "{x:e}");
    }
    assert!(bf16_operand(f32::NAN).is_nan());
}

//! Normally distributed numbers: what fresh weights are made of.
//!
//! Element i of a stream is a function of the stream's key and i alone, so it depends neither on
//! threads and ISA nor on how the stream is cut. 32 consecutive elements are 16 pairs of Box and
//! Muller's method (1958): the cosines, then the sines. A uniform number has 24 bits, so a normal one
//! lies within ±5.77.

#![expect(clippy::cast_possible_truncation, reason = "places inside a section are below 2³²")]

pub(crate) mod bench;

use crate::cpu::Cpu;
use crate::math;
use crate::random::{RandomLanes, random_bits, splitmix};
use crate::simd::{F32x16, I32x16, LANES, kernel};

/// Elements under one key of random bits.
const SECTION: usize = 1 << 14;
/// Elements of sixteen pairs.
const PAIRS: usize = 2 * LANES;
const TWO_TO_MINUS_24: f32 = 1.0 / 16_777_216.0;

/// Fills `y` with consecutive elements of a stream.
#[derive(Debug)]
pub struct FillNormal<'a> {
    /// Which stream.
    pub key: u64,
    /// Which element comes first.
    pub first: u64,
    /// Standard deviation; the mean is 0.
    pub deviation: f32,
    /// Overwritten.
    pub y: &'a mut [f32],
}

/// Fills a slice with normally distributed numbers.
pub fn fill_normal(cpu: &Cpu, args: FillNormal<'_>) {
    let simd = cpu.simd();
    let FillNormal { key, first, deviation, y } = args;
    // What comes before the first whole section, then whole ones.
    let (section, skip) = place(first);
    let head = if skip == 0 { 0 } else { y.len().min(SECTION - skip) };
    let (head, rest) = y.split_at_mut(head);
    fill_section(simd, section_key(key, section), deviation, skip, head);
    let section = section + u64::from(!head.is_empty());
    cpu.parallel_chunks(rest, SECTION, |start, y, _| {
        let section = section + (start / SECTION) as u64;
        fill_section(simd, section_key(key, section), deviation, 0, y);
    });
}

/// The section of an element, and how many of the section come before it.
fn place(index: u64) -> (u64, usize) {
    (index / SECTION as u64, (index % SECTION as u64) as usize)
}

fn section_key(key: u64, section: u64) -> u64 {
    splitmix(key ^ splitmix(section))
}

kernel! {
    fn fill_section<V>(key: u64, deviation: f32, skip: usize, y: &mut [f32]) {
        let deviation = V::splat(deviation);
        // Radii use the lower half of the places, angles the upper.
        let first = (skip / PAIRS * LANES) as u32;
        let mut radii = RandomLanes::<V>::new(key, first);
        let mut angles = RandomLanes::<V>::new(key, first + (1 << 31));
        let mut skip = skip % PAIRS;
        let mut y = y;
        while !y.is_empty() {
            let ln = math::ln_normal(uniform::<V>(radii.next()));
            let radius = (ln * V::splat(-2.0)).sqrt() * deviation;
            let turn = uniform::<V>(angles.next()) * V::splat(std::f32::consts::TAU);
            let (sin, cos) = math::sin_cos(turn);
            let (front, back) = (radius * cos, radius * sin);
            let (block, rest) = y.split_at_mut(y.len().min(PAIRS - skip));
            if let Ok([first, second]) = <&mut [[f32; LANES]; 2]>::try_from(block.as_chunks_mut().0) {
                front.store(first);
                back.store(second);
            } else {
                let both = [front.to_array(), back.to_array()];
                block.copy_from_slice(&both.as_flattened()[skip..skip + block.len()]);
            }
            (skip, y) = (0, rest);
        }
    }
}

/// A number in (0, 1]: the logarithm must not see zero.
#[inline(always)]
fn uniform<V: F32x16>(bits: V::Int) -> V {
    (bits.shr(8) + V::Int::splat(1)).to_float() * V::splat(TWO_TO_MINUS_24)
}

/// [`fill_normal`] in plain loops.
pub fn fill_normal_reference(args: FillNormal<'_>) {
    let FillNormal { key, first, deviation, y } = args;
    let uniform = |bits: u32| ((bits >> 8) + 1) as f32 * TWO_TO_MINUS_24;
    for (index, y) in (first..).zip(y) {
        let (section, index) = place(index);
        let key = section_key(key, section);
        let pair = (index / PAIRS * LANES + index % LANES) as u32;
        let ln = math::ln(uniform(random_bits(key, pair)));
        let radius = (ln * -2.0).sqrt() * deviation;
        let turn = uniform(random_bits(key, pair + (1 << 31))) * std::f32::consts::TAU;
        let (sin, cos) = math::sin_cos(turn);
        *y = radius * if index % PAIRS < LANES { cos } else { sin };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::isa::Isa;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn equals_the_reference(key: u64, first in 0..u64::MAX / 2, len in 1..3 * SECTION) {
            let run = |fill: &dyn Fn(FillNormal<'_>)| {
                let mut y = vec![f32::NAN; len];
                fill(FillNormal { key, first, deviation: 0.02, y: &mut y });
                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let expected = run(&fill_normal_reference);
            for isa in Isa::supported() {
                prop_assert_eq!(&run(&|args| fill_normal(&Cpu::new(isa, 2), args)), &expected);
            }
        }
    }

    #[test]
    fn moments_and_tails_are_those_of_a_normal_distribution() {
        let mut y = vec![0.0; 1 << 20];
        fill_normal(&Cpu::detect(2), FillNormal { key: 5, first: 7, deviation: 1.0, y: &mut y });
        let n = y.len() as f64;
        let moment = |power: i32| y.iter().map(|&v| f64::from(v).powi(power)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.004 && moment(3).abs() < 0.02, "{} {}", moment(1), moment(3));
        assert!((moment(2) - 1.0).abs() < 0.006 && (moment(4) - 3.0).abs() < 0.06);
        // Φ(−1), Φ(−2), Φ(−3).
        for (bound, share) in [(1.0, 0.158_655), (2.0, 0.022_750), (3.0, 0.001_350)] {
            let above = y.iter().filter(|&&v| v > bound).count() as f64 / n;
            assert!((above - share).abs() < 5.0 * (share / n).sqrt(), "{bound}: {above}");
        }
        let product = y.windows(2).map(|w| f64::from(w[0] * w[1])).sum::<f64>() / n;
        assert!(product.abs() < 0.006, "neighbors correlate: {product}");
    }
}

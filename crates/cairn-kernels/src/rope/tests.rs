//! Kernels against references, the rotation's properties, and the error against f64.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, check_bits};

fn inverse_frequencies(r: usize) -> Vec<f32> {
    (0..r).map(|i| 10_000.0_f32.powf(-(i as f32) / r as f32)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn kernels_equal_references(
        t in 0..40_usize, heads in 1..4_usize, r in 1..40_usize, rest in 0..20_usize,
        interleaved: bool, inverse: bool, seed: u64,
    ) {
        let head_dim = 2 * r + rest;
        let mut numbers = Numbers::new(seed);
        let x = numbers.floats(t * heads * head_dim, 1.0);
        let positions = numbers.indices(t, 200_000);
        let inv_freq = inverse_frequencies(r);
        let pairing = if interleaved { RopePairing::Interleaved } else { RopePairing::Half };
        check_bits("rope", |cpu| {
            let mut x = x.clone();
            let args = Rope {
                x_thk: &mut x,
                positions_t: &positions,
                inv_freq: &inv_freq,
                attention_scaling: 1.25,
                heads,
                head_dim,
                pairing,
                inverse,
            };
            match cpu {
                Some(cpu) => rope(cpu, args),
                None => rope_reference(args),
            }
            vec![x]
        });
    }
}

fn turned(x: &[f32], position: u32, pairing: RopePairing, inverse: bool) -> Vec<f32> {
    let mut x = x.to_vec();
    let args = Rope {
        inv_freq: &inverse_frequencies(x.len() / 2),
        attention_scaling: 1.0,
        heads: 1,
        head_dim: x.len(),
        x_thk: &mut x,
        positions_t: &[position],
        pairing,
        inverse,
    };
    rope_reference(args);
    x
}

#[test]
fn the_inverse_turns_back() {
    let x = Numbers::new(1).floats(64, 1.0);
    for pairing in [RopePairing::Half, RopePairing::Interleaved] {
        let there = turned(&x, 1234, pairing, false);
        assert!(there.iter().zip(&x).any(|(y, x)| (y - x).abs() > 0.1));
        let back = turned(&there, 1234, pairing, true);
        assert!(back.iter().zip(&x).all(|(y, x)| (y - x).abs() < 1e-6));
    }
}

#[test]
fn rotations_are_close_to_f64() {
    let x = Numbers::new(2).floats(64, 1.0);
    let inv_freq = inverse_frequencies(32);
    for position in [0, 1, 77, 4095, 131_071] {
        let y = turned(&x, position, RopePairing::Half, false);
        for i in 0..32 {
            let (sin, cos) = f64::from(position as f32 * inv_freq[i]).sin_cos();
            let (x0, x1) = (f64::from(x[i]), f64::from(x[i + 32]));
            let exact = [x0 * cos - x1 * sin, x1 * cos + x0 * sin];
            for (y, exact) in [y[i], y[i + 32]].into_iter().zip(exact) {
                assert!((f64::from(y) - exact).abs() < 3e-7, "{position} {i}: {y} {exact}");
            }
        }
    }
}

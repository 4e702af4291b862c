//! Kernels against references, and the statistics of the masks.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, check_bits};

const MASK: DropoutMask = DropoutMask { p: 0.1, seed: 7, step: 11, site: 3, first_token: 100 };
/// Width of a row.
const D: usize = 384;

fn kept(mask: DropoutMask, rows: usize) -> Vec<f32> {
    let mut y_td = vec![1.0; rows * D];
    dropout_assign_reference(DropoutAssign { y_td: &mut y_td, d: D, mask });
    y_td
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn kernels_equal_references(rows in 0..60_usize, d in 1..900_usize, p in 0.0..0.999_f32, seed: u64) {
        let x = Numbers::new(seed).floats(rows * d, 1.0);
        let mask = DropoutMask { p, seed, step: seed >> 7, site: 2, first_token: seed >> 20 };
        check_bits("dropout", |cpu| {
            let (mut y, mut here) = (vec![9.0; x.len()], x.clone());
            let apart = Dropout { x_td: &x, y_td: &mut y, d, mask };
            let in_place = DropoutAssign { y_td: &mut here, d, mask };
            match cpu {
                Some(cpu) => {
                    dropout(cpu, apart);
                    dropout_assign(cpu, in_place);
                }
                None => {
                    dropout_reference(apart);
                    dropout_assign_reference(in_place);
                }
            }
            vec![y, here]
        });
    }
}

#[test]
fn a_token_keeps_its_mask_in_any_batch() {
    let all = kept(MASK, 10);
    let tail = kept(DropoutMask { first_token: MASK.first_token + 4, ..MASK }, 6);
    assert_eq!(all[4 * D..], tail);
}

#[test]
fn masks_have_the_rate_and_are_unrelated() {
    let rows = 1000;
    let elements = rows * D;
    let masks = [
        MASK,
        DropoutMask { seed: 8, ..MASK },
        DropoutMask { step: 12, ..MASK },
        DropoutMask { site: 4, ..MASK },
        DropoutMask { first_token: 100 + rows as u64, ..MASK },
    ]
    .map(|mask| kept(mask, rows).iter().map(|&y| y == 0.0).collect::<Vec<bool>>());
    let p = f64::from(MASK.p);
    // Five standard deviations of a binomial count.
    let limit = |p: f64| 5.0 * (p * (1.0 - p) * elements as f64).sqrt();
    for (i, mask) in masks.iter().enumerate() {
        let dropped = mask.iter().filter(|&&dropped| dropped).count() as f64;
        assert!((dropped - p * elements as f64).abs() < limit(p), "rate of mask {i}: {dropped}");
        for distance in [1, 2, 16, D] {
            let both = (distance..elements).filter(|&i| mask[i] && mask[i - distance]).count();
            let excess = both as f64 - p * p * (elements - distance) as f64;
            assert!(excess.abs() < limit(p * p), "mask {i} against itself {distance} on: {excess}");
        }
        for other in &masks[i + 1..] {
            let both = mask.iter().zip(other).filter(|&(&a, &b)| a && b).count() as f64;
            assert!((both - p * p * elements as f64).abs() < limit(p * p), "{i}: {both}");
        }
    }
}

#[test]
fn kept_elements_keep_the_mean() {
    let y = kept(MASK, 1000);
    let mean = y.iter().map(|&y| f64::from(y)).sum::<f64>() / y.len() as f64;
    assert!((mean - 1.0).abs() < 3e-3, "{mean}");
    assert_eq!(kept(DropoutMask { p: 0.0, ..MASK }, 3), vec![1.0; 3 * D]);
}

//! Dropout of probabilities: what its masks depend on, and their statistics.

use super::*;

const DROPOUT: DropoutMask = DropoutMask { p: 0.1, seed: 7, step: 11, site: 3, first_token: 50 };

#[test]
fn a_probability_of_zero_changes_nothing() {
    let layer = Layer::new(PLAIN, &[70, 130], 5);
    let zero = layer.clone().dropping(Some(DropoutMask { p: 0.0, ..DROPOUT }));
    let dout = Numbers::new(6).floats(200 * PLAIN.heads * PLAIN.value_dim, 1.0);
    every_cpu(|cpu| {
        assert_eq!(zero.dense(Some(cpu)), layer.dense(None));
        assert_eq!(zero.grads(Some(cpu), &dout), layer.grads(None, &dout));
    });
}

/// The tokens of a step, in one batch or in two: the second counts on where the first ended.
#[test]
fn a_sequence_keeps_its_mask_in_any_batch() {
    let lens = [70, 130];
    let latent = AttentionSpec {
        heads: 4,
        kv_heads: 1,
        key_dim: 24,
        value_dim: 20,
        values_in_keys: true,
        ..PLAIN
    };
    for spec in [PLAIN, latent, AttentionSpec { mask: Mask::BIDIRECTIONAL, ..PLAIN }] {
        let both = Layer::new(spec, &lens, 5).dropping(Some(DROPOUT));
        let tail = |x: &[f32]| x[x.len() * lens[0] / 200..].to_vec();
        let first_token = DROPOUT.first_token + lens[0] as u64;
        let second = Layer {
            lens: vec![lens[1]],
            q: tail(&both.q),
            k: tail(&both.k),
            v: tail(&both.v),
            dropout: Some(DropoutMask { first_token, ..DROPOUT }),
            spec,
        };
        let dout = Numbers::new(6).floats(200 * spec.heads * spec.value_dim, 1.0);
        every_cpu(|cpu| {
            let expected = both.dense(Some(cpu));
            for (found, expected) in second.dense(Some(cpu)).iter().zip(&expected) {
                assert_bits(found, &tail(expected), "alone");
            }
            let expected = both.grads(Some(cpu), &dout);
            for (found, expected) in second.grads(Some(cpu), &tail(&dout)).iter().zip(&expected) {
                assert_bits(found, &tail(expected), "gradients alone");
            }
        });
        assert_ne!(both.dense(None), both.clone().dropping(None).dense(None));
    }
}

/// Tokens and keys of the layer below.
const KEYS: usize = 128;
/// Its heads.
const HEADS: usize = 4;

/// Which probabilities are dropped, `[t, h, s]`, read off attention itself: all scores are equal, and
/// each value is a coordinate of its own.
fn dropped(mask: DropoutMask) -> Vec<bool> {
    let spec = AttentionSpec {
        heads: HEADS,
        kv_heads: 1,
        key_dim: 4,
        value_dim: KEYS,
        mask: Mask::BIDIRECTIONAL,
        ..PLAIN
    };
    let mut layer = Layer::new(spec, &[KEYS], 1).dropping(Some(mask));
    layer.q.fill(0.0);
    layer.v.fill(0.0);
    layer.v.iter_mut().step_by(KEYS + 1).for_each(|v| *v = KEYS as f32);
    let cpu = Cpu::new(crate::Isa::best(), 1);
    let shares = layer.dense(Some(&cpu)).swap_remove(0);
    let kept = 1.0 / (1.0 - mask.p);
    assert!(shares.iter().all(|&x| x == 0.0 || (x - kept).abs() < 1e-5), "neither 0 nor {kept}");
    shares.iter().map(|&share| share == 0.0).collect()
}

#[test]
fn masks_have_the_rate_and_are_unrelated() {
    let masks = [
        DROPOUT,
        DropoutMask { seed: 8, ..DROPOUT },
        DropoutMask { step: 12, ..DROPOUT },
        DropoutMask { site: 4, ..DROPOUT },
        DropoutMask { first_token: DROPOUT.first_token + KEYS as u64, ..DROPOUT },
    ]
    .map(dropped);
    let (p, count) = (f64::from(DROPOUT.p), KEYS * HEADS * KEYS);
    // Five standard deviations of a binomial count.
    let limit = |p: f64, count: usize| 5.0 * (p * (1.0 - p) * count as f64).sqrt();
    let excess = |pairs: &mut dyn Iterator<Item = (&bool, &bool)>, what: &str| {
        let (mut both, mut count) = (0.0, 0_u32);
        for (&a, &b) in pairs {
            both += f64::from(u8::from(a && b));
            count += 1;
        }
        let excess: f64 = both - p * p * f64::from(count);
        assert!(excess.abs() < limit(p * p, count as usize), "{what}: {excess} of {count}");
    };
    for (i, mask) in masks.iter().enumerate() {
        assert_eq!(mask.len(), count);
        let share = mask.iter().filter(|&&dropped| dropped).count() as f64;
        assert!((share - p * count as f64).abs() < limit(p, count), "rate of mask {i}: {share}");
        // The next key, the next vector, the next tile, the next head, the next query.
        for distance in [1, 2, 16, 64, KEYS, 2 * KEYS, HEADS * KEYS] {
            let pairs = &mut mask.iter().zip(&mask[distance..]);
            excess(pairs, &format!("mask {i} against itself {distance} on"));
        }
        for (j, other) in masks.iter().enumerate().skip(i + 1) {
            excess(&mut mask.iter().zip(other), &format!("masks {i} and {j}"));
        }
    }
}

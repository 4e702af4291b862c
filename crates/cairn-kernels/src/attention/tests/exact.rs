//! Attention and its gradients against f64, with and without dropout and soft cap.

use super::*;
use crate::testing::assert_close;

/// What f64 gives for one layer: output, log-sum-exp, and the gradients of queries, keys and values.
struct Exact {
    out: Vec<f64>,
    lse: Vec<f64>,
    grads: [Vec<f64>; 3],
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// One causal sequence, query head h reading key/value head h / group.
fn exact(layer: &Layer, dout: &[f32]) -> Exact {
    let AttentionSpec { heads, kv_heads, key_dim, value_dim, softcap, .. } = layer.spec;
    let (scale, t) = (f64::from(layer.spec.scale), layer.tokens());
    let mut exact = Exact {
        out: vec![0.0; t * heads * value_dim],
        lse: vec![0.0; t * heads],
        grads: [&layer.q, &layer.k, &layer.v].map(|x| vec![0.0; x.len()]),
    };
    let [dq, dk, dv] = &mut exact.grads;
    for row in 0..t * heads {
        let (i, g) = (row / heads, row % heads / layer.spec.group());
        let q = &layer.q[row * key_dim..][..key_dim];
        let side = |s: usize, dim: usize| (s * kv_heads + g) * dim..(s * kv_heads + g + 1) * dim;
        // Scores and their slopes.
        let scores: Vec<(f64, f64)> = (0..=i)
            .map(|s| {
                let score = dot(q, &layer.k[side(s, key_dim)]) * scale;
                let Some(cap) = softcap.map(f64::from) else { return (score, scale) };
                let tanh = (score / cap).tanh();
                (cap * tanh, scale * (1.0 - tanh * tanh))
            })
            .collect();
        let sum: f64 = scores.iter().map(|(score, _)| score.exp()).sum();
        exact.lse[row] = sum.ln();
        let keep = |s: usize| match layer.dropout {
            None => 1.0,
            Some(mask) if mask.apply(mask.query_key(row, heads), s, 1.0) == 0.0 => 0.0,
            Some(mask) => 1.0 / (1.0 - f64::from(mask.p)),
        };
        let share = |s: usize| scores[s].0.exp() / sum;
        let out = &mut exact.out[row * value_dim..][..value_dim];
        let dout = &dout[row * value_dim..][..value_dim];
        for s in 0..=i {
            for (out, v) in out.iter_mut().zip(&layer.v[side(s, value_dim)]) {
                *out += share(s) * keep(s) * f64::from(*v);
            }
            for (dv, dout) in dv[side(s, value_dim)].iter_mut().zip(dout) {
                *dv += share(s) * keep(s) * f64::from(*dout);
            }
        }
        let slope = |s: usize| keep(s) * dot(dout, &layer.v[side(s, value_dim)]);
        let mean: f64 = (0..=i).map(|s| share(s) * slope(s)).sum();
        for s in 0..=i {
            let dscore = share(s) * (slope(s) - mean) * scores[s].1;
            let k = &layer.k[side(s, key_dim)];
            for (column, dk) in dk[side(s, key_dim)].iter_mut().enumerate() {
                *dk += dscore * f64::from(q[column]);
                dq[row * key_dim + column] += dscore * f64::from(k[column]);
            }
        }
    }
    exact
}

/// Largest difference, relative to the largest value: sums of some hundred terms of like size.
const TOLERANCE: f64 = 1e-5;

#[test]
fn outputs_and_gradients_are_close_to_f64() {
    let mask = DropoutMask { p: 0.2, seed: 1, step: 2, site: 3, first_token: 4 };
    for dropout in [None, Some(mask)] {
        for softcap in [None, Some(5.0)] {
            let layer = Layer::new(AttentionSpec { softcap, ..PLAIN }, &[200], 7).dropping(dropout);
            let dout = Numbers::new(8).floats(200 * PLAIN.heads * PLAIN.value_dim, 1.0);
            let exact = exact(&layer, &dout);
            let cpu = Cpu::new(crate::Isa::best(), 2);
            let forward = layer.dense(Some(&cpu));
            assert_close("out", &forward[0], &exact.out, TOLERANCE);
            assert_close("lse", &forward[1], &exact.lse, TOLERANCE);
            let grads = layer.grads(Some(&cpu), &dout);
            for ((what, found), expected) in
                ["dq", "dk", "dv"].into_iter().zip(&grads).zip(&exact.grads)
            {
                assert_close(what, found, expected, TOLERANCE);
            }
        }
    }
}

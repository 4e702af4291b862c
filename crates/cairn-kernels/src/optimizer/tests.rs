//! Kernels against references, and AdamW against its formula in f64.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, check_bits};

const STEP: AdamWStep = AdamWStep {
    lr: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
    step: 3,
    grad_scale: 0.7,
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn kernels_equal_references(
        len in 0..200_usize, long: bool, copied: bool, seed: u64,
    ) {
        let len = if long { len + 70_000 } else { len };
        let mut numbers = Numbers::new(seed);
        let (grad, m) = (numbers.floats(len, 1.0), numbers.floats(len, 1.0));
        let v: Vec<f32> = numbers.floats(len, 1.0).iter().map(|x| x * x).collect();
        check_bits("optimizer", |cpu| {
            let (mut w, mut m, mut v) = (m.clone(), m.clone(), v.clone());
            let (mut average, mut copy, mut total) = (v.clone(), vec![0_u16; len], 1.0_f64);
            let norm = SumSquares { x: &grad, total: &mut total };
            let update = AdamW {
                w: &mut w,
                bf16_copy: copied.then_some(&mut copy[..]),
                grad: &grad,
                m: &mut m,
                v: &mut v,
                step: STEP,
            };
            let averaging = Ema { w: &grad, ema: &mut average, decay: 0.9 };
            match cpu {
                Some(cpu) => {
                    sum_squares(cpu, norm);
                    adamw(cpu, update);
                    ema(cpu, averaging);
                }
                None => {
                    sum_squares_reference(norm);
                    adamw_reference(update);
                    ema_reference(averaging);
                }
            }
            let copy = copy.into_iter().map(f32::from).collect();
            let total = [total.to_bits() >> 32, total.to_bits() & 0xffff_ffff];
            let total = total.map(|half| f32::from_bits(u32::try_from(half).unwrap())).to_vec();
            vec![w, m, v, average, copy, total]
        });
    }
}

#[test]
fn adamw_follows_its_formula() {
    let mut numbers = Numbers::new(5);
    let n = 100;
    let mut w = numbers.floats(n, 1.0);
    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
    let mut exact: Vec<[f64; 3]> = w.iter().map(|&w| [f64::from(w), 0.0, 0.0]).collect();
    for step in 1..=20 {
        let grad = numbers.floats(n, 1.0);
        let settings = AdamWStep { step, ..STEP };
        let state =
            AdamW { w: &mut w, bf16_copy: None, grad: &grad, m: &mut m, v: &mut v, step: settings };
        adamw_reference(state);
        let corrections = [STEP.beta1, STEP.beta2].map(|beta| 1.0 - beta.powf(step as f64));
        for ([w, m, v], grad) in exact.iter_mut().zip(grad) {
            let g = f64::from(grad) * f64::from(STEP.grad_scale);
            *w *= 1.0 - STEP.lr * STEP.weight_decay;
            *m = STEP.beta1 * *m + (1.0 - STEP.beta1) * g;
            *v = STEP.beta2 * *v + (1.0 - STEP.beta2) * g * g;
            let denominator = v.sqrt() / corrections[1].sqrt() + STEP.eps;
            *w -= STEP.lr / corrections[0] * *m / denominator;
        }
    }
    for (w, exact) in w.iter().zip(&exact) {
        // Twenty updates of at most 1e-3, each rounded a few times at |w| ≤ 1.
        assert!((f64::from(*w) - exact[0]).abs() < 2e-6, "{w} {exact:?}");
    }
}

#[test]
fn sum_of_squares_is_accurate_and_adds_up() {
    let mut numbers = Numbers::new(6);
    let x = numbers.floats(300_000, 1.0);
    let exact: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let mut total = 0.0;
    sum_squares_reference(SumSquares { x: &x, total: &mut total });
    sum_squares_reference(SumSquares { x: &x, total: &mut total });
    assert!((total / exact / 2.0 - 1.0).abs() < 1e-6, "{total} {exact}");
}

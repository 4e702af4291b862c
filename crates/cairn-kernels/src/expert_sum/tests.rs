//! Kernels against references, gradients against slopes.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, check_bits, check_slope, functional};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn kernels_equal_references(
        t in 0..40_usize, a in 1..9_usize, d in 1..60_usize, weighted: bool, wide: bool, seed: u64,
    ) {
        let d = if wide { d * 40 } else { d };
        let mut numbers = Numbers::new(seed);
        let (y, dout) = (numbers.floats(t * a * d, 1.0), numbers.floats(t * d, 1.0));
        let weights = numbers.floats(t * a, 1.0);
        let weights_ta = weighted.then_some(&weights[..]);
        check_bits("expert_sum", |cpu| {
            let mut out = vec![9.0; t * d];
            let (mut dy, mut dweights) = (vec![9.0; t * a * d], vec![9.0; t * a]);
            let sum = ExpertSum { y_tad: &y, weights_ta, top_k: a, d, out_td: &mut out };
            let grad = ExpertSumGrad {
                dout_td: &dout,
                y_tad: weighted.then_some(&y[..]),
                weights_ta,
                top_k: a,
                d,
                dy_tad: Some(&mut dy),
                dweights_ta: weighted.then_some(&mut dweights[..]),
            };
            match cpu {
                Some(cpu) => {
                    expert_sum(cpu, sum);
                    expert_sum_grad(cpu, grad);
                }
                None => {
                    expert_sum_reference(sum);
                    expert_sum_grad_reference(grad);
                }
            }
            vec![out, dy, dweights]
        });
    }
}

#[test]
fn gradients_are_slopes() {
    let (t, a, d) = (3, 2, 5);
    let mut numbers = Numbers::new(2);
    let (y, weights) = (numbers.floats(t * a * d, 1.0), numbers.floats(t * a, 1.0));
    let dout = numbers.floats(t * d, 1.0);
    let sum = |y_tad: &[f32], weights: &[f32]| {
        let mut out_td = vec![0.0; t * d];
        let weights_ta = Some(weights);
        expert_sum_reference(ExpertSum { y_tad, weights_ta, top_k: a, d, out_td: &mut out_td });
        functional(&out_td, &dout)
    };
    let (mut dy, mut dweights) = (vec![0.0; t * a * d], vec![0.0; t * a]);
    expert_sum_grad_reference(ExpertSumGrad {
        dout_td: &dout,
        y_tad: Some(&y),
        weights_ta: Some(&weights),
        top_k: a,
        d,
        dy_tad: Some(&mut dy),
        dweights_ta: Some(&mut dweights),
    });
    check_slope("dy", &y, &dy, 1e-2, 1e-4, |y| sum(y, &weights));
    check_slope("dweights", &weights, &dweights, 1e-2, 1e-4, |weights| sum(&y, weights));
}

//! Kernels against references, and slopes against differences.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, check_bits, check_slope, functional};

const ACTS: [Act; 8] = [
    Act::Silu,
    Act::Gelu,
    Act::GeluTanh,
    Act::Relu,
    Act::ReluSquared,
    Act::QuickGelu,
    Act::Tanh,
    Act::Sigmoid,
];

fn run(cpu: Option<&Cpu>, act: Act, [x, up, dy]: [&[f32]; 3]) -> Vec<Vec<f32>> {
    let mut out: Vec<Vec<f32>> = vec![vec![0.0; x.len()]; 5];
    let [y, dx, gated, dgate, dup] = out.get_disjoint_mut([0, 1, 2, 3, 4]).unwrap();
    let value = Activation { x, act, y };
    let grad = ActivationGrad { dy, x, act, dx };
    let pair = Glu { gate_nf: x, up_nf: up, act, y_nf: gated };
    let pair_grad = GluGrad { dy_nf: dy, gate_nf: x, up_nf: up, act, dgate_nf: dgate, dup_nf: dup };
    match cpu {
        Some(cpu) => {
            activation(cpu, value);
            activation_grad(cpu, grad);
            glu(cpu, pair);
            glu_grad(cpu, pair_grad);
        }
        None => {
            activation_reference(value);
            activation_grad_reference(grad);
            glu_reference(pair);
            glu_grad_reference(pair_grad);
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn kernels_equal_references(len in 0..200_usize, long: bool, seed: u64) {
        let len = if long { len + 40_000 } else { len };
        let mut numbers = Numbers::new(seed);
        let [x, up, dy] = [0, 1, 2].map(|_| numbers.floats(len, 12.0));
        for act in ACTS {
            check_bits(&format!("{act:?}"), |cpu| run(cpu, act, [&x, &up, &dy]));
        }
    }
}

#[test]
fn gradients_are_slopes() {
    let mut numbers = Numbers::new(1);
    let [x, up, dy] = [0, 1, 2].map(|_| numbers.floats(64, 3.0));
    for act in ACTS {
        let out = run(None, act, [&x, &up, &dy]);
        let output = |which: usize, x: &[f32], up: &[f32]| {
            functional(&run(None, act, [x, up, &dy])[which], &dy)
        };
        let check = |what: &str, at: &[f32], gradient: &[f32], loss: &dyn Fn(&[f32]) -> f64| {
            check_slope(&format!("{act:?} {what}"), at, gradient, 4e-3, 2e-3, loss);
        };
        check("dx", &x, &out[1], &|x| output(0, x, &up));
        check("dgate", &x, &out[3], &|x| output(2, x, &up));
        check("dup", &up, &out[4], &|up| output(2, &x, up));
    }
}

#[test]
fn values_are_the_textbook_ones() {
    // torch.nn.functional, float64: silu, gelu, gelu(approximate="tanh"), relu² and tanh.
    let cases = [
        (Act::Silu, -1.5_f32, -0.273_638_24_f64),
        (Act::Gelu, -1.5, -0.100_210_804),
        (Act::GeluTanh, -1.5, -0.100_428_38),
        (Act::Gelu, 0.7, 0.530_625_4),
        (Act::ReluSquared, 1.5, 2.25),
        (Act::QuickGelu, 1.0, 0.845_795_77),
    ];
    for (act, x, expected) in cases {
        let y = f64::from(act.value(x));
        assert!((y - expected).abs() < 3e-7, "{act:?}({x}) = {y}, expected {expected}");
    }
}

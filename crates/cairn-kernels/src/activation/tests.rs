//! Kernels against references, and slopes against differences.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, assert_close, check_bits, check_slope, functional};

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

/// Φ by Simpson's rule on 1,000 pieces, exact to 1e-12 here.
fn normal_distribution(x: f64) -> f64 {
    let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let (pieces, step) = (1000, x / 1000.0);
    let inner: f64 = (1..pieces)
        .map(|i| density(f64::from(i) * step) * if i % 2 == 1 { 4.0 } else { 2.0 })
        .sum();
    0.5 + (density(0.0) + inner + density(x)) * step / 3.0
}

/// Value in f64.
fn exact(act: Act, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match act {
        Act::Silu => x * sigmoid(x),
        Act::Gelu => x * normal_distribution(x),
        Act::GeluTanh => {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            x / 2.0 * (1.0 + (root * (x + 0.044_715 * x.powi(3))).tanh())
        }
        Act::Relu => x.max(0.0),
        Act::ReluSquared => x.max(0.0).powi(2),
        Act::QuickGelu => x * sigmoid(1.702 * x),
        Act::Tanh => x.tanh(),
        Act::Sigmoid => sigmoid(x),
    }
}

#[test]
fn values_and_gradients_are_close_to_f64() {
    let mut numbers = Numbers::new(8);
    let [x, up, dy] = [0, 1, 2].map(|_| numbers.floats(101, 6.0));
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let (wide_x, wide_up, wide_dy) = (wide(&x), wide(&up), wide(&dy));
    for act in ACTS {
        let out = run(Some(&Cpu::detect(1)), act, [&x, &up, &dy]);
        let value: Vec<f64> = wide_x.iter().map(|&x| exact(act, x)).collect();
        // A central difference of the fourth order: of f64 values it is exact to 1e-10.
        let step = 1e-3;
        let slope: Vec<f64> = wide_x
            .iter()
            .map(|&x| {
                let near = exact(act, x + step) - exact(act, x - step);
                let far = exact(act, x + 2.0 * step) - exact(act, x - 2.0 * step);
                (8.0 * near - far) / (12.0 * step)
            })
            .collect();
        let times =
            |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a * b).collect() };
        let upstream = times(&wide_dy, &wide_up);
        let expected = [
            value.clone(),
            times(&wide_dy, &slope),
            times(&value, &wide_up),
            times(&upstream, &slope),
            times(&wide_dy, &value),
        ];
        let names = ["y", "dx", "gated", "dgate", "dup"];
        for ((name, found), exact) in names.into_iter().zip(&out).zip(&expected) {
            assert_close(&format!("{act:?} {name}"), found, exact, 1e-6);
        }
    }
}

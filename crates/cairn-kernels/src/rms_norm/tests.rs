//! Kernels against references, slopes against differences, and the error against f64.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, assert_close, check_bits, check_slope, functional};

#[derive(Clone, Copy)]
struct Case<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    weight: &'a [f32],
    plus_one: bool,
    rows_per_token: usize,
    row_tokens: usize,
}

const EPS: f32 = 1e-5;

fn run(cpu: Option<&Cpu>, case: Case<'_>) -> Vec<Vec<f32>> {
    let Case { x, dy, weight, plus_one, rows_per_token, row_tokens } = case;
    let mut y = vec![0.0; x.len()];
    let forward = RmsNorm { x_nd: x, weight_d: weight, eps: EPS, plus_one, y_nd: &mut y };
    match cpu {
        Some(cpu) => rms_norm(cpu, forward),
        None => rms_norm_reference(forward),
    }
    let mut out = vec![y];
    for (accumulate, frozen) in [(false, false), (true, false), (true, true)] {
        let (mut dx, mut dw) = (dy.to_vec(), weight.to_vec());
        let grad = RmsNormGrad {
            dy_nd: dy,
            x_nd: x,
            weight_d: weight,
            eps: EPS,
            plus_one,
            dx_nd: &mut dx,
            accumulate_dx: accumulate,
            dw_d: (!frozen).then_some(&mut dw),
            rows_per_token,
            row_tokens,
            accumulate_dw: accumulate,
        };
        match cpu {
            Some(cpu) => rms_norm_grad(cpu, grad),
            None => rms_norm_grad_reference(grad),
        }
        out.extend([dx, dw]);
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn kernels_equal_references(
        tokens in 0..700_usize, d in 1..70_usize, rows_per_token in 1..4_usize,
        row_tokens in 1..600_usize, plus_one: bool, seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let len = tokens * rows_per_token * d;
        let (x, dy) = (numbers.floats(len, 2.0), numbers.floats(len, 1.0));
        let weight = numbers.floats(d, 1.0);
        let case = Case { x: &x, dy: &dy, weight: &weight, plus_one, rows_per_token, row_tokens };
        check_bits("rms_norm", |cpu| run(cpu, case));
    }
}

#[test]
fn gradients_are_slopes() {
    let mut numbers = Numbers::new(2);
    let (n, d) = (5, 19);
    let (x, dy) = (numbers.floats(n * d, 2.0), numbers.floats(n * d, 1.0));
    let weight = numbers.floats(d, 1.0);
    for plus_one in [false, true] {
        let case =
            Case { x: &x, dy: &dy, weight: &weight, plus_one, rows_per_token: 1, row_tokens: 3 };
        let out = run(None, case);
        let (dx, dw) = (&out[1], &out[2]);
        check_slope("dx", &x, dx, 4e-3, 1e-3, |x| {
            functional(&run(None, Case { x, ..case })[0], &dy)
        });
        check_slope("dw", &weight, dw, 4e-3, 1e-3, |weight| {
            functional(&run(None, Case { weight, ..case })[0], &dy)
        });
    }
}

#[test]
fn rows_are_close_to_f64() {
    let mut numbers = Numbers::new(4);
    let d = 4096;
    let (x, weight) = (numbers.floats(d, 3.0), numbers.floats(d, 1.0));
    let mut y = vec![0.0; d];
    let args = RmsNorm { x_nd: &x, weight_d: &weight, eps: EPS, plus_one: false, y_nd: &mut y };
    rms_norm_reference(args);
    let square = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / d as f64;
    let r = 1.0 / (square + f64::from(EPS)).sqrt();
    for i in 0..d {
        let exact = f64::from(x[i]) * r * f64::from(weight[i]);
        // Two products and the shared r, whose sum of 4096 squares errs below 1e-6 relative.
        assert!((f64::from(y[i]) - exact).abs() <= 1e-6 * exact.abs(), "{} {exact}", y[i]);
    }
}

/// Sums of 300 tokens or 70 columns; an error of some units in the last place of the largest.
const TOLERANCE: f64 = 4e-6;

#[test]
fn gradients_are_close_to_f64() {
    let mut numbers = Numbers::new(6);
    let (n, d) = (300, 70);
    let (x, dy) = (numbers.floats(n * d, 2.0), numbers.floats(n * d, 1.0));
    let weight = numbers.floats(d, 1.0);
    let (rows_per_token, row_tokens) = (1, 300);
    for plus_one in [false, true] {
        let case = Case { x: &x, dy: &dy, weight: &weight, plus_one, rows_per_token, row_tokens };
        let out = run(Some(&Cpu::detect(2)), case);
        let weight = |i: usize| f64::from(weight[i]) + f64::from(u8::from(plus_one));
        let (mut dx, mut dw) = (Vec::new(), vec![0.0; d]);
        for (x, dy) in x.chunks(d).zip(dy.chunks(d)) {
            let [x, dy] = [x, dy].map(|row| row.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
            let square = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
            let r = 1.0 / (square + f64::from(EPS)).sqrt();
            let along: f64 = (0..d).map(|i| weight(i) * dy[i] * x[i]).sum::<f64>() / d as f64;
            dx.extend((0..d).map(|i| r * (weight(i) * dy[i] - x[i] * r * r * along)));
            dw.iter_mut().enumerate().for_each(|(i, dw)| *dw += dy[i] * x[i] * r);
        }
        assert_close("dx", &out[1], &dx, TOLERANCE);
        assert_close("dw", &out[2], &dw, TOLERANCE);
    }
}

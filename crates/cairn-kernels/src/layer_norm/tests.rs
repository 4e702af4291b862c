//! Kernels against references, slopes against differences, and the error against f64.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, assert_close, check_bits, check_slope, functional};

#[derive(Clone, Copy)]
struct Case<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    rows_per_token: usize,
    row_tokens: usize,
}

const EPS: f32 = 1e-5;

fn run(cpu: Option<&Cpu>, case: Case<'_>) -> Vec<Vec<f32>> {
    let Case { x, dy, weight, bias, rows_per_token, row_tokens } = case;
    let mut y = vec![0.0; x.len()];
    let forward = LayerNorm { x_nd: x, weight_d: weight, bias_d: bias, eps: EPS, y_nd: &mut y };
    match cpu {
        Some(cpu) => layer_norm(cpu, forward),
        None => layer_norm_reference(forward),
    }
    let mut out = vec![y];
    for (accumulate, trained) in [(false, [true, true]), (true, [true, false]), (true, [false; 2])]
    {
        let (mut dx, mut dw, mut db) = (dy.to_vec(), weight.to_vec(), weight.to_vec());
        let grad = LayerNormGrad {
            dy_nd: dy,
            x_nd: x,
            weight_d: weight,
            eps: EPS,
            dx_nd: &mut dx,
            accumulate_dx: accumulate,
            dw_d: trained[0].then_some(&mut dw),
            db_d: trained[1].then_some(&mut db),
            rows_per_token,
            row_tokens,
            accumulate_dw: accumulate,
        };
        match cpu {
            Some(cpu) => layer_norm_grad(cpu, grad),
            None => layer_norm_grad_reference(grad),
        }
        out.extend([dx, dw, db]);
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn kernels_equal_references(
        tokens in 0..700_usize, d in 1..70_usize, rows_per_token in 1..4_usize,
        row_tokens in 1..600_usize, with_bias: bool, seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let len = tokens * rows_per_token * d;
        let (x, dy) = (numbers.floats(len, 2.0), numbers.floats(len, 1.0));
        let (weight, bias) = (numbers.floats(d, 1.0), numbers.floats(d, 1.0));
        let bias = with_bias.then_some(&bias[..]);
        let case = Case { x: &x, dy: &dy, weight: &weight, bias, rows_per_token, row_tokens };
        check_bits("layer_norm", |cpu| run(cpu, case));
    }
}

#[test]
fn gradients_are_slopes() {
    let mut numbers = Numbers::new(2);
    let (n, d) = (5, 19);
    let (x, dy) = (numbers.floats(n * d, 2.0), numbers.floats(n * d, 1.0));
    let (weight, bias) = (numbers.floats(d, 1.0), numbers.floats(d, 1.0));
    let case = Case {
        x: &x,
        dy: &dy,
        weight: &weight,
        bias: Some(&bias),
        rows_per_token: 1,
        row_tokens: 3,
    };
    let out = run(None, case);
    let loss = |case: Case<'_>| functional(&run(None, case)[0], &dy);
    check_slope("dx", &x, &out[1], 4e-3, 1e-3, |x| loss(Case { x, ..case }));
    check_slope("dw", &weight, &out[2], 4e-3, 1e-3, |weight| loss(Case { weight, ..case }));
    check_slope("db", &bias, &out[3], 4e-3, 1e-3, |bias| loss(Case { bias: Some(bias), ..case }));
}

#[test]
fn rows_are_close_to_f64() {
    let mut numbers = Numbers::new(4);
    let d = 4096;
    let x: Vec<f32> = numbers.floats(d, 3.0).iter().map(|x| x + 10.0).collect();
    let (weight, bias) = (numbers.floats(d, 1.0), numbers.floats(d, 1.0));
    let mut y = vec![0.0; d];
    let args =
        LayerNorm { x_nd: &x, weight_d: &weight, bias_d: Some(&bias), eps: EPS, y_nd: &mut y };
    layer_norm_reference(args);
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / d as f64;
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / d as f64;
    for i in 0..d {
        let normal = (f64::from(x[i]) - mean) / (variance + f64::from(EPS)).sqrt();
        let exact = normal * f64::from(weight[i]) + f64::from(bias[i]);
        // Half an ulp of x near 13 is 5e-7, over a deviation of √3; the mean errs as much.
        assert!((f64::from(y[i]) - exact).abs() <= 2e-6, "{} {exact}", y[i]);
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
    let (bias, rows_per_token, row_tokens) = (None, 1, 300);
    let case = Case { x: &x, dy: &dy, weight: &weight, bias, rows_per_token, row_tokens };
    let out = run(Some(&Cpu::detect(2)), case);
    let (mut dx, mut dw, mut db) = (Vec::new(), vec![0.0; d], vec![0.0; d]);
    for (x, dy) in x.chunks(d).zip(dy.chunks(d)) {
        let [x, dy] = [x, dy].map(|row| row.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
        let mean = x.iter().sum::<f64>() / d as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
        let r = 1.0 / (variance + f64::from(EPS)).sqrt();
        let normal: Vec<f64> = x.iter().map(|x| (x - mean) * r).collect();
        let slope: Vec<f64> = (0..d).map(|i| f64::from(weight[i]) * dy[i]).collect();
        let level = slope.iter().sum::<f64>() / d as f64;
        let along = slope.iter().zip(&normal).map(|(s, n)| s * n).sum::<f64>() / d as f64;
        dx.extend((0..d).map(|i| r * (slope[i] - level - normal[i] * along)));
        for i in 0..d {
            dw[i] += dy[i] * normal[i];
            db[i] += dy[i];
        }
    }
    assert_close("dx", &out[1], &dx, TOLERANCE);
    assert_close("dw", &out[2], &dw, TOLERANCE);
    assert_close("db", &out[3], &db, TOLERANCE);
}

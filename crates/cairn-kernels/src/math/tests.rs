//! Errors in units in the last place against f64, special values, and vector = scalar.

use super::*;

/// The largest error of `f` in ulps of the exact result, over `xs`.
fn worst_ulp(
    xs: impl Iterator<Item = f32>,
    f: impl Fn(f32) -> f32,
    exact: impl Fn(f64) -> f64,
) -> f64 {
    let mut worst = 0.0_f64;
    for x in xs {
        let truth = exact(f64::from(x));
        let ulp = ulp_of(truth);
        worst = worst.max((f64::from(f(x)) - truth).abs() / ulp);
    }
    worst
}

/// The distance between floats around `x`, of normal numbers.
fn ulp_of(x: f64) -> f64 {
    let exponent = x.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor();
    (exponent - 23.0).exp2()
}

/// Every `stride`-th float between two of the same sign.
fn floats(from: f32, to: f32, stride: usize) -> impl Iterator<Item = f32> {
    let (a, b) = (from.to_bits(), to.to_bits());
    (a.min(b)..=a.max(b)).step_by(stride).map(f32::from_bits)
}

/// The error function in f64, by its series and its continued fraction.
fn erf_f64(x: f64) -> f64 {
    let t = x.abs();
    let y = if t < 2.5 {
        let (mut term, mut sum) = (t, t);
        for n in 1..80 {
            let n = f64::from(n);
            term *= -t * t / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let mut fraction = t;
        for n in (1..120).rev() {
            fraction = t + f64::from(n) / 2.0 / fraction;
        }
        1.0 - (-t * t).exp() / fraction / std::f64::consts::PI.sqrt()
    };
    y.copysign(x)
}

#[test]
fn errors_are_the_stated_ones() {
    let both = |a: f32, b: f32| floats(a, b, 9973).chain(floats(-a, -b, 9973));
    let stated = [
        ("exp", 1.0, worst_ulp(both(1e-9, 86.9), exp, f64::exp)),
        ("ln", 1.0, worst_ulp(floats(1e-38, 3e38, 9973), ln, f64::ln)),
        ("sigmoid", 2.5, worst_ulp(both(1e-9, 80.0), sigmoid, |x| 1.0 / (1.0 + (-x).exp()))),
        ("tanh", 2.0, worst_ulp(both(1e-9, 20.0), tanh, f64::tanh)),
        ("erf", 2.0, worst_ulp(both(1e-9, 8.0), erf, erf_f64)),
        ("sin", 2.0, worst_ulp(both(1e-9, 4_194_303.0), |x| sin_cos(x).0, f64::sin)),
        ("cos", 2.0, worst_ulp(both(1e-9, 4_194_303.0), |x| sin_cos(x).1, f64::cos)),
    ];
    for (name, bound, worst) in stated {
        assert!(worst <= bound, "{name}: {worst} ulp, stated {bound}");
    }
}

#[test]
fn special_values() {
    assert_eq!(exp(0.0_f32).to_bits(), 1.0_f32.to_bits());
    assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0.0_f32.to_bits());
    assert_eq!(exp(f32::INFINITY).to_bits(), f32::INFINITY.to_bits());
    assert_eq!((exp(-100.0_f32), exp(100.0_f32)), (0.0, f32::INFINITY));
    assert_eq!((tanh(f32::INFINITY), tanh(-50.0_f32)), (1.0, -1.0));
    assert_eq!((erf(f32::INFINITY), erf(-5.0_f32)), (1.0, -1.0));
    assert_eq!((sigmoid(200.0_f32), sigmoid(-200.0_f32)), (1.0, 0.0));
    assert_eq!((ln(1.0), ln(0.0), ln(f32::INFINITY)), (0.0, f32::NEG_INFINITY, f32::INFINITY));
    for payload in [f32::NAN, f32::from_bits(0x7fc0_0001), f32::from_bits(0xffff_ffff)] {
        for y in [exp(payload), tanh(payload), erf(payload), sigmoid(payload), ln(payload)] {
            assert!(y.is_nan(), "{:x}", payload.to_bits());
        }
    }
    assert_eq!(sin_cos(0.0_f32), (0.0, 1.0));
}

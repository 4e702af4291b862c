//! Kernels against references.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, assert_close, check_bits, check_slope, functional};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn kernels_equal_references(len in 0..200_usize, long: bool, seed: u64) {
        let len = if long { len + 40_000 } else { len };
        let mut numbers = Numbers::new(seed);
        let [a, b] = [0, 1].map(|_| numbers.floats(len, 60.0));
        check_bits("pointwise", |cpu| {
            let mut out: Vec<Vec<f32>> = vec![b.clone(); 7];
            let [sum, total, scaled, scaled_here, capped, slope, filled] =
                out.get_disjoint_mut([0, 1, 2, 3, 4, 5, 6]).unwrap();
            let add_args = Add { a: &a, b: &b, y: sum };
            let add_assign_args = AddAssign { x: &a, y: total };
            let scale_args = Scale { x: &a, factor: 0.3, y: scaled };
            let scale_assign_args = ScaleAssign { factor: 0.3, y: scaled_here };
            let softcap_args = Softcap { x: &a, cap: 30.0, y: capped };
            let softcap_grad_args = SoftcapGrad { dy: &a, y: &b, cap: 30.0, dx: slope };
            let fill_args = Fill { value: 2.5, y: filled };
            match cpu {
                Some(cpu) => {
                    add(cpu, add_args);
                    add_assign(cpu, add_assign_args);
                    scale(cpu, scale_args);
                    scale_assign(cpu, scale_assign_args);
                    softcap(cpu, softcap_args);
                    softcap_grad(cpu, softcap_grad_args);
                    fill(cpu, fill_args);
                }
                None => {
                    add_reference(add_args);
                    add_assign_reference(add_assign_args);
                    scale_reference(scale_args);
                    scale_assign_reference(scale_assign_args);
                    softcap_reference(softcap_args);
                    softcap_grad_reference(softcap_grad_args);
                    fill_reference(fill_args);
                }
            }
            out
        });
    }
}

#[test]
fn softcap_bounds_and_its_gradient_is_its_slope() {
    let mut numbers = Numbers::new(3);
    let (x, dy) = (numbers.floats(40, 4.0), numbers.floats(40, 1.0));
    let forward = |x: &[f32]| {
        let mut y = vec![0.0; x.len()];
        softcap_reference(Softcap { x, cap: 2.0, y: &mut y });
        y
    };
    let y = forward(&x);
    assert!(y.iter().all(|y| y.abs() < 2.0));
    let mut dx = vec![0.0; x.len()];
    softcap_grad_reference(SoftcapGrad { dy: &dy, y: &y, cap: 2.0, dx: &mut dx });
    check_slope("softcap", &x, &dx, 4e-3, 1e-3, |x| functional(&forward(x), &dy));
}

#[test]
fn softcaps_are_close_to_f64() {
    let mut numbers = Numbers::new(4);
    let (x, dy) = (numbers.floats(101, 9.0), numbers.floats(101, 1.0));
    let (mut y, mut dx) = (vec![0.0; 101], vec![0.0; 101]);
    let cpu = Cpu::detect(1);
    softcap(&cpu, Softcap { x: &x, cap: 3.0, y: &mut y });
    softcap_grad(&cpu, SoftcapGrad { dy: &dy, y: &y, cap: 3.0, dx: &mut dx });
    let tanh: Vec<f64> = x.iter().map(|&x| (f64::from(x) / 3.0).tanh()).collect();
    let exact: Vec<f64> = tanh.iter().map(|tanh| 3.0 * tanh).collect();
    assert_close("softcap", &y, &exact, 4e-7);
    let exact: Vec<f64> =
        tanh.iter().zip(&dy).map(|(tanh, &dy)| f64::from(dy) * (1.0 - tanh * tanh)).collect();
    assert_close("softcap_grad", &dx, &exact, 1e-6);
}

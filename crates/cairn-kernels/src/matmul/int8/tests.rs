//! Products of bytes, with the instruction and without, against their definition and against f64.

use proptest::prelude::*;

use super::*;
use crate::compute::Compute;
use crate::encoding::Layout;
use crate::isa::Isa;
use crate::matmul::tests::{Stored, any_size, bits, check_on, cpus, values};
use crate::matmul::{matmul, matmul_reference};

/// Every instruction set with one and two threads, and the widest without its instruction for bytes.
fn byte_cpus() -> Vec<Cpu> {
    let without = [1, 2].map(|threads| Cpu::new(Isa::best(), threads).without_byte_instruction());
    cpus().into_iter().chain(without).collect()
}

/// Activations of groups as unlike as they can be: outliers, nothing, next to nothing.
fn activations(len: usize, seed: u32) -> Vec<f32> {
    let mut x = values(len, seed);
    for (i, x) in x.iter_mut().enumerate() {
        match i / 32 % 7 {
            1 => *x *= 1e30,
            2 => *x *= 1e-35,
            3 => *x = 0.0,
            4 if i % 32 == 5 => *x *= 300.0,
            _ => {}
        }
    }
    x
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn int8_products_are_the_reference(
        encoding in prop::sample::select(&[Encoding::Q8, Encoding::Q4][..]),
        (t, n, k) in (any_size(60), any_size(90), any_size(700)),
        (start, unlike) in (0..3, any::<bool>()),
        seed in 1..1000_u32,
    ) {
        let stored = Stored::new(encoding, Layout::Panel, n, k, seed);
        let x_tk = if unlike { activations(t * k, seed + 1) } else { values(t * k, seed + 1) };
        let bias = values(n, seed + 2);
        let (accumulate, bias_n) = (start == 1, (start == 2).then_some(&bias[..]));
        check_on(byte_cpus(), &values(t * n, seed + 3), |cpu, y_tn| {
            let (x_tk, weight, compute) = (&x_tk[..], stored.weight(), Compute::Int8);
            let args = Matmul { x_tk, weight, bias_n, y_tn, t, accumulate, compute };
            match cpu {
                None => matmul_reference(args),
                Some(cpu) => matmul(cpu, args),
            }
        });
    }
}

fn product(cpu: &Cpu, stored: &Stored, (x_tk, t): (&[f32], usize), n: usize) -> Vec<f32> {
    let (weight, compute, accumulate) = (stored.weight(), Compute::Int8, false);
    let mut y = vec![0.0; t * n];
    let y_tn = &mut y[..];
    matmul(cpu, Matmul { x_tk, weight, bias_n: None, y_tn, t, accumulate, compute });
    y
}

/// A row is the same alone, among a few and in a batch of more than is packed at once.
#[test]
fn a_row_of_an_int8_product_depends_on_itself_alone() {
    let (t, n, k) = (500, 272, 1900);
    let x_tk = values(t * k, 5);
    for encoding in [Encoding::Q8, Encoding::Q4] {
        let stored = Stored::new(encoding, Layout::Panel, n, k, 4);
        let all = bits(&product(&Cpu::detect(2), &stored, (&x_tk, t), n));
        for cpu in byte_cpus().iter().filter(|cpu| cpu.isa() == Isa::best()) {
            for rows in [0..1, 3..5, 490..500, 100..300] {
                let part = &x_tk[rows.start * k..rows.end * k];
                let found = bits(&product(cpu, &stored, (part, rows.len()), n));
                assert_eq!(found, all[rows.start * n..rows.end * n], "{encoding} {rows:?}");
            }
        }
    }
}

/// Rounding an activation costs half a step of its group, and each step of the chain 2⁻²⁴ of what it adds up,
/// the product of the scales included.
#[test]
fn error_of_an_int8_product_is_bounded() {
    let (t, n, k) = (5, 33, 700);
    let x_tk = values(t * k, 12);
    for encoding in [Encoding::Q8, Encoding::Q4] {
        let stored = Stored::new(encoding, Layout::Panel, n, k, 11);
        let weight = stored.weight();
        let y = product(&Cpu::detect(2), &stored, (&x_tk, t), n);
        for (index, &found) in y.iter().enumerate() {
            let x = &x_tk[index / n * k..][..k];
            let (mut sum, mut magnitude, mut bound) = (0.0, 0.0, 0.0);
            for (group, x) in x.chunks(GROUP).enumerate() {
                let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
                for (i, &x) in x.iter().enumerate() {
                    let w = f64::from(weight.value(index % n, group * GROUP + i));
                    sum += f64::from(x) * w;
                    magnitude += f64::from(x).abs() * w.abs();
                    bound += f64::from(largest) / 254.0 * (1.0 + 1e-5) * w.abs();
                }
            }
            bound += (k.div_ceil(GROUP) + 3) as f64 * 2.0_f64.powi(-24) * (magnitude + bound);
            let error = (f64::from(found) - sum).abs();
            assert!(error <= bound && error > 0.0, "{encoding}: {error} > {bound}");
        }
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let (n, k) = (20, 100);
    let stored = Stored::new(Encoding::Q8, Layout::Panel, n, k, 4);
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 17, 40, 99] {
            let mut x = values(2 * k, 5);
            x[k + at] = poison;
            for cpu in byte_cpus() {
                let y = product(&cpu, &stored, (&x, 2), n);
                assert!(y[..n].iter().all(|y| y.is_finite()) && y[n..].iter().all(|y| y.is_nan()));
            }
        }
    }
}

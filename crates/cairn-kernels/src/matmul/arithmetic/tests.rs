//! bf16 products, with the instruction and without, against their definition bit for bit.

use proptest::prelude::*;

use super::*;
use crate::cpu::Cpu;
use crate::encoding::{Encoding, Layout};
use crate::isa::Isa;
use crate::matmul::tests::{Stored, any_size, bits, check_on, cpus, values};
use crate::matmul::{
    ExpertMatmul, Matmul, expert_matmul, expert_matmul_reference, expert_scratch_len, matmul,
    matmul_reference,
};
use crate::testing::Numbers;

/// Every instruction set with one and two threads, and the widest without its bf16 instruction.
fn bf16_cpus() -> Vec<Cpu> {
    let without = [1, 2].map(|threads| Cpu::new(Isa::best(), threads).without_bf16_instruction());
    cpus().into_iter().chain(without).collect()
}

/// What operands look like.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Ordinary,
    /// Products around the smallest normal number.
    Tiny,
    /// Products of ordinary size, in which now and then something is subnormal, infinite or no number.
    Sprinkled,
    /// Magnitudes from end to end.
    Wide,
}

fn operands(kind: Kind, len: usize, seed: u32) -> Vec<f32> {
    let mut numbers = Numbers::new(u64::from(seed));
    let mut wide = |lowest: u32, count: usize| {
        let bits = u32::try_from(numbers.bits() >> 32).unwrap();
        let exponent = lowest + u32::try_from(numbers.below(count)).unwrap();
        f32::from_bits(bits & 0x807f_ffff | exponent << 23)
    };
    let plain = values(len, seed);
    let mut sprinkled = Numbers::new(u64::from(seed) + 1);
    let one = |i: usize| match kind {
        Kind::Ordinary => plain[i],
        Kind::Tiny => wide(58, 8),
        Kind::Wide => wide(0, 255),
        Kind::Sprinkled => match sprinkled.below(200) {
            0 => f32::INFINITY,
            1 => f32::from_bits(0xffa1_2345),
            2 => f32::from_bits(0x0071_0000),
            3 => f32::from_bits(0x807f_ffff),
            4 => -f32::MAX,
            _ => plain[i],
        },
    };
    (0..len).map(one).collect()
}

/// Every way a weight of bf16 values is stored.
const FORMS: [(Encoding, Layout); 3] = [
    (Encoding::Bf16, Layout::RowMajor),
    (Encoding::Bf16, Layout::Panel),
    (Encoding::Bf16z, Layout::Panel),
];

/// The form, or one that holds as many exponents as there are.
fn form_for(kind: Kind, (encoding, layout): (Encoding, Layout)) -> (Encoding, Layout) {
    match kind {
        Kind::Wide => (Encoding::Bf16, layout),
        Kind::Ordinary | Kind::Tiny | Kind::Sprinkled => (encoding, layout),
    }
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(&[Kind::Ordinary, Kind::Tiny, Kind::Sprinkled, Kind::Wide][..])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn bf16_products_are_the_reference(
        form in prop::sample::select(&FORMS[..]),
        (t, n, k) in (any_size(60), any_size(90), any_size(1700)),
        (kind, start) in (any_kind(), 0..3),
        seed in 1..1000_u32,
    ) {
        let weight = operands(kind, n * k, seed);
        let stored = Stored::of(form_for(kind, form), (n, k), &weight);
        let (x_tk, bias) = (operands(kind, t * k, seed + 1), operands(kind, n, seed + 2));
        let (accumulate, bias_n) = (start == 1, (start == 2).then_some(&bias[..]));
        check_on(bf16_cpus(), &operands(kind, t * n, seed + 3), |cpu, y_tn| {
            let (x_tk, weight, compute) = (&x_tk[..], stored.weight(), Compute::Bf16);
            let args = Matmul { x_tk, weight, bias_n, y_tn, t, accumulate, compute };
            match cpu {
                None => matmul_reference(args),
                Some(cpu) => matmul(cpu, args),
            }
        });
    }

    #[test]
    fn bf16_products_of_experts_are_the_reference(
        form in prop::sample::select(&FORMS[..]),
        (t, n, k) in (0..60_usize, 1..4_usize, any_size(900)),
        (num_experts, top_k) in (1..9_usize).prop_flat_map(|e| (Just(e), 1..=e.min(4))),
        kind in any_kind(),
        seed in 1..1000_u32,
    ) {
        let (n, m) = (16 * n, t * top_k);
        let weight = operands(kind, num_experts * n * k, seed);
        let stored = Stored::of(form_for(kind, form), (num_experts * n, k), &weight);
        let experts = Numbers::new(u64::from(seed)).indices(m, num_experts);
        let x = operands(kind, t * k, seed + 1);
        check_on(bf16_cpus(), &vec![3.0; m * n], |cpu, y_tan| {
            let scratch = &mut vec![7; expert_scratch_len(m, num_experts)][..];
            let (x, weight, experts_ta) = (&x[..], stored.weight(), &experts[..]);
            let compute = Compute::Bf16;
            let args =
                ExpertMatmul { x, weight, experts_ta, top_k, num_experts, y_tan, scratch, compute };
            match cpu {
                None => expert_matmul_reference(args),
                Some(cpu) => expert_matmul(cpu, args),
            }
        });
    }
}

/// A row is the same alone (streamed), among a few and in a large batch (blocked and packed), in either
/// layout.
#[test]
fn a_row_of_a_bf16_product_depends_on_itself_alone() {
    let (t, n, k) = (700, 272, 901);
    let w_nk = operands(Kind::Ordinary, n * k, 4);
    let x_tk = operands(Kind::Ordinary, t * k, 5);
    let product = |cpu: &Cpu, form, rows: std::ops::Range<usize>| {
        let stored = Stored::of(form, (n, k), &w_nk);
        let (weight, compute, t) = (stored.weight(), Compute::Bf16, rows.len());
        let mut y = vec![0.0; t * n];
        let (x_tk, y_tn) = (&x_tk[rows.start * k..rows.end * k], &mut y[..]);
        let accumulate = false;
        matmul(cpu, Matmul { x_tk, weight, bias_n: None, y_tn, t, accumulate, compute });
        bits(&y)
    };
    let all = product(&Cpu::detect(2), FORMS[1], 0..t);
    for cpu in bf16_cpus().iter().filter(|cpu| cpu.isa() == Isa::best()) {
        for form in FORMS {
            for rows in [0..1, 3..5, 690..700, 100..400] {
                let part = product(cpu, form, rows.clone());
                assert_eq!(part, all[rows.start * n..rows.end * n], "{form:?} {rows:?}");
            }
        }
    }
}

/// Rounding an activation costs 2⁻⁹ of it, and each step of the chain 2⁻²⁴ of the sum so far.
#[test]
fn error_of_a_bf16_product_is_bounded() {
    let (t, n, k) = (5, 33, 700);
    let stored = Stored::new(Encoding::Bf16, Layout::Panel, n, k, 11);
    let (x_tk, weight) = (values(t * k, 12), stored.weight());
    let mut y = vec![0.0; t * n];
    let (x, y_tn, compute) = (&x_tk[..], &mut y[..], Compute::Bf16);
    let args = Matmul { x_tk: x, weight, bias_n: None, y_tn, t, accumulate: false, compute };
    matmul(&Cpu::detect(2), args);
    for (index, &found) in y.iter().enumerate() {
        let (token, output) = (index / n, index % n);
        let products =
            (0..k).map(|i| f64::from(x_tk[token * k + i]) * f64::from(weight.value(output, i)));
        let (sum, magnitude) = products.fold((0.0, 0.0), |(sum, all), p| (sum + p, all + p.abs()));
        let bound = (2.0_f64.powi(-9) + k as f64 * 2.0_f64.powi(-24)) * magnitude;
        let error = (f64::from(found) - sum).abs();
        assert!(error <= bound && error > 0.0, "{error} > {bound}");
    }
}

/// The largest operands for which the proof holds make sums of multiples of 2^−126, and just smaller
/// ones do not.
#[test]
fn the_proof_is_sharp() {
    let (x, w) = (2.0_f32.powi(-60), 2.0_f32.powi(-52));
    assert!(LeastMagnitudes { x, w }.keep_normal());
    assert!(!LeastMagnitudes { x: x / 2.0, w }.keep_normal());
    assert!(LeastMagnitudes { x: f32::INFINITY, w: f32::MIN_POSITIVE }.keep_normal());
    let steps = (1.0 + 2.0_f64.powi(-7)).powi(2) * f64::from(x) * f64::from(w);
    assert!((steps * 2.0_f64.powi(126)).fract().abs() < f64::MIN_POSITIVE);
    assert!(starts_normal(&[0.0, -0.0, START_MIN, -1.0, f32::INFINITY]));
    assert!(!starts_normal(&[START_MIN / 2.0]));
    assert_eq!(START_MIN.to_bits(), 2.0_f32.powi(23 - 126).to_bits());
}

/// Without the instruction ordinary operands need no flushing: the proof is not vacuous.
#[test]
fn ordinary_operands_are_proved_normal() {
    let least = |values: &[f32]| values.iter().fold(f32::INFINITY, |least, x| least.min(x.abs()));
    let (x, w) = (values(1 << 16, 1), values(1 << 16, 2));
    assert!(LeastMagnitudes { x: least(&x), w: least(&w) }.keep_normal());
}

//! Every product against its plain loops, bit for bit, and against f64 within an error bound.

mod bounds;

use proptest::prelude::*;

use super::*;
use crate::encoding::{Encoding, Layout, encode};
use crate::isa::Isa;
use crate::memory::{bytes_of, bytes_of_mut};

/// Deterministic values in (-1, 1) with full mantissas, so that every order of summation shows.
pub(super) fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state as f32 / u32::MAX as f32).mul_add(2.0, -1.0)
    };
    (0..len).map(|_| next()).collect()
}

/// A weight and the memory it lies in.
pub(super) struct Stored {
    encoding: Encoding,
    layout: Layout,
    n: usize,
    k: usize,
    storage: Vec<f32>,
}

impl Stored {
    pub(super) fn new(encoding: Encoding, layout: Layout, n: usize, k: usize, seed: u32) -> Self {
        Self::of((encoding, layout), (n, k), &values(n * k, seed))
    }

    pub(super) fn of(
        (encoding, layout): (Encoding, Layout),
        (n, k): (usize, usize),
        values_nk: &[f32],
    ) -> Self {
        let bytes = Weight::stored_bytes(encoding, layout, n, k);
        let mut storage = vec![0.0; bytes.div_ceil(4)];
        let target = &mut bytes_of_mut(&mut storage)[..bytes];
        encode((encoding, layout), (n, k), values_nk, target);
        Self { encoding, layout, n, k, storage }
    }

    pub(super) fn weight(&self) -> Weight<'_> {
        let Self { encoding, layout, n, k, .. } = *self;
        let bytes = &bytes_of(&self.storage)[..Weight::stored_bytes(encoding, layout, n, k)];
        Weight { encoding, layout, n, k, bytes }
    }
}

/// Every instruction set of the machine, with one and two threads.
pub(super) fn cpus() -> Vec<Cpu> {
    let pairs = Isa::supported().into_iter().flat_map(|isa| [(isa, 1), (isa, 2)]);
    pairs.map(|(isa, threads)| Cpu::new(isa, threads)).collect()
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Runs the reference (no processor) and the kernel on every processor handle, from the same
/// `initial` output, and compares.
pub(super) fn check(initial: &[f32], run: impl Fn(Option<&Cpu>, &mut [f32])) {
    check_on(cpus(), initial, run);
}

/// As [`check`], on these handles.
pub(super) fn check_on(
    cpus: impl IntoIterator<Item = Cpu>,
    initial: &[f32],
    run: impl Fn(Option<&Cpu>, &mut [f32]),
) {
    let mut expected = initial.to_vec();
    run(None, &mut expected);
    for cpu in cpus {
        let mut found = initial.to_vec();
        run(Some(&cpu), &mut found);
        let first = bits(&found).iter().zip(bits(&expected)).position(|(a, b)| *a != b);
        let by = if cpu.has_bf16_instruction() { " with its bf16 instruction" } else { "" };
        assert_eq!(first, None, "{}{by}, {} threads", cpu.isa(), cpu.threads());
    }
}

fn any_weight_form() -> impl Strategy<Value = (Encoding, Layout)> {
    prop::sample::select(Encoding::forms())
}

/// Small sizes often, and some beyond one block of steps, columns or rows.
pub(super) fn any_size(max: usize) -> impl Strategy<Value = usize> {
    prop_oneof![0..4_usize, 10..40_usize, 0..max]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn forward_is_the_reference(
        (encoding, layout) in any_weight_form(),
        (t, n, k) in (any_size(70), any_size(90), any_size(850)),
        start in 0..3,
        seed in 1..1000_u32,
    ) {
        let stored = Stored::new(encoding, layout, n, k, seed);
        let (x_tk, bias) = (values(t * k, seed + 1), values(n, seed + 2));
        let accumulate = start == 1;
        let initial = values(t * n, seed + 3);
        check(&initial, |cpu, y_tn| {
            let args = Matmul {
            x_tk: &x_tk, weight: stored.weight(), bias_n: (start == 2).then_some(&bias[..]),
            y_tn, t, accumulate, compute: Compute::F32,
        };
            match cpu {
                None => matmul_reference(args),
                Some(cpu) => matmul(cpu, args),
            }
        });
    }

    #[test]
    fn input_gradient_is_the_reference(
        (encoding, layout) in any_weight_form(),
        (t, n, k) in (any_size(70), any_size(850), any_size(90)),
        accumulate in any::<bool>(),
        seed in 1..1000_u32,
    ) {
        let stored = Stored::new(encoding, layout, n, k, seed);
        let dy_tn = values(t * n, seed + 1);
        let initial = values(t * k, seed + 3);
        check(&initial, |cpu, dx_tk| {
            let args = MatmulDx { dy_tn: &dy_tn, weight: stored.weight(), dx_tk, t, accumulate };
            match cpu {
                None => matmul_dx_reference(args),
                Some(cpu) => matmul_dx(cpu, args),
            }
        });
    }

    #[test]
    fn weight_gradient_is_the_reference(
        (t, n, k) in (any_size(700), any_size(70), any_size(70)),
        row_tokens in prop_oneof![Just(1_usize), 1..50_usize, 200..600_usize],
        accumulate in any::<bool>(),
        seed in 1..1000_u32,
    ) {
        let (dy_tn, x_tk) = (values(t * n, seed), values(t * k, seed + 1));
        let initial = values(n * k, seed + 3);
        check(&initial, |cpu, dw_nk| {
            let args = MatmulDw {
            dy_tn: &dy_tn, x_tk: &x_tk, dw_nk, n, k, t, row_tokens, accumulate,
        };
            match cpu {
                None => matmul_dw_reference(args),
                Some(cpu) => matmul_dw(cpu, args),
            }
        });
        let initial = values(n, seed + 4);
        check(&initial, |cpu, db_n| {
            let args = BiasGrad { dy_tn: &dy_tn, db_n, t, row_tokens, accumulate };
            match cpu {
                None => bias_grad_reference(args),
                Some(cpu) => bias_grad(cpu, args),
            }
        });
    }
}

/// Kernel and reference of one call, chosen by whether there is a processor.
macro_rules! run {
    ($cpu:expr, $kernel:ident, $reference:ident, $args:expr) => {
        match $cpu {
            None => $reference($args),
            Some(cpu) => $kernel(cpu, $args),
        }
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn head_products_are_the_reference(
        (t, heads) in (any_size(40), 1..4_usize),
        (inputs, outputs) in (any_size(60), any_size(60)),
        (row_tokens, accumulate) in (1..300_usize, any::<bool>()),
        seed in 1..1000_u32,
    ) {
        let (x_thi, dy_tho) = (values(t * heads * inputs, seed), values(t * heads * outputs, 1));
        let w_hoi = values(heads * inputs * outputs, seed + 1);
        let (x_thi, dy_tho, w_hoi) = (&x_thi[..], &dy_tho[..], &w_hoi[..]);
        check(&values(t * heads * outputs, 2), |cpu, y_tho| {
            let args = HeadMatmul { x_thi, w_hoi, y_tho, t, heads, inputs, outputs };
            run!(cpu, head_matmul, head_matmul_reference, args);
        });
        check(&values(t * heads * inputs, 3), |cpu, dx_thi| {
            let args =
                HeadMatmulDx { dy_tho, w_hoi, dx_thi, t, heads, inputs, outputs, accumulate };
            run!(cpu, head_matmul_dx, head_matmul_dx_reference, args);
        });
        check(&values(heads * inputs * outputs, 4), |cpu, dw_hoi| {
            let args = HeadMatmulDw {
                dy_tho, x_thi, dw_hoi, t, heads, inputs, outputs, row_tokens, accumulate,
            };
            run!(cpu, head_matmul_dw, head_matmul_dw_reference, args);
        });
    }

    #[test]
    fn streams_are_the_reference(
        (encoding, layout) in any_weight_form(),
        (t, n, k) in (0..20_usize, any_size(300), any_size(200)),
        start in 0..3,
        seed in 1..1000_u32,
    ) {
        let stored = Stored::new(encoding, layout, n, k, seed);
        let (x_tk, bias) = (values(t * k, seed + 1), values(n, seed + 2));
        let (accumulate, bias_n) = (start == 1, (start == 2).then_some(&bias[..]));
        check(&values(t * n, seed + 3), |cpu, y_tn| {
            let (weight, compute) = (stored.weight(), Compute::F32);
            let args = Matmul { x_tk: &x_tk, weight, bias_n, y_tn, t, accumulate, compute };
            run!(cpu, matmul, matmul_reference, args);
        });
    }
}

/// Every tail of a row, of a panel and of a group of tokens. Each row ends beside an infinity, which a
/// product that reads too far would find.
#[test]
fn rows_end_where_they_end() {
    let forms = [
        (Encoding::F32, Compute::F32),
        (Encoding::F16, Compute::F32),
        (Encoding::Bf16, Compute::F32),
        (Encoding::Bf16, Compute::Bf16),
    ];
    for (encoding, compute) in forms {
        for k in [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95] {
            for n in [1, 15, 17, 33] {
                let mut weights = values(n * k, 3);
                weights
                    .iter_mut()
                    .step_by(k.max(1))
                    .skip(1)
                    .for_each(|first| *first = f32::INFINITY);
                let stored = Stored::of((encoding, Layout::RowMajor), (n, k), &weights);
                for t in [1, 2, 3, 5, 8, 9, 16] {
                    let x_tk = values(t * k, 4);
                    check(&values(t * n, 5), |cpu, y_tn| {
                        let (weight, x_tk) = (stored.weight(), &x_tk[..]);
                        let (bias_n, accumulate) = (None, t % 2 == 0);
                        let args = Matmul { x_tk, weight, bias_n, y_tn, t, accumulate, compute };
                        run!(cpu, matmul, matmul_reference, args);
                    });
                }
            }
        }
    }
}

/// A product large enough for several row tasks, column tasks and blocks at once.
#[test]
fn large_products_are_the_reference() {
    let (t, n, k) = (800, 400, 500);
    let stored = Stored::new(Encoding::F32, Layout::RowMajor, n, k, 5);
    let (x_tk, dy_tn) = (values(t * k, 6), values(t * n, 7));
    let cpu = Cpu::detect(2);
    let mut expected = vec![0.0; t * n];
    let mut found = values(t * n, 1);
    fn args<'a>(x_tk: &'a [f32], weight: Weight<'a>, t: usize, y_tn: &'a mut [f32]) -> Matmul<'a> {
        let compute = Compute::F32;
        Matmul { x_tk, weight, bias_n: None, y_tn, t, accumulate: false, compute }
    }
    matmul_reference(args(&x_tk, stored.weight(), t, &mut expected));
    matmul(&cpu, args(&x_tk, stored.weight(), t, &mut found));
    assert_eq!(bits(&found), bits(&expected), "forward");

    let mut expected = vec![0.0; n * k];
    let mut found = values(n * k, 1);
    for (kernel, dw_nk) in [(false, &mut expected), (true, &mut found)] {
        let (dy_tn, x_tk) = (&dy_tn[..], &x_tk[..]);
        let args = MatmulDw { dy_tn, x_tk, dw_nk, n, k, t, row_tokens: 300, accumulate: false };
        if kernel { matmul_dw(&cpu, args) } else { matmul_dw_reference(args) }
    }
    assert_eq!(bits(&found), bits(&expected), "weight gradient");
}

/// Elements far from all others, at every place of a block, in products of all kinds.
#[test]
fn exceptions_of_bf16z_are_part_of_the_product() {
    for (n, k) in [(40, 520), (72, 523)] {
        let mut weight_nk = values(n * k, 3);
        for i in 0..40 {
            let exponent = i32::try_from(i).unwrap();
            weight_nk[(i * 521 + 7 * i) % (n * k)] *= 2.0_f32.powi(-30 - exponent);
        }
        let stored = Stored::of((Encoding::Bf16z, Layout::Panel), (n, k), &weight_nk);
        let weight = stored.weight();
        for t in [1, 3, 7, 20] {
            let (x_tk, dy_tn) = (values(t * k, 5), values(t * n, 6));
            let accumulate = false;
            for compute in [Compute::F32, Compute::Bf16] {
                check(&vec![0.0; t * n], |cpu, y_tn| {
                    let x_tk = &x_tk;
                    let args = Matmul { x_tk, weight, bias_n: None, y_tn, t, accumulate, compute };
                    run!(cpu, matmul, matmul_reference, args);
                });
            }
            check(&vec![0.0; t * k], |cpu, dx_tk| {
                let args = MatmulDx { dy_tn: &dy_tn, weight, dx_tk, t, accumulate };
                run!(cpu, matmul_dx, matmul_dx_reference, args);
            });
        }
    }
}

/// A weight of bytes that no encoder wrote: some numbers, but no panic and no read outside.
#[test]
fn a_damaged_bf16z_weight_ends_no_process() {
    let (n, k) = (40, 523);
    for seed in 0..4 {
        let mut stored = Stored::new(Encoding::Bf16z, Layout::Panel, n, k, seed);
        let noise = values(stored.storage.len(), seed + 1);
        for (word, noise) in stored.storage.iter_mut().zip(noise) {
            // Small numbers are positions within the panel, in any order.
            let bits = noise.to_bits() >> (8 * (seed % 3));
            *word = f32::from_bits(bits);
        }
        for (t, compute) in
            [1, 3, 20].into_iter().flat_map(|t| Compute::ALL.map(|compute| (t, compute)))
        {
            if !compute.multiplies(Encoding::Bf16z) {
                continue;
            }
            let x_tk = values(t * k, 5);
            for cpu in cpus() {
                let (weight, bias_n, accumulate) = (stored.weight(), None, false);
                let (x_tk, y_tn) = (&x_tk[..], &mut vec![0.0; t * n][..]);
                matmul(&cpu, Matmul { x_tk, weight, bias_n, y_tn, t, accumulate, compute });
            }
        }
    }
}

/// Together or one by one, products are the same.
#[test]
fn products_together_are_the_products() {
    let k = 200;
    for (encoding, layout, compute) in [
        (Encoding::F32, Layout::Panel, Compute::F32),
        (Encoding::Bf16, Layout::RowMajor, Compute::Bf16),
        (Encoding::Bf16z, Layout::Panel, Compute::Bf16),
        (Encoding::Q8, Layout::Panel, Compute::Int8),
        (Encoding::Q4, Layout::Panel, Compute::Int8),
    ] {
        // The last pair is stored apart, so it is not run with the others.
        let other = if encoding == Encoding::Bf16 { Encoding::F16 } else { Encoding::Bf16 };
        for (t, last) in [(1, encoding), (5, encoding), (40, encoding), (3, other)] {
            let last_compute = if last == encoding { compute } else { Compute::F32 };
            let stored = [(64, encoding), (300, encoding), (16, last)]
                .map(|(n, encoding)| Stored::new(encoding, layout, n, k, 9));
            let (x_tk, bias_n) = (values(t * k, 5), values(300, 8));
            let computes = [compute, compute, last_compute];
            let biases = [None, Some(&bias_n[..]), None];
            for cpu in cpus() {
                let mut together = stored.each_ref().map(|stored| vec![f32::NAN; t * stored.n]);
                let mut ys = together.iter_mut();
                let products = std::array::from_fn::<_, 3, _>(|i| Matmul {
                    x_tk: &x_tk,
                    weight: stored[i].weight(),
                    bias_n: biases[i],
                    y_tn: ys.next().unwrap(),
                    t,
                    accumulate: false,
                    compute: computes[i],
                });
                matmul_each(&cpu, products);
                for (i, together) in together.iter().enumerate() {
                    let mut alone = vec![f32::NAN; together.len()];
                    let (weight, bias_n, compute) = (stored[i].weight(), biases[i], computes[i]);
                    let (x_tk, y_tn, accumulate) = (&x_tk[..], &mut alone[..], false);
                    matmul(&cpu, Matmul { x_tk, weight, bias_n, y_tn, t, accumulate, compute });
                    assert_eq!(bits(together), bits(&alone), "{encoding}, {t} tokens, product {i}");
                }
            }
        }
    }
}

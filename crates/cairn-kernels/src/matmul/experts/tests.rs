//! Products of experts against their plain loops, bit for bit, and against one expert at a time.

use proptest::prelude::*;

use super::*;
use crate::encoding::{Encoding, Layout};
use crate::matmul::tests::{Stored, bits, check, values};
use crate::testing::Numbers;

/// `t` tokens, each with `top_k` different experts out of `e`, some experts more popular.
fn routing(t: usize, top_k: usize, e: usize, seed: u64) -> Vec<u32> {
    let mut numbers = Numbers::new(seed);
    let mut experts = Vec::with_capacity(t * top_k);
    for _ in 0..t {
        let mut left: Vec<u32> = (0..u32::try_from(e).unwrap()).collect();
        for _ in 0..top_k {
            let limit = if numbers.below(3) == 0 { left.len() } else { left.len().div_ceil(4) };
            experts.push(left.remove(numbers.below(limit)));
        }
    }
    experts
}

macro_rules! run {
    ($cpu:expr, $kernel:ident, $reference:ident, $args:expr) => {
        match $cpu {
            None => $reference($args),
            Some(cpu) => $kernel(cpu, $args),
        }
    };
}

fn any_size(max: usize) -> impl Strategy<Value = usize> {
    prop_oneof![1..5_usize, 10..40_usize, 1..max]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn products_of_experts_are_the_references(
        (encoding, layout) in prop::sample::select(Encoding::forms()),
        (t, n, k) in (prop_oneof![0..4_usize, 0..90_usize], any_size(70), any_size(450)),
        (num_experts, top_k) in (1..9_usize).prop_flat_map(|e| (Just(e), 1..=e.min(4))),
        per_rank in any::<bool>(),
        seed in 1..1000_u32,
    ) {
        let n = if layout == Layout::Panel { n.next_multiple_of(16) } else { n };
        let stored = Stored::new(encoding, layout, num_experts * n, k, seed);
        let experts = routing(t, top_k, num_experts, u64::from(seed));
        let m = experts.len();
        let x = values(if per_rank { m } else { t } * k, seed + 1);
        let dy_tan = values(m * n, seed + 2);
        let scratch = || vec![7; expert_scratch_len(m, num_experts)];
        let (experts_ta, weight) = (&experts[..], stored.weight());
        check(&values(m * n, seed + 3), |cpu, y_tan| {
            let scratch = &mut scratch()[..];
            let args = ExpertMatmul {
                x: &x, weight, experts_ta, top_k, num_experts, y_tan, scratch,
                compute: Compute::F32,
            };
            run!(cpu, expert_matmul, expert_matmul_reference, args);
        });
        check(&values(m * k, seed + 4), |cpu, dx_tak| {
            let scratch = &mut scratch()[..];
            let dy_tan = &dy_tan[..];
            let args =
                ExpertMatmulDx { dy_tan, weight, experts_ta, num_experts, dx_tak, scratch };
            run!(cpu, expert_matmul_dx, expert_matmul_dx_reference, args);
        });
    }

    #[test]
    fn weight_gradients_of_experts_are_the_reference(
        (t, n, k) in (prop_oneof![0..4_usize, 0..700_usize], any_size(40), any_size(40)),
        (num_experts, top_k) in (1..6_usize).prop_flat_map(|e| (Just(e), 1..=e.min(3))),
        row_tokens in prop_oneof![Just(1_usize), 1..50_usize, 200..600_usize],
        (per_rank, accumulate) in (any::<bool>(), any::<bool>()),
        seed in 1..1000_u32,
    ) {
        let experts = routing(t, top_k, num_experts, u64::from(seed));
        let m = experts.len();
        let x = values(if per_rank { m } else { t } * k, seed + 1);
        let dy_tan = values(m * n, seed + 2);
        check(&values(num_experts * n * k, seed + 3), |cpu, dw_enk| {
            let mut scratch = vec![7; expert_scratch_len(m, num_experts)];
            let args = ExpertMatmulDw {
                dy_tan: &dy_tan, x: &x, experts_ta: &experts, top_k, num_experts, dw_enk,
                row_tokens, accumulate, scratch: &mut scratch,
            };
            run!(cpu, expert_matmul_dw, expert_matmul_dw_reference, args);
        });
    }
}

/// An expert's product is the plain product of its weight, and a token's row the same whoever is
/// routed beside it.
#[test]
fn a_row_depends_on_its_expert_alone() {
    let (t, n, k, num_experts, top_k) = (40, 32, 100, 4, 2);
    let stored = Stored::new(Encoding::Bf16, Layout::Panel, num_experts * n, k, 3);
    let weight = stored.weight();
    let experts = routing(t, top_k, num_experts, 5);
    let x = values(t * k, 6);
    let cpu = Cpu::detect(2);
    let product = |x: &[f32], experts_ta: &[u32]| {
        let mut y = vec![0.0; experts_ta.len() * n];
        let mut scratch = vec![0; expert_scratch_len(experts_ta.len(), num_experts)];
        let (y_tan, scratch) = (&mut y[..], &mut scratch[..]);
        let compute = Compute::F32;
        let args =
            ExpertMatmul { x, weight, experts_ta, top_k, num_experts, y_tan, scratch, compute };
        expert_matmul(&cpu, args);
        y
    };
    let all = product(&x, &experts);
    for token in 0..t {
        let rows = token * top_k..(token + 1) * top_k;
        let alone = product(&x[token * k..][..k], &experts[rows.clone()]);
        assert_eq!(bits(&alone), bits(&all[rows.start * n..rows.end * n]), "token {token}");
        let mut plain = vec![0.0; num_experts * n];
        let args = crate::Matmul {
            x_tk: &x[token * k..][..k],
            weight,
            bias_n: None,
            y_tn: &mut plain,
            t: 1,
            accumulate: false,
            compute: Compute::F32,
        };
        crate::matmul(&cpu, args);
        for (rank, row) in rows.enumerate() {
            let expert = experts[row] as usize;
            let own = &plain[expert * n..][..n];
            assert_eq!(bits(own), bits(&alone[rank * n..][..n]), "token {token} rank {rank}");
        }
    }
}

/// Blocks are of an expert's own rows, so a batch row's sum does not depend on the micro-batch.
#[test]
fn weight_gradients_add_up_over_micro_batches() {
    let (t, n, k, num_experts, top_k, row_tokens) = (1200, 3, 5, 3, 2, 600);
    let experts = routing(t, top_k, num_experts, 9);
    let (x, dy) = (values(t * k, 1), values(t * top_k * n, 2));
    let cpu = Cpu::detect(2);
    let add = |tokens: Range<usize>, dw_enk: &mut [f32], accumulate| {
        let rows = tokens.start * top_k..tokens.end * top_k;
        let mut scratch = vec![0; expert_scratch_len(rows.len(), num_experts)];
        let args = ExpertMatmulDw {
            dy_tan: &dy[rows.start * n..rows.end * n],
            x: &x[tokens.start * k..tokens.end * k],
            experts_ta: &experts[rows],
            top_k,
            num_experts,
            dw_enk,
            row_tokens,
            accumulate,
            scratch: &mut scratch,
        };
        expert_matmul_dw(&cpu, args);
    };
    let (mut once, mut twice) = (vec![1.0; num_experts * n * k], vec![2.0; num_experts * n * k]);
    add(0..t, &mut once, false);
    add(0..row_tokens, &mut twice, false);
    add(row_tokens..t, &mut twice, true);
    assert_eq!(bits(&once), bits(&twice));
}

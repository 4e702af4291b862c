//! Accounting: the arithmetic and the traffic of each instruction, from its shapes alone.
//!
//! FLOPs count one multiply-add as two. Attention counts the (query, key) pairs that the mask lets
//! through, not the full square. Bytes count every operand read and every result written once, the
//! least that any kernel must move; of the weights of experts, those that the run's rows can reach.

use serde::Serialize;

use crate::dim::Sizes;
use crate::op::Op;
use crate::program::{Instr, Program};

/// The size of a run, for accounting.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Dynamic sizes.
    pub sizes: Sizes,
    /// Visible (query, key) pairs, all sequences together.
    pub pairs: usize,
}

impl Workload {
    /// A training batch of `rows` causal sequences of `seq_len` tokens each.
    pub fn causal(rows: usize, seq_len: usize) -> Self {
        let pairs = rows * seq_len * (seq_len + 1) / 2;
        Self { sizes: Sizes::dense(rows * seq_len, rows), pairs }
    }
}

/// What one instruction costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Floating-point operations, a multiply-add counted as two.
    pub flops: f64,
    /// Bytes read and written at least.
    pub bytes: f64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

impl Program {
    /// The cost of each instruction, in order.
    pub fn account(&self, workload: &Workload) -> Vec<Cost> {
        self.instrs.iter().map(|instr| self.cost(instr, workload)).collect()
    }

    /// The cost of the whole program.
    pub fn total_cost(&self, workload: &Workload) -> Cost {
        let mut total = Cost::default();
        for cost in self.account(workload) {
            total += cost;
        }
        total
    }

    fn cost(&self, instr: &Instr, workload: &Workload) -> Cost {
        let operands = instr.reads().chain(instr.writes());
        let mut bytes = operands.map(|id| self.value(id).bytes(&workload.sizes) as f64).sum();
        if let Op::ExpertMatmul | Op::ExpertMatmulDx = instr.op {
            let weight = instr.inputs[1].map_or(0, |id| self.value(id).bytes(&workload.sizes));
            bytes -= weight as f64 * (1.0 - self.reached(instr, &workload.sizes));
        }
        Cost { flops: self.flops(instr, workload), bytes }
    }

    /// The share of experts that routed rows can reach: a row reaches one.
    fn reached(&self, instr: &Instr, sizes: &Sizes) -> f64 {
        let weight = instr.inputs[1].map(|id| &self.value(id).shape.0[0]);
        let experts = weight.and_then(|dim| dim.size).unwrap_or(1) as f64;
        (self.elements(instr, 2, sizes) / experts).min(1.0)
    }

    fn elements(&self, instr: &Instr, slot: usize, sizes: &Sizes) -> f64 {
        let value = instr.inputs.get(slot).copied().flatten();
        value.map_or(0.0, |id| self.value(id).shape.elements(sizes) as f64)
    }

    fn flops(&self, instr: &Instr, workload: &Workload) -> f64 {
        let sizes = &workload.sizes;
        let elements = |slot| self.elements(instr, slot, sizes);
        let last = |slot: usize| -> f64 {
            let id = instr.inputs.get(slot).copied().flatten();
            id.map_or(1.0, |id| self.value(id).shape.last() as f64)
        };
        let row = |slot: usize| -> f64 {
            let id = instr.inputs.get(slot).copied().flatten();
            id.map_or(1.0, |id| self.value(id).shape.row_elements() as f64)
        };
        let heads = |slot: usize| -> f64 {
            let id = instr.inputs.get(slot).copied().flatten();
            id.and_then(|id| self.value(id).shape.0.get(1).and_then(|dim| dim.size))
                .map_or(1.0, |size| size as f64)
        };
        let lead = |slot: usize| -> f64 {
            let id = instr.inputs.get(slot).copied().flatten();
            id.and_then(|id| self.value(id).shape.0[0].size).map_or(1.0, |size| size as f64)
        };
        let pairs = workload.pairs as f64;
        match &instr.op {
            // Rows times the whole weight matrix, two operations each.
            Op::Matmul => 2.0 * elements(0) / row(0) * row(1),
            Op::MatmulDx => 2.0 * elements(0) / row(0) * row(1),
            Op::MatmulDw => 2.0 * elements(0) * row(1),
            Op::HeadMatmul | Op::HeadMatmulDx => 2.0 * elements(0) / row(0) * row(1),
            Op::HeadMatmulDw => 2.0 * elements(0) * last(1),
            // Routed rows times one expert's weight.
            Op::ExpertMatmul | Op::ExpertMatmulDx => 2.0 * elements(2) * row(1) / lead(1),
            Op::ExpertMatmulDw => 2.0 * elements(2) * row(3) / lead(3),
            Op::ExpertSum => 2.0 * elements(0),
            Op::ExpertSumGrad => 3.0 * elements(1).max(elements(0)),
            Op::Route(_) | Op::RouteGrad(_) => {
                // A softmax or sigmoids, about twenty operations an exponential.
                let logits = usize::from(matches!(instr.op, Op::RouteGrad(_)));
                20.0 * elements(logits)
            }
            // The router's softmax again.
            Op::ExpertLoad => 21.0 * elements(0),
            Op::ExpertLoadGrad => 24.0 * elements(1),
            Op::BalanceLoss(_) => 2.0 * elements(0),
            Op::BalanceLossGrad(_) => elements(1),
            Op::TokenLogprob(_) => {
                2.0 * elements(0) / row(0) * row(1) + 2.0 * elements(4) * lead(5)
            }
            Op::CrossEntropy(_) | Op::TokenLogprobGrad(_) => {
                let first = usize::from(matches!(instr.op, Op::TokenLogprobGrad(_)));
                // Scores again, then dx and dw where they are wanted; the same of an adapter.
                let from = usize::from(matches!(instr.op, Op::CrossEntropy(_)));
                let wanted = |slots: [usize; 2]| {
                    let of = |slot: &usize| instr.outputs.get(from + slot).copied().flatten();
                    1.0 + slots.iter().filter_map(of).count() as f64
                };
                let one = 2.0 * elements(first) / row(first) * row(first + 1);
                let low = 7 + first;
                one * wanted([0, 1]) + 2.0 * elements(low) * lead(low + 1) * wanted([3, 4])
            }
            Op::Attention(a) => {
                // Dropout multiplies each probability.
                let dropout = f64::from(u8::from(a.dropout.is_some()));
                pairs * heads(0) * (2.0 * (last(0) + a.value_dim as f64) + dropout)
            }
            Op::AttentionGrad(a) => {
                // Scores again, dP, dQ, dK and dV; dropout multiplies P and dP.
                let dropout = 2.0 * f64::from(u8::from(a.dropout.is_some()));
                let products = 2.0 * (3.0 * last(1) + 2.0 * a.value_dim as f64);
                pairs * heads(1) * (products + dropout)
            }
            Op::RmsNorm(_) | Op::LayerNorm(_) => 4.0 * elements(0),
            Op::RmsNormGrad(_) | Op::LayerNormGrad(_) => 8.0 * elements(0),
            Op::Rope(_) | Op::RopeGrad(_) => 3.0 * elements(0),
            Op::AdamW(_) => 12.0 * elements(0),
            Op::GlobalNorm => 2.0 * (0..instr.inputs.len()).map(elements).sum::<f64>(),
            Op::KvWrite { .. } | Op::Embed | Op::GatherRows | Op::ScatterRows => 0.0,
            Op::Concat(_) | Op::Split(..) => 0.0,
            _ => elements(0),
        }
    }
}

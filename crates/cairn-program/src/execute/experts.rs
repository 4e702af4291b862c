//! The instructions of mixtures of experts, and their adjoints.

use cairn_kernels::{self as kernels, Routing, Span};

use super::{Step, WeightShape};
use crate::op::BalanceAttrs;

/// The sizes of a product of experts.
struct ExpertSizes {
    weight: WeightShape,
    num_experts: usize,
    top_k: usize,
}

impl Step<'_> {
    /// Sizes from the weight, whose rows contract `inputs` elements, and from the chosen experts.
    fn expert_sizes(&self, inputs: usize) -> ExpertSizes {
        let (num_experts, top_k) = (self.axis(1, 0), self.axis(2, 1));
        ExpertSizes { weight: self.weight(1, inputs), num_experts, top_k }
    }

    pub(super) fn route(&mut self, routing: Routing) {
        let (num_experts, biased) = (self.width(0), self.has_input(1));
        let writes = [self.output(0), self.output(1)];
        let ([logits, bias], [experts, weights]) =
            self.memory.split([self.input(0), self.input(1)], writes);
        kernels::route(
            self.cpu,
            kernels::Route {
                logits_te: logits.f32s(),
                bias_e: biased.then(|| bias.f32s()),
                routing,
                num_experts,
                experts_ta: experts.u32s(),
                weights_ta: weights.f32s(),
            },
        );
    }

    pub(super) fn route_grad(&mut self, routing: Routing) {
        let num_experts = self.width(1);
        let reads = [self.input(0), self.input(1), self.input(2)];
        let ([dweights, logits, experts], [dlogits]) = self.memory.split(reads, [self.output(0)]);
        kernels::route_grad(
            self.cpu,
            kernels::RouteGrad {
                dweights_ta: dweights.f32s(),
                logits_te: logits.f32s(),
                experts_ta: experts.u32s(),
                routing,
                num_experts,
                dlogits_te: dlogits.f32s(),
            },
        );
    }

    pub(super) fn expert_load(&mut self) {
        let (num_experts, goes_on) = (self.width(0), self.has_input(2));
        let reads: [Span; 4] = std::array::from_fn(|slot| self.input(slot));
        let writes = [self.output(0), self.output(1)];
        let ([logits, experts, choices, mass], [choices_out, mass_out]) =
            self.memory.split(reads, writes);
        kernels::expert_load(
            self.cpu,
            kernels::ExpertLoad {
                logits_te: logits.f32s(),
                experts_ta: experts.u32s(),
                num_experts,
                before: goes_on.then(|| (choices.f32s(), mass.f32s())),
                choices_e: choices_out.f32s(),
                mass_e: mass_out.f32s(),
            },
        );
    }

    pub(super) fn expert_load_grad(&mut self) {
        let reads = [self.input(0), self.input(1)];
        let ([dmass, logits], [dlogits]) = self.memory.split(reads, [self.output(0)]);
        kernels::expert_load_grad(
            self.cpu,
            kernels::ExpertLoadGrad {
                dmass_e: dmass.f32s(),
                logits_te: logits.f32s(),
                dlogits_te: dlogits.f32s(),
            },
        );
    }

    pub(super) fn balance_loss(&mut self, attrs: BalanceAttrs) {
        let reads = [self.input(0), self.input(1)];
        let ([choices, mass], [loss]) = self.memory.split(reads, [self.output(0)]);
        loss.f32s()[0] = balance(attrs).loss(choices.f32s(), mass.f32s());
    }

    pub(super) fn balance_loss_grad(&mut self, attrs: BalanceAttrs) {
        let reads = [self.input(0), self.input(1)];
        let ([dloss, choices], [dmass]) = self.memory.split(reads, [self.output(0)]);
        balance(attrs).loss_grad(dloss.f32s()[0], choices.f32s(), dmass.f32s());
    }

    /// Elements of a row of `x`, whose shape is `[t, in..]` or `[t, a, in..]`.
    fn contracted(&self, x: usize) -> usize {
        let per_rank = self.value(x).shape.0.get(1) == self.value(2).shape.0.get(1);
        if per_rank { self.width(x) / self.axis(2, 1) } else { self.width(x) }
    }

    pub(super) fn expert_matmul(&mut self) {
        let ExpertSizes { weight, num_experts, top_k } = self.expert_sizes(self.contracted(0));
        let scratch = self.prepared.scratch(self.index);
        let reads = [self.input(0), self.input(1), self.input(2)];
        let ([x, w, experts], [scratch, y]) = self.memory.split(reads, [scratch, self.output(0)]);
        kernels::expert_matmul(
            self.cpu,
            kernels::ExpertMatmul {
                x: x.f32s(),
                weight: weight.of(w),
                experts_ta: experts.u32s(),
                top_k,
                num_experts,
                y_tan: y.f32s(),
                scratch: scratch.u32s(),
                compute: self.instr.compute,
            },
        );
    }

    pub(super) fn expert_matmul_dx(&mut self) {
        let outputs = self.width(0) / self.axis(2, 1);
        let inputs = self.width(1) / self.axis(1, 0) / outputs;
        let ExpertSizes { weight, num_experts, .. } = self.expert_sizes(inputs);
        let scratch = self.prepared.scratch(self.index);
        let reads = [self.input(0), self.input(1), self.input(2)];
        let ([dy, w, experts], [scratch, dx]) = self.memory.split(reads, [scratch, self.output(0)]);
        kernels::expert_matmul_dx(
            self.cpu,
            kernels::ExpertMatmulDx {
                dy_tan: dy.f32s(),
                weight: weight.of(w),
                experts_ta: experts.u32s(),
                num_experts,
                dx_tak: dx.f32s(),
                scratch: scratch.u32s(),
            },
        );
    }

    pub(super) fn expert_matmul_dw(&mut self) {
        let (num_experts, top_k) = (self.axis(3, 0), self.axis(2, 1));
        let (row_tokens, accumulate) = (self.row_tokens(), self.adds());
        let scratch = self.prepared.scratch(self.index);
        let reads = [self.input(0), self.input(1), self.input(2)];
        let ([dy, x, experts], [scratch, dw]) = self.memory.split(reads, [scratch, self.output(0)]);
        kernels::expert_matmul_dw(
            self.cpu,
            kernels::ExpertMatmulDw {
                dy_tan: dy.f32s(),
                x: x.f32s(),
                experts_ta: experts.u32s(),
                top_k,
                num_experts,
                dw_enk: dw.f32s(),
                row_tokens,
                accumulate,
                scratch: scratch.u32s(),
            },
        );
    }

    pub(super) fn expert_sum(&mut self) {
        let (top_k, weighted) = (self.axis(0, 1), self.has_input(1));
        let d = self.width(0) / top_k;
        let ([y, weights], [out]) =
            self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::expert_sum(
            self.cpu,
            kernels::ExpertSum {
                y_tad: y.f32s(),
                weights_ta: weighted.then(|| weights.f32s()),
                top_k,
                d,
                out_td: out.f32s(),
            },
        );
    }

    pub(super) fn expert_sum_grad(&mut self) {
        let (has_rows, weighted) = (self.has_input(1), self.has_input(2));
        let top_k = self.axis(if has_rows { 1 } else { 2 }, 1);
        let d = self.width(0);
        let reads: [Span; 3] = std::array::from_fn(|slot| self.input(slot));
        let writes = [self.output(0), self.output(1)];
        let wanted = |slot: usize| self.instr.outputs.get(slot).copied().flatten().is_some();
        let (wants_rows, wants_weights) = (wanted(0), wanted(1));
        let ([dout, y, weights], [dy, dweights]) = self.memory.split(reads, writes);
        kernels::expert_sum_grad(
            self.cpu,
            kernels::ExpertSumGrad {
                dout_td: dout.f32s(),
                y_tad: has_rows.then(|| y.f32s()),
                weights_ta: weighted.then(|| weights.f32s()),
                top_k,
                d,
                dy_tad: wants_rows.then(|| dy.f32s()),
                dweights_ta: wants_weights.then(|| dweights.f32s()),
            },
        );
    }
}

/// The kernel's name of the attributes.
fn balance(BalanceAttrs { top_k, coefficient }: BalanceAttrs) -> kernels::Balance {
    kernels::Balance { top_k, coefficient }
}

//! The update instructions and their kernels.

use cairn_kernels as kernels;

use super::Step;
use crate::op::AdamWAttrs;

/// Added to the norm before dividing, as `torch.nn.utils.clip_grad_norm_` does.
const CLIP_EPS: f64 = 1e-6;

impl Step<'_> {
    pub(super) fn global_norm(&mut self) {
        let mut total = 0.0;
        for slot in 0..self.instr.inputs.len() {
            let gradient = self.memory.read(self.input(slot));
            let args = kernels::SumSquares { x: gradient.f32s(), total: &mut total };
            kernels::sum_squares(self.cpu, args);
        }
        self.memory.write(self.output(0)).f64s()[0] = total;
    }

    pub(super) fn clip(&mut self, max_norm: f32) {
        let norm = self.memory.read(self.input(0)).f64s()[0].sqrt();
        let factor = (f64::from(max_norm) / (norm + CLIP_EPS)).min(1.0);
        #[expect(clippy::cast_possible_truncation, reason = "rounded to the gradients' type")]
        let factor = factor as f32;
        self.memory.write(self.output(0)).f32s()[0] = factor;
    }

    pub(super) fn adamw(&mut self, attrs: &AdamWAttrs) {
        let clipped = self.has_input(4);
        let grad_scale = if clipped { self.memory.read(self.input(4)).f32s()[0] } else { 1.0 };
        let step = kernels::AdamWStep {
            lr: self.memory.read(self.input(5)).f64s()[0],
            beta1: attrs.beta1,
            beta2: attrs.beta2,
            eps: attrs.eps,
            weight_decay: attrs.weight_decay,
            step: u64::from(self.memory.read(self.input(6)).u32s()[0]),
            grad_scale,
        };
        let has_copy = self.has_input(7);
        let writes = [self.output(0), self.output(1), self.output(2), self.output(3)];
        let ([grad], [w, m, v, copy]) = self.memory.split([self.input(1)], writes);
        kernels::adamw(
            self.cpu,
            kernels::AdamW {
                w: w.f32s(),
                bf16_copy: has_copy.then(|| copy.u16s()),
                grad: grad.f32s(),
                m: m.f32s(),
                v: v.f32s(),
                step,
            },
        );
    }

    pub(super) fn ema(&mut self, decay: f32) {
        let ([w], [ema]) = self.memory.split([self.input(0)], [self.output(0)]);
        kernels::ema(self.cpu, kernels::Ema { w: w.f32s(), ema: ema.f32s(), decay });
    }
}

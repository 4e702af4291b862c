//! What the tuner measures: the cuts a product can be made with, on operands of its own.

use super::arithmetic::Form;
use super::{Blocking, Matmul, MatmulDw, MatmulDx, matmul_cut, matmul_dw_cut, matmul_dx_cut};
use crate::compute::Compute;
use crate::cpu::Cpu;
use crate::encoding::{Layout, Weight, encode};
use crate::memory::{bytes_of, bytes_of_mut};
use crate::tuner::{ProductKind, TuneCase};

/// Tokens of a batch row in a trial of the weight gradient.
const ROW_TOKENS: usize = crate::TOKEN_BLOCK;

impl TuneCase {
    /// The cuts worth measuring, the unmeasured choice first.
    pub(crate) fn candidates(&self, cpu: &Cpu) -> Vec<Blocking> {
        let Self { t, n, k, .. } = *self;
        let (rows, columns, steps) = match self.product {
            ProductKind::Matmul => (t, n, k),
            ProductKind::MatmulBf16 => (t, n, Form::new(Compute::Bf16, cpu.simd()).steps(k)),
            ProductKind::MatmulDx => (t, k, n),
            ProductKind::MatmulDw => (n, k, ROW_TOKENS),
        };
        Blocking::candidates(rows, columns, steps, cpu)
    }
}

/// One case with operands allocated.
pub(crate) struct Trial {
    case: TuneCase,
    layout: Layout,
    weight: Vec<f32>,
    left: Vec<f32>,
    right: Vec<f32>,
    out: Vec<f32>,
}

impl Trial {
    pub(crate) fn new(case: TuneCase, layout: Layout) -> Self {
        let TuneCase { product, encoding, t, n, k } = case;
        let bytes = Weight::stored_bytes(encoding, layout, n, k);
        let is_dw = product == ProductKind::MatmulDw;
        let mut weight = vec![0.0; if is_dw { 0 } else { bytes.div_ceil(4) }];
        if !is_dw {
            let target = &mut bytes_of_mut(&mut weight)[..bytes];
            encode((encoding, layout), (n, k), &ramp(n * k), target);
        }
        let (left, right, out) = match product {
            ProductKind::Matmul | ProductKind::MatmulBf16 => (t * k, 0, t * n),
            ProductKind::MatmulDx => (t * n, 0, t * k),
            ProductKind::MatmulDw => (t * n, t * k, n * k),
        };
        Self { case, layout, weight, left: ramp(left), right: ramp(right), out: vec![0.0; out] }
    }

    pub(crate) fn run(&mut self, cpu: &Cpu, blocking: &Blocking) {
        let TuneCase { product, encoding, t, n, k } = self.case;
        let layout = self.layout;
        let bytes = Weight::stored_bytes(encoding, layout, n, k);
        let stored = bytes_of(&self.weight);
        let weight = Weight { encoding, layout, n, k, bytes: &stored[..bytes.min(stored.len())] };
        let (accumulate, row_tokens) = (false, ROW_TOKENS);
        match product {
            ProductKind::Matmul | ProductKind::MatmulBf16 => {
                let is_f32 = product == ProductKind::Matmul;
                let compute = if is_f32 { Compute::F32 } else { Compute::Bf16 };
                let (x_tk, y_tn) = (&self.left[..], &mut self.out[..]);
                let args = Matmul { x_tk, weight, bias_n: None, y_tn, t, accumulate, compute };
                matmul_cut(cpu, args, blocking);
            }
            ProductKind::MatmulDx => {
                let (dy_tn, dx_tk) = (&self.left[..], &mut self.out[..]);
                matmul_dx_cut(cpu, MatmulDx { dy_tn, weight, dx_tk, t, accumulate }, blocking);
            }
            ProductKind::MatmulDw => {
                let (dy_tn, x_tk) = (&self.left[..], &self.right[..]);
                let dw_nk = &mut self.out[..];
                let args = MatmulDw { dy_tn, x_tk, dw_nk, n, k, t, row_tokens, accumulate };
                matmul_dw_cut(cpu, args, blocking);
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn output(&self) -> &[f32] {
        &self.out
    }
}

/// Plain values of ordinary size: neither subnormal nor growing.
fn ramp(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7919 % 1021) as f32 / 512.0 - 1.0).collect()
}

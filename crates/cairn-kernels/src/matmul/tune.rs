//! What the tuner measures: the cuts a product can be made with, on operands in memory it is lent.

use super::arithmetic::Form;
use super::{Blocking, Matmul, MatmulDw, MatmulDx, matmul_cut, matmul_dw_cut, matmul_dx_cut};
use crate::compute::Compute;
use crate::cpu::Cpu;
use crate::encoding::{Layout, Weight, encode};
use crate::memory::{bytes_of, bytes_of_mut};
use crate::simd::LANES;
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

/// Lengths of a trial's operands in f32s, each rounded up to whole cache lines.
#[derive(Clone, Copy, Debug)]
struct Lengths {
    weight: usize,
    left: usize,
    right: usize,
    out: usize,
    /// The weight's values before they are encoded; they lie where the other operands come to lie.
    values: usize,
}

impl Lengths {
    fn of(case: TuneCase, layout: Layout) -> Self {
        let TuneCase { product, encoding, t, n, k } = case;
        let bytes = Weight::stored_bytes(encoding, encoding.layout_near(layout), n, k);
        let (weight, values) = match product {
            ProductKind::MatmulDw => (0, 0),
            _ => (bytes.div_ceil(4), n * k),
        };
        let (left, right, out) = match product {
            ProductKind::Matmul | ProductKind::MatmulBf16 => (t * k, 0, t * n),
            ProductKind::MatmulDx => (t * n, 0, t * k),
            ProductKind::MatmulDw => (t * n, t * k, n * k),
        };
        let lines = |len: usize| len.next_multiple_of(LANES);
        let (weight, left, right) = (lines(weight), lines(left), lines(right));
        Self { weight, left, right, out: lines(out), values }
    }

    fn total(&self) -> usize {
        self.weight + self.values.max(self.left + self.right + self.out)
    }
}

/// One case with its operands.
pub(crate) struct Trial<'a> {
    case: TuneCase,
    layout: Layout,
    weight: &'a [f32],
    left: &'a [f32],
    right: &'a [f32],
    out: &'a mut [f32],
}

impl<'a> Trial<'a> {
    /// f32s that a trial of `case` takes.
    pub(crate) fn len_of(case: TuneCase, layout: Layout) -> usize {
        Lengths::of(case, layout).total()
    }

    /// Lays the operands out in `room`; `None` if they need more.
    pub(crate) fn new(case: TuneCase, layout: Layout, room: &'a mut [f32]) -> Option<Self> {
        let TuneCase { encoding, n, k, .. } = case;
        let layout = encoding.layout_near(layout);
        let lengths = Lengths::of(case, layout);
        let (weight, rest) = room.get_mut(..lengths.total())?.split_at_mut(lengths.weight);
        if lengths.weight > 0 {
            let bytes = Weight::stored_bytes(encoding, layout, n, k);
            let values = &mut rest[..n * k];
            ramp(values);
            encode((encoding, layout), (n, k), values, &mut bytes_of_mut(weight)[..bytes]);
        }
        let (left, rest) = rest.split_at_mut(lengths.left);
        let (right, rest) = rest.split_at_mut(lengths.right);
        ramp(left);
        ramp(right);
        Some(Self { case, layout, weight, left, right, out: &mut rest[..lengths.out] })
    }

    pub(crate) fn run(&mut self, cpu: &Cpu, blocking: &Blocking) {
        let TuneCase { product, encoding, t, n, k } = self.case;
        let layout = self.layout;
        let bytes = Weight::stored_bytes(encoding, layout, n, k);
        let stored = bytes_of(self.weight);
        let weight = Weight { encoding, layout, n, k, bytes: &stored[..bytes.min(stored.len())] };
        let (accumulate, row_tokens) = (false, ROW_TOKENS);
        match product {
            ProductKind::Matmul | ProductKind::MatmulBf16 => {
                let is_f32 = product == ProductKind::Matmul;
                let compute = if is_f32 { Compute::F32 } else { Compute::Bf16 };
                let (x_tk, y_tn) = (&self.left[..t * k], &mut self.out[..t * n]);
                let args = Matmul { x_tk, weight, bias_n: None, y_tn, t, accumulate, compute };
                matmul_cut(cpu, args, blocking);
            }
            ProductKind::MatmulDx => {
                let (dy_tn, dx_tk) = (&self.left[..t * n], &mut self.out[..t * k]);
                matmul_dx_cut(cpu, MatmulDx { dy_tn, weight, dx_tk, t, accumulate }, blocking);
            }
            ProductKind::MatmulDw => {
                let (dy_tn, x_tk) = (&self.left[..t * n], &self.right[..t * k]);
                let dw_nk = &mut self.out[..n * k];
                let args = MatmulDw { dy_tn, x_tk, dw_nk, n, k, t, row_tokens, accumulate };
                matmul_dw_cut(cpu, args, blocking);
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn output(&self) -> &[f32] {
        self.out
    }
}

/// Fills with plain values of ordinary size: neither subnormal nor growing.
fn ramp(values: &mut [f32]) {
    for (i, value) in values.iter_mut().enumerate() {
        *value = (i * 7919 % 1021) as f32 / 512.0 - 1.0;
    }
}

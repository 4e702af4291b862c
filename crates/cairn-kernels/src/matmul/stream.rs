//! The forward product for a few tokens: the weight's panels are read front to back, once.
//!
//! Bound by memory: one multiply-add for each element read and token, so a token costs what the
//! weight's bytes cost. Several panels at a time cover the latency of one chain and keep several
//! streams of the memory system busy. The chains are those of the blocked product, bit for bit.

use std::ops::Range;

use super::pack::{Elements, ElementsVisitor, visit};
use super::product::Start;
use super::rows::{RowList, WeightRows};
use crate::cpu::{Cpu, SharedSlice};
use crate::isa::Simd;
use crate::simd::{F32x16, Kernel, LANES, dispatch};

/// Tokens up to which panels are streamed: beyond, packing pays.
pub(super) const STREAM_TOKENS_MAX: usize = 16;
/// Weight bytes of one task: long enough for the memory's streams, short enough to share out.
const TASK_BYTES: usize = 128 << 10;
/// Panels that are read together for one token.
const GROUP_PANELS: usize = 4;
/// Columns of a panel between a read and the hint for it.
const AHEAD: usize = 32;

/// A forward product over a weight in panels.
pub(super) struct StreamProduct<'a> {
    pub(super) x_tk: &'a [f32],
    pub(super) rows: WeightRows<'a>,
    pub(super) start: Start<'a>,
    pub(super) t: usize,
    /// Which row of the inputs, and of the outputs, each token stands for; its own if there are no
    /// lists.
    pub(super) routed: Option<(RowList<'a>, &'a [u32])>,
}

impl StreamProduct<'_> {
    #[inline(always)]
    fn input_row(&self, token: usize) -> usize {
        self.routed.map_or(token, |(list, _)| list.at(token))
    }

    #[inline(always)]
    fn output_row(&self, token: usize) -> usize {
        self.routed.map_or(token, |(_, rows)| rows[token] as usize)
    }

    /// Panels of one task, where `all` such products share out the threads together.
    pub(super) fn task_panels(&self, cpu: &Cpu, all: usize) -> usize {
        let panels = self.rows.n.div_ceil(LANES);
        let bytes = panels * self.rows.panel_bytes();
        let wanted = (all * bytes).div_ceil(TASK_BYTES).next_multiple_of(cpu.threads());
        (all * panels)
            .div_ceil(wanted.max(1))
            .clamp(1, panels.max(1))
            .next_multiple_of(GROUP_PANELS)
    }

    /// Computes the panels of one task. No other task has them.
    pub(super) fn run_part(&self, simd: Simd, y: &SharedSlice<'_, f32>, panels: Range<usize>) {
        let Range { start: first, end: last } = panels;
        visit(&self.rows, Panels { product: self, y, first, last, simd });
    }
}

/// Computes the product, panels shared out over the threads.
pub(super) fn run(cpu: &Cpu, product: &StreamProduct<'_>, y_tn: &mut [f32]) {
    let panels = product.rows.n.div_ceil(LANES);
    if panels == 0 || product.t == 0 {
        return;
    }
    let task_panels = product.task_panels(cpu, 1);
    let y = SharedSlice::new(y_tn);
    let simd = cpu.simd();
    cpu.parallel(panels.div_ceil(task_panels), |task, _| {
        let first = task * task_panels;
        product.run_part(simd, &y, first..panels.min(first + task_panels));
    });
}

/// The panels of one task, before their encoding is known.
struct Panels<'a> {
    product: &'a StreamProduct<'a>,
    y: &'a SharedSlice<'a, f32>,
    first: usize,
    last: usize,
    simd: Simd,
}

impl ElementsVisitor for Panels<'_> {
    type Output = ();
    fn visit<E: Elements>(self, elements: E) {
        let Self { product, y, first, last, simd } = self;
        dispatch(simd, Part { elements, product, y, first, last });
    }
}

/// The panels of one task.
struct Part<'a, E> {
    elements: E,
    product: &'a StreamProduct<'a>,
    y: &'a SharedSlice<'a, f32>,
    first: usize,
    last: usize,
}

impl<E: Elements> Kernel for Part<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let t = self.product.t;
        // Accumulators: at most 16 of 32 registers, or 8 of 16 where a vector takes two.
        if V::TILE.0 == 2 {
            match t {
                1 => self.groups::<V, 1, GROUP_PANELS>(),
                2 => self.groups::<V, 2, GROUP_PANELS>(),
                3 | 4 => self.groups::<V, 4, GROUP_PANELS>(),
                _ => self.groups::<V, 8, 2>(),
            }
        } else {
            match t {
                1 => self.groups::<V, 1, GROUP_PANELS>(),
                2 => self.groups::<V, 2, 2>(),
                _ => self.groups::<V, 4, 1>(),
            }
        }
    }
}

impl<E: Elements> Part<'_, E> {
    #[inline(always)]
    fn groups<V: F32x16, const ROWS: usize, const VECS: usize>(&self) {
        for panel in (self.first..self.last).step_by(VECS) {
            for token in (0..self.product.t).step_by(ROWS) {
                V::call(Group::<E, ROWS, VECS> {
                    elements: self.elements,
                    product: self.product,
                    y: self.y,
                    panel,
                    panels: VECS.min(self.last - panel),
                    token,
                    tokens: ROWS.min(self.product.t - token),
                });
            }
        }
    }
}

/// Up to `VECS` panels times up to `ROWS` tokens. Missing ones repeat the last and are not stored.
struct Group<'a, E, const ROWS: usize, const VECS: usize> {
    elements: E,
    product: &'a StreamProduct<'a>,
    y: &'a SharedSlice<'a, f32>,
    panel: usize,
    panels: usize,
    token: usize,
    tokens: usize,
}

impl<E: Elements, const ROWS: usize, const VECS: usize> Kernel for Group<'_, E, ROWS, VECS> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let k = self.product.rows.weight.k;
        let x: [*const f32; ROWS] = std::array::from_fn(|i| {
            let row = self.product.input_row(self.token + i.min(self.tokens - 1));
            self.product.x_tk[row * k..(row + 1) * k].as_ptr()
        });
        let panels: [usize; VECS] = std::array::from_fn(|j| self.panel + j.min(self.panels - 1));
        let mut sums = self.begin::<V>();
        let mut column = 0;
        while column < k {
            for &panel in &panels {
                self.elements.prefetch::<V>(panel, column + AHEAD);
            }
            let until = k.min(column + 4);
            while column < until {
                let mut lanes = [V::zero(); VECS];
                for (lane, &panel) in lanes.iter_mut().zip(&panels) {
                    // SAFETY: the weight has `panel` (below its last) and `column` (below k).
                    *lane = unsafe { self.elements.lanes(panel, column) };
                }
                for (row, x) in sums.iter_mut().zip(x) {
                    // SAFETY: `x` points to a row of k floats.
                    let x = V::splat(unsafe { *x.wrapping_add(column) });
                    for (sum, lane) in row.iter_mut().zip(lanes) {
                        *sum = x.mul_add(lane, *sum);
                    }
                }
                column += 1;
            }
        }
        self.finish(&sums);
    }
}

impl<E: Elements, const ROWS: usize, const VECS: usize> Group<'_, E, ROWS, VECS> {
    /// The output's columns of panel `j`, and how many there are.
    #[inline(always)]
    fn columns(&self, j: usize) -> (usize, usize) {
        let first = (self.panel + j) * LANES;
        (first, LANES.min(self.product.rows.n - first))
    }

    /// Where the outputs of token `i` and panel `j` lie.
    #[inline(always)]
    fn outputs(&self, i: usize, j: usize) -> Range<usize> {
        let (first, count) = self.columns(j);
        let row = self.product.output_row(self.token + i);
        let start = row * self.product.rows.n + first;
        start..start + count
    }

    #[inline(always)]
    fn begin<V: F32x16>(&self) -> [[V; VECS]; ROWS] {
        let mut sums = [[V::zero(); VECS]; ROWS];
        for (i, row) in sums.iter_mut().enumerate().take(self.tokens) {
            for (j, sum) in row.iter_mut().enumerate().take(self.panels) {
                match self.product.start {
                    Start::Zero => {}
                    Start::Bias(bias) => {
                        let (first, count) = self.columns(j);
                        *sum = V::load_partial(&bias[first..first + count], 0.0);
                    }
                    Start::Keep => {
                        // SAFETY: these panels' columns belong to this task alone.
                        let outputs = unsafe { self.y.slice_mut(self.outputs(i, j)) };
                        *sum = V::load_partial(outputs, 0.0);
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn finish<V: F32x16>(&self, sums: &[[V; VECS]; ROWS]) {
        for (i, row) in sums.iter().enumerate().take(self.tokens) {
            for (j, &sum) in row.iter().enumerate().take(self.panels) {
                // SAFETY: these panels' columns belong to this task alone.
                sum.store_partial(unsafe { self.y.slice_mut(self.outputs(i, j)) });
            }
        }
    }
}

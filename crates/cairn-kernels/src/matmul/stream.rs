//! The forward product for a few tokens: the weight's panels are read front to back, once. Weights in rows
//! have a loop of their own (`stream_rows`).
//!
//! Bound by memory: one multiply-add for each element read and token, so a token costs what the
//! weight's bytes cost. Several panels at a time cover the latency of one chain and keep several
//! streams of the memory system busy. The chains are those of the blocked product, bit for bit.

use std::cell::RefMut;
use std::marker::PhantomData;
use std::ops::Range;

use super::arithmetic::{Arithmetic, Form, Fused, PairDot, PairFlushed};
use super::pack::{Bf16Elements, Columns, Elements, ElementsVisitor, QUAD, visit};
use super::pack_bf16::{FlushedColumns, PairColumns, RoundRowsToPairs, RoundToBf16};
use super::pack_bf16z::Bf16zPairs;
use super::product::Start;
use super::rows::{RowList, WeightRows};
use super::shares::{GROUP_PANELS, Shares};
use super::stream_rows::{Bf16Values, F16Values, RowElements, RowsPart, Words};
use crate::cpu::{Cpu, SharedSlice};
use crate::encoding::{Encoding, Layout};
use crate::isa::Simd;
use crate::pool::{SCRATCH_BYTES, Scratch};
use crate::simd::{F32x16, Kernel, LANES, dispatch};

/// Tokens up to which weights are streamed: beyond, packing pays.
pub(super) const STREAM_TOKENS_MAX: usize = 16;
/// Weight bytes of one task of an expert.
const TASK_BYTES: usize = 128 << 10;
/// Columns of a panel between a read and the hint for it.
const AHEAD: usize = 32;

/// A forward product whose weight is streamed. Sixteen of its rows are a panel, however they lie.
pub(super) struct StreamProduct<'a> {
    /// Rows of inputs as the form's steps, from [`Inputs`].
    pub(super) x: &'a [f32],
    pub(super) form: Form,
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

    fn panels(&self) -> usize {
        self.rows.n.div_ceil(LANES)
    }

    /// Panels of one task, where `all` such products share out the threads together.
    pub(super) fn task_panels(&self, cpu: &Cpu, all: usize) -> usize {
        let panels = self.panels();
        let bytes = panels * self.rows.panel_bytes();
        let wanted = (all * bytes).div_ceil(TASK_BYTES).next_multiple_of(cpu.threads());
        (all * panels)
            .div_ceil(wanted.max(1))
            .clamp(1, panels.max(1))
            .next_multiple_of(GROUP_PANELS)
    }

    /// Computes the panels of one task. No other task has them. The thread likely goes on with those that
    /// follow after `skipped` more.
    pub(super) fn run_part(
        &self,
        simd: Simd,
        y: &SharedSlice<'_, f32>,
        panels: Range<usize>,
        skipped: usize,
    ) {
        let task = Task { product: self, y, panels, skipped, simd };
        if self.rows.weight.layout == Layout::RowMajor {
            return task.run_rows();
        }
        match (self.form, self.rows.weight.encoding) {
            (Form::Floats, _) => visit(&self.rows, task),
            (Form::Pairs, Encoding::Bf16z) => {
                let (elements, k) = (self.rows.bf16z(), self.rows.weight.k);
                task.run::<_, PairDot>(Bf16zPairs { elements, k });
            }
            (Form::Pairs, _) => task.run::<_, PairDot>(PairColumns(Bf16Elements::new(&self.rows))),
            (Form::Bf16Floats, Encoding::Bf16z) => {
                task.run::<_, PairFlushed>(FlushedColumns(self.rows.bf16z()));
            }
            (Form::Bf16Floats, _) => {
                task.run::<_, PairFlushed>(FlushedColumns(Bf16Elements::new(&self.rows)));
            }
        }
    }
}

/// The inputs of a streamed product as its form wants them: rounded once for all tasks.
pub(super) struct Inputs<'a> {
    pub(super) form: Form,
    x: &'a [f32],
    rounded: Option<(RefMut<'a, Scratch>, usize)>,
}

impl<'a> Inputs<'a> {
    /// `None` where rounded inputs are more than the scratch memory holds.
    pub(super) fn new(cpu: &'a Cpu, form: Form, x: &'a [f32], k: usize) -> Option<Self> {
        if form == Form::Floats {
            return Some(Self { form, x, rounded: None });
        }
        let len = x.len().checked_div(k).unwrap_or(0) * form.steps(k);
        if len > SCRATCH_BYTES / size_of::<f32>() {
            return None;
        }
        let mut scratch = cpu.partials();
        let target = scratch.f32s(len);
        match form {
            Form::Pairs => dispatch_call::<PairDot, _>(
                cpu.simd(),
                RoundRowsToPairs { x_tk: x, k, pairs: target },
            ),
            _ => dispatch(cpu.simd(), RoundToBf16 { x, y: target }),
        }
        Some(Self { form, x, rounded: Some((scratch, len)) })
    }

    pub(super) fn get(&mut self) -> &[f32] {
        match &mut self.rounded {
            Some((scratch, len)) => scratch.f32s(*len),
            None => self.x,
        }
    }
}

/// Runs a kernel as an arithmetic's kernels run.
fn dispatch_call<A: Arithmetic, K: Kernel>(simd: Simd, kernel: K) -> K::Output {
    struct Called<A, K>(K, PhantomData<A>);
    impl<A: Arithmetic, K: Kernel> Kernel for Called<A, K> {
        type Output = K::Output;
        #[inline(always)]
        fn run<V: F32x16>(self) -> K::Output {
            A::call::<V, K>(self.0)
        }
    }
    dispatch(simd, Called(kernel, PhantomData::<A>))
}

/// Computes products, the panels of all shared out over the threads.
pub(super) fn run<const N: usize>(
    cpu: &Cpu,
    products: &[StreamProduct<'_>; N],
    ys_tn: [&mut [f32]; N],
) {
    let panels_of = |product: &StreamProduct<'_>| match product.t {
        0 => (0, 0),
        _ => (product.panels(), product.rows.panel_bytes()),
    };
    let shares = Shares::new(products.each_ref().map(panels_of), cpu.threads());
    let (ys, simd, threads) = (ys_tn.map(SharedSlice::new), cpu.simd(), cpu.threads());
    cpu.parallel(shares.tasks(), |task, _| {
        let (product, panels) = shares.of(task);
        let skipped = (threads - 1) * panels.len();
        products[product].run_part(simd, &ys[product], panels, skipped);
    });
}

/// The panels of one task, before it is known how they are read.
struct Task<'a> {
    product: &'a StreamProduct<'a>,
    y: &'a SharedSlice<'a, f32>,
    panels: Range<usize>,
    skipped: usize,
    simd: Simd,
}

impl Task<'_> {
    fn run<C: Columns, A: Arithmetic>(self, columns: C) {
        let Self { product, y, panels, skipped, simd } = self;
        dispatch(simd, Part { columns, product, y, panels, skipped, arithmetic: PhantomData::<A> });
    }

    /// As [`run`](Self::run), of a weight in rows.
    fn run_rows(self) {
        match (self.product.form, self.product.rows.weight.encoding) {
            (Form::Floats, Encoding::F32) => self.run_elements::<Words, Fused>(),
            (Form::Floats, Encoding::Bf16) => self.run_elements::<Bf16Values<false>, Fused>(),
            (Form::Floats, Encoding::F16) => self.run_elements::<F16Values, Fused>(),
            (Form::Pairs, Encoding::Bf16) => self.run_elements::<Words, PairDot>(),
            (Form::Bf16Floats, Encoding::Bf16) => {
                self.run_elements::<Bf16Values<true>, PairFlushed>();
            }
            (form, encoding) => unreachable!("{form:?} of {encoding} in rows"),
        }
    }

    fn run_elements<E: RowElements, A: Arithmetic>(self) {
        let Self { product, y, panels, skipped, simd } = self;
        // Panics unless the elements are aligned, which the loop takes for granted.
        let is_wide = product.rows.weight.encoding == Encoding::F32;
        let weight = product.rows.weight;
        let elements = if is_wide { weight.f32s().len() } else { weight.u16s().len() };
        assert_eq!(elements, weight.n * weight.k, "elements of a weight in rows");
        let kinds = PhantomData::<(E, A)>;
        dispatch(simd, RowsPart { product, y, panels, skipped, kinds });
    }
}

impl ElementsVisitor for Task<'_> {
    type Output = ();
    fn visit<E: Elements>(self, elements: E) {
        self.run::<E, Fused>(elements);
    }
}

/// The panels of one task.
struct Part<'a, C, A> {
    columns: C,
    product: &'a StreamProduct<'a>,
    y: &'a SharedSlice<'a, f32>,
    panels: Range<usize>,
    skipped: usize,
    arithmetic: PhantomData<A>,
}

impl<C: Columns, A: Arithmetic> Kernel for Part<'_, C, A> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let t = self.product.t;
        // Accumulators: at most 16 of 32 registers, or 8 of 16 where a vector takes two.
        if V::TILE.0 == 2 {
            match t {
                1 if self.panels.len() <= GROUP_PANELS / 2 => {
                    self.groups::<V, 1, { GROUP_PANELS / 2 }>();
                }
                1 => self.groups::<V, 1, GROUP_PANELS>(),
                2 => self.groups::<V, 2, 2>(),
                3 | 4 => self.groups::<V, 4, 2>(),
                _ => self.groups::<V, 8, 1>(),
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

impl<C: Columns, A: Arithmetic> Part<'_, C, A> {
    #[inline(always)]
    fn groups<V: F32x16, const ROWS: usize, const VECS: usize>(&self) {
        for panel in self.panels.clone().step_by(VECS) {
            let skipped = if panel + VECS < self.panels.end { 0 } else { self.skipped };
            for token in (0..self.product.t).step_by(ROWS) {
                A::call::<V, _>(Group::<C, A, ROWS, VECS> {
                    columns: self.columns,
                    tile: OutputTile {
                        product: self.product,
                        y: self.y,
                        panel,
                        panels: VECS.min(self.panels.end - panel),
                        token,
                        tokens: ROWS.min(self.product.t - token),
                    },
                    ahead: VECS + skipped,
                    arithmetic: PhantomData,
                });
            }
        }
    }
}

/// Up to `VECS` panels times up to `ROWS` tokens. Missing ones repeat the last and are not stored.
struct Group<'a, C, A, const ROWS: usize, const VECS: usize> {
    columns: C,
    tile: OutputTile<'a>,
    /// Panels to those that are likely read next.
    ahead: usize,
    arithmetic: PhantomData<A>,
}

impl<C: Columns, A: Arithmetic, const ROWS: usize, const VECS: usize> Kernel
    for Group<'_, C, A, ROWS, VECS>
{
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let product = self.tile.product;
        let steps = product.form.steps(product.rows.weight.k);
        let x: [*const f32; ROWS] = std::array::from_fn(|i| self.tile.inputs(i, steps).as_ptr());
        let panels: [usize; VECS] =
            std::array::from_fn(|j| self.tile.panel + j.min(self.tile.panels - 1));
        let mut sums = self.tile.begin::<V, A, ROWS, VECS>();
        for panel in panels {
            self.columns.prefetch_panel::<V>(panel + self.ahead);
        }
        let quad_steps = if C::QUADS { self.columns.quad_steps(steps) } else { 0 };
        let mut missing = Missing::new(self.columns, &panels);
        let mut step = 0;
        while step < steps {
            for &panel in &panels {
                if C::ASKS_NEXT_PANELS {
                    self.columns.prefetch::<V>(panel + self.ahead, step);
                } else {
                    self.columns.prefetch::<V>(panel, step + AHEAD);
                }
            }
            let until = steps.min(step + QUAD);
            if step + QUAD <= quad_steps {
                self.quad_step::<V>(&panels, &x, step, &mut missing, &mut sums);
                step = until;
            }
            while step + A::TOGETHER <= until {
                for i in (0..A::TOGETHER).rev() {
                    self.step::<V>(&panels, &x, step + i, &mut sums);
                }
                step += A::TOGETHER;
            }
            if step < until {
                // The last input is the first of a pair whose second is zero: −0 becomes 0.
                sums.iter_mut().flatten().for_each(|sum| *sum = *sum + V::zero());
                self.step::<V>(&panels, &x, step, &mut sums);
                step += 1;
            }
        }
        self.tile.finish::<V, A, ROWS, VECS>(&sums);
    }
}

/// What the bare quads of some panels lack, from some step on: known beforehand, so that decoding need
/// not look for it.
struct Missing<const VECS: usize> {
    /// How many of each panel are behind.
    index: [usize; VECS],
    /// The step of each panel's next.
    step: [usize; VECS],
}

impl<const VECS: usize> Missing<VECS> {
    #[inline(always)]
    fn new<C: Columns>(columns: C, panels: &[usize; VECS]) -> Self {
        Self { index: [0; VECS], step: panels.map(|panel| columns.missing_step(panel, 0)) }
    }

    /// The quad of the `j`-th panel.
    #[inline(always)]
    fn complete<C: Columns, V: F32x16>(
        &mut self,
        columns: C,
        (j, panel): (usize, usize),
        step: usize,
        quad: [V; QUAD],
    ) -> [V; QUAD] {
        let (quad, index) = columns.completed(panel, step, self.index[j], quad);
        self.index[j] = index;
        self.step[j] = columns.missing_step(panel, index);
        quad
    }
}

impl<C: Columns, A: Arithmetic, const ROWS: usize, const VECS: usize> Group<'_, C, A, ROWS, VECS> {
    /// One step of all chains.
    #[inline(always)]
    fn step<V: F32x16>(
        &self,
        panels: &[usize; VECS],
        x: &[*const f32; ROWS],
        step: usize,
        sums: &mut [[V; VECS]; ROWS],
    ) {
        let mut lanes = [V::zero(); VECS];
        for (lane, &panel) in lanes.iter_mut().zip(panels) {
            // SAFETY: the weight has `panel` (below its last) and the columns of `step`.
            *lane = unsafe { self.columns.lanes(panel, step) };
        }
        for (row, x) in sums.iter_mut().zip(x) {
            // SAFETY: `x` points to a row of as many floats as there are steps.
            let x = V::splat(unsafe { *x.wrapping_add(step) });
            for (sum, lane) in row.iter_mut().zip(lanes) {
                *sum = A::step(x, lane, *sum);
            }
        }
    }

    /// Four steps of all chains.
    #[inline(always)]
    fn quad_step<V: F32x16>(
        &self,
        panels: &[usize; VECS],
        x: &[*const f32; ROWS],
        step: usize,
        missing: &mut Missing<VECS>,
        sums: &mut [[V; VECS]; ROWS],
    ) {
        // One panel after the other, so that a quad stays in registers; written out, so that sums do.
        const { assert!(VECS <= 4) };
        self.quad_of_panel::<V, 0>(panels, x, step, missing, sums);
        if VECS > 1 {
            self.quad_of_panel::<V, 1>(panels, x, step, missing, sums);
        }
        if VECS > 2 {
            self.quad_of_panel::<V, 2>(panels, x, step, missing, sums);
        }
        if VECS > 3 {
            self.quad_of_panel::<V, 3>(panels, x, step, missing, sums);
        }
    }

    /// Four steps of the chains of panel `J`.
    #[inline(always)]
    fn quad_of_panel<V: F32x16, const J: usize>(
        &self,
        panels: &[usize; VECS],
        x: &[*const f32; ROWS],
        step: usize,
        missing: &mut Missing<VECS>,
        sums: &mut [[V; VECS]; ROWS],
    ) {
        // SAFETY: the weight has the panel (below its last) and the columns of these steps.
        let (mut quad, _) = unsafe { self.columns.bare_quad(panels[J], step) };
        if missing.step[J] < step + QUAD {
            quad = missing.complete(self.columns, (J, panels[J]), step, quad);
        }
        for (row, x) in sums.iter_mut().zip(x) {
            for first in (0..QUAD).step_by(A::TOGETHER) {
                for i in (first..first + A::TOGETHER).rev() {
                    // SAFETY: `x` points to a row of as many floats as there are steps.
                    let x = V::splat(unsafe { *x.wrapping_add(step + i) });
                    row[J] = A::step(x, quad[i], row[J]);
                }
            }
        }
    }
}

/// Where the results of some panels and tokens lie.
#[derive(Clone, Copy)]
pub(super) struct OutputTile<'a> {
    pub(super) product: &'a StreamProduct<'a>,
    pub(super) y: &'a SharedSlice<'a, f32>,
    pub(super) panel: usize,
    pub(super) panels: usize,
    pub(super) token: usize,
    pub(super) tokens: usize,
}

impl<'a> OutputTile<'a> {
    /// The inputs of token `i`, or of the last there is, `steps` of them.
    #[inline(always)]
    pub(super) fn inputs(&self, i: usize, steps: usize) -> &'a [f32] {
        let row = self.product.input_row(self.token + i.min(self.tokens - 1));
        &self.product.x[row * steps..(row + 1) * steps]
    }

    /// The output's columns of panel `j`, and how many there are.
    #[inline(always)]
    fn outputs_of(&self, j: usize) -> (usize, usize) {
        let first = (self.panel + j) * LANES;
        (first, LANES.min(self.product.rows.n - first))
    }

    /// Where the outputs of token `i` and panel `j` lie.
    #[inline(always)]
    fn outputs(&self, i: usize, j: usize) -> Range<usize> {
        let (first, count) = self.outputs_of(j);
        let row = self.product.output_row(self.token + i);
        let start = row * self.product.rows.n + first;
        start..start + count
    }

    #[inline(always)]
    pub(super) fn begin<V: F32x16, A: Arithmetic, const ROWS: usize, const VECS: usize>(
        &self,
    ) -> [[V; VECS]; ROWS] {
        let mut sums = [[V::zero(); VECS]; ROWS];
        for (i, row) in sums.iter_mut().enumerate().take(self.tokens) {
            for (j, sum) in row.iter_mut().enumerate().take(self.panels) {
                match self.product.start {
                    Start::Zero => {}
                    Start::Bias(bias) => {
                        let (first, count) = self.outputs_of(j);
                        *sum = A::begin(V::load_partial(&bias[first..first + count], 0.0));
                    }
                    Start::Keep => {
                        // SAFETY: these panels' columns belong to this task alone.
                        let outputs = unsafe { self.y.slice_mut(self.outputs(i, j)) };
                        *sum = A::begin(V::load_partial(outputs, 0.0));
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    pub(super) fn finish<V: F32x16, A: Arithmetic, const ROWS: usize, const VECS: usize>(
        &self,
        sums: &[[V; VECS]; ROWS],
    ) {
        for (i, row) in sums.iter().enumerate().take(self.tokens) {
            for (j, &sum) in row.iter().enumerate().take(self.panels) {
                // SAFETY: these panels' columns belong to this task alone.
                A::finish(sum).store_partial(unsafe { self.y.slice_mut(self.outputs(i, j)) });
            }
        }
    }
}

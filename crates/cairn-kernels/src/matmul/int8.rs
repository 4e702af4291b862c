//! The forward product of bytes: codes of a weight times activations rounded to bytes.
//!
//! [`crate::compute`] says what is computed. A group's products are summed in integers, so the only order
//! that matters is that of the groups: one chain an output. For a few tokens weights are read as they are
//! stored, front to back: panels are what the instruction wants. For many, two panels stay in the
//! second-level cache while the rows go by, nibbles made bytes once before.
//!
//! On Zen 4 a tile of many tokens is bound by the two units that multiply: eight `vpdpbusd`, the product of
//! the scales and the multiply-add of the sum for each group of an output, so 80 % of the peak of the
//! instruction at most; alone it reaches 75 %.
//!
//! A row of inputs is packed as [`INPUT_WORDS`] words a group: its 32 bytes, its scale, and what takes the
//! codes' offset away.

use std::marker::PhantomData;
use std::ops::Range;

use super::Matmul;
use super::product::Start;
use super::shares::{GROUP_PANELS, Shares};
use crate::compute::{BYTE_MAX, GROUP, MAGNITUDE_MIN, ROUNDER};
use crate::cpu::{Cpu, SharedSlice};
use crate::encoding::{Encoding, Grouped, PART_BYTES, Weight};
use crate::isa::Simd;
use crate::pool::{SCRATCH_BYTES, Scratch};
use crate::simd::{F32x16, I32x16, Kernel, LANES, Mask16, dispatch};

/// Words of bytes of a group.
const CODE_WORDS: usize = GROUP / 4;
/// Words of a group of a row of inputs: bytes, scale, correction.
const INPUT_WORDS: usize = CODE_WORDS + 2;
/// Bytes of packed rows that are worked on at once: half of a second-level cache.
const ROWS_BYTES: usize = 512 << 10;
/// From so many tokens on, weights are read for blocks of rows.
const MANY_TOKENS: usize = 24;
/// Bytes of a panel's codes that are made bytes, for each group.
const GROUP_BYTES: usize = GROUP * LANES;
/// Bytes of a line of memory.
const LINE_BYTES: usize = 64;
/// Groups whose scales share a line.
const SCALE_GROUPS: usize = LINE_BYTES / (2 * LANES);
/// Rows that one task packs.
const PACK_ROWS: usize = 16;

/// Computes `y = x · Wᵀ` in bytes.
pub(super) fn run(cpu: &Cpu, args: Matmul<'_>) {
    run_each(cpu, [args]);
}

/// Computes products of the same rows by weights of the same encoding.
pub(super) fn run_each<const N: usize>(cpu: &Cpu, mut products: [Matmul<'_>; N]) {
    let Some(&Matmul { x_tk, weight, t, .. }) = products.first() else { return };
    let (k, row_words) = (weight.k, row_words(weight.k));
    let rows_max = (SCRATCH_BYTES / 4).checked_div(row_words).unwrap_or(t).max(1);
    let mut scratch = cpu.partials();
    for first in (0..t).step_by(rows_max) {
        let rows = rows_max.min(t - first);
        let packed = scratch.f32s(rows * row_words);
        pack(cpu, &weight, &x_tk[first * k..(first + rows) * k], packed);
        let packed = &*packed;
        let parts = products.each_ref().map(|args| Product::new(packed, args, rows));
        let ys = products.each_mut().map(|args| {
            let n = args.weight.n;
            &mut args.y_tn[first * n..(first + rows) * n]
        });
        multiply(cpu, &parts, ys);
    }
}

/// Words of a packed row.
fn row_words(k: usize) -> usize {
    let words = k.div_ceil(GROUP) * INPUT_WORDS;
    assert!(words * 4 <= SCRATCH_BYTES, "{k} inputs are more than the scratch memory holds");
    words
}

/// What is subtracted from a code to give its value.
fn offset(encoding: Encoding) -> f32 {
    if encoding == Encoding::Q4 { 8.0 } else { 128.0 }
}

/// Rounds rows to bytes.
fn pack(cpu: &Cpu, weight: &Weight<'_>, x_tk: &[f32], packed: &mut [f32]) {
    let k = weight.k;
    if packed.is_empty() {
        return;
    }
    let row_words = k.div_ceil(GROUP) * INPUT_WORDS;
    let (simd, offset) = (cpu.simd(), offset(weight.encoding));
    let rows = x_tk.len() / k;
    if rows <= PACK_ROWS {
        dispatch(simd, PackRows { x_tk, k, offset, packed });
        return;
    }
    cpu.parallel_chunks(packed, PACK_ROWS * row_words, |start, packed, _| {
        let (first, rows) = (start / row_words, packed.len() / row_words);
        let x_tk = &x_tk[first * k..(first + rows) * k];
        dispatch(simd, PackRows { x_tk, k, offset, packed });
    });
}

/// Rounds rows of `k` inputs to bytes.
struct PackRows<'a> {
    x_tk: &'a [f32],
    k: usize,
    offset: f32,
    packed: &'a mut [f32],
}

impl Kernel for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let mut packed = self.packed;
        for row in self.x_tk.chunks_exact(self.k) {
            let (targets, rest) = packed.split_at_mut(row.len().div_ceil(GROUP) * INPUT_WORDS);
            packed = rest;
            let (targets, _) = targets.as_chunks_mut::<INPUT_WORDS>();
            for (groups, targets) in row.chunks(GROUP * LANES).zip(targets.chunks_mut(LANES)) {
                pack_groups::<V>(groups, self.offset, targets);
            }
        }
    }
}

/// Rounds up to sixteen groups of inputs, missing inputs being zeros. What is one number a group is a lane:
/// largest magnitudes and sums of whole numbers are the same in any order.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "sums of bytes")]
fn pack_groups<V: F32x16>(x: &[f32], offset: f32, targets: &mut [[f32; INPUT_WORDS]]) {
    let mut groups = [[V::zero(); 2]; LANES];
    let (mut largest, mut nothing) = ([V::zero(); LANES], [V::zero(); LANES]);
    for (i, x) in x.chunks(GROUP).enumerate() {
        let (low, high) = x.split_at(x.len().min(LANES));
        let (low, high) = match (low.first_chunk(), high.first_chunk()) {
            (Some(low), Some(high)) => (V::load(low), V::load(high)),
            _ => (V::load_partial(low, 0.0), V::load_partial(high, 0.0)),
        };
        largest[i] = low.abs().max(high.abs());
        // Zeros, or no number where an input is none or infinite.
        nothing[i] = low * V::zero() + high * V::zero();
        groups[i] = [low, high];
    }
    let largest = folded(largest, |largest, lanes| largest.max(lanes));
    let is_finite = folded(nothing, |sum, lanes| sum + lanes).eq(V::zero());
    let is_live = largest.lt(V::splat(MAGNITUDE_MIN)).not().and(is_finite);
    let inverse = V::select(is_live, V::splat(BYTE_MAX) / largest, V::zero()).to_array();
    let dead = V::select(is_finite, V::zero(), V::splat(f32::NAN));
    let scale = V::select(is_live, largest / V::splat(BYTE_MAX), dead).to_array();
    let mut sums = [V::zero(); LANES];
    for (i, target) in targets.iter_mut().enumerate() {
        let mut bytes = [0_u8; GROUP];
        let (halves, _) = bytes.as_chunks_mut::<LANES>();
        for (x, bytes) in groups[i].into_iter().zip(halves) {
            let x = if inverse[i] == 0.0 { V::zero() } else { x };
            let rounded = x * V::splat(inverse[i]) + V::splat(ROUNDER);
            sums[i] = sums[i] + (rounded - V::splat(ROUNDER));
            *bytes = rounded.low_bytes();
        }
        let (quads, _) = bytes.as_chunks::<4>();
        for (word, quad) in target.iter_mut().zip(quads) {
            *word = f32::from_bits(u32::from_le_bytes(*quad));
        }
        target[CODE_WORDS] = scale[i];
    }
    // Exact: whole numbers below 2²⁴.
    let corrections = (folded(sums, |sum, lanes| sum + lanes) * V::splat(-offset)).to_array();
    for (target, correction) in targets.iter_mut().zip(corrections) {
        target[CODE_WORDS + 1] = f32::from_bits((correction as i32).cast_unsigned());
    }
}

/// Folds the lanes of each vector; lane i of the result is that of vector i.
#[inline(always)]
fn folded<V: F32x16>(vectors: [V; LANES], fold: impl Fn(V, V) -> V) -> V {
    V::transpose(vectors).into_iter().fold(V::zero(), fold)
}

/// Packed rows times a weight.
struct Product<'a> {
    x: &'a [f32],
    codes: Grouped<'a>,
    start: Start<'a>,
    t: usize,
    n: usize,
    groups: usize,
}

impl<'a> Product<'a> {
    /// The product of `t` rows.
    fn new(x: &'a [f32], args: &Matmul<'a>, t: usize) -> Self {
        let (weight, start) = (args.weight, args.start());
        let groups = weight.k.div_ceil(GROUP);
        Self { x, codes: weight.grouped(), start, t, n: weight.n, groups }
    }
}

fn multiply<const N: usize>(cpu: &Cpu, products: &[Product<'_>; N], ys_tn: [&mut [f32]; N]) {
    let panels_of =
        |product: &Product<'_>| (product.n.div_ceil(LANES), product.codes.panel_bytes());
    let shares = Shares::new(products.each_ref().map(panels_of), cpu.threads());
    let (ys, simd, threads) = (ys_tn.map(SharedSlice::new), cpu.simd(), cpu.threads());
    cpu.parallel(shares.tasks(), |task, scratch| {
        let (product, panels) = shares.of(task);
        let skipped = (threads - 1) * panels.len();
        let task = Task { product: &products[product], y: &ys[product], panels, skipped, scratch };
        task.run(simd);
    });
}

/// What one task computes, and memory for it.
struct Task<'a> {
    product: &'a Product<'a>,
    y: &'a SharedSlice<'a, f32>,
    panels: Range<usize>,
    /// Panels behind them that other threads likely have.
    skipped: usize,
    scratch: &'a mut Scratch,
}

impl Task<'_> {
    fn run(self, simd: Simd) {
        match (simd.has_byte_dot(), self.product.codes.format.is_nibble()) {
            (true, false) => self.part::<Instruction, false>(simd),
            (true, true) => self.part::<Instruction, true>(simd),
            (false, false) => self.part::<Words, false>(simd),
            (false, true) => self.part::<Words, true>(simd),
        }
    }

    fn part<D: ByteDot, const NIBBLES: bool>(self, simd: Simd) {
        dispatch(simd, Part::<D, NIBBLES> { task: self, dot: PhantomData });
    }
}

/// How four products of bytes are added to a sum.
trait ByteDot {
    /// Runs a kernel that does so.
    fn call<V: F32x16, K: Kernel>(kernel: K) -> K::Output;
    /// `sum + Σ w·x` over the four bytes of each lane, those of `w` unsigned, those of `x` signed.
    fn add<V: F32x16>(sum: V::Int, w: V::Int, x: V::Int) -> V::Int;
}

/// `vpdpbusd`. Used only behind [`Simd::has_byte_dot`].
struct Instruction;

impl ByteDot for Instruction {
    #[inline(always)]
    fn call<V: F32x16, K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: `run_part` has asked for the instruction.
        unsafe { V::call_byte_dot(kernel) }
    }
    #[inline(always)]
    fn add<V: F32x16>(sum: V::Int, w: V::Int, x: V::Int) -> V::Int {
        sum.byte_dot(w, x)
    }
}

/// Bytes widened to words.
struct Words;

impl ByteDot for Words {
    #[inline(always)]
    fn call<V: F32x16, K: Kernel>(kernel: K) -> K::Output {
        V::call(kernel)
    }
    #[inline(always)]
    fn add<V: F32x16>(sum: V::Int, w: V::Int, x: V::Int) -> V::Int {
        sum.byte_dot_in_words(w, x)
    }
}

/// The panels of one task.
struct Part<'a, D, const NIBBLES: bool> {
    task: Task<'a>,
    dot: PhantomData<D>,
}

impl<D: ByteDot, const NIBBLES: bool> Kernel for Part<'_, D, NIBBLES> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(mut self) {
        let t = self.task.product.t;
        // Two accumulators an output, one of integers: at most 24 of 32 registers.
        if V::TILE.0 == 2 {
            match t {
                1 if self.task.panels.len() <= GROUP_PANELS / 2 => self.groups::<V, 1, 2>(),
                1 => self.groups::<V, 1, GROUP_PANELS>(),
                2..=4 => self.groups::<V, 4, 2>(),
                5..MANY_TOKENS => self.groups::<V, 6, 2>(),
                _ => self.blocks::<V, 6, 2>(),
            }
        } else {
            match t {
                1 => self.groups::<V, 1, 2>(),
                2..MANY_TOKENS => self.groups::<V, 2, 1>(),
                _ => self.blocks::<V, 2, 1>(),
            }
        }
    }
}

impl<D: ByteDot, const NIBBLES: bool> Part<'_, D, NIBBLES> {
    /// Where the codes of some panels from `panel` on lie; missing ones repeat the last.
    #[inline(always)]
    fn stored<const VECS: usize>(&self, panel: usize) -> [*const u8; VECS] {
        let Task { product, panels, .. } = &self.task;
        let mut stored = [product.codes.part(panel, 0).cast::<u8>(); VECS];
        for (j, stored) in stored.iter_mut().enumerate() {
            *stored = product.codes.part(panel + j.min(panels.end - panel - 1), 0).cast();
        }
        stored
    }

    /// A few tokens: codes as they are stored.
    #[inline(always)]
    fn groups<V: F32x16, const ROWS: usize, const VECS: usize>(&self) {
        for panel in self.task.panels.clone().step_by(VECS) {
            let codes = self.stored::<VECS>(panel);
            for token in (0..self.task.product.t).step_by(ROWS) {
                let tokens = token..self.task.product.t.min(token + ROWS);
                self.tile::<V, ROWS, VECS, NIBBLES, true>(panel, codes, tokens);
            }
        }
    }

    /// Many tokens: blocks of rows, which stay in the second-level cache.
    #[inline(always)]
    fn blocks<V: F32x16, const ROWS: usize, const VECS: usize>(&mut self) {
        let Product { t, groups, codes, .. } = *self.task.product;
        let panel_bytes = groups * GROUP_BYTES;
        if NIBBLES && VECS * panel_bytes > SCRATCH_BYTES {
            return self.groups::<V, ROWS, VECS>();
        }
        let most = ROWS_BYTES.checked_div(4 * groups * INPUT_WORDS).unwrap_or(t);
        let most = (most / ROWS * ROWS).max(ROWS);
        // All of nearly one length: in a short last one, panels would not come in time.
        let block = t.div_ceil(t.div_ceil(most)).next_multiple_of(ROWS);
        for first in (0..t).step_by(block) {
            let tokens = first..t.min(first + block);
            for panel in self.task.panels.clone().step_by(VECS) {
                let mut codes_at = self.stored::<VECS>(panel);
                if NIBBLES {
                    self.unpack::<V, VECS>(&mut codes_at);
                }
                // The next panels come while these are multiplied.
                let bytes = VECS * codes.panel_bytes();
                let mut next = codes.part(panel, 0).cast::<u8>().wrapping_add(bytes);
                let lines = bytes.div_ceil(LINE_BYTES).div_ceil(tokens.len().div_ceil(ROWS));
                for token in tokens.clone().step_by(ROWS) {
                    for _ in 0..lines {
                        V::prefetch_far(next);
                        next = next.wrapping_add(LINE_BYTES);
                    }
                    let tokens = token..tokens.end.min(token + ROWS);
                    self.tile::<V, ROWS, VECS, false, false>(panel, codes_at, tokens);
                }
            }
        }
    }

    /// Makes bytes of the nibbles of some panels, in scratch memory.
    #[inline(always)]
    fn unpack<V: F32x16, const VECS: usize>(&mut self, codes: &mut [*const u8; VECS]) {
        let words = self.task.product.groups * GROUP_BYTES / 4;
        let panels = self.task.scratch.f32s(VECS * words).chunks_exact_mut(words.max(1));
        for (codes, panel) in codes.iter_mut().zip(panels) {
            let mut from = *codes;
            let (parts, _) = panel.as_chunks_mut::<LANES>();
            for [low, high] in parts.as_chunks_mut().0 {
                // SAFETY: the panel has as many parts as half of those that are made of them.
                let both = V::Int::load_bytes(unsafe { &*from.cast::<[u8; PART_BYTES]>() });
                from = from.wrapping_add(PART_BYTES);
                low_halves::<V>(both).as_float().store(low);
                high_halves::<V>(both).as_float().store(high);
            }
            // Last: what is written through the slice afterwards would not be this pointer's to read. The
            // task's scratch memory outlives the product.
            *codes = panel.as_ptr().cast();
        }
    }

    #[inline(always)]
    fn tile<
        V: F32x16,
        const ROWS: usize,
        const VECS: usize,
        const HALVES: bool,
        const FAR: bool,
    >(
        &self,
        panel: usize,
        codes: [*const u8; VECS],
        tokens: Range<usize>,
    ) {
        let Task { product, y, panels, .. } = &self.task;
        D::call::<V, _>(Tile::<D, ROWS, VECS, HALVES, FAR> {
            product,
            y,
            codes,
            panel,
            panels: VECS.min(panels.end - panel),
            tokens,
            ahead: self.ahead(panel, VECS),
            dot: PhantomData,
        });
    }

    /// Bytes from what is read of some panels to what is read next where they end: the same of the panels
    /// behind them, or of the likely next task.
    #[inline(always)]
    fn ahead(&self, panel: usize, vecs: usize) -> usize {
        let Task { product, panels, skipped, .. } = &self.task;
        let next = if panel + vecs < panels.end { 0 } else { *skipped };
        (vecs + next) * product.codes.panel_bytes()
    }
}

/// The nibbles in the low halves of bytes.
#[inline(always)]
fn low_halves<V: F32x16>(both: V::Int) -> V::Int {
    both.and(V::Int::splat(0x0f0f_0f0f))
}

/// The nibbles in the high halves of bytes.
#[inline(always)]
fn high_halves<V: F32x16>(both: V::Int) -> V::Int {
    low_halves::<V>(both.shr(4))
}

/// Up to `VECS` panels times up to `ROWS` tokens. Missing ones repeat the last and are not stored. Codes are
/// `HALVES` of bytes or bytes, out of memory that is `FAR` or in a cache.
struct Tile<'a, D, const ROWS: usize, const VECS: usize, const HALVES: bool, const FAR: bool> {
    product: &'a Product<'a>,
    y: &'a SharedSlice<'a, f32>,
    codes: [*const u8; VECS],
    panel: usize,
    panels: usize,
    tokens: Range<usize>,
    /// Bytes between a read out of memory and the hint for it, which goes to the second-level cache: there is
    /// room for more lines on their way.
    ahead: usize,
    dot: PhantomData<D>,
}

impl<D: ByteDot, const ROWS: usize, const VECS: usize, const HALVES: bool, const FAR: bool> Kernel
    for Tile<'_, D, ROWS, VECS, HALVES, FAR>
{
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Product { x, codes, groups, .. } = *self.product;
        let row_words = groups * INPUT_WORDS;
        let mut rows = [x.as_ptr(); ROWS];
        for (i, row) in rows.iter_mut().enumerate() {
            let token = self.tokens.start + i.min(self.tokens.len() - 1);
            *row = x[token * row_words..(token + 1) * row_words].as_ptr();
        }
        let mut parts = self.codes;
        let mut scales = [codes.scales(self.panel, 0); VECS];
        for (j, scales) in scales.iter_mut().enumerate() {
            *scales = codes.scales(self.panel + j.min(self.panels - 1), 0);
        }
        if !FAR {
            self.ask_outputs::<V>();
        }
        let mut sums = self.begin::<V>();
        for group in 0..groups {
            let totals = self.group::<V>(&rows, &mut parts);
            let mut scale = [V::zero(); VECS];
            for (scale, from) in scale.iter_mut().zip(&mut scales) {
                if FAR && group.is_multiple_of(SCALE_GROUPS) {
                    V::prefetch_far(from.wrapping_add(self.ahead));
                }
                // SAFETY: every panel has sixteen f16 scales for each group, aligned to 32 bytes.
                *scale = V::from_f16(unsafe { &*from.cast() });
                *from = from.wrapping_add(2 * LANES);
            }
            for ((sums, totals), row) in sums.iter_mut().zip(&totals).zip(&mut rows) {
                // SAFETY: the row has the words of this group.
                let x = V::splat(unsafe { *row.wrapping_add(CODE_WORDS) });
                *row = row.wrapping_add(INPUT_WORDS);
                for ((sum, total), scale) in sums.iter_mut().zip(totals).zip(scale) {
                    *sum = total.to_float().mul_add(x * scale, *sum);
                }
            }
        }
        self.finish(&sums);
    }
}

impl<D: ByteDot, const ROWS: usize, const VECS: usize, const HALVES: bool, const FAR: bool>
    Tile<'_, D, ROWS, VECS, HALVES, FAR>
{
    /// The integer sums of one group; the panels' pointers move on.
    #[inline(always)]
    fn group<V: F32x16>(
        &self,
        rows: &[*const f32; ROWS],
        parts: &mut [*const u8; VECS],
    ) -> [[V::Int; VECS]; ROWS] {
        let mut totals = [[V::Int::splat(0); VECS]; ROWS];
        for (totals, row) in totals.iter_mut().zip(rows) {
            // SAFETY: the row has the words of this group.
            let correction =
                V::Int::splat(unsafe { *row.cast::<i32>().wrapping_add(CODE_WORDS + 1) });
            totals.iter_mut().for_each(|total| *total = correction);
        }
        let part_words = if HALVES { 2 } else { 1 };
        for first in (0..CODE_WORDS).step_by(part_words) {
            let mut codes = [V::Int::splat(0); VECS];
            for (codes, part) in codes.iter_mut().zip(&mut *parts) {
                if FAR {
                    V::prefetch_far(part.wrapping_add(self.ahead));
                }
                // SAFETY: the panel has the parts of this group.
                *codes = V::Int::load_bytes(unsafe { &*part.cast::<[u8; PART_BYTES]>() });
                *part = part.wrapping_add(PART_BYTES);
            }
            if HALVES {
                let mut low = codes;
                low.iter_mut().for_each(|codes| *codes = low_halves::<V>(*codes));
                codes.iter_mut().for_each(|codes| *codes = high_halves::<V>(*codes));
                Self::add::<V>(rows, first, &low, &mut totals);
                Self::add::<V>(rows, first + 1, &codes, &mut totals);
            } else {
                Self::add::<V>(rows, first, &codes, &mut totals);
            }
        }
        totals
    }

    /// Adds the products of four inputs.
    #[inline(always)]
    fn add<V: F32x16>(
        rows: &[*const f32; ROWS],
        word: usize,
        codes: &[V::Int; VECS],
        totals: &mut [[V::Int; VECS]; ROWS],
    ) {
        for (totals, row) in totals.iter_mut().zip(rows) {
            // SAFETY: the row has the words of this group.
            let x = V::Int::splat(unsafe { *row.cast::<i32>().wrapping_add(word) });
            for (total, codes) in totals.iter_mut().zip(codes) {
                *total = D::add::<V>(*total, *codes, x);
            }
        }
    }

    /// The output's columns of panel `j`, and how many there are.
    #[inline(always)]
    fn outputs_of(&self, j: usize) -> (usize, usize) {
        let first = (self.panel + j) * LANES;
        (first, LANES.min(self.product.n - first))
    }

    /// Where the outputs of token `i` and panel `j` lie.
    #[inline(always)]
    fn outputs(&self, i: usize, j: usize) -> Range<usize> {
        let (first, count) = self.outputs_of(j);
        let start = (self.tokens.start + i) * self.product.n + first;
        start..start + count
    }

    /// Asks for the lines that the outputs go to, long before they do.
    #[inline(always)]
    fn ask_outputs<V: F32x16>(&self) {
        for i in 0..self.tokens.len() {
            for j in 0..self.panels {
                let start = self.outputs(i, j).start;
                V::prefetch(self.y.as_mut_ptr().wrapping_add(start).cast());
            }
        }
    }

    #[inline(always)]
    fn begin<V: F32x16>(&self) -> [[V; VECS]; ROWS] {
        let mut sums = [[V::zero(); VECS]; ROWS];
        if matches!(self.product.start, Start::Zero) {
            return sums;
        }
        for (i, row) in sums.iter_mut().enumerate().take(self.tokens.len()) {
            for (j, sum) in row.iter_mut().enumerate().take(self.panels) {
                match self.product.start {
                    Start::Zero => {}
                    Start::Bias(bias) => {
                        let (first, count) = self.outputs_of(j);
                        *sum = V::load_partial(&bias[first..first + count], 0.0);
                    }
                    Start::Keep => {
                        // SAFETY: these panels' columns belong to this task alone.
                        *sum =
                            V::load_partial(unsafe { self.y.slice_mut(self.outputs(i, j)) }, 0.0);
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn finish<V: F32x16>(&self, sums: &[[V; VECS]; ROWS]) {
        for (i, row) in sums.iter().enumerate().take(self.tokens.len()) {
            for (j, &sum) in row.iter().enumerate().take(self.panels) {
                // SAFETY: these panels' columns belong to this task alone.
                sum.store_partial(unsafe { self.y.slice_mut(self.outputs(i, j)) });
            }
        }
    }
}

#[cfg(test)]
mod tests;

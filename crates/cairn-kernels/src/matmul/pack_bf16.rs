//! Packing for bf16 products: pairs of bf16 values for the instruction, bf16 values as floats without it.
//!
//! A pair is an even input in the low half of 32 bits and the next one in the high half; sixteen
//! outputs of one pair are a vector. Pairs travel in the bits of floats: they are moved, never computed
//! with. A partner that an odd last input lacks is +0.

use std::ops::Range;

use super::pack::{Bf16Elements, Columns, CopyPanels, Left, QUAD};
use super::pack_bf16z::Bf16zPairs;
use super::rows::WeightRows;
use super::tile::LEFT_ROW_STRIDE;
use crate::encoding::{Encoding, Layout, Weight};
use crate::simd::{F32x16, Kernel, LANES};

const PAIR_LANES: usize = 2 * LANES;

/// Two columns of a panel from `start` on as pairs, or the last one with zeros.
#[inline(always)]
fn interleaved<V: F32x16>(values: &[u16], start: usize, count: usize) -> V {
    match values[start..start + count].first_chunk() {
        Some(columns) => V::interleave_pairs(columns),
        None => V::interleave_pairs(&padded(&values[start..start + count])),
    }
}

/// Sixteen pairs of a row from `start` on, or fewer and zeros.
#[inline(always)]
fn loaded<V: F32x16>(values: &[u16], start: usize, count: usize) -> V {
    match values[start..start + count].first_chunk() {
        Some(pairs) => V::load_pairs(pairs),
        None => V::load_pairs(&padded(&values[start..start + count])),
    }
}

fn padded(values: &[u16]) -> [u16; PAIR_LANES] {
    let mut words = [0; PAIR_LANES];
    words[..values.len()].copy_from_slice(values);
    words
}

/// Pairs of columns of panels, for the stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct PairColumns<'a>(pub(super) Bf16Elements<'a>);

impl Columns for PairColumns<'_> {
    #[inline(always)]
    unsafe fn lanes<V: F32x16>(self, panel: usize, pair: usize) -> V {
        let Bf16Elements { values, stride: k } = self.0;
        let start = (panel * k + 2 * pair) * LANES;
        if 2 * pair + 1 < k {
            debug_assert!(start + PAIR_LANES <= values.len(), "panel read past its weight");
            // SAFETY: the panel has both columns (the caller's promise).
            V::interleave_pairs(unsafe { &*values.as_ptr().wrapping_add(start).cast() })
        } else {
            interleaved(values, start, LANES)
        }
    }
    #[inline(always)]
    fn prefetch<V: F32x16>(self, panel: usize, pair: usize) {
        let first = (panel * self.0.stride + 2 * pair) * LANES;
        let address = self.0.values.as_ptr().wrapping_add(first).cast::<u8>();
        for line in 0..4 {
            V::prefetch(address.wrapping_add(line * 64));
        }
    }
}

/// Other columns without what is subnormal.
#[derive(Clone, Copy, Debug)]
pub(super) struct FlushedColumns<E>(pub(super) E);

impl<E: Columns> Columns for FlushedColumns<E> {
    const QUADS: bool = E::QUADS;
    const ASKS_NEXT_PANELS: bool = E::ASKS_NEXT_PANELS;

    #[inline(always)]
    unsafe fn lanes<V: F32x16>(self, panel: usize, column: usize) -> V {
        // SAFETY: passed on.
        let lanes: V = unsafe { self.0.lanes(panel, column) };
        lanes.flushed()
    }
    #[inline(always)]
    unsafe fn bare_quad<V: F32x16>(self, panel: usize, column: usize) -> ([V; QUAD], bool) {
        // SAFETY: passed on.
        let (mut quad, is_bare) = unsafe { self.0.bare_quad::<V>(panel, column) };
        quad.iter_mut().for_each(|lanes| *lanes = lanes.flushed());
        (quad, is_bare)
    }
    #[inline(always)]
    fn patched<V: F32x16>(self, panel: usize, column: usize, quad: [V; QUAD]) -> [V; QUAD] {
        self.0.patched(panel, column, quad).map(V::flushed)
    }
    #[inline(always)]
    fn missing_step(self, panel: usize, index: usize) -> usize {
        self.0.missing_step(panel, index)
    }
    #[inline(always)]
    fn completed<V: F32x16>(
        self,
        panel: usize,
        column: usize,
        index: usize,
        quad: [V; QUAD],
    ) -> ([V; QUAD], usize) {
        let (quad, index) = self.0.completed(panel, column, index, quad);
        (quad.map(V::flushed), index)
    }
    #[inline(always)]
    fn quad_steps(self, steps: usize) -> usize {
        self.0.quad_steps(steps)
    }
    #[inline(always)]
    fn prefetch<V: F32x16>(self, panel: usize, column: usize) {
        self.0.prefetch::<V>(panel, column);
    }
    #[inline(always)]
    fn prefetch_panel<V: F32x16>(self, panel: usize) {
        self.0.prefetch_panel::<V>(panel);
    }
}

/// Fills `panels` (`[columns/16][steps][16]`, zeros past the last column) with pairs of a weight whose
/// outputs are the columns. A step is a pair; `columns.start` and `steps.start` are multiples of 16.
pub(super) struct PackRightPairs<'p, 'a> {
    pub(super) rows: &'p WeightRows<'a>,
    pub(super) columns: Range<usize>,
    pub(super) steps: Range<usize>,
    pub(super) panels: &'p mut [f32],
}

impl Kernel for PackRightPairs<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { rows, columns, steps, panels } = self;
        let Weight { encoding, layout, k, .. } = rows.weight;
        match (encoding, layout) {
            (Encoding::Bf16z, _) => {
                let elements = Bf16zPairs { elements: rows.bf16z(), k };
                V::call(CopyPanels { elements, columns, steps, panels });
            }
            (_, Layout::Panel) => {
                let elements = PairColumns(Bf16Elements::new(rows));
                V::call(CopyPanels { elements, columns, steps, panels });
            }
            (_, Layout::RowMajor) => {
                let from = Bf16Elements::new(rows);
                Self { rows, columns, steps, panels }.transpose_rows::<V>(from);
            }
        }
    }
}

impl PackRightPairs<'_, '_> {
    #[inline(always)]
    fn transpose_rows<V: F32x16>(self, from: Bf16Elements<'_>) {
        let (vectors, _) = self.panels.as_chunks_mut::<LANES>();
        let mut first = self.columns.start;
        for panel in vectors.chunks_exact_mut(self.steps.len().max(1)) {
            for (block, step) in self.steps.clone().step_by(LANES).enumerate() {
                let count = LANES.min(self.steps.end - step);
                let inputs = PAIR_LANES.min(from.stride - 2 * step);
                let mut rows = [V::zero(); LANES];
                for (i, row) in rows.iter_mut().enumerate() {
                    if first + i < self.columns.end {
                        let start = (first + i) * from.stride + 2 * step;
                        *row = loaded(from.values, start, inputs);
                    }
                }
                let target = &mut panel[block * LANES..block * LANES + count];
                for (lanes, vector) in V::transpose(rows).into_iter().zip(target) {
                    lanes.store(vector);
                }
            }
            first += LANES;
        }
    }
}

/// Packs rows of activations for a tile of `tile_rows` rows as pairs, the missing ones zero. Calls the
/// rounding instruction: run it as [`PairDot`](super::arithmetic::PairDot) does.
pub(super) struct PackLeftPairs<'p, 'a> {
    pub(super) left: Left<'a>,
    pub(super) rows: Range<usize>,
    /// The inputs that the steps stand for; the first is even.
    pub(super) inputs: Range<usize>,
    pub(super) tile_rows: usize,
    pub(super) packed: &'p mut [f32],
}

impl Kernel for PackLeftPairs<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { left, rows, inputs, tile_rows, packed } = self;
        for i in 0..tile_rows {
            let target = &mut packed[i * LEFT_ROW_STRIDE..][..inputs.len().div_ceil(2)];
            if rows.start + i < rows.end {
                let (values, start) = left.row(rows.start + i);
                round_pairs::<V>(&values[start + inputs.start..start + inputs.end], target);
            } else {
                target.fill(0.0);
            }
        }
    }
}

/// Rounds a row to pairs, the last one with +0 if the row's length is odd.
#[inline(always)]
fn round_pairs<V: F32x16>(row: &[f32], pairs: &mut [f32]) {
    let (blocks, tail) = row.as_chunks::<PAIR_LANES>();
    let (targets, target_tail) = pairs.as_chunks_mut::<LANES>();
    for (block, target) in blocks.iter().zip(&mut *targets) {
        let (halves, _) = block.as_chunks::<LANES>();
        V::pairs_of(V::load(&halves[0]), V::load(&halves[1])).store(target);
    }
    if !tail.is_empty() {
        let (first, second) = tail.split_at(tail.len().min(LANES));
        let last = V::pairs_of(V::load_partial(first, 0.0), V::load_partial(second, 0.0));
        // Sixteen pairs, or those that are left.
        match targets.get_mut(blocks.len()) {
            Some(target) => last.store(target),
            None => last.store_partial(target_tail),
        }
    }
}

/// Rounds rows of `k` activations to pairs, each row for itself. For [`PackLeftPairs`]'s callers.
pub(super) struct RoundRowsToPairs<'a> {
    pub(super) x_tk: &'a [f32],
    pub(super) k: usize,
    pub(super) pairs: &'a mut [f32],
}

impl Kernel for RoundRowsToPairs<'_> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let rows = self.x_tk.chunks_exact(self.k.max(1));
        for (row, pairs) in rows.zip(self.pairs.chunks_exact_mut(self.k.div_ceil(2).max(1))) {
            round_pairs::<V>(row, pairs);
        }
    }
}

/// Rounds activations to bf16 values in floats, zero where subnormal.
pub(super) struct RoundToBf16<'a> {
    pub(super) x: &'a [f32],
    pub(super) y: &'a mut [f32],
}

impl Kernel for RoundToBf16<'_> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        for (x, y) in self.x.chunks(LANES).zip(self.y.chunks_mut(LANES)) {
            rounded(V::load_partial(x, 0.0)).store_partial(y);
        }
    }
}

#[inline(always)]
fn rounded<V: F32x16>(x: V) -> V {
    let mut bits = [0; LANES];
    x.flushed().to_bf16(&mut bits);
    V::from_bf16(&bits)
}

/// Makes packed floats the operands of a bf16 product, where `ROUND` by rounding them, and gives their
/// smallest magnitude other than 0 (infinity if there is none).
pub(super) struct Settle<'a, const ROUND: bool> {
    pub(super) packed: &'a mut [f32],
}

impl<const ROUND: bool> Kernel for Settle<'_, ROUND> {
    type Output = f32;
    #[inline(always)]
    fn run<V: F32x16>(self) -> f32 {
        let mut least = V::splat(f32::INFINITY);
        for chunk in self.packed.chunks_mut(LANES) {
            let x = V::load_partial(chunk, 0.0);
            let x = if ROUND { rounded(x) } else { x.flushed() };
            let magnitude = x.abs();
            let is_zero = magnitude.eq(V::zero());
            least = V::select(is_zero, V::splat(f32::INFINITY), magnitude).min(least);
            x.store_partial(chunk);
        }
        least.to_array().into_iter().fold(f32::INFINITY, f32::min)
    }
}

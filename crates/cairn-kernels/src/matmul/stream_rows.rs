//! The forward product for a few tokens by a weight in rows: read where a file holds it.
//!
//! Sixteen rows at a time, a cache line of each, are transposed in registers into the vectors that a panel
//! would have held, so that the chains are those of the other products, bit for bit. That costs a few
//! cycles a line, and memory takes longer; what is saved is a second copy of the weight.

use std::marker::PhantomData;
use std::ops::Range;

use super::arithmetic::Arithmetic;
use super::rows::WeightRows;
use super::stream::{OutputTile, StreamProduct};
use crate::cpu::SharedSlice;
use crate::encoding::Encoding;
use crate::memory::bytes_of_mut;
use crate::simd::{F32x16, I32x16, Kernel, LANES};

/// Bytes of a row that are read at once.
const LINE: usize = 64;

/// What the lanes of a transposed vector hold.
pub(super) trait RowElements: Copy {
    /// Bytes of a row in a block of sixteen vectors.
    const BYTES: usize = LINE;
    /// Steps of a chain in one vector: one or two.
    const STEPS: usize = 1;

    /// Sixteen lanes of a row.
    ///
    /// # Safety
    /// - `from` is valid to read for [`Self::BYTES`], and aligned to the weight's elements.
    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const u8) -> V {
        // SAFETY: the caller promises so many bytes.
        V::Int::load_bytes(unsafe { &*from.cast() }).as_float()
    }

    /// The steps of a transposed vector, in ascending order; the second only where there are two.
    #[inline(always)]
    fn steps<V: F32x16>(lanes: V) -> [V; 2] {
        [lanes; 2]
    }
}

/// Words that are a step as they are: floats, or pairs of bf16 values for [`PairDot`].
///
/// [`PairDot`]: super::arithmetic::PairDot
#[derive(Clone, Copy)]
pub(super) struct Words;

impl RowElements for Words {}

/// bf16 values, zero where subnormal if `FLUSHED`.
#[derive(Clone, Copy)]
pub(super) struct Bf16Values<const FLUSHED: bool>;

impl<const FLUSHED: bool> RowElements for Bf16Values<FLUSHED> {
    const STEPS: usize = 2;

    #[inline(always)]
    fn steps<V: F32x16>(lanes: V) -> [V; 2] {
        let [low, high] = lanes.split_pairs();
        if FLUSHED { [low.flushed(), high.flushed()] } else { [low, high] }
    }
}

/// f16 values.
#[derive(Clone, Copy)]
pub(super) struct F16Values;

impl RowElements for F16Values {
    const BYTES: usize = LINE / 2;

    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const u8) -> V {
        // SAFETY: the caller promises so many bytes, aligned.
        V::from_f16(unsafe { &*from.cast() })
    }
}

/// The panels of one task, sixteen rows each.
pub(super) struct RowsPart<'a, E, A> {
    pub(super) product: &'a StreamProduct<'a>,
    pub(super) y: &'a SharedSlice<'a, f32>,
    pub(super) panels: Range<usize>,
    /// Panels of other threads between these and those that follow.
    pub(super) skipped: usize,
    pub(super) kinds: PhantomData<(E, A)>,
}

impl<E: RowElements, A: Arithmetic> Kernel for RowsPart<'_, E, A> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        // One panel at a time: its lines are as many streams as memory serves well.
        match self.product.t {
            1 => self.groups::<V, 1>(),
            2 => self.groups::<V, 2>(),
            3 | 4 => self.groups::<V, 4>(),
            _ => self.groups::<V, 8>(),
        }
    }
}

impl<E: RowElements, A: Arithmetic> RowsPart<'_, E, A> {
    #[inline(always)]
    fn groups<V: F32x16, const ROWS: usize>(&self) {
        for panel in self.panels.clone() {
            let skipped = if panel + 1 < self.panels.end { 0 } else { self.skipped };
            for token in (0..self.product.t).step_by(ROWS) {
                let tokens = ROWS.min(self.product.t - token);
                let Self { product, y, .. } = *self;
                A::call::<V, _>(RowsGroup::<E, A, ROWS> {
                    tile: OutputTile { product, y, panel, panels: 1, token, tokens },
                    ahead: 1 + skipped,
                    kinds: PhantomData,
                });
            }
        }
    }
}

/// A panel times up to `ROWS` tokens. Missing ones repeat the last and are not stored.
struct RowsGroup<'a, E, A, const ROWS: usize> {
    tile: OutputTile<'a>,
    /// Panels to the one that is likely read next.
    ahead: usize,
    kinds: PhantomData<(E, A)>,
}

/// Sixteen rows of a weight; missing ones repeat the last.
#[derive(Clone, Copy)]
struct SixteenRows<'a> {
    rows: [&'a [u8]; LANES],
}

impl<'a> SixteenRows<'a> {
    #[inline(always)]
    fn new(rows: &WeightRows<'a>, panel: usize) -> Self {
        let element = if rows.weight.encoding == Encoding::F32 { 4 } else { 2 };
        let len = rows.weight.k * element;
        let mut found = [&rows.weight.bytes[..0]; LANES];
        for (i, row) in found.iter_mut().enumerate() {
            let index = rows.first + (panel * LANES + i).min(rows.n - 1);
            *row = &rows.weight.bytes[index * len..(index + 1) * len];
        }
        Self { rows: found }
    }

    /// Byte `start` of every row and the lanes that follow, a vector for all rows.
    ///
    /// # Safety
    /// - The rows have as many bytes from `start` on as a block has.
    #[inline(always)]
    unsafe fn block<E: RowElements, V: F32x16>(&self, start: usize) -> [V; LANES] {
        let mut lanes = [V::zero(); LANES];
        for (lanes, row) in lanes.iter_mut().zip(&self.rows) {
            // SAFETY: passed on; rows begin at elements, and so do blocks.
            *lanes = unsafe { E::load(row.as_ptr().wrapping_add(start)) };
        }
        V::transpose(lanes)
    }

    /// As [`block`](Self::block), with zeros after the ends of the rows.
    #[inline(always)]
    fn last_block<E: RowElements, V: F32x16>(&self, start: usize) -> [V; LANES] {
        let mut lanes = [V::zero(); LANES];
        for (lanes, row) in lanes.iter_mut().zip(&self.rows) {
            let mut line = [0_f32; LINE / size_of::<f32>()];
            let bytes = &row[start..];
            bytes_of_mut(&mut line)[..bytes.len()].copy_from_slice(bytes);
            // SAFETY: a line has the bytes of any block, and floats are aligned to any element.
            *lanes = unsafe { E::load(line.as_ptr().cast()) };
        }
        V::transpose(lanes)
    }

    /// Asks memory for what lies `start` bytes after the beginning of each row. It need not exist.
    #[inline(always)]
    fn prefetch<V: F32x16>(&self, start: usize) {
        for row in &self.rows {
            V::prefetch_far(row.as_ptr().wrapping_add(start));
        }
    }
}

impl<E: RowElements, A: Arithmetic, const ROWS: usize> Kernel for RowsGroup<'_, E, A, ROWS> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let product = self.tile.product;
        let steps = product.form.steps(product.rows.weight.k);
        let x: [&[f32]; ROWS] = std::array::from_fn(|i| self.tile.inputs(i, steps));
        let rows = SixteenRows::new(&product.rows, self.tile.panel);
        let distance = self.ahead * LANES * rows.rows[0].len();
        let mut sums = [V::zero(); ROWS];
        for (sum, [begun]) in sums.iter_mut().zip(self.tile.begin::<V, A, ROWS, 1>()) {
            *sum = begun;
        }
        let block_steps = LANES * E::STEPS;
        // A row of an odd length has no partner for its last input: that pair is in no full block.
        let full = rows.rows[0].len() / E::BYTES;
        for (first, start) in (0..full).map(|block| (block * block_steps, block * E::BYTES)) {
            rows.prefetch::<V>(start + distance);
            // SAFETY: full blocks end before the rows do.
            let block = unsafe { rows.block::<E, V>(start) };
            sums = Self::whole_block(&block, Self::inputs_of_block(&x, first), sums);
        }
        if full * block_steps < steps {
            let block = rows.last_block::<E, V>(full * E::BYTES);
            Self::last_steps(&block, &x, full * block_steps..steps, &mut sums);
        }
        let mut ended = [[V::zero()]; ROWS];
        for (ended, sum) in ended.iter_mut().zip(sums) {
            *ended = [sum];
        }
        self.tile.finish::<V, A, ROWS, 1>(&ended);
    }
}

impl<E: RowElements, A: Arithmetic, const ROWS: usize> RowsGroup<'_, E, A, ROWS> {
    /// Where the inputs of a whole block begin.
    #[inline(always)]
    fn inputs_of_block(x: &[&[f32]; ROWS], first: usize) -> [*const f32; ROWS] {
        let mut starts = [std::ptr::null(); ROWS];
        for (start, x) in starts.iter_mut().zip(x) {
            *start = x[first..first + LANES * E::STEPS].as_ptr();
        }
        starts
    }

    /// The steps of a whole block. Sums come and go by value, so that they stay in registers.
    #[inline(always)]
    fn whole_block<V: F32x16>(
        block: &[V; LANES],
        x: [*const f32; ROWS],
        mut sums: [V; ROWS],
    ) -> [V; ROWS] {
        for (i, &lanes) in block.iter().enumerate() {
            let lanes = E::steps(lanes);
            for turn in 0..E::STEPS {
                // Steps that are taken together are taken from the last to the first.
                let step = if A::TOGETHER == 2 { E::STEPS - 1 - turn } else { turn };
                for (sum, x) in sums.iter_mut().zip(&x) {
                    // SAFETY: a whole block has so many inputs (`inputs_of_block`).
                    let x = V::splat(unsafe { *x.wrapping_add(i * E::STEPS + step) });
                    *sum = A::step(x, lanes[step], *sum);
                }
            }
        }
        sums
    }

    /// The steps of the last block, which is not full.
    #[inline(always)]
    fn last_steps<V: F32x16>(
        block: &[V; LANES],
        x: &[&[f32]; ROWS],
        steps: Range<usize>,
        sums: &mut [V; ROWS],
    ) {
        for (&lanes, first) in block.iter().zip(steps.clone().step_by(E::STEPS)) {
            let lanes = E::steps(lanes);
            let count = E::STEPS.min(steps.end - first);
            for (sum, x) in sums.iter_mut().zip(x) {
                if count < A::TOGETHER {
                    // The last input is the first of a pair whose second is zero: −0 becomes 0.
                    *sum = *sum + V::zero();
                }
                for turn in 0..count {
                    let step = if A::TOGETHER == 2 { count - 1 - turn } else { turn };
                    *sum = A::step(V::splat(x[first + step]), lanes[step], *sum);
                }
            }
        }
    }
}

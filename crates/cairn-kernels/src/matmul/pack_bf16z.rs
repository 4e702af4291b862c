//! The columns of a bf16z weight: decoded four at a time, exceptions written over afterwards.

use super::pack::{Columns, Elements, QUAD};
use crate::encoding::{Bf16z, HALF_COLUMNS};
use crate::simd::{F32x16, I32x16, LANES};

/// bf16 in twelve bits, as floats.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bf16zElements<'a>(pub(super) Bf16z<'a>);

impl Bf16zElements<'_> {
    /// Four columns of a panel, `column` being a multiple of 4, as two vectors of pairs; and whether
    /// exceptions are missing among them.
    ///
    /// # Safety
    /// - The matrix has that panel and the block of those columns.
    #[inline(always)]
    unsafe fn bare_half<V: F32x16>(self, panel: usize, column: usize) -> ([V; 2], bool) {
        let (bytes, codes) = self.0.half(panel, column);
        // SAFETY: the caller promises that the panel's block is there.
        let bytes = unsafe { &*bytes.cast::<[u8; 64]>() };
        // SAFETY: the caller promises that the panel's block is there.
        let codes = unsafe { &*codes.cast::<[u8; 32]>() };
        // SAFETY: the caller promises that the panel is there.
        let table = unsafe { &*self.0.table(panel) };
        V::pairs_from_bf16z(bytes, codes, table)
    }

    /// Writes the exceptions of four columns, the first of which is its panel's `index`-th; how many.
    #[cold]
    #[inline(never)]
    fn patch_from(
        self,
        panel: usize,
        column: usize,
        index: usize,
        lanes: &mut [[f32; LANES]; QUAD],
    ) -> usize {
        let mut count = 0;
        for (c, lane, bits) in self.0.exceptions_from(panel, column, index) {
            lanes[c][lane] = f32::from_bits(u32::from(bits) << 16);
            count += 1;
        }
        count
    }

    /// As [`patch_from`](Self::patch_from), in pairs of columns.
    #[cold]
    #[inline(never)]
    fn patch_pairs_from(
        self,
        panel: usize,
        column: usize,
        index: usize,
        pairs: &mut [[f32; LANES]; 2],
    ) -> usize {
        let mut count = 0;
        for (c, lane, bits) in self.0.exceptions_from(panel, column, index) {
            set_half(&mut pairs[c / 2][lane], c % 2, bits);
            count += 1;
        }
        count
    }
}

/// Writes the low (0) or high (1) half of a float's bits.
fn set_half(pair: &mut f32, half: usize, bits: u16) {
    let shift = half * 16;
    let others = pair.to_bits() & !(0xffff << shift);
    *pair = f32::from_bits(others | u32::from(bits) << shift);
}

impl Elements for Bf16zElements<'_> {
    fn row<V: F32x16>(self, _row: usize, _column: usize, _count: usize) -> V {
        unreachable!("bf16z weights lie in panels")
    }
}

impl Columns for Bf16zElements<'_> {
    const QUADS: bool = true;
    const ASKS_NEXT_PANELS: bool = true;

    #[inline(always)]
    unsafe fn lanes<V: F32x16>(self, panel: usize, column: usize) -> V {
        let first = column - column % QUAD;
        // SAFETY: passed on; blocks are padded to whole quads.
        let quad: [V; QUAD] = unsafe { self.quad(panel, first) };
        quad[column % QUAD]
    }
    #[inline(always)]
    unsafe fn bare_quad<V: F32x16>(self, panel: usize, column: usize) -> ([V; QUAD], bool) {
        // SAFETY: passed on.
        let ([first, second], is_bare) = unsafe { self.bare_half::<V>(panel, column) };
        let ([c0, c1], [c2, c3]) = (first.split_pairs(), second.split_pairs());
        ([c0, c1, c2, c3], is_bare)
    }
    #[inline(always)]
    fn patched<V: F32x16>(self, panel: usize, column: usize, quad: [V; QUAD]) -> [V; QUAD] {
        let mut lanes = quad.map(V::to_array);
        self.patch_from(panel, column, self.0.exceptions_before(panel, column), &mut lanes);
        lanes.each_ref().map(V::load)
    }
    #[inline(always)]
    fn missing_step(self, panel: usize, index: usize) -> usize {
        self.0.exception_column(panel, index)
    }
    #[inline(always)]
    fn completed<V: F32x16>(
        self,
        panel: usize,
        column: usize,
        index: usize,
        quad: [V; QUAD],
    ) -> ([V; QUAD], usize) {
        let mut lanes = quad.map(V::to_array);
        let count = self.patch_from(panel, column, index, &mut lanes);
        (lanes.each_ref().map(V::load), index + count)
    }
    #[inline(always)]
    fn prefetch<V: F32x16>(self, panel: usize, column: usize) {
        if column.is_multiple_of(2 * HALF_COLUMNS) {
            let (block, _) = self.0.half(panel, column);
            (0..3).for_each(|line| V::prefetch_far(block.wrapping_add(line * 64)));
        }
    }
    #[inline(always)]
    fn prefetch_panel<V: F32x16>(self, panel: usize) {
        self.0.ends(panel).into_iter().for_each(V::prefetch);
    }
}

/// bf16 in twelve bits, as pairs of columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bf16zPairs<'a> {
    pub(super) elements: Bf16zElements<'a>,
    /// Columns of the matrix.
    pub(super) k: usize,
}

impl Bf16zPairs<'_> {
    /// The same with +0 for the partner that an odd last column lacks.
    #[inline(always)]
    fn without_missing<V: F32x16>(self, pair: usize, lanes: V) -> V {
        if 2 * pair + 1 < self.k {
            return lanes;
        }
        let low = V::Int::splat(if 2 * pair < self.k { 0xffff } else { 0 });
        lanes.bits().and(low).as_float()
    }
}

impl Columns for Bf16zPairs<'_> {
    const QUADS: bool = true;
    const ASKS_NEXT_PANELS: bool = true;

    #[inline(always)]
    unsafe fn lanes<V: F32x16>(self, panel: usize, pair: usize) -> V {
        let column = (2 * pair) - (2 * pair) % HALF_COLUMNS;
        // SAFETY: passed on; blocks are padded to whole halves.
        let (pairs, is_bare) = unsafe { self.elements.bare_half::<V>(panel, column) };
        let mut lanes = pairs[pair % 2];
        if is_bare {
            let mut pairs = pairs.map(V::to_array);
            let index = self.elements.0.exceptions_before(panel, column);
            self.elements.patch_pairs_from(panel, column, index, &mut pairs);
            lanes = V::load(&pairs[pair % 2]);
        }
        self.without_missing(pair, lanes)
    }
    #[inline(always)]
    unsafe fn bare_quad<V: F32x16>(self, panel: usize, pair: usize) -> ([V; QUAD], bool) {
        let column = 2 * pair;
        // SAFETY: passed on; a block is eight columns, and `pair` a multiple of 4.
        let ([p0, p1], is_first_bare) = unsafe { self.elements.bare_half::<V>(panel, column) };
        // SAFETY: as above.
        let ([p2, p3], is_second_bare) =
            unsafe { self.elements.bare_half::<V>(panel, column + HALF_COLUMNS) };
        let is_partial = column + 2 * HALF_COLUMNS > self.k;
        ([p0, p1, p2, p3], is_first_bare | is_second_bare | is_partial)
    }
    #[inline(always)]
    fn patched<V: F32x16>(self, panel: usize, pair: usize, quad: [V; QUAD]) -> [V; QUAD] {
        let mut lanes = quad.map(V::to_array);
        let (halves, _) = lanes.as_chunks_mut::<2>();
        let mut index = self.elements.0.exceptions_before(panel, 2 * pair);
        for (i, half) in halves.iter_mut().enumerate() {
            let column = 2 * pair + i * HALF_COLUMNS;
            index += self.elements.patch_pairs_from(panel, column, index, half);
        }
        std::array::from_fn(|i| self.without_missing(pair + i, V::load(&lanes[i])))
    }
    #[inline(always)]
    fn missing_step(self, panel: usize, index: usize) -> usize {
        self.elements.0.exception_column(panel, index) / 2
    }
    #[inline(always)]
    fn completed<V: F32x16>(
        self,
        panel: usize,
        pair: usize,
        index: usize,
        quad: [V; QUAD],
    ) -> ([V; QUAD], usize) {
        let mut lanes = quad.map(V::to_array);
        let mut index = index;
        let (halves, _) = lanes.as_chunks_mut::<2>();
        for (i, half) in halves.iter_mut().enumerate() {
            let column = 2 * pair + i * HALF_COLUMNS;
            index += self.elements.patch_pairs_from(panel, column, index, half);
        }
        (lanes.each_ref().map(V::load), index)
    }
    #[inline(always)]
    fn quad_steps(self, _steps: usize) -> usize {
        self.k / 2
    }
    #[inline(always)]
    fn prefetch<V: F32x16>(self, panel: usize, pair: usize) {
        self.elements.prefetch::<V>(panel, 2 * pair);
    }
    #[inline(always)]
    fn prefetch_panel<V: F32x16>(self, panel: usize) {
        self.elements.prefetch_panel::<V>(panel);
    }
}

//! The two register-tiled products that attention is made of, on operands that fit in cache.
//!
//! - [`scores`]: rows · panels, `out[r][16j + l] = Σ_i a[r][i] · panel_j[i][l]`, lanes are keys.
//! - [`mix`]: weights · rows, `out[r][c] = Σ_s a[r][s] · b[s][c]`, lanes are columns.
//!
//! Both chains ascend. A tile is 6 rows by 4 vectors on AVX-512 (24 sums; for each step 4 loads and
//! 6 broadcasts) and 6 by 1 on AVX2. Operands from a cache in bf16 or bytes are widened on the way in.

use std::ops::Range;

use crate::KEY_TILE;
use crate::simd::{F32x16, Kernel, LANES};

/// Rows of the largest register tile.
const ROWS_MAX: usize = 6;
/// What is asked of memory at a time.
const LINE_BYTES: usize = 64;
/// Keys of a panel, and steps of a segment: one page.
pub(super) const PANEL: usize = 16;

/// A number as the cache stores it.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// Whether keys and values have factors, which are not multiplied with their numbers.
    const SCALED: bool = false;

    /// Sixteen numbers from an address.
    ///
    /// # Safety
    /// - `from` is valid to read for sixteen numbers.
    unsafe fn load<V: F32x16>(from: *const Self) -> V;

    /// One number.
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const Self) -> V {
        // SAFETY: passed on.
        unsafe { V::load_ptr(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const Self) -> V {
        // SAFETY: sixteen numbers are readable (the caller's promise), which is such an array.
        V::from_bf16(unsafe { &*from.cast::<[Self; LANES]>() })
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        crate::simd::f32_from_bf16(self)
    }
}

impl Element for i8 {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const Self) -> V {
        // SAFETY: sixteen numbers are readable (the caller's promise), which is such an array.
        V::from_i8(unsafe { &*from.cast::<[Self; LANES]>() })
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }
}

/// Rows of a left operand: row r starts at `start(r)`, steps are `step` apart.
pub(super) struct Left<'a, F> {
    pub(super) numbers: &'a [f32],
    pub(super) start: F,
    pub(super) step: usize,
}

impl<F: Fn(usize) -> usize> Left<'_, F> {
    /// Where `ROWS` rows begin, checked to hold all steps.
    #[inline(always)]
    fn pointers<const ROWS: usize>(
        &self,
        first: usize,
        steps: &Range<usize>,
    ) -> [*const f32; ROWS] {
        std::array::from_fn(|i| {
            let start = (self.start)(first + i);
            let last = start + steps.end.saturating_sub(1) * self.step;
            assert!(steps.is_empty() || last < self.numbers.len(), "a row leaves its operand");
            self.numbers.as_ptr().wrapping_add(start + steps.start * self.step)
        })
    }
}

/// The kernel of [`scores`]: one tile.
struct ScoreTile<E, const ROWS: usize, const VECS: usize> {
    left: [*const f32; ROWS],
    panels: [*const E; VECS],
    /// What is read next: asked for line by line, because pages end before prefetchers learn.
    ahead: [*const E; VECS],
    steps: usize,
    out: *mut f32,
}

impl<E: Element, const ROWS: usize, const VECS: usize> Kernel for ScoreTile<E, ROWS, VECS> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let mut sums = [[V::zero(); VECS]; ROWS];
        for step in 0..self.steps {
            let mut keys = [V::zero(); VECS];
            for (j, keys) in keys.iter_mut().enumerate() {
                let at = step * LANES;
                if asks_at::<E>(step) {
                    V::prefetch_far(self.ahead[j].wrapping_add(at).cast());
                }
                // SAFETY: panels hold `steps` vectors (`scores`).
                *keys = unsafe { E::load(self.panels[j].wrapping_add(at)) };
            }
            for (sum, left) in sums.iter_mut().zip(self.left) {
                // SAFETY: rows hold `steps` numbers (`Left::pointers`).
                let x = V::splat(unsafe { *left.wrapping_add(step) });
                for (sum, keys) in sum.iter_mut().zip(keys) {
                    *sum = x.mul_add(keys, *sum);
                }
            }
        }
        for (i, row) in sums.into_iter().enumerate() {
            for (j, sum) in row.into_iter().enumerate() {
                // SAFETY: the output holds `ROWS` rows of a tile of keys (`scores`).
                unsafe { sum.store_ptr(self.out.wrapping_add(i * KEY_TILE + j * LANES)) };
            }
        }
    }
}

/// Whether the vector number `i` begins a line of memory, to be asked for once.
#[inline(always)]
fn asks_at<E>(i: usize) -> bool {
    i.is_multiple_of((LINE_BYTES / (LANES * size_of::<E>())).max(1))
}

/// The panels or segments of a tile, and of the one that is read after it (itself, if none is).
#[derive(Clone, Copy)]
pub(super) struct Operand<'a, E> {
    pub(super) now: &'a [&'a [E]],
    pub(super) next: &'a [&'a [E]],
}

impl<E> Operand<'_, E> {
    /// What to ask for while part `part` is read by rows from `first` on.
    #[inline(always)]
    fn ahead(&self, part: usize, first: usize) -> *const E {
        let next = if first == 0 { self.next } else { self.now };
        next.get(part).unwrap_or(&self.now[part]).as_ptr()
    }
}

/// `out[r][16j + l] = Σ_i a[r][i] · panel_j[i][l]` for the first `panels_of(rows)` panels of each
/// group of rows; other columns of `out` (`[rows][KEY_TILE]`) are left as they are.
#[inline(always)]
pub(super) fn scores<V: F32x16, E: Element, F: Fn(usize) -> usize>(
    left: &Left<'_, F>,
    (rows, steps): (usize, usize),
    operand: Operand<'_, E>,
    out: &mut [f32],
    panels_of: impl Fn(Range<usize>) -> usize,
) {
    let panels = operand.now;
    assert!(panels.iter().all(|panel| panel.len() >= steps * LANES), "short panels");
    assert!(out.len() >= rows * KEY_TILE && panels.len() <= KEY_TILE / PANEL, "scores");
    assert_eq!(left.step, 1, "rows of queries are contiguous");
    let height = V::TILE.1.min(ROWS_MAX);
    for first in (0..rows).step_by(height) {
        let group = first..rows.min(first + height);
        let wanted = panels_of(group.clone()).min(panels.len());
        let mut j = 0;
        while j < wanted {
            let vectors = if V::TILE.0 == 1 || wanted - j < 2 { 1 } else { (wanted - j) & !1 };
            let panels = (operand, j);
            let out = &mut out[first * KEY_TILE + j * PANEL..];
            match vectors {
                4 => score_rows::<V, E, F, 4>(left, group.clone(), steps, panels, out),
                2 => score_rows::<V, E, F, 2>(left, group.clone(), steps, panels, out),
                _ => score_rows::<V, E, F, 1>(left, group.clone(), steps, panels, out),
            }
            j += vectors;
        }
    }
}

#[inline(always)]
fn score_rows<V: F32x16, E: Element, F: Fn(usize) -> usize, const VECS: usize>(
    left: &Left<'_, F>,
    rows: Range<usize>,
    steps: usize,
    (operand, first_panel): (Operand<'_, E>, usize),
    out: &mut [f32],
) {
    macro_rules! tile {
        ($rows:literal) => {
            V::call(ScoreTile::<E, $rows, VECS> {
                left: left.pointers(rows.start, &(0..steps)),
                panels: std::array::from_fn(|j| operand.now[first_panel + j].as_ptr()),
                ahead: std::array::from_fn(|j| operand.ahead(first_panel + j, rows.start)),
                steps,
                out: out.as_mut_ptr(),
            })
        };
    }
    match rows.len() {
        1 => tile!(1),
        2 => tile!(2),
        3 => tile!(3),
        4 => tile!(4),
        5 => tile!(5),
        _ => tile!(6),
    }
}

/// The right operand of [`mix`]: segments of [`PANEL`] rows, rows `stride` numbers apart.
#[derive(Clone, Copy)]
pub(super) struct Segments<'a, E> {
    pub(super) segments: Operand<'a, E>,
    pub(super) stride: usize,
}

/// The kernel of [`mix`]: one tile.
struct MixTile<'a, E, const ROWS: usize, const VECS: usize> {
    left: [*const f32; ROWS],
    left_step: usize,
    right: Segments<'a, E>,
    column: usize,
    first_row: usize,
    steps: Range<usize>,
    out: *mut f32,
    out_stride: usize,
    keep: bool,
}

impl<E: Element, const ROWS: usize, const VECS: usize> Kernel for MixTile<'_, E, ROWS, VECS> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let mut sums = [[V::zero(); VECS]; ROWS];
        let at = |i: usize, j: usize| self.out.wrapping_add(i * self.out_stride + j * LANES);
        if self.keep {
            for (i, row) in sums.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    // SAFETY: the output holds the tile (`mix`).
                    *sum = unsafe { V::load_ptr(at(i, j)) };
                }
            }
        }
        let mut left = self.left;
        let mut step = self.steps.start;
        while step < self.steps.end {
            let (segment, within) = (step / PANEL, step % PANEL);
            let count = (PANEL - within).min(self.steps.end - step);
            let start = within * self.right.stride + self.column;
            let mut right = self.right.segments.now[segment].as_ptr().wrapping_add(start);
            let mut ahead = self.right.segments.ahead(segment, self.first_row).wrapping_add(start);
            for _ in 0..count {
                let mut columns = [V::zero(); VECS];
                for (j, columns) in columns.iter_mut().enumerate() {
                    if asks_at::<E>(j) {
                        V::prefetch_far(ahead.wrapping_add(j * LANES).cast());
                    }
                    // SAFETY: segments hold `PANEL` rows that reach past these columns (`mix`).
                    *columns = unsafe { E::load(right.wrapping_add(j * LANES)) };
                }
                for (sum, left) in sums.iter_mut().zip(&mut left) {
                    // SAFETY: rows hold all steps (`Left::pointers`).
                    let x = V::splat(unsafe { **left });
                    *left = left.wrapping_add(self.left_step);
                    for (sum, columns) in sum.iter_mut().zip(columns) {
                        *sum = x.mul_add(columns, *sum);
                    }
                }
                right = right.wrapping_add(self.right.stride);
                ahead = ahead.wrapping_add(self.right.stride);
            }
            step += count;
        }
        for (i, row) in sums.into_iter().enumerate() {
            for (j, sum) in row.into_iter().enumerate() {
                // SAFETY: the output holds the tile (`mix`).
                unsafe { sum.store_ptr(at(i, j)) };
            }
        }
    }
}

/// Sizes and output of a [`mix`].
pub(super) struct Mix<'a> {
    /// Rows of the output.
    pub(super) rows: usize,
    /// Columns of the output, a multiple of 16, and the distance of its rows.
    pub(super) columns: usize,
    /// `[rows][columns]`.
    pub(super) out: &'a mut [f32],
    /// Whether chains start from what is there, or from 0.
    pub(super) keep: bool,
}

/// `out[r][c] = Σ_s a[r][s] · b[s][c]` over the steps `steps_of(rows)` of each group of rows.
#[inline(always)]
pub(super) fn mix<V: F32x16, E: Element, F: Fn(usize) -> usize>(
    left: &Left<'_, F>,
    right: Segments<'_, E>,
    args: Mix<'_>,
    steps_of: impl Fn(Range<usize>) -> Range<usize>,
) {
    let Mix { rows, columns, out, keep } = args;
    assert!(columns.is_multiple_of(LANES) && out.len() >= rows * columns, "mix: output");
    let reach = (PANEL - 1) * right.stride + columns;
    let height = V::TILE.1.min(ROWS_MAX);
    for first in (0..rows).step_by(height) {
        let group = first..rows.min(first + height);
        let steps = steps_of(group.clone());
        let segments = steps.start / PANEL..steps.end.div_ceil(PANEL).max(steps.start / PANEL);
        assert!(
            right.segments.now[segments].iter().all(|segment| segment.len() >= reach),
            "mix: a segment is short"
        );
        let mut column = 0;
        while column < columns {
            let left_over = (columns - column) / LANES;
            let vectors = match left_over {
                _ if V::TILE.0 == 1 => 1,
                0..2 => 1,
                2..4 => 2,
                _ => 4,
            };
            let tile = GroupTile { group: group.clone(), steps: steps.clone(), column, keep };
            let out = &mut out[first * columns + column..];
            match vectors {
                4 => mix_rows::<V, E, F, 4>(left, right, tile, (out, columns)),
                2 => mix_rows::<V, E, F, 2>(left, right, tile, (out, columns)),
                _ => mix_rows::<V, E, F, 1>(left, right, tile, (out, columns)),
            }
            column += vectors * LANES;
        }
    }
}

/// One group of rows at some columns.
struct GroupTile {
    group: Range<usize>,
    steps: Range<usize>,
    column: usize,
    keep: bool,
}

#[inline(always)]
fn mix_rows<V: F32x16, E: Element, F: Fn(usize) -> usize, const VECS: usize>(
    left: &Left<'_, F>,
    right: Segments<'_, E>,
    tile: GroupTile,
    (out, out_stride): (&mut [f32], usize),
) {
    macro_rules! tile {
        ($rows:literal) => {
            V::call(MixTile::<E, $rows, VECS> {
                left: left.pointers(tile.group.start, &tile.steps),
                left_step: left.step,
                right,
                column: tile.column,
                first_row: tile.group.start,
                steps: tile.steps,
                out: out.as_mut_ptr(),
                out_stride,
                keep: tile.keep,
            })
        };
    }
    match tile.group.len() {
        1 => tile!(1),
        2 => tile!(2),
        3 => tile!(3),
        4 => tile!(4),
        5 => tile!(5),
        _ => tile!(6),
    }
}

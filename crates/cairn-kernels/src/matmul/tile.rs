//! The register tile: a few rows by one or two vectors of columns, one chain an output.
//!
//! Cost of the AVX-512 tile of 14 × 32, for each step of the contraction: 28 fused multiply-adds,
//! 2 loads of packed columns and 14 broadcasts, so arithmetic bounds it with room to spare.

use std::marker::PhantomData;
use std::ops::Range;

use super::arithmetic::Arithmetic;
use crate::simd::{F32x16, Kernel, LANES};

/// Floats between two packed rows. 25 cache lines: the rows of a tile spread over all cache sets.
pub(super) const LEFT_ROW_STRIDE: usize = 400;
/// Floats between two steps of a packed column-wise left operand.
pub(super) const LEFT_STEP_STRIDE: usize = 16;
/// The largest tile, in floats: where partial tiles are staged.
pub(super) const STAGE_FLOATS: usize = 14 * 2 * LANES;

/// Where the chains of a tile start.
#[derive(Clone, Copy, Debug)]
pub(super) enum Begin {
    /// From 0.
    Zero,
    /// From the bias at this address, one float a column of the tile.
    Bias(*const f32),
    /// From the value in the output.
    Keep,
}

/// What happens to finished chains.
#[derive(Clone, Copy, Debug)]
pub(super) enum Finish {
    /// They are the outputs.
    Store,
    /// They are added to the output: a folded token block.
    Fold,
    /// They are added to 0: the first folded block.
    FoldIntoZero,
}

/// A walk along the cache lines of a rectangle that is needed soon, row by row. Tiles take a few
/// steps of it each, so that memory works while they multiply. At its end it stays in the last row,
/// whose lines are there by then: what lies beyond would only drive out what is needed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    at: *const u8,
    row: *const u8,
    row_bytes: usize,
    row_stride: usize,
    /// Rows after this one.
    rows_left: usize,
}

const LINE: usize = 64;

/// Steps of a tile between two steps of its walks: about a hundred cycles on AVX-512, whose step is
/// 28 multiply-adds at one a cycle, and fifty on AVX2, with 12 at two a cycle.
const fn steps_a_line(vectors: usize) -> usize {
    if vectors == 1 { 8 } else { 4 }
}

impl Walk {
    /// Asks for nothing.
    pub(super) const NOWHERE: Self = Self {
        at: std::ptr::null(),
        row: std::ptr::null(),
        row_bytes: 0,
        row_stride: 0,
        rows_left: 0,
    };

    /// Elements `columns` of the rows `rows` of a matrix with `stride` elements of `element` bytes a
    /// row. Columns may run past the last: nothing is read, only asked for.
    pub(super) fn rows<T>(
        values: &[T],
        (element, stride): (usize, usize),
        rows: &Range<usize>,
        columns: &Range<usize>,
    ) -> Self {
        let start = (rows.start * stride + columns.start) * element;
        let row = values.as_ptr().cast::<u8>().wrapping_add(start);
        Self {
            at: row,
            row,
            row_bytes: columns.len() * element,
            row_stride: stride * element,
            rows_left: rows.len().saturating_sub(1),
        }
    }

    #[inline(always)]
    fn step<V: F32x16>(&mut self) {
        V::prefetch(self.at);
        self.at = self.at.wrapping_add(LINE);
        if self.at >= self.row.wrapping_add(self.row_bytes) {
            if self.rows_left > 0 {
                self.rows_left -= 1;
                self.row = self.row.wrapping_add(self.row_stride);
            }
            self.at = self.row;
        }
    }
}

/// Packed operands and the output of one tile.
#[derive(Clone, Copy, Debug)]
pub(super) struct TileArgs {
    /// Steps of the contraction.
    pub(super) steps: usize,
    /// Packed left operand.
    pub(super) left: *const f32,
    /// Packed right operand, `[steps][16]` a panel.
    pub(super) right: *const f32,
    /// Floats between two panels.
    pub(super) panel_stride: usize,
    /// First output.
    pub(super) out: *mut f32,
    /// Floats between two rows of the output.
    pub(super) out_stride: usize,
    /// Where chains start.
    pub(super) begin: Begin,
    /// Where they end.
    pub(super) finish: Finish,
    /// What to ask memory for meanwhile. Behind a pointer: a copy back would have to wait until the
    /// tile's stores have left the store buffer.
    pub(super) walks: *mut [Walk; 2],
}

/// One tile of `ROWS` × `VECS` · 16 outputs. The left operand has `ROW_STRIDE` floats between rows
/// and `STEP_STRIDE` between steps.
struct Tile<
    A,
    const ROWS: usize,
    const VECS: usize,
    const ROW_STRIDE: usize,
    const STEP_STRIDE: usize,
> {
    args: TileArgs,
    arithmetic: PhantomData<A>,
}

impl<
    A: Arithmetic,
    const ROWS: usize,
    const VECS: usize,
    const ROW_STRIDE: usize,
    const STEP_STRIDE: usize,
> Kernel for Tile<A, ROWS, VECS, ROW_STRIDE, STEP_STRIDE>
{
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let TileArgs { steps, left, right, walks, .. } = self.args;
        // SAFETY: the caller lends its walks for the call (`run_tile`).
        let walks = unsafe { &mut *walks };
        let mut sums = self.args.begin::<V, A, ROWS, VECS>();
        let (mut left, mut right) = (left, right);
        let mut done = 0;
        while done < steps {
            for walk in walks.iter_mut() {
                walk.step::<V>();
            }
            let stride = steps_a_line(V::TILE.0);
            self.args.ask_for_row::<V, VECS>((steps - done).div_ceil(stride), ROWS);
            let until = steps.min(done + stride);
            for _ in 0..(until - done) / A::TOGETHER {
                for step in (0..A::TOGETHER).rev() {
                    let left = left.wrapping_add(step * STEP_STRIDE);
                    let right = right.wrapping_add(step * LANES);
                    self.step::<V>(left, right, &mut sums);
                }
                left = left.wrapping_add(A::TOGETHER * STEP_STRIDE);
                right = right.wrapping_add(A::TOGETHER * LANES);
            }
            if !(until - done).is_multiple_of(A::TOGETHER) {
                // The last input is the first of a pair whose second is zero: −0 becomes 0.
                sums.iter_mut().flatten().for_each(|sum| *sum = *sum + V::zero());
                self.step::<V>(left, right, &mut sums);
            }
            done = until;
        }
        self.args.finish::<V, A, ROWS, VECS>(&sums);
    }
}

impl<
    A: Arithmetic,
    const ROWS: usize,
    const VECS: usize,
    const ROW_STRIDE: usize,
    const STEP_STRIDE: usize,
> Tile<A, ROWS, VECS, ROW_STRIDE, STEP_STRIDE>
{
    /// One step of all chains.
    #[inline(always)]
    fn step<V: F32x16>(&self, left: *const f32, right: *const f32, sums: &mut [[V; VECS]; ROWS]) {
        let mut columns = [V::zero(); VECS];
        for (j, column) in columns.iter_mut().enumerate() {
            // SAFETY: packed panels hold `steps` vectors (`run_tile`).
            *column = unsafe { V::load_ptr(right.wrapping_add(j * self.args.panel_stride)) };
        }
        for (i, row) in sums.iter_mut().enumerate() {
            // SAFETY: the packed left operand holds `ROWS` rows of `steps` (`run_tile`).
            let x = V::splat(unsafe { *left.wrapping_add(i * ROW_STRIDE) });
            for (sum, column) in row.iter_mut().zip(columns) {
                *sum = A::step(x, column, *sum);
            }
        }
    }
}

impl TileArgs {
    #[inline(always)]
    fn out_at(&self, i: usize, j: usize) -> *mut f32 {
        self.out.wrapping_add(i * self.out_stride + j * LANES)
    }

    /// Asks for a row of the output, and of the tile beside it, which likely comes next. `left` says how
    /// many more times that will be, so that the rows are there for the tile's stores: what was asked
    /// for at its beginning would be driven out by the packed operands.
    #[inline(always)]
    fn ask_for_row<V: F32x16, const VECS: usize>(&self, left: usize, rows: usize) {
        if left <= rows {
            for j in 0..2 * VECS {
                V::prefetch(self.out_at(rows - left, j).cast());
            }
        }
    }

    /// What the chains start from.
    #[inline(always)]
    fn begin<V: F32x16, A: Arithmetic, const ROWS: usize, const VECS: usize>(
        &self,
    ) -> [[V; VECS]; ROWS] {
        let mut sums = [[V::zero(); VECS]; ROWS];
        for (i, row) in sums.iter_mut().enumerate() {
            for (j, sum) in row.iter_mut().enumerate() {
                match self.begin {
                    Begin::Zero => {}
                    Begin::Bias(bias) => {
                        // SAFETY: the bias has a value for every column of the tile (`run_tile`).
                        *sum = A::begin(unsafe { V::load_ptr(bias.wrapping_add(j * LANES)) });
                    }
                    // SAFETY: the output holds the whole tile (`run_tile`).
                    Begin::Keep => *sum = A::begin(unsafe { V::load_ptr(self.out_at(i, j)) }),
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn finish<V: F32x16, A: Arithmetic, const ROWS: usize, const VECS: usize>(
        &self,
        sums: &[[V; VECS]; ROWS],
    ) {
        for (i, row) in sums.iter().enumerate() {
            for (j, &sum) in row.iter().enumerate() {
                let out = self.out_at(i, j);
                let total = match self.finish {
                    Finish::Store => A::finish(sum),
                    // SAFETY: the output holds the whole tile (`run_tile`).
                    Finish::Fold => (unsafe { V::load_ptr(out) }) + sum,
                    Finish::FoldIntoZero => V::zero() + sum,
                };
                // SAFETY: the output holds the whole tile, and no other task has it (`run_tile`).
                unsafe { total.store_ptr(out) };
            }
        }
    }
}

/// Rows of the smallest tile that holds `rows` rows (at most `V::TILE.1`).
#[inline(always)]
pub(super) fn tile_rows<V: F32x16>(rows: usize) -> usize {
    let fits = |size: &usize| *size >= rows && *size <= V::TILE.1;
    [1, 2, 4, 6, 8, 12, 14].into_iter().find(fits).unwrap_or(V::TILE.1)
}

/// Computes one tile of exactly `rows` (a value of [`tile_rows`]) × `vectors` · 16 outputs, with a
/// left operand packed by rows or, if `BY_STEPS`, by steps.
///
/// # Safety
/// - `left` holds `rows` packed rows and `right` `vectors` packed panels of `steps` steps each.
/// - `out` is valid for the whole tile, and no other thread touches it meanwhile.
/// - `Begin::Bias` points to `vectors` · 16 floats.
/// - `walks` points to walks that nobody else uses meanwhile.
#[inline(always)]
pub(super) unsafe fn run_tile<V: F32x16, A: Arithmetic, const BY_STEPS: bool>(
    rows: usize,
    vectors: usize,
    args: TileArgs,
) {
    if vectors == 2 && V::TILE.0 == 2 {
        run_rows::<V, A, 2, BY_STEPS>(rows, args);
    } else {
        run_rows::<V, A, 1, BY_STEPS>(rows, args);
    }
}

#[inline(always)]
fn run_rows<V: F32x16, A: Arithmetic, const VECS: usize, const BY_STEPS: bool>(
    rows: usize,
    args: TileArgs,
) {
    match rows {
        1 => run_exact::<V, A, 1, VECS, BY_STEPS>(args),
        2 => run_exact::<V, A, 2, VECS, BY_STEPS>(args),
        4 => run_exact::<V, A, 4, VECS, BY_STEPS>(args),
        6 if V::TILE.1 >= 6 => run_exact::<V, A, 6, VECS, BY_STEPS>(args),
        8 if V::TILE.1 >= 8 => run_exact::<V, A, 8, VECS, BY_STEPS>(args),
        12 if V::TILE.1 >= 12 => run_exact::<V, A, 12, VECS, BY_STEPS>(args),
        14 if V::TILE.1 >= 14 => run_exact::<V, A, 14, VECS, BY_STEPS>(args),
        _ => unreachable!("tiles of {rows} rows do not exist"),
    }
}

#[inline(always)]
fn run_exact<
    V: F32x16,
    A: Arithmetic,
    const ROWS: usize,
    const VECS: usize,
    const BY_STEPS: bool,
>(
    args: TileArgs,
) {
    let arithmetic = PhantomData::<A>;
    if BY_STEPS {
        A::call::<V, _>(Tile::<A, ROWS, VECS, 1, LEFT_STEP_STRIDE> { args, arithmetic });
    } else {
        A::call::<V, _>(Tile::<A, ROWS, VECS, LEFT_ROW_STRIDE, 1> { args, arithmetic });
    }
}

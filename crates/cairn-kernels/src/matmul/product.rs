//! One blocked product for all three uses: packed operands, register tiles, a grid of tasks.
//!
//! Source of the scheme: Goto and van de Geijn, "Anatomy of High-Performance Matrix
//! Multiplication", 2008. We differ in one thing: a chain that is cut into blocks of the contraction
//! continues from the stored partial, so blocking changes no bit.
//!
//! Loops, outermost first: tasks (row range × column range), column blocks, blocks of the
//! contraction (the right block is packed and stays in the second-level cache), row tiles (the left
//! rows are packed and stay in the first-level cache), vectors of columns.

use std::ops::Range;

use super::arithmetic::{
    Arithmetic, Form, Fused, LeastMagnitudes, PairDot, PairFlushed, PairFused, starts_normal,
};
use super::blocking::Blocking;
use super::pack::{Left, PackLeft, Right, pack_right};
use super::pack_bf16::{PackLeftPairs, PackRightPairs, Settle};
use super::reference::{row_blocks, token_blocks};
use super::rows::RowList;
use super::tile::{
    Begin, Finish, LEFT_ROW_STRIDE, LEFT_STEP_STRIDE, STAGE_FLOATS, TileArgs, Walk, run_tile,
    tile_rows,
};
use crate::TOKEN_BLOCK;
use crate::cpu::{Cpu, SharedSlice};
use crate::pool::Scratch;
use crate::simd::{F32x16, Kernel, LANES, dispatch};

/// Steps of the contraction in one block, at most. Rows of this length fill the first-level cache
/// of the smallest machine we care for (32 KiB) to two thirds. A multiple of 32, the block of Q8.
pub(super) const STEPS_MAX: usize = 384;
/// Floats that a packed block of the right operand may take.
pub(super) const RIGHT_FLOATS_MAX: usize = 400 << 10;
const LEFT_FLOATS: usize = {
    let rows = 14 * LEFT_ROW_STRIDE;
    let steps = TOKEN_BLOCK * LEFT_STEP_STRIDE;
    if rows > steps { rows } else { steps }
};

/// Floats between two rows of a staged tile.
const STAGE_STRIDE: usize = 2 * LANES;

/// Where each output's chain starts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start<'a> {
    Zero,
    Bias(&'a [f32]),
    Keep,
}

/// How the contraction is summed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Contraction<'a> {
    /// One chain over this many steps.
    Chain(usize),
    /// A chain for each token block, folded in order.
    TokenBlocks { t: usize, row_tokens: usize },
    /// A chain for each block of an expert's rows, folded in order; the list gives their tokens.
    RowBlocks { tokens: RowList<'a>, row_tokens: usize },
}

impl Contraction<'_> {
    /// Calls `f` with each block of steps, the one after it (an empty one after the last) and whether
    /// it is the first.
    fn for_each_block(self, steps_max: usize, mut f: impl FnMut(Range<usize>, Range<usize>, bool)) {
        let mut pending: Option<Range<usize>> = None;
        let mut is_first = true;
        self.blocks(steps_max, |block| {
            if let Some(steps) = pending.replace(block.clone()) {
                f(steps, block, is_first);
                is_first = false;
            }
        });
        if let Some(steps) = pending {
            let end = steps.end;
            f(steps, end..end, is_first);
        }
    }

    fn blocks(self, steps_max: usize, mut f: impl FnMut(Range<usize>)) {
        match self {
            Self::Chain(steps) => {
                let parts = steps.div_ceil(steps_max).max(1);
                let length = steps.div_ceil(parts).next_multiple_of(32).max(1);
                f(0..steps.min(length));
                for start in (length..steps).step_by(length) {
                    f(start..steps.min(start + length));
                }
            }
            Self::TokenBlocks { t, row_tokens } => {
                token_blocks(t, row_tokens).for_each(f);
            }
            Self::RowBlocks { tokens, row_tokens } => {
                row_blocks(tokens, row_tokens).for_each(f);
            }
        }
    }
}

/// `out[row][column] = Σ_step left[row][step] · right[step][column]`.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) left: Left<'a>,
    pub(super) right: Right<'a>,
    /// How the operands are packed. Anything but floats is a forward product by a bf16 weight.
    pub(super) form: Form,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) contraction: Contraction<'a>,
    pub(super) start: Start<'a>,
    /// First float of the output in `out`.
    pub(super) out_first: usize,
    /// Floats between two rows of the output.
    pub(super) out_stride: usize,
    /// Where each row goes, if not one after the other.
    pub(super) out_rows: Option<&'a [u32]>,
}

impl Product<'_> {
    /// The first float of an output row.
    #[inline(always)]
    fn row_start(&self, row: usize) -> usize {
        let row = self.out_rows.map_or(row, |rows| rows[row] as usize);
        self.out_first + row * self.out_stride
    }

    /// What these steps contract, in both operands.
    #[inline(always)]
    fn inputs(&self, steps: &Range<usize>) -> Range<usize> {
        match (self.form, &self.right) {
            (Form::Pairs, Right::Outputs(rows)) => {
                2 * steps.start..rows.weight.k.min(2 * steps.end)
            }
            _ => steps.clone(),
        }
    }

    /// Whether chains that are summed as floats need no care for subnormal numbers, as far as their
    /// starts are concerned.
    fn starts_normal(&self, columns: &Range<usize>) -> bool {
        match self.start {
            Start::Zero => true,
            Start::Bias(bias) => starts_normal(&bias[columns.clone()]),
            Start::Keep => false,
        }
    }
}

/// Computes a product into `out`, all its tiles as one set of tasks.
pub(super) fn run(cpu: &Cpu, product: Product<'_>, out: &mut [f32], blocking: &Blocking) {
    run_each(cpu, (1, |_| product), out, blocking);
}

/// As [`run`] for `count` products of the same sizes (heads of one layer) into disjoint parts of `out`.
pub(super) fn run_each<'a>(
    cpu: &Cpu,
    (count, product_of): (usize, impl Fn(usize) -> Product<'a> + Sync),
    out: &mut [f32],
    blocking: &Blocking,
) {
    if count == 0 {
        return;
    }
    let first = product_of(0);
    let row_parts = first.rows.div_ceil(blocking.rows);
    let column_parts = first.columns.div_ceil(blocking.columns);
    let grid = row_parts * column_parts;
    let out = SharedSlice::new(out);
    let simd = cpu.simd();
    cpu.parallel(count * grid, |task, scratch| {
        let product = &product_of(task / grid);
        let (row_part, column_part) = (task % grid % row_parts, task % grid / row_parts);
        let part = |i: usize, size: usize, end: usize| i * size..end.min((i + 1) * size);
        let rows = part(row_part, blocking.rows, product.rows);
        let columns = part(column_part, blocking.columns, product.columns);
        let steps_max = blocking.steps;
        dispatch(simd, Region { product, out: &out, rows, columns, steps_max, scratch });
    });
}

/// One task: a range of rows and columns that no other task touches.
pub(super) struct Region<'a> {
    pub(super) product: &'a Product<'a>,
    pub(super) out: &'a SharedSlice<'a, f32>,
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
    pub(super) steps_max: usize,
    pub(super) scratch: &'a mut Scratch,
}

impl Kernel for Region<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { product, out, rows, columns, steps_max, scratch } = self;
        let [right, left, stage] = scratch.f32_parts([RIGHT_FLOATS_MAX, LEFT_FLOATS, STAGE_FLOATS]);
        let mut is_normal = product.form != Form::Bf16Floats || product.starts_normal(&columns);
        product.contraction.for_each_block(steps_max, |steps, next, is_first| {
            let panels = columns.len().div_ceil(LANES);
            let packed = &mut right[..panels * LANES * steps.len()];
            let least = pack_block::<V>(product, columns.clone(), steps.clone(), packed);
            // After the last block, the first one of the next columns: whoever has a task to go on with
            // likely begins there.
            let walk = if next.is_empty() {
                let end = product.columns.min(columns.end + columns.len());
                product.right.walk(&(columns.end..end), &product.inputs(&(0..steps.len())))
            } else {
                product.right.walk(&columns, &product.inputs(&next))
            };
            let mut block = Block {
                product,
                out,
                columns: columns.clone(),
                steps,
                next_steps: next,
                is_first,
                right: packed,
                least,
                walks: [walk; 2],
            };
            let rows = rows.clone();
            match (product.form, product.left) {
                (Form::Pairs, _) => block.run::<V, PairDot, false>(rows, left, stage),
                (Form::Bf16Floats, _) => {
                    is_normal = block.run_bf16_floats::<V>(rows, left, stage, is_normal);
                }
                (Form::Floats, Left::Rows { .. } | Left::ListedRows { .. }) => {
                    block.run::<V, Fused, false>(rows, left, stage);
                }
                (Form::Floats, Left::Steps { .. } | Left::ListedSteps { .. }) => {
                    block.run::<V, Fused, true>(rows, left, stage);
                }
            }
        });
    }
}

/// Packs a block of the right operand. Gives the smallest magnitude in it where that matters.
#[inline(always)]
fn pack_block<V: F32x16>(
    product: &Product<'_>,
    columns: Range<usize>,
    steps: Range<usize>,
    packed: &mut [f32],
) -> f32 {
    match (product.form, &product.right) {
        (Form::Pairs, Right::Outputs(rows)) => {
            V::call(PackRightPairs { rows, columns, steps, panels: packed });
            f32::INFINITY
        }
        (form, right) => {
            pack_right::<V>(right, columns, steps, packed);
            match form {
                Form::Bf16Floats => V::call(Settle::<false> { packed }),
                Form::Floats | Form::Pairs => f32::INFINITY,
            }
        }
    }
}

/// The right operand packed for some columns and steps.
struct Block<'a> {
    product: &'a Product<'a>,
    out: &'a SharedSlice<'a, f32>,
    columns: Range<usize>,
    steps: Range<usize>,
    next_steps: Range<usize>,
    is_first: bool,
    right: &'a [f32],
    /// The smallest magnitude other than 0 in `right`, where the form asks for it.
    least: f32,
    /// What to ask memory for while multiplying: the next left rows and the next right block.
    walks: [Walk; 2],
}

impl Block<'_> {
    #[inline(always)]
    fn run<V: F32x16, A: Arithmetic, const BY_STEPS: bool>(
        &mut self,
        all_rows: Range<usize>,
        left: &mut [f32],
        stage: &mut [f32],
    ) {
        for first in all_rows.clone().step_by(V::TILE.1) {
            let rows = first..all_rows.end.min(first + V::TILE.1);
            let tile_rows = self.pack_left::<V, A>(&rows, &all_rows, left);
            self.tiles::<V, A, BY_STEPS>(&rows, tile_rows, left, stage);
        }
    }

    /// A block of a bf16 product by multiply-adds. The chains go on from multiples of 2^−126 if
    /// `is_normal`; gives whether they still are. Once they might not be, they are flushed.
    #[inline(always)]
    fn run_bf16_floats<V: F32x16>(
        &mut self,
        all_rows: Range<usize>,
        left: &mut [f32],
        stage: &mut [f32],
        is_normal: bool,
    ) -> bool {
        let mut stays_normal = is_normal;
        for first in all_rows.clone().step_by(V::TILE.1) {
            let rows = first..all_rows.end.min(first + V::TILE.1);
            let tile_rows = self.pack_left::<V, PairFused>(&rows, &all_rows, left);
            let mut x = f32::INFINITY;
            for row in left.chunks_mut(LEFT_ROW_STRIDE).take(tile_rows) {
                let packed = &mut row[..self.steps.len()];
                x = x.min(V::call(Settle::<true> { packed }));
            }
            if is_normal && (LeastMagnitudes { x, w: self.least }).keep_normal() {
                self.tiles::<V, PairFused, false>(&rows, tile_rows, left, stage);
            } else {
                self.tiles::<V, PairFlushed, false>(&rows, tile_rows, left, stage);
                stays_normal = false;
            }
        }
        stays_normal
    }

    /// Packs the left rows of some tiles, and gives how many there are with those that fill them up.
    #[inline(always)]
    fn pack_left<V: F32x16, A: Arithmetic>(
        &mut self,
        rows: &Range<usize>,
        all_rows: &Range<usize>,
        left: &mut [f32],
    ) -> usize {
        let (product, steps) = (self.product, &self.steps);
        self.walks[0] = if rows.end < all_rows.end {
            // The next rows of this block; after the last, the first of the next block.
            let next = rows.end..all_rows.end.min(rows.end + V::TILE.1);
            product.left.walk(&next, &product.inputs(steps))
        } else {
            let next = all_rows.start..all_rows.end.min(all_rows.start + V::TILE.1);
            product.left.walk(&next, &product.inputs(&self.next_steps))
        };
        let tile_rows = tile_rows::<V>(rows.len());
        let (source, rows, packed) = (product.left, rows.clone(), left);
        if product.form == Form::Pairs {
            let inputs = product.inputs(steps);
            A::call::<V, _>(PackLeftPairs { left: source, rows, inputs, tile_rows, packed });
        } else {
            V::call(PackLeft { left: source, rows, steps: steps.clone(), tile_rows, packed });
        }
        tile_rows
    }

    #[inline(always)]
    fn tiles<V: F32x16, A: Arithmetic, const BY_STEPS: bool>(
        &mut self,
        rows: &Range<usize>,
        tile_rows: usize,
        left: &[f32],
        stage: &mut [f32],
    ) {
        for column in (0..self.columns.len()).step_by(V::TILE.0 * LANES) {
            self.tile::<V, A, BY_STEPS>(rows.clone(), tile_rows, column, left, stage);
        }
    }

    /// One tile, `column` columns after the block's first.
    #[inline(always)]
    fn tile<V: F32x16, A: Arithmetic, const BY_STEPS: bool>(
        &mut self,
        rows: Range<usize>,
        tile_rows: usize,
        column: usize,
        left: &[f32],
        stage: &mut [f32],
    ) {
        let panels = (self.columns.len() - column).div_ceil(LANES);
        let vectors = panels.min(V::TILE.0);
        let columns = (self.columns.len() - column).min(vectors * LANES);
        let Product { out_stride, out_rows, .. } = *self.product;
        let first = self.columns.start + column;
        let out_index = self.product.row_start(rows.start) + first;
        let (begin, finish) = self.ends(first);
        let mut args = TileArgs {
            steps: self.steps.len(),
            left: left.as_ptr(),
            right: self.right[column * self.steps.len()..].as_ptr(),
            panel_stride: self.steps.len() * LANES,
            out: self.out.as_mut_ptr().wrapping_add(out_index),
            out_stride,
            begin,
            finish,
            walks: &raw mut self.walks,
        };
        if rows.len() == tile_rows && columns == vectors * LANES && out_rows.is_none() {
            // SAFETY: operands are packed for this tile; the whole tile lies in the output, in this
            // task's rows and columns; the bias covers the columns; the walks are this block's.
            unsafe { run_tile::<V, A, BY_STEPS>(tile_rows, vectors, args) };
            return;
        }
        if !matches!((begin, finish), (Begin::Zero, Finish::Store | Finish::FoldIntoZero)) {
            self.load_stage(&rows, first, columns, stage);
        }
        args.out = stage.as_mut_ptr();
        args.out_stride = STAGE_STRIDE;
        args.begin = if matches!(begin, Begin::Bias(_)) { Begin::Keep } else { begin };
        // SAFETY: as above, with the stage as the output: it holds the largest tile.
        unsafe { run_tile::<V, A, BY_STEPS>(tile_rows, vectors, args) };
        for (i, row) in rows.enumerate() {
            let start = self.product.row_start(row) + first;
            // SAFETY: these columns of this row belong to this task.
            let target = unsafe { self.out.slice_mut(start..start + columns) };
            target.copy_from_slice(&stage[i * STAGE_STRIDE..][..columns]);
        }
    }

    /// Where the chains of columns from `first` on start and end in this block.
    #[inline(always)]
    fn ends(&self, first: usize) -> (Begin, Finish) {
        let is_first = self.is_first;
        match (self.product.contraction, self.product.start) {
            (Contraction::Chain(_), _) if !is_first => (Begin::Keep, Finish::Store),
            (Contraction::Chain(_), Start::Zero) => (Begin::Zero, Finish::Store),
            (Contraction::Chain(_), Start::Keep) => (Begin::Keep, Finish::Store),
            (Contraction::Chain(_), Start::Bias(bias)) => {
                (Begin::Bias(bias[first..].as_ptr()), Finish::Store)
            }
            // Blocks of tokens or rows.
            (_, Start::Keep) => (Begin::Zero, Finish::Fold),
            _ if !is_first => (Begin::Zero, Finish::Fold),
            _ => (Begin::Zero, Finish::FoldIntoZero),
        }
    }

    /// Copies what the tile's chains start from (output or bias) into the stage.
    #[inline(always)]
    fn load_stage(&self, rows: &Range<usize>, first: usize, columns: usize, stage: &mut [f32]) {
        let start = self.product.start;
        stage.fill(0.0);
        for (i, row) in rows.clone().enumerate() {
            let target = &mut stage[i * STAGE_STRIDE..][..columns];
            match start {
                Start::Bias(bias) if self.is_first => {
                    target.copy_from_slice(&bias[first..first + columns]);
                }
                _ => {
                    let start = self.product.row_start(row) + first;
                    // SAFETY: these columns of this row belong to this task.
                    target.copy_from_slice(unsafe { self.out.slice_mut(start..start + columns) });
                }
            }
        }
    }
}

//! Packing: operands of a product copied, decoded and transposed into what the tiles read.
//!
//! The right operand becomes panels `[steps][16]`, lanes are output columns; the left operand
//! becomes a few rows. Both live in a thread's scratch and stay in cache; a weight is never decoded
//! as a whole.

use std::ops::Range;

use super::rows::{RowList, WeightRows};
use super::tile::{LEFT_ROW_STRIDE, LEFT_STEP_STRIDE, Walk};
use crate::encoding::{Bf16z, Encoding, HALF_COLUMNS, Layout};
use crate::simd::{F32x16, Kernel, LANES};

/// Panels that are filled together when rows are copied, so that reads run along the rows.
const PANEL_GROUP: usize = 4;

/// Columns of a panel that are read at once where they are there.
pub(super) const QUAD: usize = HALF_COLUMNS;

/// The stored elements of a matrix, sixteen at a time.
pub(super) trait Elements: Columns {
    /// Elements (`row`, `column`) … (`row`, `column + count - 1`) of a row-major matrix, zeros
    /// after them. `column` is a multiple of 16, `count` at most 16.
    fn row<V: F32x16>(self, row: usize, column: usize, count: usize) -> V;
}

/// The columns of a matrix in panels.
pub(super) trait Columns: Copy {
    /// Whether a quad costs less than four columns one by one.
    const QUADS: bool = false;

    /// Column `column` of panel `panel`.
    ///
    /// # Safety
    /// - The matrix has that panel and that column.
    unsafe fn lanes<V: F32x16>(self, panel: usize, column: usize) -> V;

    /// Columns `column` to `column + 3` of panel `panel` of a matrix in panels. `column` is a
    /// multiple of 4.
    ///
    /// # Safety
    /// - The matrix has that panel and those columns.
    #[inline(always)]
    unsafe fn quad<V: F32x16>(self, panel: usize, column: usize) -> [V; QUAD] {
        // SAFETY: passed on.
        let (quad, is_bare) = unsafe { self.bare_quad(panel, column) };
        if is_bare { self.patched(panel, column, quad) } else { quad }
    }

    /// As [`quad`](Self::quad), but perhaps without what [`patched`](Self::patched) adds; and
    /// whether that is needed. So a loop can decode first, without a branch in between.
    ///
    /// # Safety
    /// - The matrix has that panel and those columns.
    #[inline(always)]
    unsafe fn bare_quad<V: F32x16>(self, panel: usize, column: usize) -> ([V; QUAD], bool) {
        let mut quad = [V::zero(); QUAD];
        for (i, lanes) in quad.iter_mut().enumerate() {
            // SAFETY: passed on.
            *lanes = unsafe { self.lanes(panel, column + i) };
        }
        (quad, false)
    }

    /// The quad that a bare one stands for.
    #[inline(always)]
    fn patched<V: F32x16>(self, _panel: usize, _column: usize, quad: [V; QUAD]) -> [V; QUAD] {
        quad
    }

    /// The step of what a panel's bare quads lack, of that the `index`-th; `usize::MAX` past the last.
    #[inline(always)]
    fn missing_step(self, _panel: usize, _index: usize) -> usize {
        usize::MAX
    }

    /// The quad that a bare one stands for, and how many of its panel were missing up to its end.
    /// Before it, `index` were.
    #[inline(always)]
    fn completed<V: F32x16>(
        self,
        _panel: usize,
        _column: usize,
        index: usize,
        quad: [V; QUAD],
    ) -> ([V; QUAD], usize) {
        (quad, index)
    }

    /// Of so many steps, those up to which bare quads lack nothing but what
    /// [`missing_step`](Self::missing_step) tells.
    #[inline(always)]
    fn quad_steps(self, steps: usize) -> usize {
        steps
    }

    /// Whether a stream asks for the columns of the next panels while it reads these, into the second-level
    /// cache; else for those that follow.
    const ASKS_NEXT_PANELS: bool = false;

    /// Asks memory for four columns of a panel, from `column` on. They need not exist.
    fn prefetch<V: F32x16>(self, panel: usize, column: usize);

    /// Asks memory for what a panel has beside its columns. It need not exist.
    #[inline(always)]
    fn prefetch_panel<V: F32x16>(self, _panel: usize) {}
}

/// Asks memory for four columns of sixteen elements.
#[inline(always)]
fn prefetch_columns<V: F32x16, T>(values: &[T], first: usize) {
    let address = values.as_ptr().wrapping_add(first).cast::<u8>();
    for line in 0..size_of::<T>() {
        V::prefetch(address.wrapping_add(line * 64));
    }
}

/// 32-bit floats with `stride` elements between rows; the panels have `stride` columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct F32Elements<'a> {
    pub(super) values: &'a [f32],
    pub(super) stride: usize,
}

/// bf16 bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bf16Elements<'a> {
    pub(super) values: &'a [u16],
    pub(super) stride: usize,
}

impl<'a> Bf16Elements<'a> {
    /// # Panics
    /// If the weight is not stored as bf16.
    pub(super) fn new(rows: &WeightRows<'a>) -> Self {
        let WeightRows { weight, first, .. } = rows;
        assert_eq!(weight.encoding, Encoding::Bf16, "a weight of bf16 values");
        // Rows of both layouts take k elements, so the first one starts at the same place.
        Self { values: &weight.u16s()[first * weight.k..], stride: weight.k }
    }
}

/// f16 bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct F16Elements<'a> {
    values: &'a [u16],
    stride: usize,
}

/// The first `count` elements of `from[start..]`, zeros after them.
#[inline(always)]
fn padded<T: Copy + Default>(from: &[T], start: usize, count: usize) -> [T; LANES] {
    let mut lanes = [T::default(); LANES];
    lanes[..count].copy_from_slice(&from[start..start + count]);
    lanes
}

/// Sixteen elements from `start`, without a copy.
#[inline(always)]
fn whole<T>(from: &[T], start: usize) -> &[T; LANES] {
    from[start..].first_chunk().expect("a stored row holds the sixteen elements asked for")
}

/// Sixteen elements from `start`, unchecked but for debug builds.
///
/// # Safety
/// - `from` holds `start + 16` elements.
#[inline(always)]
unsafe fn whole_unchecked<T>(from: &[T], start: usize) -> &[T; LANES] {
    debug_assert!(start + LANES <= from.len(), "panel read past its weight");
    // SAFETY: the caller promises that the sixteen elements are there.
    unsafe { &*from.as_ptr().wrapping_add(start).cast() }
}

impl Elements for F32Elements<'_> {
    #[inline(always)]
    fn row<V: F32x16>(self, row: usize, column: usize, count: usize) -> V {
        let start = row * self.stride + column;
        if count == LANES {
            V::load(whole(self.values, start))
        } else {
            V::load_partial(&self.values[start..start + count], 0.0)
        }
    }
}

impl Columns for F32Elements<'_> {
    #[inline(always)]
    unsafe fn lanes<V: F32x16>(self, panel: usize, column: usize) -> V {
        let start = (panel * self.stride + column) * LANES;
        // SAFETY: passed on.
        V::load(unsafe { whole_unchecked(self.values, start) })
    }
    #[inline(always)]
    fn prefetch<V: F32x16>(self, panel: usize, column: usize) {
        prefetch_columns::<V, _>(self.values, (panel * self.stride + column) * LANES);
    }
}

impl Elements for Bf16Elements<'_> {
    #[inline(always)]
    fn row<V: F32x16>(self, row: usize, column: usize, count: usize) -> V {
        let start = row * self.stride + column;
        if count == LANES {
            V::from_bf16(whole(self.values, start))
        } else {
            V::from_bf16(&padded(self.values, start, count))
        }
    }
}

impl Columns for Bf16Elements<'_> {
    #[inline(always)]
    unsafe fn lanes<V: F32x16>(self, panel: usize, column: usize) -> V {
        let start = (panel * self.stride + column) * LANES;
        // SAFETY: passed on.
        V::from_bf16(unsafe { whole_unchecked(self.values, start) })
    }
    #[inline(always)]
    fn prefetch<V: F32x16>(self, panel: usize, column: usize) {
        prefetch_columns::<V, _>(self.values, (panel * self.stride + column) * LANES);
    }
}

impl Elements for F16Elements<'_> {
    #[inline(always)]
    fn row<V: F32x16>(self, row: usize, column: usize, count: usize) -> V {
        let start = row * self.stride + column;
        if count == LANES {
            V::from_f16(whole(self.values, start))
        } else {
            V::from_f16(&padded(self.values, start, count))
        }
    }
}

impl Columns for F16Elements<'_> {
    #[inline(always)]
    unsafe fn lanes<V: F32x16>(self, panel: usize, column: usize) -> V {
        let start = (panel * self.stride + column) * LANES;
        // SAFETY: passed on.
        V::from_f16(unsafe { whole_unchecked(self.values, start) })
    }
    #[inline(always)]
    fn prefetch<V: F32x16>(self, panel: usize, column: usize) {
        prefetch_columns::<V, _>(self.values, (panel * self.stride + column) * LANES);
    }
}

/// Work on a weight's elements, whatever their encoding.
pub(super) trait ElementsVisitor {
    /// What the work gives.
    type Output;
    /// Does the work.
    fn visit<E: Elements>(self, elements: E) -> Self::Output;
}

/// Calls `visitor` with the weight's elements.
#[inline(always)]
pub(super) fn visit<X: ElementsVisitor>(rows: &WeightRows<'_>, visitor: X) -> X::Output {
    let (weight, first) = (&rows.weight, rows.first);
    let stride = weight.k;
    // Rows of both layouts take `stride` elements, so the first kept one starts at the same place.
    let start = first * stride;
    match weight.encoding {
        Encoding::F32 => visitor.visit(F32Elements { values: &weight.f32s()[start..], stride }),
        Encoding::Bf16 => visitor.visit(Bf16Elements::new(rows)),
        Encoding::F16 => visitor.visit(F16Elements { values: &weight.u16s()[start..], stride }),
        Encoding::Bf16z => visitor.visit(rows.bf16z()),
        Encoding::Q8 | Encoding::Q4 | Encoding::Nf4 | Encoding::Fp8 | Encoding::Fp4 => {
            visitor.visit(rows.grouped())
        }
    }
}

/// The operand whose columns become vector lanes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Right<'a> {
    /// A plain matrix, `[steps][columns]`, with `stride` floats between steps.
    Matrix { values: &'a [f32], stride: usize },
    /// Listed rows of a plain matrix: step i is the i-th of the list.
    ListedMatrix { values: &'a [f32], stride: usize, list: RowList<'a> },
    /// A weight whose outputs are the lanes and whose inputs are contracted.
    Outputs(WeightRows<'a>),
    /// A weight whose inputs are the lanes and whose outputs are contracted.
    Inputs(WeightRows<'a>),
}

/// The operand whose elements are broadcast.
#[derive(Clone, Copy, Debug)]
pub(super) enum Left<'a> {
    /// `[rows][steps]`, with `stride` floats between rows.
    Rows { values: &'a [f32], stride: usize },
    /// `[steps][rows]`, with `stride` floats between steps.
    Steps { values: &'a [f32], stride: usize },
    /// As `Rows`; row i is the i-th of the list.
    ListedRows { values: &'a [f32], stride: usize, list: RowList<'a> },
    /// As `Steps`; step i is the i-th of the list.
    ListedSteps { values: &'a [f32], stride: usize, list: RowList<'a> },
}

impl Right<'_> {
    /// Walks what [`pack_right`] will read for these columns and steps.
    pub(super) fn walk(&self, columns: &Range<usize>, steps: &Range<usize>) -> Walk {
        match self {
            Right::Matrix { values, stride } => Walk::rows(values, (4, *stride), steps, columns),
            Right::ListedMatrix { .. } => Walk::NOWHERE,
            Right::Outputs(weight) => walk_weight(weight, columns, steps),
            Right::Inputs(weight) => walk_weight(weight, steps, columns),
        }
    }
}

fn walk_weight(rows: &WeightRows<'_>, outputs: &Range<usize>, inputs: &Range<usize>) -> Walk {
    let weight = &rows.weight;
    let outputs = rows.first + outputs.start..rows.first + outputs.end;
    let panels = outputs.start / LANES..outputs.end.div_ceil(LANES);
    let element = match weight.encoding {
        Encoding::F32 => 4,
        Encoding::Bf16 | Encoding::F16 => 2,
        Encoding::Bf16z => {
            let bytes = Bf16z::column_bytes(inputs.start)..Bf16z::column_bytes(inputs.end + 7);
            return Walk::rows(weight.bytes, (1, rows.panel_bytes()), &panels, &bytes);
        }
        Encoding::Q8 | Encoding::Q4 | Encoding::Nf4 | Encoding::Fp8 | Encoding::Fp4 => {
            let bytes = rows.code_bytes(inputs.start)..rows.code_bytes(inputs.end + 7);
            return Walk::rows(weight.bytes, (1, rows.panel_bytes()), &panels, &bytes);
        }
    };
    match weight.layout {
        Layout::RowMajor => Walk::rows(weight.bytes, (element, weight.k), &outputs, inputs),
        Layout::Panel => {
            let lanes = inputs.start * LANES..inputs.end * LANES;
            Walk::rows(weight.bytes, (element, weight.k * LANES), &panels, &lanes)
        }
    }
}

impl<'a> Left<'a> {
    /// The values that row `row` lies among, and its first. Not for an operand by steps.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> (&'a [f32], usize) {
        match self {
            Left::Rows { values, stride } => (values, row * stride),
            Left::ListedRows { values, stride, list } => (values, list.at(row) * stride),
            Left::Steps { .. } | Left::ListedSteps { .. } => {
                unreachable!("the operand lies by steps")
            }
        }
    }

    /// Walks what [`PackLeft`] will read for these rows and steps.
    pub(super) fn walk(&self, rows: &Range<usize>, steps: &Range<usize>) -> Walk {
        match self {
            Left::Rows { values, stride } => Walk::rows(values, (4, *stride), rows, steps),
            // One line a step: the rows before these lie in the lines before it.
            Left::Steps { values, stride } => {
                let last = rows.end.saturating_sub(1)..rows.end;
                Walk::rows(values, (4, *stride), steps, &last)
            }
            Left::ListedRows { .. } | Left::ListedSteps { .. } => Walk::NOWHERE,
        }
    }
}

/// Fills `panels` (`[columns/16][steps][16]`, zeros past the last column) from part of the right
/// operand. `columns.start` is a multiple of 16, `steps.start` of 32 for an encoded weight.
#[inline(always)]
pub(super) fn pack_right<V: F32x16>(
    right: &Right<'_>,
    columns: Range<usize>,
    steps: Range<usize>,
    panels: &mut [f32],
) {
    match right {
        Right::Matrix { values, stride } => {
            let elements = F32Elements { values, stride: *stride };
            V::call(CopyRows { elements, columns, steps, panels });
        }
        Right::ListedMatrix { values, stride, list } => {
            let elements = F32Elements { values, stride: *stride };
            V::call(CopyListedRows { elements, list: *list, columns, steps, panels });
        }
        Right::Outputs(rows) => match rows.weight.layout {
            Layout::RowMajor => {
                visit(rows, Packing::<V>::new(columns, steps, panels, Form::TransposeRows));
            }
            Layout::Panel => {
                visit(rows, Packing::<V>::new(columns, steps, panels, Form::CopyPanels));
            }
        },
        Right::Inputs(rows) => match rows.weight.layout {
            Layout::RowMajor => {
                visit(rows, Packing::<V>::new(columns, steps, panels, Form::CopyRows));
            }
            Layout::Panel => {
                visit(rows, Packing::<V>::new(columns, steps, panels, Form::TransposePanels));
            }
        },
    }
}

#[derive(Clone, Copy)]
enum Form {
    TransposeRows,
    CopyPanels,
    CopyRows,
    TransposePanels,
}

/// The packing of one weight, before its encoding is known.
struct Packing<'p, V> {
    columns: Range<usize>,
    steps: Range<usize>,
    panels: &'p mut [f32],
    form: Form,
    isa: std::marker::PhantomData<V>,
}

impl<'p, V> Packing<'p, V> {
    fn new(columns: Range<usize>, steps: Range<usize>, panels: &'p mut [f32], form: Form) -> Self {
        Self { columns, steps, panels, form, isa: std::marker::PhantomData }
    }
}

impl<V: F32x16> ElementsVisitor for Packing<'_, V> {
    type Output = ();
    fn visit<E: Elements>(self, elements: E) {
        let Self { columns, steps, panels, form, .. } = self;
        match form {
            Form::TransposeRows => V::call(TransposeRows { elements, columns, steps, panels }),
            Form::CopyPanels => V::call(CopyPanels { elements, columns, steps, panels }),
            Form::CopyRows => V::call(CopyRows { elements, columns, steps, panels }),
            Form::TransposePanels => V::call(TransposePanels { elements, columns, steps, panels }),
        }
    }
}

/// Lanes are rows of a row-major matrix; steps run along its columns.
struct TransposeRows<'p, E> {
    elements: E,
    columns: Range<usize>,
    steps: Range<usize>,
    panels: &'p mut [f32],
}

impl<E: Elements> Kernel for TransposeRows<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { elements, columns, steps, panels } = self;
        let (vectors, _) = panels.as_chunks_mut::<LANES>();
        let mut first = columns.start;
        for panel in vectors.chunks_exact_mut(steps.len().max(1)) {
            for (block, step) in (steps.start..steps.end).step_by(LANES).enumerate() {
                let count = LANES.min(steps.end - step);
                let mut rows = [V::zero(); LANES];
                for (i, row) in rows.iter_mut().enumerate() {
                    if first + i < columns.end {
                        *row = elements.row(first + i, step, count);
                    }
                }
                let transposed = V::transpose(rows);
                let target = &mut panel[block * LANES..block * LANES + count];
                for (lanes, vector) in transposed.into_iter().zip(target) {
                    lanes.store(vector);
                }
            }
            first += LANES;
        }
    }
}

/// Lanes and steps are those of the stored panels.
pub(super) struct CopyPanels<'p, E> {
    pub(super) elements: E,
    pub(super) columns: Range<usize>,
    pub(super) steps: Range<usize>,
    pub(super) panels: &'p mut [f32],
}

impl<E: Columns> Kernel for CopyPanels<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { elements, columns, steps, panels } = self;
        let (vectors, _) = panels.as_chunks_mut::<LANES>();
        for (i, panel) in vectors.chunks_exact_mut(steps.len().max(1)).enumerate() {
            let stored = columns.start / LANES + i;
            let (quads, tail) = panel.as_chunks_mut::<QUAD>();
            let last = steps.end - tail.len();
            for (step, vectors) in steps.clone().step_by(QUAD).zip(quads) {
                // SAFETY: columns and steps are inside the weight, whose last panel is padded.
                let quad: [V; QUAD] = unsafe { elements.quad(stored, step) };
                for (lanes, vector) in quad.into_iter().zip(vectors) {
                    lanes.store(vector);
                }
            }
            for (step, vector) in (last..steps.end).zip(tail) {
                // SAFETY: as above.
                let lanes: V = unsafe { elements.lanes(stored, step) };
                lanes.store(vector);
            }
        }
    }
}

/// Lanes are columns of a row-major matrix; steps are its rows.
struct CopyRows<'p, E> {
    elements: E,
    columns: Range<usize>,
    steps: Range<usize>,
    panels: &'p mut [f32],
}

impl<E: Elements> Kernel for CopyRows<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { elements, columns, steps, panels } = self;
        let (vectors, _) = panels.as_chunks_mut::<LANES>();
        let length = steps.len();
        for group in (columns.start..columns.end).step_by(LANES * PANEL_GROUP) {
            let group_end = columns.end.min(group + LANES * PANEL_GROUP);
            for (i, step) in steps.clone().enumerate() {
                for column in (group..group_end).step_by(LANES) {
                    let lanes: V = elements.row(step, column, LANES.min(columns.end - column));
                    lanes.store(&mut vectors[(column - columns.start) / LANES * length + i]);
                }
            }
        }
    }
}

/// As [`CopyRows`]; step i is the i-th row of a list.
struct CopyListedRows<'p, 'a, E> {
    elements: E,
    list: RowList<'a>,
    columns: Range<usize>,
    steps: Range<usize>,
    panels: &'p mut [f32],
}

impl<E: Elements> Kernel for CopyListedRows<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { elements, list, columns, steps, panels } = self;
        let (vectors, _) = panels.as_chunks_mut::<LANES>();
        let length = steps.len();
        for (i, step) in steps.enumerate() {
            let row = list.at(step);
            for column in columns.clone().step_by(LANES) {
                let lanes: V = elements.row(row, column, LANES.min(columns.end - column));
                lanes.store(&mut vectors[(column - columns.start) / LANES * length + i]);
            }
        }
    }
}

/// Lanes run along the columns of stored panels; steps are the panels' lanes.
struct TransposePanels<'p, E> {
    elements: E,
    columns: Range<usize>,
    steps: Range<usize>,
    panels: &'p mut [f32],
}

impl<E: Elements> Kernel for TransposePanels<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { elements, columns, steps, panels } = self;
        let (vectors, _) = panels.as_chunks_mut::<LANES>();
        let mut first = columns.start;
        for panel in vectors.chunks_exact_mut(steps.len().max(1)) {
            for (block, step) in (steps.start..steps.end).step_by(LANES).enumerate() {
                let mut rows = [V::zero(); LANES];
                let (quads, _) = rows.as_chunks_mut::<QUAD>();
                for (column, quad) in (first..).step_by(QUAD).zip(quads) {
                    if column + QUAD <= columns.end {
                        // SAFETY: columns and steps are inside the weight, whose last panel is
                        // padded.
                        *quad = unsafe { elements.quad(step / LANES, column) };
                        continue;
                    }
                    for (column, row) in (column..columns.end).zip(quad) {
                        // SAFETY: as above.
                        *row = unsafe { elements.lanes(step / LANES, column) };
                    }
                }
                let count = LANES.min(steps.end - step);
                let target = &mut panel[block * LANES..block * LANES + count];
                for (lanes, vector) in V::transpose(rows).into_iter().zip(target) {
                    lanes.store(vector);
                }
            }
            first += LANES;
        }
    }
}

/// Packs rows `rows` of the left operand for a tile of `tile_rows` rows, the missing ones zero.
pub(super) struct PackLeft<'p, 'a> {
    pub(super) left: Left<'a>,
    pub(super) rows: Range<usize>,
    pub(super) steps: Range<usize>,
    pub(super) tile_rows: usize,
    pub(super) packed: &'p mut [f32],
}

impl Kernel for PackLeft<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { left, rows, steps, tile_rows, packed } = self;
        match left {
            Left::Rows { values, stride } => {
                let row_of = |row| row * stride;
                pack_rows::<V>(values, row_of, &rows, &steps, tile_rows, packed);
            }
            Left::ListedRows { values, stride, list } => {
                let row_of = |row| list.at(row) * stride;
                pack_rows::<V>(values, row_of, &rows, &steps, tile_rows, packed);
            }
            Left::Steps { values, stride } => {
                pack_steps::<V>(values, |step| step * stride, &rows, steps, packed);
            }
            Left::ListedSteps { values, stride, list } => {
                pack_steps::<V>(values, |step| list.at(step) * stride, &rows, steps, packed);
            }
        }
    }
}

#[inline(always)]
fn pack_rows<V: F32x16>(
    values: &[f32],
    start_of: impl Fn(usize) -> usize,
    rows: &Range<usize>,
    steps: &Range<usize>,
    tile_rows: usize,
    packed: &mut [f32],
) {
    for i in 0..tile_rows {
        let target = &mut packed[i * LEFT_ROW_STRIDE..][..steps.len()];
        if rows.start + i < rows.end {
            let start = start_of(rows.start + i) + steps.start;
            copy::<V>(&values[start..start + steps.len()], target);
        } else {
            target.fill(0.0);
        }
    }
}

#[inline(always)]
fn pack_steps<V: F32x16>(
    values: &[f32],
    start_of: impl Fn(usize) -> usize,
    rows: &Range<usize>,
    steps: Range<usize>,
    packed: &mut [f32],
) {
    let (targets, _) = packed.as_chunks_mut::<LEFT_STEP_STRIDE>();
    for (step, target) in steps.zip(targets) {
        let start = start_of(step) + rows.start;
        // Lanes past the rows are never read, so they may hold their neighbors; a masked load costs
        // AVX2 more than the tile it is for.
        let lanes: V = match values[start..].first_chunk::<LANES>() {
            Some(lanes) => V::load(lanes),
            None => V::load_partial(&values[start..start + rows.len()], 0.0),
        };
        lanes.store(target);
    }
}

/// Copies a row; as vectors, because a call to the system's copy costs more for rows this short.
#[inline(always)]
fn copy<V: F32x16>(from: &[f32], to: &mut [f32]) {
    let (vectors, tail) = from.as_chunks::<LANES>();
    let (targets, target_tail) = to.as_chunks_mut::<LANES>();
    for (vector, target) in vectors.iter().zip(targets) {
        V::load(vector).store(target);
    }
    if !tail.is_empty() {
        V::load_partial(tail, 0.0).store_partial(target_tail);
    }
}

//! One product an expert, over the rows routed to it: a mixture of experts without capacity.
//!
//! Letters: `t` tokens, `a` experts a token goes to, `e` experts, `n` outputs, `k` inputs. The
//! `m = t·a` routed rows are `[t][a]`, ranks within tokens; `experts_ta` says whose each is.
//!
//! - forward `y[t][a] = x · W[experts[t][a]]ᵀ`, where `x` is the token's row (`[t][k]`) or the routed
//!   one (`[t][a][k]`): each output is one chain over `k`, ascending, from 0;
//! - input gradient `dx[t][a] = dy[t][a] · W[experts[t][a]]`: one chain over `n`, ascending;
//! - weight gradient `dw[e] = Σ dyᵀ · x` over the rows of the expert, in order of tokens: a chain over
//!   each block of [`TOKEN_BLOCK`] *of the expert's own rows*, from 0, each batch row of `row_tokens`
//!   tokens beginning a new block; blocks are added to the total in order.
//!
//! A row's result depends on its input and its expert alone. Rows are sorted by expert (a counting
//! sort, stable) inside the call, so that an expert's weight is read once, and only if it has rows.
//! Experts with few rows of a weight in panels are streamed, as in [`super::matmul`].

use std::ops::Range;

use super::arithmetic::Form;
use super::blocking::Blocking;
use super::check_compute;
use super::pack::{Left, Right};
use super::product::{Contraction, Product, Region, Start};
use super::reference::row_blocks;
use super::rows::{RowList, WeightRows};
use super::stream::{Inputs, STREAM_TOKENS_MAX, StreamProduct};
use crate::TOKEN_BLOCK;
use crate::compute::{Compute, bf16_chain};
use crate::cpu::{Cpu, SharedSlice};
use crate::encoding::Weight;
use crate::simd::{LANES, dispatch};

/// `y[t][a] = x · W[experts[t][a]]ᵀ`.
#[derive(Debug)]
pub struct ExpertMatmul<'a> {
    /// Inputs, `[t][k]` or `[t][a][k]`.
    pub x: &'a [f32],
    /// The weights of all experts one after the other, `[e · n][k]`, any encoding. In panels, `n` is
    /// a multiple of 16.
    pub weight: Weight<'a>,
    /// The expert of each routed row, `[t][a]`, below `num_experts`.
    pub experts_ta: &'a [u32],
    /// Experts a token goes to.
    pub top_k: usize,
    /// Experts.
    pub num_experts: usize,
    /// Outputs, `[t][a][n]`, overwritten.
    pub y_tan: &'a mut [f32],
    /// [`expert_scratch_len`] words; overwritten.
    pub scratch: &'a mut [u32],
    /// The arithmetic; anything but f32 wants a weight of that encoding.
    pub compute: Compute,
}

/// `dx[t][a] = dy[t][a] · W[experts[t][a]]`, the gradient of [`ExpertMatmul`] for its routed rows.
#[derive(Debug)]
pub struct ExpertMatmulDx<'a> {
    /// Gradient of the outputs, `[t][a][n]`.
    pub dy_tan: &'a [f32],
    /// The weights of all experts, `[e · n][k]`.
    pub weight: Weight<'a>,
    /// The expert of each routed row, `[t][a]`.
    pub experts_ta: &'a [u32],
    /// Experts.
    pub num_experts: usize,
    /// Gradient of the routed rows, `[t][a][k]`, overwritten.
    pub dx_tak: &'a mut [f32],
    /// [`expert_scratch_len`] words; overwritten.
    pub scratch: &'a mut [u32],
}

/// `dw[e] = Σ dyᵀ · x` over the rows of expert `e`, the gradient of [`ExpertMatmul`] for its weights.
#[derive(Debug)]
pub struct ExpertMatmulDw<'a> {
    /// Gradient of the outputs, `[t][a][n]`.
    pub dy_tan: &'a [f32],
    /// Inputs, `[t][k]` or `[t][a][k]`.
    pub x: &'a [f32],
    /// The expert of each routed row, `[t][a]`.
    pub experts_ta: &'a [u32],
    /// Experts a token goes to.
    pub top_k: usize,
    /// Experts.
    pub num_experts: usize,
    /// Gradient of the weights, `[e][n][k]`.
    pub dw_enk: &'a mut [f32],
    /// Tokens of a batch row, to which blocks are aligned.
    pub row_tokens: usize,
    /// Whether the blocks are added to what is there, or to 0.
    pub accumulate: bool,
    /// [`expert_scratch_len`] words; overwritten.
    pub scratch: &'a mut [u32],
}

/// Words of scratch that `rows` routed rows over `num_experts` experts need.
pub fn expert_scratch_len(rows: usize, num_experts: usize) -> usize {
    rows + num_experts
}

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    n: usize,
    k: usize,
    /// What a routed row's number is divided by to give its row of `x`.
    divisor: usize,
}

/// How many routed rows share a row of `x`: all of a token's, or each has its own.
fn input_divisor(x_len: usize, rows: usize, top_k: usize, k: usize) -> usize {
    assert!(top_k > 0 && rows.is_multiple_of(top_k), "routed rows of half a token");
    if x_len == rows * k {
        return 1;
    }
    assert_eq!(x_len, rows / top_k * k, "x of {rows} routed rows of width {k}");
    top_k
}

impl ExpertMatmul<'_> {
    fn check(&self) -> Sizes {
        let Weight { n: rows, k, .. } = self.weight;
        self.weight.check();
        check_compute(self.compute, self.weight);
        assert!(self.compute != Compute::Int8, "experts have no products of bytes");
        assert!(self.num_experts > 0 && rows.is_multiple_of(self.num_experts), "whole experts");
        let (n, m) = (rows / self.num_experts, self.experts_ta.len());
        assert_eq!(self.y_tan.len(), m * n, "y_tan");
        Sizes { n, k, divisor: input_divisor(self.x.len(), m, self.top_k, k) }
    }
}

impl ExpertMatmulDx<'_> {
    fn check(&self) -> Sizes {
        let Weight { n: rows, k, .. } = self.weight;
        self.weight.check();
        assert!(self.num_experts > 0 && rows.is_multiple_of(self.num_experts), "whole experts");
        let (n, m) = (rows / self.num_experts, self.experts_ta.len());
        assert_eq!(self.dy_tan.len(), m * n, "dy_tan");
        assert_eq!(self.dx_tak.len(), m * k, "dx_tak");
        Sizes { n, k, divisor: 1 }
    }
}

impl ExpertMatmulDw<'_> {
    /// `None` where there are no rows.
    fn check(&self) -> Option<Sizes> {
        let (m, e) = (self.experts_ta.len(), self.num_experts);
        assert!(self.row_tokens > 0 || m == 0, "row_tokens of a weight gradient");
        if m == 0 {
            return None;
        }
        let n = self.dy_tan.len() / m;
        assert_eq!(self.dy_tan.len(), m * n, "dy_tan");
        assert!(n > 0 && self.dw_enk.len().is_multiple_of(e * n), "dw_enk of {e} experts");
        let k = self.dw_enk.len() / (e * n);
        Some(Sizes { n, k, divisor: input_divisor(self.x.len(), m, self.top_k, k) })
    }
}

/// Routed rows sorted by expert, in ascending order within each.
struct Grouped<'a> {
    rows: &'a [u32],
    ends: &'a [u32],
}

impl<'a> Grouped<'a> {
    fn new(experts_ta: &[u32], num_experts: usize, scratch: &'a mut [u32]) -> Self {
        let len = expert_scratch_len(experts_ta.len(), num_experts);
        let (ends, rows) = scratch[..len].split_at_mut(num_experts);
        ends.fill(0);
        for &expert in experts_ta {
            ends[expert as usize] += 1;
        }
        let mut start = 0;
        for end in &mut *ends {
            (*end, start) = (start, start + *end);
        }
        for (row, &expert) in (0_u32..).zip(experts_ta) {
            let next = &mut ends[expert as usize];
            rows[*next as usize] = row;
            *next += 1;
        }
        Self { rows, ends }
    }

    fn of(&self, expert: usize) -> &'a [u32] {
        let start = expert.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.rows[start as usize..self.ends[expert] as usize]
    }

    fn all(&self) -> impl Iterator<Item = (usize, &'a [u32])> + '_ {
        (0..self.ends.len()).map(|expert| (expert, self.of(expert)))
    }

    /// Experts that have rows.
    fn active(&self) -> usize {
        self.all().filter(|(_, rows)| !rows.is_empty()).count()
    }

    /// Rows of an active expert on average, in whole tiles.
    fn typical_rows(&self, cpu: &Cpu) -> usize {
        self.rows.len().div_ceil(self.active().max(1)).next_multiple_of(cpu.isa().tile().1)
    }
}

/// One set of tasks over all experts, each cut into parts.
fn for_each_part(
    cpu: &Cpu,
    grouped: &Grouped<'_>,
    parts: impl Fn(&[u32]) -> usize + Sync,
    run: impl Fn(usize, usize, &mut crate::Scratch) + Sync,
) {
    let total = grouped.all().map(|(_, rows)| parts(rows)).sum();
    cpu.parallel(total, |task, scratch| {
        let mut part = task;
        for (expert, rows) in grouped.all() {
            let count = parts(rows);
            if part < count {
                return run(expert, part, scratch);
            }
            part -= count;
        }
    });
}

/// How one expert's product is cut: nearly equal parts of its rows, times the blocking's columns.
struct Grid {
    blocking: Blocking,
    column_parts: usize,
    tile_rows: usize,
}

impl Grid {
    fn new(blocking: Blocking, columns: usize, cpu: &Cpu) -> Self {
        let column_parts = columns.div_ceil(blocking.columns);
        Self { blocking, column_parts, tile_rows: cpu.isa().tile().1 }
    }

    fn part_rows(&self, rows: usize) -> usize {
        let parts = (rows / self.blocking.rows).max(1);
        rows.div_ceil(parts).next_multiple_of(self.tile_rows)
    }

    fn parts(&self, rows: usize) -> usize {
        if rows == 0 { 0 } else { rows.div_ceil(self.part_rows(rows)) * self.column_parts }
    }

    /// The rows and columns of a part.
    fn part(&self, product: &Product<'_>, part: usize) -> (Range<usize>, Range<usize>) {
        let cut = |i: usize, size: usize, end: usize| i * size..end.min((i + 1) * size);
        let rows = cut(part / self.column_parts, self.part_rows(product.rows), product.rows);
        (rows, cut(part % self.column_parts, self.blocking.columns, product.columns))
    }
}

/// The product over the routed rows. See [`expert_matmul_reference`] for its definition.
pub fn expert_matmul(cpu: &Cpu, args: ExpertMatmul<'_>) {
    let Sizes { n, k, divisor } = args.check();
    let ExpertMatmul { x, weight, experts_ta, num_experts, y_tan, scratch, compute, .. } = args;
    if n == 0 {
        return;
    }
    let form = Form::new(compute, cpu.simd());
    let mut inputs = Inputs::new(cpu, form, x, k);
    let streamed = inputs.as_mut().map(Inputs::get);
    let grouped = Grouped::new(experts_ta, num_experts, scratch);
    let grid = Grid::new(Blocking::guess(grouped.typical_rows(cpu), n, form.steps(k), cpu), n, cpu);
    let panels = n.div_ceil(LANES);
    let streams =
        |rows: &[u32]| streamed.is_some() && !rows.is_empty() && rows.len() <= STREAM_TOKENS_MAX;
    let stream = |expert: usize, rows| StreamProduct {
        x: streamed.unwrap_or_default(),
        form,
        rows: WeightRows::part(weight, expert, n),
        start: Start::Zero,
        t: <[u32]>::len(rows),
        routed: Some((RowList { entries: rows, divisor }, rows)),
    };
    let task_panels = stream(0, &[]).task_panels(cpu, grouped.active());
    let parts = |rows: &[u32]| match streams(rows) {
        true => panels.div_ceil(task_panels),
        false => grid.parts(rows.len()),
    };
    let (out, simd) = (SharedSlice::new(y_tan), cpu.simd());
    for_each_part(cpu, &grouped, parts, |expert, part, scratch| {
        let rows = grouped.of(expert);
        if streams(rows) {
            let first = part * task_panels;
            let panels = first..panels.min(first + task_panels);
            return stream(expert, rows).run_part(simd, &out, panels, 0);
        }
        let product = Product {
            left: Left::ListedRows {
                values: x,
                stride: k,
                list: RowList { entries: rows, divisor },
            },
            right: Right::Outputs(WeightRows::part(weight, expert, n)),
            form,
            rows: rows.len(),
            columns: n,
            contraction: Contraction::Chain(form.steps(k)),
            start: Start::Zero,
            out_first: 0,
            out_stride: n,
            out_rows: Some(rows),
        };
        let (rows, columns) = grid.part(&product, part);
        let (product, out, steps_max) = (&product, &out, grid.blocking.steps);
        dispatch(simd, Region { product, out, rows, columns, steps_max, scratch });
    });
}

/// The input gradient. See [`expert_matmul_dx_reference`] for its definition.
pub fn expert_matmul_dx(cpu: &Cpu, args: ExpertMatmulDx<'_>) {
    let Sizes { n, k, divisor } = args.check();
    let ExpertMatmulDx { dy_tan, weight, experts_ta, num_experts, dx_tak, scratch } = args;
    if k == 0 {
        return;
    }
    let grouped = Grouped::new(experts_ta, num_experts, scratch);
    let grid = Grid::new(Blocking::guess(grouped.typical_rows(cpu), k, n, cpu), k, cpu);
    let (out, simd) = (SharedSlice::new(dx_tak), cpu.simd());
    let parts = |rows: &[u32]| grid.parts(rows.len());
    for_each_part(cpu, &grouped, parts, |expert, part, scratch| {
        let rows = grouped.of(expert);
        let list = RowList { entries: rows, divisor };
        let product = Product {
            left: Left::ListedRows { values: dy_tan, stride: n, list },
            right: Right::Inputs(WeightRows::part(weight, expert, n)),
            form: Form::Floats,
            rows: rows.len(),
            columns: k,
            contraction: Contraction::Chain(n),
            start: Start::Zero,
            out_first: 0,
            out_stride: k,
            out_rows: Some(rows),
        };
        let (rows, columns) = grid.part(&product, part);
        let (product, out, steps_max) = (&product, &out, grid.blocking.steps);
        dispatch(simd, Region { product, out, rows, columns, steps_max, scratch });
    });
}

/// The weight gradient. See [`expert_matmul_dw_reference`] for its definition.
pub fn expert_matmul_dw(cpu: &Cpu, args: ExpertMatmulDw<'_>) {
    let Some(Sizes { n, k, divisor }) = args.check() else {
        if !args.accumulate {
            args.dw_enk.fill(0.0);
        }
        return;
    };
    let ExpertMatmulDw { dy_tan, x, experts_ta, top_k, num_experts, dw_enk, row_tokens, .. } = args;
    if k == 0 {
        return;
    }
    let grouped = Grouped::new(experts_ta, num_experts, args.scratch);
    let blocking = Blocking::guess(n, k, TOKEN_BLOCK, cpu);
    let (row_parts, column_parts) = (n.div_ceil(blocking.rows), k.div_ceil(blocking.columns));
    let (out, simd) = (SharedSlice::new(dw_enk), cpu.simd());
    let part_of = |i: usize, size: usize, end: usize| i * size..end.min((i + 1) * size);
    let start = if args.accumulate { Start::Keep } else { Start::Zero };
    for_each_part(
        cpu,
        &grouped,
        |_| row_parts * column_parts,
        |expert, part, scratch| {
            let entries = grouped.of(expert);
            let rows = part_of(part / column_parts, blocking.rows, n);
            let columns = part_of(part % column_parts, blocking.columns, k);
            if entries.is_empty() {
                for row in rows.filter(|_| matches!(start, Start::Zero)) {
                    let first = (expert * n + row) * k;
                    // SAFETY: these columns of this row belong to this task.
                    unsafe { out.slice_mut(first + columns.start..first + columns.end) }.fill(0.0);
                }
                return;
            }
            let routed = RowList { entries, divisor: 1 };
            let product = Product {
                left: Left::ListedSteps { values: dy_tan, stride: n, list: routed },
                right: Right::ListedMatrix {
                    values: x,
                    stride: k,
                    list: RowList { entries, divisor },
                },
                form: Form::Floats,
                rows: n,
                columns: k,
                contraction: Contraction::RowBlocks {
                    tokens: RowList { entries, divisor: top_k },
                    row_tokens,
                },
                start,
                out_first: expert * n * k,
                out_stride: k,
                out_rows: None,
            };
            let (product, out, steps_max) = (&product, &out, blocking.steps);
            dispatch(simd, Region { product, out, rows, columns, steps_max, scratch });
        },
    );
}

/// Defines [`expert_matmul`]: plain loops in the canonical order.
pub fn expert_matmul_reference(args: ExpertMatmul<'_>) {
    let Sizes { n, k, divisor } = args.check();
    for (row, &expert) in args.experts_ta.iter().enumerate() {
        let x_k = &args.x[row / divisor * k..][..k];
        for output in 0..n {
            let weight = |input| args.weight.value(expert as usize * n + output, input);
            args.y_tan[row * n + output] = match args.compute {
                Compute::F32 | Compute::Int8 => {
                    (0..k).fold(0.0, |sum, input| x_k[input].mul_add(weight(input), sum))
                }
                Compute::Bf16 => bf16_chain(0.0, k, |input| x_k[input], weight),
            };
        }
    }
}

/// Defines [`expert_matmul_dx`]: plain loops in the canonical order.
pub fn expert_matmul_dx_reference(args: ExpertMatmulDx<'_>) {
    let Sizes { n, k, .. } = args.check();
    for (row, &expert) in args.experts_ta.iter().enumerate() {
        let dy_n = &args.dy_tan[row * n..][..n];
        for input in 0..k {
            let weight = |output| args.weight.value(expert as usize * n + output, input);
            args.dx_tak[row * k + input] =
                (0..n).fold(0.0, |sum, output| dy_n[output].mul_add(weight(output), sum));
        }
    }
}

/// Defines [`expert_matmul_dw`]: plain loops in the canonical order.
pub fn expert_matmul_dw_reference(args: ExpertMatmulDw<'_>) {
    let sizes = args.check();
    if !args.accumulate {
        args.dw_enk.fill(0.0);
    }
    let Some(Sizes { n, k, divisor }) = sizes else { return };
    for expert in 0..args.num_experts {
        let routed = (0_u32..).zip(args.experts_ta);
        let entries: Vec<u32> =
            routed.filter(|(_, chosen)| **chosen as usize == expert).map(|(row, _)| row).collect();
        let tokens = RowList { entries: &entries, divisor: args.top_k };
        for index in 0..n * k {
            let (output, input) = (index / k, index % k);
            let dw = &mut args.dw_enk[expert * n * k + index];
            *dw = row_blocks(tokens, args.row_tokens).fold(*dw, |total, block| {
                total
                    + entries[block].iter().fold(0.0, |sum: f32, &row| {
                        let row = row as usize;
                        args.dy_tan[row * n + output]
                            .mul_add(args.x[row / divisor * k + input], sum)
                    })
            });
        }
    }
}

#[cfg(test)]
mod tests;

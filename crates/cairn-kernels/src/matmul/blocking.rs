//! How a product is cut into tasks and blocks. Every choice gives the same bits.

use super::product::{RIGHT_FLOATS_MAX, STEPS_MAX};
use crate::cpu::Cpu;
use crate::simd::LANES;

/// Sizes of the pieces of one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blocking {
    /// Rows of the output in one task.
    pub rows: usize,
    /// Columns of the output in one task, a multiple of 16.
    pub columns: usize,
    /// Steps of the contraction in one packed block, at most.
    pub steps: usize,
}

/// Cost of packing one element of the right operand, in vector multiply-adds: memory's share too.
const PACK_RIGHT_COST: f64 = 1.0;
/// Cost of packing one element of the left operand.
const PACK_LEFT_COST: f64 = 0.5;
/// Cost of a task by itself, in vector multiply-adds.
const TASK_COST: f64 = 500.0;
/// Share of a task that the last thread is expected to wait for: others use the machine too.
const RISK: f64 = 0.05;
/// Columns of a right block of the longest steps: a third of a 1 MiB second-level cache, the rest is
/// for what streams through it.
const COLUMNS_MAX: usize = 224;
const PARTS_TRIED: usize = 16;

impl Blocking {
    /// A choice without measurement: the grid of least estimated cost.
    pub(super) fn guess(rows: usize, columns: usize, steps: usize, cpu: &Cpu) -> Self {
        let tile = cpu.isa().tile();
        let block_steps = steps.clamp(32, STEPS_MAX);
        let columns_max = (COLUMNS_MAX * STEPS_MAX / block_steps).min(RIGHT_FLOATS_MAX / STEPS_MAX);
        let column_parts_min = columns.div_ceil(columns_max).max(1);
        let row_parts_max = rows.div_ceil(tile.1).clamp(1, PARTS_TRIED);
        let mut best = (f64::INFINITY, rows, columns);
        for column_parts in column_parts_min..column_parts_min + PARTS_TRIED {
            let part_columns = columns.div_ceil(column_parts).next_multiple_of(tile.0 * LANES);
            for row_parts in 1..=row_parts_max {
                let part_rows = rows.div_ceil(row_parts).next_multiple_of(tile.1);
                let tasks =
                    rows.div_ceil(part_rows.max(1)) * columns.div_ceil(part_columns.max(LANES));
                let (r, c, s) = (part_rows as f64, part_columns as f64, steps as f64);
                let multiply = r * c / LANES as f64;
                let task = TASK_COST + s * (multiply + PACK_RIGHT_COST * c + PACK_LEFT_COST * r);
                let cost = task * (tasks.div_ceil(cpu.threads()) as f64 + RISK);
                if cost < best.0 {
                    best = (cost, part_rows, part_columns);
                }
            }
        }
        Self { rows: best.1.max(1), columns: best.2.max(LANES), steps: STEPS_MAX }
    }

    /// Whether the sizes fit the packed buffers.
    pub(super) fn is_valid(&self) -> bool {
        self.rows > 0
            && self.columns > 0
            && self.columns.is_multiple_of(LANES)
            && self.steps.is_multiple_of(32)
            && self.steps > 0
            && self.steps <= STEPS_MAX
            && self.columns * self.steps.max(crate::TOKEN_BLOCK) <= RIGHT_FLOATS_MAX
    }
}

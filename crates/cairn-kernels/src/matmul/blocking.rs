//! How a product is cut into tasks and blocks. Every choice gives the same bits.

use super::product::{RIGHT_FLOATS_MAX, STEPS_MAX};
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

/// Tasks a thread should find, so that one that loses its core delays the others little.
const TASKS_PER_THREAD: usize = 4;
/// Rows below which packing the right operand for one task costs more than a few percent.
const ROWS_MIN: usize = 384;
/// Columns below which packing the left operand for one task does.
const COLUMNS_MIN: usize = 128;
/// Columns of a right block that leave half of a 1 MiB second-level cache to the output.
const COLUMNS_MAX: usize = 352;

impl Blocking {
    /// A choice without measurement: columns first (their packed block must fit the second-level
    /// cache anyway), then rows, until there are enough tasks.
    pub(super) fn guess(rows: usize, columns: usize, steps_total: usize, threads: usize) -> Self {
        let steps = STEPS_MAX;
        let block_steps = steps_total.clamp(1, steps);
        let columns_max = (COLUMNS_MAX * STEPS_MAX / block_steps).min(RIGHT_FLOATS_MAX / steps);
        let wanted = if threads == 1 { 1 } else { threads * TASKS_PER_THREAD };
        let mut column_parts = columns.div_ceil(columns_max.max(LANES)).max(1);
        let row_parts_max = (rows / ROWS_MIN).max(1);
        let mut row_parts = wanted.div_ceil(column_parts).min(row_parts_max);
        while row_parts * column_parts < wanted && columns / (column_parts + 1) >= COLUMNS_MIN {
            column_parts += 1;
        }
        if row_parts * column_parts < threads {
            // A small product: share it out all the same.
            row_parts = row_parts.max(threads.min(rows / 16).max(1));
            if row_parts * column_parts < threads {
                column_parts = threads.min(columns.div_ceil(LANES)).max(1);
            }
        }
        Self {
            rows: rows.div_ceil(row_parts).next_multiple_of(14).max(1),
            columns: columns.div_ceil(column_parts).next_multiple_of(2 * LANES).max(LANES),
            steps,
        }
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

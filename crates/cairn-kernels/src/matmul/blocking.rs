//! How a product is cut into tasks and blocks. Every choice gives the same bits.

use std::cell::RefCell;

use super::arithmetic::Form;
use super::product::{RIGHT_FLOATS_MAX, STEPS_MAX};
use crate::TOKEN_BLOCK;
use crate::compute::Compute;
use crate::cpu::Cpu;
use crate::simd::LANES;
use crate::tuner::{ProductKind, TuneCase};

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

/// The last estimates of one handle, by sizes. A fixed table: a product allocates nothing.
#[derive(Debug)]
pub(crate) struct Estimates {
    slots: RefCell<[Option<(Sizes, Blocking)>; SLOTS]>,
}

/// Rows, columns and steps of a product.
type Sizes = (usize, usize, usize);
const SLOTS: usize = 64;

impl Default for Estimates {
    fn default() -> Self {
        Self { slots: RefCell::new([None; SLOTS]) }
    }
}

impl Estimates {
    /// The estimate for `sizes`, made by `make` if it is not there.
    fn get(&self, sizes: Sizes, make: impl FnOnce() -> Blocking) -> Blocking {
        let (rows, columns, steps) = sizes;
        let slot = rows.wrapping_mul(31).wrapping_add(columns.wrapping_mul(17)) + steps;
        let slot = &mut self.slots.borrow_mut()[(slot ^ slot >> 6) % SLOTS];
        match slot {
            Some((known, blocking)) if *known == sizes => *blocking,
            _ => slot.insert((sizes, make())).1,
        }
    }
}

impl Blocking {
    /// What the tuner chose for this handle, or else the estimate.
    pub(super) fn choose(cpu: &Cpu, case: TuneCase) -> Self {
        if let Some(choice) = cpu.tuning().choice(cpu, case)
            && choice.blocking.is_valid()
        {
            return choice.blocking;
        }
        let TuneCase { t, n, k, .. } = case;
        match case.product {
            ProductKind::Matmul => Self::guess(t, n, k, cpu),
            ProductKind::MatmulBf16 => {
                Self::guess(t, n, Form::new(Compute::Bf16, cpu.simd()).steps(k), cpu)
            }
            ProductKind::MatmulDx => Self::guess(t, k, n, cpu),
            ProductKind::MatmulDw => Self::guess(n, k, TOKEN_BLOCK, cpu),
        }
    }

    /// A choice without measurement: the grid of least estimated cost.
    pub(super) fn guess(rows: usize, columns: usize, steps: usize, cpu: &Cpu) -> Self {
        cpu.estimates()
            .get((rows, columns, steps), || Self::estimate(rows, columns, steps, cpu, COLUMNS_MAX))
    }

    /// The estimate, then its neighbors: other block widths, then of each width shorter tasks,
    /// narrower tasks and shorter blocks of steps. Whoever has time for a few takes the first few.
    pub(super) fn candidates(rows: usize, columns: usize, steps: usize, cpu: &Cpu) -> Vec<Self> {
        let tile = cpu.isa().tile();
        let of_width = |columns_max: usize| Self::estimate(rows, columns, steps, cpu, columns_max);
        let widths = [160, 320, 128, 512, 224].map(of_width);
        let mut all = vec![Self::guess(rows, columns, steps, cpu)];
        all.extend(widths);
        for base in widths {
            let half = (base.rows / 2).next_multiple_of(tile.1).max(tile.1);
            let narrow = (base.columns / 2).next_multiple_of(tile.0 * LANES);
            all.extend([
                Self { rows: half, ..base },
                Self { columns: narrow, ..base },
                Self { steps: 256, ..base },
            ]);
        }
        let mut unique: Vec<Self> = Vec::new();
        for candidate in all {
            if candidate.is_valid() && !unique.contains(&candidate) {
                unique.push(candidate);
            }
        }
        unique
    }

    /// The grid of least estimated cost whose packed block has at most `columns_max` columns of the
    /// longest steps.
    fn estimate(rows: usize, columns: usize, steps: usize, cpu: &Cpu, columns_max: usize) -> Self {
        let tile = cpu.isa().tile();
        // As long as the blocks are that the chain is cut into.
        let blocks = steps.div_ceil(STEPS_MAX).max(1);
        let block_steps = steps.div_ceil(blocks).next_multiple_of(32).clamp(32, STEPS_MAX);
        let columns_max = (columns_max * STEPS_MAX / block_steps).min(RIGHT_FLOATS_MAX / STEPS_MAX);
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
            && self.columns * self.steps.max(TOKEN_BLOCK) <= RIGHT_FLOATS_MAX
    }
}

//! How the rows of a run are cut: blocks of rows that share keys, and tasks of blocks.

use std::ops::Range;

use super::tree::{NodeShape, Tree};
use super::{AttentionSpec, RaggedBatch, SeqSlot};
use crate::KEY_TILE;
use crate::dropout::DropoutMask;
use crate::pool::SCRATCH_BYTES;
use crate::simd::LANES;

/// Rows of a block, at most.
pub(super) const BLOCK_ROWS: usize = 64;
/// Floats of scratch memory.
pub(super) const SCRATCH_FLOATS: usize = SCRATCH_BYTES / 4;
/// Floats that the nodes of a block may take.
pub(super) const NODE_FLOATS: usize = SCRATCH_FLOATS / 4;
/// Tiles of the smallest chunk a block is cut into.
const CHUNK_TILES_MIN: usize = 4;

/// Rows of one key/value head of one sequence.
#[derive(Clone)]
pub(super) struct Block<'a> {
    pub(super) spec: AttentionSpec,
    pub(super) dropout: Option<DropoutMask>,
    pub(super) slot: SeqSlot<'a>,
    pub(super) head: usize,
    /// Row r is query r / group, query head r % group of the group.
    pub(super) rows: Range<usize>,
}

impl Block<'_> {
    /// The (token, query head) of the block's row `r`, as an index into `[t, h]`.
    #[inline(always)]
    pub(super) fn token_head(&self, r: usize) -> usize {
        let group = self.spec.heads / self.spec.kv_heads;
        let r = self.rows.start + r;
        (self.slot.start + r / group) * self.spec.heads + self.head * group + r % group
    }

    /// Keys that the block's row `r` sees.
    #[inline(always)]
    pub(super) fn visible(&self, r: usize) -> Range<usize> {
        let group = self.spec.heads / self.spec.kv_heads;
        let query = (self.rows.start + r) / group;
        self.spec.mask.range(self.slot.cached + query, self.slot.keys())
    }

    /// Tiles that any row sees: ranges grow with the query, so the ends are the first and last row's.
    pub(super) fn tiles(&self) -> Range<usize> {
        let (first, last) = (self.visible(0), self.visible(self.rows.len() - 1));
        let end = last.end.div_ceil(KEY_TILE);
        (first.start / KEY_TILE).min(end)..end
    }
}

/// Where lane ranges of a tile lie.
#[inline(always)]
pub(super) fn within(visible: &Range<usize>, tile: usize) -> Range<usize> {
    let clamp = |position: usize| position.saturating_sub(tile * KEY_TILE).min(KEY_TILE);
    clamp(visible.start)..clamp(visible.end)
}

/// How the rows of a run are cut into tasks.
#[derive(Clone, Copy)]
pub(super) struct Grid<'a> {
    pub(super) spec: AttentionSpec,
    pub(super) dropout: Option<DropoutMask>,
    pub(super) batch: RaggedBatch<'a>,
    /// Rows of a block.
    pub(super) block_rows: usize,
    /// Blocks of a task.
    pub(super) task_blocks: usize,
}

impl<'a> Grid<'a> {
    pub(super) fn new(
        spec: AttentionSpec,
        dropout: Option<DropoutMask>,
        batch: RaggedBatch<'a>,
    ) -> Self {
        let keys = batch.sequences.iter().map(SeqSlot::keys).max().unwrap_or(0);
        let nodes = Tree::nodes(keys.div_ceil(KEY_TILE));
        let columns = spec.value_dim.next_multiple_of(LANES);
        let fitting = (NODE_FLOATS / nodes).saturating_sub(2 * BLOCK_ROWS) / columns;
        assert!(fitting > 0, "values of {columns} floats do not fit in scratch memory");
        Self { spec, dropout, batch, block_rows: fitting.min(BLOCK_ROWS), task_blocks: 1 }
    }

    pub(super) fn blocks_of_head(&self, slot: &SeqSlot<'_>) -> usize {
        (slot.len * self.spec.group()).div_ceil(self.block_rows)
    }

    fn tasks_of_head(&self, slot: &SeqSlot<'_>) -> usize {
        self.blocks_of_head(slot).div_ceil(self.task_blocks)
    }

    pub(super) fn tasks(&self) -> usize {
        let slots = self.batch.sequences.iter();
        slots.map(|slot| self.tasks_of_head(slot) * self.spec.kv_heads).sum()
    }

    /// The blocks of a task: all of one key/value head of one sequence.
    pub(super) fn blocks(&self, mut task: usize) -> impl Iterator<Item = Block<'a>> + use<'a> {
        let grid = *self;
        let mut slots = self.batch.sequences.iter();
        let slot = loop {
            let slot = slots.next().expect("a task number below the number of tasks");
            let tasks = self.tasks_of_head(slot) * self.spec.kv_heads;
            if task < tasks {
                break *slot;
            }
            task -= tasks;
        };
        let (head, part) = (task / self.tasks_of_head(&slot), task % self.tasks_of_head(&slot));
        let rows = slot.len * self.spec.group();
        let blocks =
            part * self.task_blocks..self.blocks_of_head(&slot).min((part + 1) * self.task_blocks);
        blocks.map(move |block| {
            let first = block * grid.block_rows;
            let rows = first..rows.min(first + grid.block_rows);
            Block { spec: grid.spec, dropout: grid.dropout, slot, head, rows }
        })
    }

    /// Tiles of the chunks that blocks must be cut into to occupy all threads; `None` if there are
    /// enough blocks, too few tiles, or no room for the nodes.
    pub(super) fn chunk_tiles(&self, threads: usize) -> Option<usize> {
        let tasks = self.tasks();
        if threads == 1 || tasks >= 2 * threads || tasks == 0 {
            return None;
        }
        let blocks = (0..tasks).flat_map(|task| self.blocks(task));
        let tiles = blocks.map(|block| block.tiles().len()).max().unwrap_or(0);
        let wanted = tiles.div_ceil((4 * threads).div_ceil(tasks));
        let chunk = wanted.max(CHUNK_TILES_MIN).next_power_of_two();
        let node = NodeShape::new(self.block_rows, self.spec.value_dim).len();
        let nodes = tasks * (tiles.div_ceil(chunk) + 1);
        (tiles > chunk && nodes * node <= SCRATCH_FLOATS).then_some(chunk)
    }
}

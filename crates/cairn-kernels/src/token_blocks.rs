//! Sums over tokens in their fixed order: one chain inside a token block, blocks folded in order.
//!
//! A block is [`TOKEN_BLOCK`] tokens of one batch row, aligned to the row's start. Blocks are computed
//! in parallel, each into a row of the handle's shared scratch, and added to the totals afterwards.

use std::ops::Range;

use crate::TOKEN_BLOCK;
use crate::cpu::Cpu;
use crate::disjoint::{RowParts, RowSlice, parallel_rows};
use crate::pool::SCRATCH_BYTES;

/// How rows group into token blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenBlocks {
    /// Rows in all.
    pub(crate) rows: usize,
    /// Rows of one token.
    pub(crate) rows_per_token: usize,
    /// Tokens of one batch row.
    pub(crate) row_tokens: usize,
}

/// Totals that blocks are folded into.
pub(crate) struct BlockSums<'a, const N: usize> {
    /// The totals, of any lengths.
    pub(crate) totals: [&'a mut [f32]; N],
    /// Whether they start from what is there, or from 0.
    pub(crate) accumulate: bool,
}

impl TokenBlocks {
    /// Blocks of a whole batch row.
    fn blocks_per_row(&self) -> usize {
        self.row_tokens.div_ceil(TOKEN_BLOCK)
    }

    /// Blocks in all.
    pub(crate) fn count(&self) -> usize {
        assert!(self.row_tokens > 0 && self.rows_per_token > 0, "empty batch rows");
        assert!(self.rows.is_multiple_of(self.rows_per_token), "rows of half a token");
        let tokens = self.rows / self.rows_per_token;
        let (whole, rest) = (tokens / self.row_tokens, tokens % self.row_tokens);
        whole * self.blocks_per_row() + rest.div_ceil(TOKEN_BLOCK)
    }

    /// The rows of a block.
    pub(crate) fn rows_of(&self, block: usize) -> Range<usize> {
        let (row, block) = (block / self.blocks_per_row(), block % self.blocks_per_row());
        let first = row * self.row_tokens;
        let start = first + block * TOKEN_BLOCK;
        let end = (start + TOKEN_BLOCK).min(first + self.row_tokens);
        start * self.rows_per_token..self.rows.min(end * self.rows_per_token)
    }

    /// Calls `f` for every block with its rows, those rows of `outputs` and partial sums that start
    /// at 0, then folds the partial sums into the totals in the order of the blocks.
    pub(crate) fn fold<R: RowParts, const N: usize>(
        &self,
        cpu: &Cpu,
        sums: BlockSums<'_, N>,
        outputs: R,
        f: impl Fn(Range<usize>, R::Part, [&mut [f32]; N]) + Sync,
    ) {
        let BlockSums { mut totals, accumulate } = sums;
        if !accumulate {
            totals.iter_mut().for_each(|total| total.fill(0.0));
        }
        let lens = totals.each_ref().map(|total| total.len());
        let width = lens.iter().sum::<usize>().next_multiple_of(16).max(16);
        let window = SCRATCH_BYTES / 4 / width;
        assert!(window > 0, "partial sums of {width} floats do not fit in scratch memory");
        let mut partials = cpu.partials();
        for first in (0..self.count()).step_by(window) {
            let blocks = window.min(self.count() - first);
            let partials = partials.f32s(blocks * width);
            let partial_rows = RowSlice::new(&mut *partials, width);
            parallel_rows(cpu, blocks, 1, partial_rows, |task, mut partial, _| {
                let rows = self.rows_of(first + task.start);
                // SAFETY: blocks share no rows, and each block is one task.
                let part = unsafe { outputs.part(rows.clone()) };
                partial.fill(0.0);
                let sums = lens.map(|len| {
                    let (sum, rest) = std::mem::take(&mut partial).split_at_mut(len);
                    partial = rest;
                    sum
                });
                f(rows, part, sums);
            });
            for partial in partials.chunks_exact(width) {
                let mut start = 0;
                for total in &mut totals {
                    let partial = &partial[start..start + total.len()];
                    start += total.len();
                    total.iter_mut().zip(partial).for_each(|(total, x)| *total += x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_tile_the_rows() {
        for (rows, rows_per_token, row_tokens) in
            [(1024, 1, 256), (1000, 2, 100), (600, 1, 600), (700, 1, 300), (0, 1, 5), (7, 7, 1)]
        {
            let blocks = TokenBlocks { rows, rows_per_token, row_tokens };
            let mut next = 0;
            for block in 0..blocks.count() {
                let range = blocks.rows_of(block);
                assert_eq!(range.start, next);
                assert!(!range.is_empty() && range.len() <= TOKEN_BLOCK * rows_per_token);
                next = range.end;
            }
            assert_eq!(next, rows);
        }
    }
}

//! The blocks of one sequence, in order of position.
//!
//! Position `p` of the sequence lies in lane `p mod 16` of block `blocks[p / 16]`. A table may be
//! forked: both then own the same blocks, and whoever appends to a half-filled shared block first
//! gets a block of its own and an order to copy it ([`BlockCopy`]): copy on write.
//!
//! **Invariant:** a table has exactly `blocks_for(num_tokens)` blocks and one reference on each.
//! **Invariant:** a block that is not full is written by one table only.

use crate::block_pool::{BLOCK_TOKENS, BlockPool, OutOfBlocks, blocks_for};

/// Bytes that must move before the next run: block `from` to block `to`, in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the table already points at the copy"]
pub struct BlockCopy {
    /// Where they are.
    pub from: u32,
    /// Where the table expects them.
    pub to: u32,
}

/// The blocks of one sequence.
///
/// Not `Clone`: [`fork`](Self::fork) counts the references, [`release`](Self::release) gives them
/// back.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
    num_tokens: usize,
}

impl BlockTable {
    /// An empty table that will not reallocate below `tokens` tokens.
    pub fn with_capacity(tokens: usize) -> Self {
        Self { blocks: Vec::with_capacity(blocks_for(tokens)), num_tokens: 0 }
    }

    /// The block ids, as the kernels read them.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Tokens whose keys and values the table has room for and, after the run, holds.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Makes room for `tokens` more tokens. If the last block is half full and shared, the table
    /// gets its own and the caller must carry out the returned copy before it runs the tokens.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when the pool has too few free blocks; the table is then unchanged.
    pub fn append(
        &mut self,
        pool: &mut BlockPool,
        tokens: usize,
    ) -> Result<Option<BlockCopy>, OutOfBlocks> {
        let shared = self.shared_tail(pool).filter(|_| 0 < tokens);
        let grown = blocks_for(self.num_tokens + tokens) - self.blocks.len();
        let needed = grown + usize::from(shared.is_some());
        if pool.num_free() < needed {
            return Err(pool.shortage(needed));
        }
        let copy = match shared {
            Some(from) => {
                let to = pool.acquire()?;
                pool.release(from);
                *self.blocks.last_mut().expect("a shared tail exists") = to;
                Some(BlockCopy { from, to })
            }
            None => None,
        };
        for _ in 0..grown {
            self.blocks.push(pool.acquire()?);
        }
        self.num_tokens += tokens;
        Ok(copy)
    }

    /// The last block, if it has room left and another owner.
    fn shared_tail(&self, pool: &BlockPool) -> Option<u32> {
        let tail = self.blocks.last().copied()?;
        let has_room = !self.num_tokens.is_multiple_of(BLOCK_TOKENS);
        (has_room && 1 < pool.ref_count(tail)).then_some(tail)
    }

    /// A second table over the same blocks.
    pub fn fork(&self, pool: &mut BlockPool) -> Self {
        for &block in &self.blocks {
            pool.share(block);
        }
        Self { blocks: self.blocks.clone(), num_tokens: self.num_tokens }
    }

    /// Goes on with a block that is full already and gets one more owner.
    pub(crate) fn attach_full(&mut self, pool: &mut BlockPool, block: u32) {
        assert_eq!(self.slack(), 0, "a full block follows full blocks");
        pool.share(block);
        self.blocks.push(block);
        self.num_tokens += BLOCK_TOKENS;
    }

    /// Goes on with a copy of the first `tokens` tokens of somebody's block, which need not be owned.
    /// The copy has to be carried out before anything later is written.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when the pool has none; the table is then unchanged.
    pub(crate) fn attach_copy(
        &mut self,
        pool: &mut BlockPool,
        (from, tokens): (u32, usize),
    ) -> Result<Option<BlockCopy>, OutOfBlocks> {
        assert!(self.num_tokens.is_multiple_of(BLOCK_TOKENS) && tokens < BLOCK_TOKENS);
        let to = pool.acquire()?;
        self.blocks.push(to);
        self.num_tokens += tokens;
        // The last free block may be the very one that was to be copied.
        Ok((from != to).then_some(BlockCopy { from, to }))
    }

    /// Takes another block that holds the same in place of its own.
    pub(crate) fn replace(&mut self, pool: &mut BlockPool, index: usize, block: u32) {
        pool.share(block);
        pool.release(std::mem::replace(&mut self.blocks[index], block));
    }

    /// Tokens that the blocks it has still have room for.
    pub(crate) fn slack(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS - self.num_tokens
    }

    /// Forgets all but the first `tokens` tokens and gives back the blocks that held only others.
    pub fn truncate(&mut self, pool: &mut BlockPool, tokens: usize) {
        if self.num_tokens <= tokens {
            return;
        }
        for block in self.blocks.drain(blocks_for(tokens)..).rev() {
            pool.release(block);
        }
        self.num_tokens = tokens;
    }

    /// Gives every block back and leaves the table empty.
    pub fn release(&mut self, pool: &mut BlockPool) {
        // Last block first, so that the next sequence gets them in the order this one had.
        while let Some(block) = self.blocks.pop() {
            pool.release(block);
        }
        self.num_tokens = 0;
    }
}

#[cfg(test)]
mod tests;

//! The pool of fixed-size KV-cache blocks behind paged attention.
//!
//! A *block* holds the keys and values of [`BLOCK_TOKENS`] consecutive tokens of one sequence, in
//! every layer: block `b` is page `b` of each layer's cache. A sequence owns blocks through its
//! block table; several sequences may share a block when they begin alike (beams, later common
//! prompts), so blocks are reference counted.
//!
//! Source: Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention",
//! SOSP 2023, section 4.2. <https://arxiv.org/abs/2309.06180>
//!
//! **Invariant:** a block is on the free list if and only if its reference count is zero.
//! **Invariant:** this module never touches the cache; it hands out ids, the session moves bytes.

/// Tokens per block; the attention kernels' page.
pub const BLOCK_TOKENS: usize = cairn_kernels::attention::PAGE_TOKENS;

/// Blocks that hold `tokens` tokens of one sequence.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// Every KV-cache block is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} KV-cache blocks are needed and {free} of {num_blocks} are free")]
pub struct OutOfBlocks {
    /// Blocks that were asked for.
    pub needed: usize,
    /// Blocks that were free.
    pub free: usize,
    /// Size of the pool, in blocks.
    pub num_blocks: usize,
}

/// Hands out and takes back KV-cache blocks.
///
/// Ids are plain `u32` because block tables go to the kernels as slices of them.
///
/// ```
/// use cairn_engine::BlockPool;
/// let mut pool = BlockPool::new(1);
/// let block = pool.acquire()?;
/// pool.share(block);
/// pool.release(block);
/// assert_eq!(pool.num_free(), 0);
/// pool.release(block);
/// assert_eq!(pool.num_free(), 1);
/// # Ok::<(), cairn_engine::OutOfBlocks>(())
/// ```
#[derive(Debug)]
pub struct BlockPool {
    ref_counts: Vec<u32>,
    free: Vec<u32>,
}

impl BlockPool {
    /// Creates a pool of `num_blocks` free blocks.
    ///
    /// # Panics
    ///
    /// Panics if there are more blocks than `u32` ids; limits are checked before.
    pub fn new(num_blocks: usize) -> Self {
        let last = u32::try_from(num_blocks).expect("block ids are u32");
        // Reversed so that low ids leave first; traces are easier to read that way.
        Self { ref_counts: vec![0; num_blocks], free: (0..last).rev().collect() }
    }

    /// Takes one free block; its reference count becomes one.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when every block is in use.
    pub fn acquire(&mut self) -> Result<u32, OutOfBlocks> {
        let block = self.free.pop().ok_or_else(|| self.shortage(1))?;
        let ref_count = &mut self.ref_counts[block as usize];
        assert_eq!(*ref_count, 0, "free block {block} is still referenced");
        *ref_count = 1;
        Ok(block)
    }

    /// Adds one owner to a block that is already in use.
    pub fn share(&mut self, block: u32) {
        let ref_count = &mut self.ref_counts[block as usize];
        assert!(0 < *ref_count, "cannot share free block {block}");
        *ref_count += 1;
    }

    /// Drops one owner; the last owner returns the block to the free list.
    pub fn release(&mut self, block: u32) {
        let ref_count = &mut self.ref_counts[block as usize];
        assert!(0 < *ref_count, "double release of block {block}");
        *ref_count -= 1;
        if *ref_count == 0 {
            self.free.push(block);
        }
    }

    /// Owners of a block; zero for a free one.
    pub fn ref_count(&self, block: u32) -> u32 {
        self.ref_counts[block as usize]
    }

    /// Blocks that [`acquire`](Self::acquire) can still hand out.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Size of the pool, in blocks.
    pub fn num_blocks(&self) -> usize {
        self.ref_counts.len()
    }

    /// The error that says that `needed` blocks are too many.
    pub(crate) fn shortage(&self, needed: usize) -> OutOfBlocks {
        OutOfBlocks { needed, free: self.num_free(), num_blocks: self.num_blocks() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_block_is_freed_by_its_last_owner() {
        let mut pool = BlockPool::new(1);
        let block = pool.acquire().unwrap();
        pool.share(block);
        assert_eq!(pool.ref_count(block), 2);

        pool.release(block);
        assert_eq!(pool.num_free(), 0);

        pool.release(block);
        assert_eq!(pool.num_free(), 1);
    }

    #[test]
    fn exhausted_pool_reports_its_size() {
        let mut pool = BlockPool::new(2);
        pool.acquire().unwrap();
        pool.acquire().unwrap();
        let message = pool.acquire().unwrap_err().to_string();
        assert_eq!(message, "1 KV-cache blocks are needed and 0 of 2 are free");
    }

    #[test]
    fn blocks_are_rounded_up() {
        assert_eq!([0, 1, 16, 17].map(blocks_for), [0, 1, 1, 2]);
    }
}

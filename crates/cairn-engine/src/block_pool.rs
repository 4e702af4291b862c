//! The pool of fixed-size KV-cache blocks behind paged attention.
//!
//! A *block* holds the keys and values of [`BLOCK_TOKENS`] consecutive tokens of one sequence, in
//! every layer: block `b` is page `b` of each layer's cache. A sequence owns blocks through its
//! block table; several sequences may share a block when they begin alike (beams, common prompts),
//! so blocks are reference counted.
//!
//! What a block holds may be remembered beyond its last owner ([`PrefixTree`]): such a block is
//! *idle*, serves whoever begins alike, and is given to somebody else when no other block is free,
//! the one that was released first before the others.
//!
//! Source: Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention",
//! SOSP 2023, section 4.2. <https://arxiv.org/abs/2309.06180>
//!
//! **Invariant:** a block is free or idle if and only if its reference count is zero, and idle if the
//! tree holds it.
//! **Invariant:** among idle blocks children come before their parents: whoever owns a block owns its
//! parents, and releases them after it. So the first idle block never has children.
//! **Invariant:** this module never touches the cache; it hands out ids, the session moves bytes.

use crate::block_queue::BlockQueue;
use crate::prefix_tree::{Grown, PathEnd, PrefixTree};

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
    /// Blocks without an owner whose contents are remembered, in the order of their release.
    idle: BlockQueue,
    prefixes: PrefixTree,
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
        Self {
            ref_counts: vec![0; num_blocks],
            free: (0..last).rev().collect(),
            idle: BlockQueue::new(num_blocks),
            prefixes: PrefixTree::new(num_blocks),
        }
    }

    /// Takes one free block, or the one that has been idle longest; its reference count becomes one.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when every block is in use.
    pub fn acquire(&mut self) -> Result<u32, OutOfBlocks> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.evict().ok_or_else(|| self.shortage(1))?,
        };
        let ref_count = &mut self.ref_counts[block as usize];
        assert_eq!(*ref_count, 0, "free block {block} is still referenced");
        *ref_count = 1;
        Ok(block)
    }

    fn evict(&mut self) -> Option<u32> {
        let block = self.idle.pop_front()?;
        self.prefixes.remove(block, true);
        Some(block)
    }

    /// Adds one owner to a block that is in use or idle.
    pub fn share(&mut self, block: u32) {
        let ref_count = &mut self.ref_counts[block as usize];
        if *ref_count == 0 {
            assert!(self.prefixes.holds(block), "cannot share free block {block}");
            self.idle.remove(block);
        }
        *ref_count += 1;
    }

    /// Drops one owner; the last owner leaves the block free, or idle if its contents are remembered.
    pub fn release(&mut self, block: u32) {
        let ref_count = &mut self.ref_counts[block as usize];
        assert!(0 < *ref_count, "double release of block {block}");
        *ref_count -= 1;
        if *ref_count != 0 {
            return;
        }
        if self.prefixes.holds(block) {
            self.idle.push_back(block);
        } else {
            self.free.push(block);
        }
    }

    /// Which blocks hold what.
    pub(crate) fn prefixes(&self) -> &PrefixTree {
        &self.prefixes
    }

    /// Remembers what a full block holds that its caller owns, and the path to it.
    pub(crate) fn remember(&mut self, end: PathEnd, tokens: &[u32], block: u32) -> Grown {
        debug_assert_ne!(self.ref_count(block), 0, "a block in use");
        self.prefixes.grow(end, tokens, block)
    }

    /// Remembers what a half-filled block holds that its caller owns alone and writes no more.
    pub(crate) fn remember_tail(&mut self, end: PathEnd, tokens: &[u32], block: u32) {
        debug_assert_eq!(self.ref_count(block), 1, "a block of one owner");
        self.prefixes.grow_tail(end, tokens, block);
    }

    /// Forgets what idle blocks hold.
    pub(crate) fn forget_idle(&mut self) {
        while let Some(block) = self.idle.pop_front() {
            self.prefixes.remove(block, false);
            self.free.push(block);
        }
    }

    /// Owners of a block; zero for a free one.
    pub fn ref_count(&self, block: u32) -> u32 {
        self.ref_counts[block as usize]
    }

    /// Blocks that [`acquire`](Self::acquire) can still hand out, idle ones included.
    pub fn num_free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks without an owner whose contents are remembered.
    pub fn num_idle(&self) -> usize {
        self.idle.len()
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
impl BlockPool {
    /// Asserts what holds between any two calls, given how many owners each block has.
    pub(crate) fn check(&self, owners: &[u32]) {
        assert_eq!(self.ref_counts, owners, "owners of blocks");
        let mut seen = vec![false; owners.len()];
        for block in self.free.iter().copied() {
            assert!(
                !std::mem::replace(&mut seen[block as usize], true),
                "block {block} is free twice"
            );
            assert!(!self.prefixes.holds(block), "free block {block} is remembered");
        }
        for block in self.idle.iter() {
            assert!(
                !std::mem::replace(&mut seen[block as usize], true),
                "block {block} is idle twice"
            );
            assert!(self.prefixes.holds(block), "idle block {block} is not remembered");
            let parent_went =
                self.prefixes.parent(block).is_some_and(|parent| seen[parent as usize]);
            assert!(!parent_went, "the parent of block {block} would leave before it");
        }
        for (block, (&seen, &owners)) in seen.iter().zip(owners).enumerate() {
            assert_eq!(seen, owners == 0, "block {block} leaked");
        }
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
    fn what_is_idle_longest_is_given_away_first() {
        let mut pool = BlockPool::new(3);
        let tokens: Vec<u32> = (0..48).collect();
        let mut end = PathEnd::root(0);
        let blocks = [0, 1, 2].map(|_| pool.acquire().unwrap());
        for (tokens, block) in tokens.chunks(BLOCK_TOKENS).zip(blocks) {
            let Grown::New(next) = pool.remember(end, tokens, block) else { panic!("known") };
            end = next;
        }
        blocks.into_iter().rev().for_each(|block| pool.release(block));
        assert_eq!((pool.num_free(), pool.num_idle()), (3, 3));
        let root = PathEnd::root(0);
        let (first, _) = pool.prefixes().child(root, &tokens[..16]).unwrap();
        pool.share(first);
        assert_eq!(pool.num_free(), 2);
        assert_eq!([pool.acquire().unwrap(), pool.acquire().unwrap()], [blocks[2], blocks[1]]);
        assert!(pool.acquire().is_err(), "the first block has an owner");
        assert!(pool.prefixes().child(root, &tokens[..16]).is_some());
        pool.release(first);
        pool.forget_idle();
        assert_eq!((pool.num_free(), pool.num_idle()), (1, 0));
        assert!(pool.prefixes().child(root, &tokens[..16]).is_none());
    }

    #[test]
    fn blocks_are_rounded_up() {
        assert_eq!([0, 1, 16, 17].map(blocks_for), [0, 1, 1, 2]);
    }
}

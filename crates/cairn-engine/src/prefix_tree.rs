//! What the blocks of the cache hold: a tree in which each block's tokens follow those of its parent.
//!
//! A *node* is a block whose keys and values are those of its tokens after all tokens above it, so a
//! prompt that begins like a path of the tree need not run that part again. Full blocks are found by
//! a hash of the whole path, and compared token by token: equal hashes alone are no hit. The last,
//! half-filled block of a sequence is a leaf; it, or any block that begins alike, serves by being
//! copied.
//!
//! Paths with different *salts* never meet: another adapter gives other keys for the same tokens, and
//! users may be kept from learning by the clock what others have asked.
//!
//! Source: the radix tree is that of `SGLang` (Zheng et al. 2024, <https://arxiv.org/abs/2312.07104>,
//! section 3), the hash of paths of blocks that of vLLM.
//!
//! **Invariant:** a node leaves only without children.
//! **Invariant:** this module counts no owners; the pool does.

use std::collections::HashMap;

use cairn_kernels::splitmix;

use crate::block_pool::BLOCK_TOKENS;
use crate::sequence::num_common;

/// No block: the parent of the first blocks.
const NONE: u32 = u32::MAX;
/// Siblings that are compared to find the one that begins most alike; the latest come first.
const NUM_COMPARED_MAX: usize = 32;
/// Siblings that are looked at to find these among those of other salts.
const NUM_VISITED_MAX: usize = 256;

/// The end of a path: what has been read up to here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PathEnd {
    /// The last block, or `NONE` at the root.
    block: u32,
    hash: u64,
}

impl PathEnd {
    /// Where nothing has been read.
    pub(crate) fn root(salt: u64) -> Self {
        Self { block: NONE, hash: splitmix(salt) }
    }

    /// The hash of the path that goes on with `tokens`.
    ///
    /// For given tokens it is a bijection of the hash so far, so that one first block under two salts
    /// has two hashes.
    fn hash_with(self, tokens: &[u32]) -> u64 {
        tokens.iter().fold(self.hash, |hash, &token| splitmix(hash ^ u64::from(token)))
    }
}

/// What a block holds; a block without tokens is no node.
#[derive(Clone, Copy, Debug)]
struct Node {
    /// Of the path that ends here.
    hash: u64,
    /// Of the path to the parent.
    parent_hash: u64,
    parent: u32,
    first_child: u32,
    /// Neighbors among the parent's children.
    before: u32,
    after: u32,
    len: usize,
    tokens: [u32; BLOCK_TOKENS],
}

const EMPTY: Node = Node {
    hash: 0,
    parent_hash: 0,
    parent: NONE,
    first_child: NONE,
    before: NONE,
    after: NONE,
    len: 0,
    tokens: [0; BLOCK_TOKENS],
};

impl Node {
    fn tokens(&self) -> &[u32] {
        &self.tokens[..self.len]
    }
}

/// What became of a full block that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grown {
    /// It is a node now.
    New(PathEnd),
    /// This block holds the same already.
    Known(u32, PathEnd),
    /// Another path has the same hash, so this one is not remembered.
    Collision,
}

/// Which tokens are in which block.
#[derive(Debug)]
pub(crate) struct PrefixTree {
    /// By block.
    nodes: Vec<Node>,
    /// First child of the root.
    first: u32,
    /// Full blocks by the hash of their path. Twice as large as it gets, so that it never grows.
    by_hash: HashMap<u64, u32>,
    /// Hashes of paths that have left, each at its own place, until another takes it.
    evicted: Vec<u64>,
}

impl PrefixTree {
    /// An empty tree over `num_blocks` blocks; it does not allocate again.
    pub(crate) fn new(num_blocks: usize) -> Self {
        Self {
            nodes: vec![EMPTY; num_blocks],
            first: NONE,
            by_hash: HashMap::with_capacity(2 * num_blocks),
            evicted: vec![0; (2 * num_blocks).next_power_of_two()],
        }
    }

    /// Whether a block is a node.
    pub(crate) fn holds(&self, block: u32) -> bool {
        self.nodes[block as usize].len != 0
    }

    /// The child that holds exactly this full block of tokens.
    pub(crate) fn child(&self, end: PathEnd, tokens: &[u32]) -> Option<(u32, PathEnd)> {
        let hash = end.hash_with(tokens);
        let &block = self.by_hash.get(&hash)?;
        let node = &self.nodes[block as usize];
        let same = node.parent == end.block && node.tokens == *tokens;
        same.then_some((block, PathEnd { block, hash }))
    }

    /// The child that begins most like `tokens`, and how many of them it holds.
    pub(crate) fn closest(&self, end: PathEnd, tokens: &[u32]) -> Option<(u32, usize)> {
        self.children(end)
            .take(NUM_VISITED_MAX)
            .filter(|&(_, node)| node.parent_hash == end.hash)
            .take(NUM_COMPARED_MAX)
            .map(|(block, node)| (block, num_common(node.tokens(), tokens)))
            .filter(|&(_, common)| common != 0)
            // Of equals the first, which is the latest.
            .reduce(|best, next| if best.1 < next.1 { next } else { best })
    }

    /// Whether a full block of tokens was here and has left, as far as is remembered.
    pub(crate) fn was_evicted(&self, end: PathEnd, tokens: &[u32]) -> bool {
        let hash = end.hash_with(tokens);
        self.evicted[self.evicted_at(hash)] == hash
    }

    /// Makes a full block a node, unless another holds the same.
    pub(crate) fn grow(&mut self, end: PathEnd, tokens: &[u32], block: u32) -> Grown {
        let hash = end.hash_with(tokens);
        if let Some((known, end)) = self.child(end, tokens) {
            return Grown::Known(known, end);
        }
        if self.by_hash.contains_key(&hash) {
            return Grown::Collision;
        }
        self.by_hash.insert(hash, block);
        self.link(end, hash, tokens, block);
        Grown::New(PathEnd { block, hash })
    }

    /// Makes a half-filled block a leaf, unless a block that is found holds the same.
    pub(crate) fn grow_tail(&mut self, end: PathEnd, tokens: &[u32], block: u32) {
        if self.closest(end, tokens).is_none_or(|(_, common)| common < tokens.len()) {
            self.link(end, end.hash_with(tokens), tokens, block);
        }
    }

    /// Takes a node out; `remembers` that it was there.
    pub(crate) fn remove(&mut self, block: u32, remembers: bool) {
        let Node { hash, parent, first_child, before, after, len, .. } =
            std::mem::replace(&mut self.nodes[block as usize], EMPTY);
        assert!(len != 0, "block {block} is in the tree");
        assert_eq!(first_child, NONE, "block {block} leaves before its children");
        match before {
            NONE => *self.first_child_mut(parent) = after,
            before => self.nodes[before as usize].after = after,
        }
        if after != NONE {
            self.nodes[after as usize].before = before;
        }
        if len == BLOCK_TOKENS {
            self.by_hash.remove(&hash);
            if remembers {
                let at = self.evicted_at(hash);
                self.evicted[at] = hash;
            }
        }
    }

    fn link(&mut self, end: PathEnd, hash: u64, tokens: &[u32], block: u32) {
        debug_assert!(!self.holds(block), "block {block} is a node already");
        let PathEnd { block: parent, hash: parent_hash } = end;
        let after = std::mem::replace(self.first_child_mut(parent), block);
        if after != NONE {
            self.nodes[after as usize].before = block;
        }
        let node = &mut self.nodes[block as usize];
        *node = Node { hash, parent_hash, parent, after, len: tokens.len(), ..EMPTY };
        node.tokens[..tokens.len()].copy_from_slice(tokens);
    }

    fn first_child_mut(&mut self, parent: u32) -> &mut u32 {
        match parent {
            NONE => &mut self.first,
            parent => &mut self.nodes[parent as usize].first_child,
        }
    }

    fn children(&self, end: PathEnd) -> impl Iterator<Item = (u32, &Node)> {
        let first = match end.block {
            NONE => self.first,
            parent => self.nodes[parent as usize].first_child,
        };
        let found = |block: u32| (block != NONE).then(|| (block, &self.nodes[block as usize]));
        std::iter::successors(found(first), move |(_, node)| found(node.after))
    }

    #[expect(clippy::cast_possible_truncation, reason = "any of the hash's bits will do")]
    fn evicted_at(&self, hash: u64) -> usize {
        hash as usize & (self.evicted.len() - 1)
    }

    /// The parent of a node, if that is a block.
    #[cfg(test)]
    pub(crate) fn parent(&self, block: u32) -> Option<u32> {
        let parent = self.nodes[block as usize].parent;
        (parent != NONE).then_some(parent)
    }
}

#[cfg(test)]
mod tests;

//! The tree that joins tiles of keys: what a range of tiles contributes, and how two are merged.
//!
//! A node holds, for each row of a block, the greatest score, the sum of the weights and the values
//! weighted by them. Tiles are leaves; tile 2i joins 2i + 1, then pairs join pairs, like the digits of
//! a binary counter, so that a row's result depends on the tiles alone and not on who made them.

use crate::lanes::{at, put, vectors};
use crate::math;
use crate::simd::{F32x16, Kernel, LANES};

/// Layout of a node: maxima, sums, then the weighted values of each row.
#[derive(Clone, Copy)]
pub(super) struct NodeShape {
    rows: usize,
    padded_rows: usize,
    pub(super) columns: usize,
}

impl NodeShape {
    pub(super) fn new(rows: usize, value_dim: usize) -> Self {
        let columns = value_dim.next_multiple_of(LANES);
        Self { rows, padded_rows: rows.next_multiple_of(LANES), columns }
    }

    pub(super) fn len(self) -> usize {
        2 * self.padded_rows + self.rows * self.columns
    }

    /// Maxima, sums and values of a node.
    #[inline(always)]
    fn parts(self, node: &mut [f32]) -> [&mut [f32]; 3] {
        let (max, rest) = node.split_at_mut(self.padded_rows);
        let (sum, out) = rest.split_at_mut(self.padded_rows);
        [max, sum, &mut out[..self.rows * self.columns]]
    }

    /// `right = left ∘ right`.
    #[inline(always)]
    fn merge<V: F32x16>(self, left: &mut [f32], right: &mut [f32]) {
        let [left_max, left_sum, left_out] = self.parts(left);
        let [max, sum, out] = self.parts(right);
        for first in vectors(self.padded_rows) {
            let (a_max, b_max) = (at::<V>(left_max, first), at::<V>(max, first));
            let top = a_max.max(b_max);
            // Where neither side saw a key, any finite number keeps both factors at 0.
            let safe = V::select(top.eq(V::splat(f32::NEG_INFINITY)), V::zero(), top);
            let (a, b) = (math::exp(a_max - safe), math::exp(b_max - safe));
            put(top, max, first);
            put(at::<V>(left_sum, first).mul_add(a, at::<V>(sum, first) * b), sum, first);
            let (a, b) = (a.to_array(), b.to_array());
            for i in 0..LANES.min(self.rows - first) {
                let row = (first + i) * self.columns..(first + i + 1) * self.columns;
                let (from, to) = (&left_out[row.clone()], &mut out[row]);
                for column in vectors(self.columns) {
                    let scaled = at::<V>(to, column) * V::splat(b[i]);
                    put(at::<V>(from, column).mul_add(V::splat(a[i]), scaled), to, column);
                }
            }
        }
    }
}

/// Subtrees that wait for their right sibling, like the digits of a binary counter.
pub(super) struct Tree<'a> {
    pub(super) shape: NodeShape,
    /// Memory of the nodes.
    nodes: &'a mut [f32],
    /// Where the waiting node of each level is, if `waiting` has its bit.
    places: [usize; LEVELS_MAX],
    waiting: u64,
    /// Where the node in hand is.
    hand: usize,
}

/// Levels of the deepest tree: 2³¹ tiles.
const LEVELS_MAX: usize = 32;

impl<'a> Tree<'a> {
    /// Nodes that a tree over leaves below `end` needs.
    pub(super) fn nodes(end: usize) -> usize {
        (end.max(1).ilog2() + 2) as usize
    }

    /// An empty tree: the node in hand has seen nothing.
    pub(super) fn new(shape: NodeShape, nodes: &'a mut [f32]) -> Self {
        let hand = nodes.len() / shape.len() - 1;
        let mut tree = Self { shape, nodes, places: std::array::from_fn(|i| i), waiting: 0, hand };
        let [max, sum, out] = tree.in_hand();
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        out.fill(0.0);
        tree
    }

    /// The parts of the node in hand, where a leaf is made and the result is found.
    #[inline(always)]
    pub(super) fn in_hand(&mut self) -> [&mut [f32]; 3] {
        let len = self.shape.len();
        self.shape.parts(&mut self.nodes[self.hand * len..][..len])
    }

    /// The whole node in hand.
    pub(super) fn node(&self) -> &[f32] {
        let len = self.shape.len();
        &self.nodes[self.hand * len..][..len]
    }

    /// Merges the waiting node of a level into the one in hand.
    #[inline(always)]
    fn merge<V: F32x16>(&mut self, level: usize) {
        let len = self.shape.len();
        let range = |place: usize| place * len..(place + 1) * len;
        let ranges = [range(self.places[level]), range(self.hand)];
        let [left, right] = self.nodes.get_disjoint_mut(ranges).expect("nodes do not overlap");
        self.shape.merge::<V>(left, right);
        self.waiting &= !(1 << level);
    }

    /// Takes the leaf in hand, number `leaf`, in. Leaves come in ascending order; missing ones are
    /// empty.
    #[inline(always)]
    pub(super) fn carry<V: F32x16>(&mut self, leaf: usize) {
        let mut level = 0;
        while leaf >> level & 1 == 1 {
            if self.waiting >> level & 1 == 1 {
                self.merge::<V>(level);
            }
            level += 1;
        }
        std::mem::swap(&mut self.places[level], &mut self.hand);
        self.waiting |= 1 << level;
    }

    /// Folds what waits into the node in hand, from the smallest subtree upward.
    #[inline(always)]
    pub(super) fn fold<V: F32x16>(&mut self) {
        if self.waiting == 0 {
            return;
        }
        let lowest = self.waiting.trailing_zeros() as usize;
        std::mem::swap(&mut self.places[lowest], &mut self.hand);
        self.waiting &= !(1 << lowest);
        for level in lowest + 1..LEVELS_MAX {
            if self.waiting >> level & 1 == 1 {
                self.merge::<V>(level);
            }
        }
    }
}

/// Combines the nodes of a block's chunks.
pub(super) struct Combine<'a, 'm> {
    /// Nodes of consecutive chunks, each at the start of `width` floats.
    pub(super) nodes: &'a [f32],
    pub(super) width: usize,
    pub(super) first_chunk: usize,
    pub(super) tree: Tree<'m>,
}

impl<'m> Kernel for Combine<'_, 'm> {
    type Output = Tree<'m>;

    #[inline(always)]
    fn run<V: F32x16>(self) -> Tree<'m> {
        let Self { nodes, width, first_chunk, mut tree } = self;
        let len = tree.shape.len();
        for (i, node) in nodes.chunks_exact(width).enumerate() {
            let hand = tree.hand;
            tree.nodes[hand * len..][..len].copy_from_slice(&node[..len]);
            tree.carry::<V>(first_chunk + i);
        }
        tree.fold::<V>();
        tree
    }
}

//! The fixed tree in which tiles combine: nodes of a block of rows, and subtrees that wait.
//!
//! A node is what a range of tiles contributes to each row: the greatest score, the sum of
//! `e^(score − max)` and the values weighted by it. Tiles come in ascending order; like the digits of a
//! binary counter, a finished subtree waits until its right sibling is finished too.

use crate::lanes::{at, put, vectors};
use crate::math;
use crate::simd::{F32x16, LANES};

/// Layout of a node: maxima, sums, then the weighted values of each row.
#[derive(Clone, Copy)]
pub(super) struct NodeShape {
    pub(super) rows: usize,
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
        let shape = self.shape;
        shape.parts(self.hand())
    }

    /// The node in hand as it lies in memory.
    pub(super) fn hand(&mut self) -> &mut [f32] {
        let len = self.shape.len();
        &mut self.nodes[self.hand * len..][..len]
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

    /// Takes the leaf in hand, number `leaf`, in. Leaves follow each other without gaps; those before
    /// the first and after the last are empty.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Portable;

    /// The maximum, sum and value of a tree over one-row leaves; `None` are missing leaves.
    fn root(leaves: &[Option<[f32; 3]>], pad: usize) -> [f32; 3] {
        let shape = NodeShape::new(1, 1);
        let mut memory = vec![f32::NAN; Tree::nodes(leaves.len() + pad) * shape.len()];
        let mut tree = Tree::new(shape, &mut memory);
        for (i, leaf) in leaves.iter().enumerate() {
            if let Some([m, s, o]) = leaf {
                let [max, sum, out] = tree.in_hand();
                max.fill(f32::NEG_INFINITY);
                sum.fill(0.0);
                (max[0], sum[0]) = (*m, *s);
                out.fill(*o);
                tree.carry::<Portable>(i);
            }
        }
        tree.fold::<Portable>();
        let [max, sum, out] = tree.in_hand();
        [max[0], sum[0], out[0]]
    }

    #[test]
    fn an_empty_leaf_is_the_identity() {
        let empty = Some([f32::NEG_INFINITY, 0.0, 0.0]);
        let leaf = |i: usize| Some([i as f32 * 0.7 - 2.0, 1.0 + i as f32, 0.3 * i as f32]);
        for (first, last) in (0..7).flat_map(|first| (first..7).map(move |last| (first, last))) {
            let present = |i: usize| (first..=last).contains(&i);
            let absent: Vec<_> = (0..7).map(|i| leaf(i).filter(|_| present(i))).collect();
            let filled: Vec<_> = (0..7).map(|i| if present(i) { leaf(i) } else { empty }).collect();
            let bits = |root: [f32; 3]| root.map(f32::to_bits);
            assert_eq!(bits(root(&absent, 0)), bits(root(&filled, 0)), "{first}..={last}");
            assert_eq!(bits(root(&absent, 0)), bits(root(&absent, 300)));
        }
    }
}

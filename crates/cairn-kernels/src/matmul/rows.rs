//! Which rows a product works on: all of them in order, or those of a list.

use super::pack_bf16z::Bf16zElements;
use super::pack_grouped::GroupedElements;
use crate::encoding::{Bf16z, Layout, Weight};
use crate::simd::LANES;

/// Rows of a matrix by number. An entry divided by `divisor` is a row: routed rows are numbered
/// `token · top_k + rank`, so the divisor is `top_k` where a matrix has one row a token.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowList<'a> {
    pub(super) entries: &'a [u32],
    pub(super) divisor: usize,
}

impl RowList<'_> {
    /// The i-th row.
    #[inline(always)]
    pub(super) fn at(self, i: usize) -> usize {
        self.entries[i] as usize / self.divisor
    }
}

/// Consecutive outputs of a weight: all of them, or one expert's.
#[derive(Clone, Copy, Debug)]
pub(super) struct WeightRows<'a> {
    pub(super) weight: Weight<'a>,
    /// The first output; a multiple of 16 in panels.
    pub(super) first: usize,
    /// Outputs.
    pub(super) n: usize,
}

impl<'a> WeightRows<'a> {
    /// All outputs.
    pub(super) fn all(weight: Weight<'a>) -> Self {
        Self { weight, first: 0, n: weight.n }
    }

    /// The `index`-th of equal parts of `n` outputs.
    pub(super) fn part(weight: Weight<'a>, index: usize, n: usize) -> Self {
        let first = index * n;
        let aligned = weight.layout == Layout::RowMajor || first.is_multiple_of(LANES);
        assert!(aligned && first + n <= weight.n, "a part of the weight begins inside a panel");
        Self { weight, first, n }
    }

    /// The columns of a bf16z weight.
    pub(super) fn bf16z(&self) -> Bf16zElements<'a> {
        let before = self.first / LANES * self.panel_bytes();
        Bf16zElements(Bf16z::new(&self.weight.bytes[before..], self.weight.k))
    }

    /// The columns of a weight whose codes share scales.
    pub(super) fn grouped(&self) -> GroupedElements<'a> {
        GroupedElements::new(self.weight.grouped().after(self.first / LANES))
    }

    /// Where the codes of a column begin in their panel, of a weight whose codes share scales.
    pub(super) fn code_bytes(&self, column: usize) -> usize {
        self.grouped().column_bytes(column)
    }

    /// Stored bytes of one panel.
    pub(super) fn panel_bytes(&self) -> usize {
        (self.weight.bytes.len() / self.weight.n.div_ceil(LANES).max(1)).max(1)
    }
}

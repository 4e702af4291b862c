//! The canonical order of a row reduction: 16 lanes, then a fixed tree.
//!
//! Lane j takes the elements i ≡ j (mod 16) in ascending order, products by fused multiply-add from
//! 0; lanes then combine 16→8 (j with j+8), 8→4, 4→2, 2→1. Lanes past the end of a short row
//! see nothing. These plain loops are the meaning; vectors of any width reproduce them exactly.

use crate::simd::{F32x16, LANES};

/// The 16 elements from `i` on; past the end of the row, `fill`.
#[inline(always)]
pub(crate) fn at_or<V: F32x16>(row: &[f32], i: usize, fill: f32) -> V {
    match row[i..].first_chunk::<LANES>() {
        Some(chunk) => V::load(chunk),
        None => V::load_partial(&row[i..], fill),
    }
}

/// The 16 elements from `i` on; past the end of the row, 0.
#[inline(always)]
pub(crate) fn at<V: F32x16>(row: &[f32], i: usize) -> V {
    at_or(row, i, 0.0)
}

/// Writes the elements from `i` on, up to 16 of them, as many as the row has.
#[inline(always)]
pub(crate) fn put<V: F32x16>(vector: V, row: &mut [f32], i: usize) {
    match row[i..].first_chunk_mut::<LANES>() {
        Some(chunk) => vector.store(chunk),
        None => vector.store_partial(&mut row[i..]),
    }
}

/// The first elements of the vectors of a row of `len` elements.
#[inline(always)]
pub(crate) fn vectors(len: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(LANES)
}

/// [`sum`] with vectors. Adding −0 changes no lane, so a short tail leaves lanes alone.
#[inline(always)]
pub(crate) fn row_sum<V: F32x16>(row: &[f32]) -> f32 {
    let mut sum = V::zero();
    for i in vectors(row.len()) {
        sum = sum + at_or::<V>(row, i, -0.0);
    }
    sum.sum()
}

/// [`dot`] with vectors. The product of 0 and −0 is −0, see [`row_sum`].
#[inline(always)]
pub(crate) fn row_dot<V: F32x16>(a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    let mut sum = V::zero();
    for i in vectors(a.len()) {
        sum = at::<V>(a, i).mul_add(at_or(b, i, -0.0), sum);
    }
    sum.sum()
}

/// [`max`] with vectors.
#[inline(always)]
pub(crate) fn row_max<V: F32x16>(row: &[f32]) -> f32 {
    let mut max = V::splat(f32::NEG_INFINITY);
    for i in vectors(row.len()) {
        max = max.max(at_or(row, i, f32::NEG_INFINITY));
    }
    max.max_lane()
}

/// Writes a row vector by vector: `sweep!(y, i => at::<V>(x, i) * factor)`. A macro and not a function
/// that takes a closure, because a closure that is not inlined is compiled without the vectors'
/// instructions, at a hundredth of the speed.
macro_rules! sweep {
    ($row:ident, $i:ident => $value:expr) => {
        for $i in $crate::lanes::vectors($row.len()) {
            $crate::lanes::put($value, $row, $i);
        }
    };
}
pub(crate) use sweep;

/// Combines 16 partial results in the fixed tree.
pub(crate) fn tree(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for j in 0..half {
            lanes[j] = combine(lanes[j], lanes[j + half]);
        }
    }
    lanes[0]
}

/// The sum of a row.
pub(crate) fn sum(row: impl IntoIterator<Item = f32>) -> f32 {
    let mut lanes = [0.0; LANES];
    for (i, x) in row.into_iter().enumerate() {
        lanes[i % LANES] += x;
    }
    tree(lanes, |a, b| a + b)
}

/// The sum of products of pairs.
pub(crate) fn dot(pairs: impl IntoIterator<Item = (f32, f32)>) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for (i, (a, b)) in pairs.into_iter().enumerate() {
        lanes[i % LANES] = a.mul_add(b, lanes[i % LANES]);
    }
    tree(lanes, |a, b| a + b)
}

/// The greatest element; −∞ of an empty row. Of two elements the later one wins if either is not a
/// number, as vectors do it.
pub(crate) fn max(row: impl IntoIterator<Item = f32>) -> f32 {
    let greater = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for (i, x) in row.into_iter().enumerate() {
        lanes[i % LANES] = greater(lanes[i % LANES], x);
    }
    tree(lanes, greater)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_rows_leave_lanes_empty() {
        assert_eq!(sum([]).to_bits(), 0.0_f32.to_bits());
        assert_eq!(max([]).to_bits(), f32::NEG_INFINITY.to_bits());
        assert_eq!(max([1.0, 3.0]).to_bits(), 3.0_f32.to_bits());
        assert_eq!(dot([(2.0, 3.0), (4.0, 5.0)]).to_bits(), 26.0_f32.to_bits());
    }

    #[test]
    fn the_tree_is_the_documented_one() {
        let lanes: [f32; LANES] = std::array::from_fn(|i| (i as f32 - 8.0).exp2() * 1.1 + 1e-3);
        let pair = |j: usize| lanes[j] + lanes[j + 8];
        let four = |j: usize| pair(j) + pair(j + 4);
        let two = |j: usize| four(j) + four(j + 2);
        assert_eq!(sum(lanes).to_bits(), (two(0) + two(1)).to_bits());
    }
}

//! The canonical order of a row reduction: 16 lanes, then a fixed tree.
//!
//! Lane j takes the elements i ≡ j (mod 16) in ascending order, products by fused multiply-add from
//! 0; lanes then combine 16→8 (j with j+8), 8→4, 4→2, 2→1. Lanes past the end of a short row
//! see nothing. These plain loops are the meaning; vectors of any width reproduce them exactly.

/// How many partial results a row reduction keeps.
pub const LANES: usize = 16;

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

/// The greatest element; −∞ of an empty row. A not-a-number anywhere makes the result one.
pub(crate) fn max(row: impl IntoIterator<Item = f32>) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for (i, x) in row.into_iter().enumerate() {
        lanes[i % LANES] = greater(lanes[i % LANES], x);
    }
    tree(lanes, greater)
}

/// The greater of two; a not-a-number wins.
fn greater(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_rows_leave_lanes_empty() {
        assert_eq!(sum([]).to_bits(), 0.0_f32.to_bits());
        assert_eq!(max([]).to_bits(), f32::NEG_INFINITY.to_bits());
        assert!(max([1.0, f32::NAN, 3.0]).is_nan());
        assert!(max([1.0, 3.0]) == 3.0 && dot([(2.0, 3.0), (4.0, 5.0)]) == 26.0);
    }

    #[test]
    fn the_tree_is_the_documented_one() {
        let lanes: [f32; LANES] = std::array::from_fn(|i| 10.0_f32.powi(i as i32 - 8) * 1.1);
        let pair = |j: usize| lanes[j] + lanes[j + 8];
        let four = |j: usize| pair(j) + pair(j + 4);
        let two = |j: usize| four(j) + four(j + 2);
        assert_eq!(sum(lanes).to_bits(), (two(0) + two(1)).to_bits());
    }
}

//! Which keys a query sees: an intersection of conditions, as data.

use std::ops::Range;

/// Conditions that a key must all meet to be visible to a query of the same sequence.
///
/// Documents packed into one row are separate sequences of the batch, so they need no condition.
/// Whatever the conditions, the visible keys of a query are an interval of positions.
///
/// ```
/// use cairn_kernels::attention::Mask;
/// let mask = Mask { window: Some(4), ..Mask::CAUSAL };
/// assert_eq!(mask.range(10, 32), 7..11);
/// assert!(mask.visible(10, 7) && !mask.visible(10, 6) && !mask.visible(10, 11));
/// ```
#[derive(
    serde::Serialize, serde::Deserialize, Debug, Clone, Copy, PartialEq, Eq, Hash, Default,
)]
pub struct Mask {
    /// A query sees no later key, except inside `prefix` and its own block.
    pub causal: bool,
    /// A query sees only keys less than this many positions away, on either side: `Some(w)` with
    /// `causal` is Mistral's window of w keys, `Some(w / 2 + 1)` without it ModernBERT's of w.
    pub window: Option<usize>,
    /// With `causal`: positions below this are visible to every query (prefix LM).
    pub prefix: Option<usize>,
    /// With `causal`: queries see all of their own block of this many positions (block diffusion).
    pub block: Option<usize>,
}

impl Mask {
    /// Everything is visible.
    pub const BIDIRECTIONAL: Self = Self { causal: false, window: None, prefix: None, block: None };
    /// A query sees itself and what came before.
    pub const CAUSAL: Self = Self { causal: true, window: None, prefix: None, block: None };

    /// Whether the query at position `q` sees the key at position `k`.
    pub fn visible(&self, q: usize, k: usize) -> bool {
        self.range(q, usize::MAX).contains(&k)
    }

    /// The positions that the query at position `q` sees, of a sequence with `keys` keys. Both ends
    /// grow with `q`. Where nothing is visible, the range is empty and may start past its end.
    pub fn range(&self, q: usize, keys: usize) -> Range<usize> {
        let mut end = keys;
        if self.causal {
            let block_end = self.block.map_or(0, |block| (q / block + 1) * block);
            end = end.min((q + 1).max(self.prefix.unwrap_or(0)).max(block_end));
        }
        let mut start = 0;
        if let Some(window) = self.window {
            start = (q + 1).saturating_sub(window);
            end = end.min(q.saturating_add(window));
        }
        start..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_the_documented_conditions() {
        let options = [None, Some(1), Some(3), Some(8)];
        for window in options {
            for prefix in options {
                for block in options {
                    let mask = Mask { causal: true, window, prefix, block };
                    let open = Mask { causal: false, ..mask };
                    check(mask, true);
                    check(open, false);
                }
            }
        }
    }

    fn check(mask: Mask, causal: bool) {
        for q in 0..20_usize {
            for k in 0..20_usize {
                let near = mask.window.is_none_or(|w| q.abs_diff(k) < w);
                let past = k <= q
                    || mask.prefix.is_some_and(|p| k < p)
                    || mask.block.is_some_and(|b| k / b <= q / b);
                let expected = near && (!causal || past);
                assert_eq!(mask.range(q, 20).contains(&k), expected, "{mask:?} {q} {k}");
            }
        }
    }
}

//! From chains to weights: scale, soft cap, what a row sees, exponentials. One row of a tile at a
//! time, in registers, without a branch between its vectors: a row's reductions and exponentials are
//! long chains, and what hides them is the next row.

use std::ops::Range;

use super::AttentionSpec;
use super::tiles::TileFactors;
use crate::dropout::DropLanes;
use crate::simd::{F32x16, LANES, Mask16};
use crate::{KEY_TILE, math};

/// Vectors of a row of a tile.
const VECTORS: usize = KEY_TILE / LANES;

/// What turns a chain into a score, ready for vectors.
#[derive(Clone, Copy)]
pub(super) struct Scoring<V> {
    scale: V,
    /// The soft cap and its inverse.
    cap: Option<(V, V)>,
}

/// What the gradients of a query's weights need besides the scores.
pub(super) struct RowSlope {
    /// `Σ dout · out`.
    pub(super) delta: f32,
    /// Log-sum-exp of the query's scores.
    pub(super) lse: f32,
    /// Lanes of the tile that the query sees.
    pub(super) seen: Range<usize>,
}

/// Which probabilities of a row stay, sixteen keys at a time from the first of the tile on.
pub(super) trait Keep<V: F32x16>: Copy {
    /// What is known of sixteen keys.
    type Lanes: Copy;
    /// The next sixteen keys.
    fn next(&mut self) -> Self::Lanes;
    /// What becomes of their weights, or of the gradients of these.
    fn apply(&self, lanes: Self::Lanes, x: V) -> V;
}

/// All of them, as they are.
#[derive(Clone, Copy)]
pub(super) struct KeepAll;

impl<V: F32x16> Keep<V> for KeepAll {
    type Lanes = ();

    #[inline(always)]
    fn next(&mut self) {}

    #[inline(always)]
    fn apply(&self, (): (), x: V) -> V {
        x
    }
}

impl<V: F32x16> Keep<V> for DropLanes<V> {
    type Lanes = V::Mask;

    #[inline(always)]
    fn next(&mut self) -> V::Mask {
        DropLanes::next(self)
    }

    #[inline(always)]
    fn apply(&self, dropped: V::Mask, x: V) -> V {
        DropLanes::apply(self, dropped, x)
    }
}

impl<V: F32x16> Scoring<V> {
    #[inline(always)]
    pub(super) fn new(spec: &AttentionSpec) -> Self {
        let cap = spec.softcap.map(|cap| (V::splat(cap), V::splat(1.0 / cap)));
        Self { scale: V::splat(spec.scale), cap }
    }

    /// The scores of some chains, and the tanh of the soft cap (0 without one).
    #[inline(always)]
    fn score(&self, chains: V) -> (V, V) {
        let score = chains * self.scale;
        match self.cap {
            Some((cap, inverse)) => {
                let tanh = math::tanh(score * inverse);
                (cap * tanh, tanh)
            }
            None => (score, V::zero()),
        }
    }

    /// Turns the visible chains of a row into weights, hidden ones into 0, and gives the scores'
    /// maximum and the sum of the weights, dropped ones included. Where keys and values have factors, these
    /// are multiplied with chains and weights; what is summed is without.
    #[inline(always)]
    pub(super) fn weigh(
        &self,
        row: &mut [f32],
        (seen, factors): (&Range<usize>, Option<TileFactors<'_>>),
        keep: impl Keep<V>,
    ) -> (f32, f32) {
        let (row, lanes) = (of_row(row), (seen, factors));
        match seen.end.div_ceil(LANES) {
            _ if seen.is_empty() => {
                row.as_flattened_mut().fill(0.0);
                (f32::NEG_INFINITY, 0.0)
            }
            1 => self.weigh_first::<1, _>(row, lanes, keep),
            2 => self.weigh_first::<2, _>(row, lanes, keep),
            3 => self.weigh_first::<3, _>(row, lanes, keep),
            _ => self.weigh_first::<VECTORS, _>(row, lanes, keep),
        }
    }

    /// [`weigh`](Self::weigh) for a row that sees nothing past its first `N` vectors.
    #[inline(always)]
    fn weigh_first<const N: usize, K: Keep<V>>(
        &self,
        row: &mut [[f32; LANES]; VECTORS],
        (seen, factors): (&Range<usize>, Option<TileFactors<'_>>),
        mut keep: K,
    ) -> (f32, f32) {
        let hidden = V::splat(f32::NEG_INFINITY);
        let mut scores = [hidden; N];
        for (j, (score, chains)) in scores.iter_mut().zip(&*row).enumerate() {
            let mut chains = V::load(chains);
            if let Some(factors) = &factors {
                chains = chains * V::load(factors.keys[j]);
            }
            *score = self.score(chains).0;
        }
        let is_whole = *seen == (0..N * LANES);
        if !is_whole {
            for (j, score) in scores.iter_mut().enumerate() {
                *score = V::select(shown::<V>(seen, j), *score, hidden);
            }
        }
        let max = scores.iter().fold(hidden, |max, &score| max.max(score)).max_lane();
        let mut sum = V::zero();
        for (j, (score, to)) in scores.into_iter().zip(&mut *row).enumerate() {
            let mut weight = math::exp(score - V::splat(max));
            sum = sum + weight;
            let lanes = keep.next();
            weight = keep.apply(lanes, weight);
            if let Some(factors) = &factors {
                weight = weight * V::load(factors.values[j]);
                // A factor of what nobody has written may be no number.
                if !is_whole {
                    weight = V::select(shown::<V>(seen, j), weight, V::zero());
                }
            }
            weight.store(to);
        }
        row[N..].as_flattened_mut().fill(0.0);
        (max, sum.sum())
    }

    /// Turns the visible chains of a row into weights and the gradients of the weights into those of
    /// the chains, hidden ones into 0.
    #[inline(always)]
    pub(super) fn slope(
        &self,
        weights: &mut [f32],
        slopes: &mut [f32],
        row: &RowSlope,
        keep: impl Keep<V>,
    ) {
        let (weights, slopes) = (of_row(weights), of_row(slopes));
        match row.seen.end.div_ceil(LANES) {
            _ if row.seen.is_empty() => {
                weights.as_flattened_mut().fill(0.0);
                slopes.as_flattened_mut().fill(0.0);
            }
            1 => self.slope_first::<1, _>(weights, slopes, row, keep),
            2 => self.slope_first::<2, _>(weights, slopes, row, keep),
            3 => self.slope_first::<3, _>(weights, slopes, row, keep),
            _ => self.slope_first::<VECTORS, _>(weights, slopes, row, keep),
        }
    }

    /// [`slope`](Self::slope) for a row that sees nothing past its first `N` vectors.
    #[inline(always)]
    fn slope_first<const N: usize, K: Keep<V>>(
        &self,
        weights: &mut [[f32; LANES]; VECTORS],
        slopes: &mut [[f32; LANES]; VECTORS],
        row: &RowSlope,
        mut keep: K,
    ) {
        let is_whole = row.seen == (0..N * LANES);
        let (lse, delta) = (V::splat(row.lse), V::splat(row.delta));
        for (j, (to_weight, to_slope)) in weights.iter_mut().zip(&mut *slopes).take(N).enumerate() {
            let (score, tanh) = self.score(V::load(to_weight));
            let lanes = keep.next();
            let mut weight = math::exp(score - lse);
            let mut slope = weight * (keep.apply(lanes, V::load(to_slope)) - delta);
            weight = keep.apply(lanes, weight);
            if self.cap.is_some() {
                slope = slope * (-tanh).mul_add(tanh, V::splat(1.0));
            }
            slope = slope * self.scale;
            if !is_whole {
                let shown = shown::<V>(&row.seen, j);
                weight = V::select(shown, weight, V::zero());
                slope = V::select(shown, slope, V::zero());
            }
            weight.store(to_weight);
            slope.store(to_slope);
        }
        weights[N..].as_flattened_mut().fill(0.0);
        slopes[N..].as_flattened_mut().fill(0.0);
    }
}

/// A row of a tile as vectors.
#[inline(always)]
fn of_row(row: &mut [f32]) -> &mut [[f32; LANES]; VECTORS] {
    let vectors = row.as_chunks_mut::<LANES>().0;
    vectors.first_chunk_mut().expect("a row of a tile has a number for each key")
}

/// The lanes of vector `j` that a row sees.
#[inline(always)]
fn shown<V: F32x16>(seen: &Range<usize>, j: usize) -> V::Mask {
    let within = |end: usize| end.saturating_sub(j * LANES).min(LANES);
    V::Mask::first(within(seen.end)).and(V::Mask::first(within(seen.start)).not())
}

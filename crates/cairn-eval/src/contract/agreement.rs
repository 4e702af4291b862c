//! Whether two sides say the same: where their tokens part, how close the choice was, and how far
//! apart their distributions are over the same text.

use serde::{Deserialize, Serialize};

/// The first position at which two outputs differ; one that ends early differs at its end.
pub fn first_divergence(ours: &[u32], theirs: &[u32]) -> Option<usize> {
    let common = ours.iter().zip(theirs).take_while(|(left, right)| left == right).count();
    (common < ours.len().max(theirs.len())).then_some(common)
}

/// Kullback–Leibler divergence `Σ p (ln p − ln q) − p + q` in nats of two distributions over the same
/// tokens, from their log-probabilities, summed in f64. The last two terms sum to nothing but for
/// what rounding left of either sum; with them no term is negative.
///
/// # Panics
///
/// Panics if they are over different numbers of tokens.
pub fn divergence_of(p_v: &[f32], q_v: &[f32]) -> f64 {
    assert_eq!(p_v.len(), q_v.len(), "distributions over the same vocabulary");
    let term = |(&p, &q): (&f32, &f32)| {
        let (p, q) = (f64::from(p), f64::from(q));
        // 0 · ln 0 is 0.
        let log_ratio = if p == f64::NEG_INFINITY { 0.0 } else { p - q };
        p.exp() * log_ratio - p.exp() + q.exp()
    };
    p_v.iter().zip(q_v).map(term).sum()
}

/// Where two outputs part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// The first position, counted from the first new token.
    pub position: usize,
    /// Our token there.
    pub ours: u32,
    /// The peer's.
    pub theirs: u32,
    /// How much likelier our token is to us than the peer's, in nats: a small number is rounding, a
    /// large one is another model.
    pub margin: f64,
}

/// What two sides say of the same text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Where the outputs part; `None` if they are equal.
    pub divergence: Option<Divergence>,
    /// Positions of our output before which whole distributions were compared.
    pub kl_positions: Vec<usize>,
    /// `KL(ours ‖ theirs)` at each, in nats.
    pub kl: Vec<f64>,
    /// How far each side is from the exact model, where that was there.
    pub source_kl: Option<SourceKl>,
}

/// How far two sides are from the exact model at each position, in nats.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceKl {
    /// `KL(exact ‖ ours)`.
    pub ours: Vec<f64>,
    /// `KL(exact ‖ theirs)`.
    pub theirs: Vec<f64>,
}

impl SourceKl {
    /// The means, ours first; NaN if nothing was measured.
    pub fn means(&self) -> [f64; 2] {
        [&self.ours, &self.theirs].map(|kl| kl.iter().sum::<f64>() / kl.len() as f64)
    }
}

impl Agreement {
    /// The mean divergence; `None` if none was measured.
    pub fn kl_mean(&self) -> Option<f64> {
        (!self.kl.is_empty()).then(|| self.kl.iter().sum::<f64>() / self.kl.len() as f64)
    }
}

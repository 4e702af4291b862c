//! Mirostat (Basu et al. 2020, "Mirostat: A neural text decoding algorithm that directly controls perplexity",
//! <https://arxiv.org/abs/2007.14966>): how surprising tokens may be is steered after each of them, so that on the
//! average they are as surprising as is asked for.
//!
//! Both versions are llama.cpp's: the first estimates Zipf's exponent from the 100 likeliest tokens and keeps the
//! `k` likeliest that it suggests, the second keeps the tokens that are not too surprising; the surprise of the
//! token that was drawn is that among those kept. Surprise is in bits.
//!
//! **Invariant:** the state depends on the tokens that were chosen and on nothing else, so a sequence that gives
//! way, or whose guesses were wrong, goes on as if it had not.

use serde::{Deserialize, Serialize};

use crate::float;

/// Likeliest tokens that the exponent is estimated from.
pub(crate) const ESTIMATED_FROM: usize = 100;
/// ln 2.
const LN_2: f64 = std::f64::consts::LN_2;
/// Exponents nearer to 1 than this are taken for 1.
const NEAR: f64 = 1e-6;

/// Which way the tokens that stay are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MirostatVersion {
    /// By an estimated number of likeliest tokens.
    V1,
    /// By their surprise.
    V2,
}

/// How surprise is steered.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirostatParams {
    /// Which way.
    pub version: MirostatVersion,
    /// The surprise that is wanted, in bits, in (0, 100].
    pub tau: f32,
    /// How much of an error is corrected after a token, in [0, 1].
    pub eta: f32,
}

impl MirostatParams {
    /// As llama.cpp steers where nothing is said: 5 bits, a tenth of the error.
    pub fn new(version: MirostatVersion) -> Self {
        Self { version, tau: 5.0, eta: 0.1 }
    }
}

/// How surprising the next token of a sequence may be.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MirostatState {
    /// In bits; twice what is wanted before the first token.
    mu: Option<f64>,
}

impl MirostatState {
    /// The bound of the next token.
    pub(crate) fn mu(self, params: MirostatParams) -> f64 {
        self.mu.unwrap_or(2.0 * f64::from(params.tau))
    }

    /// Notes how surprising the token was that came, as its share of the probability that was left.
    pub(crate) fn note(&mut self, params: MirostatParams, share: f64) {
        let error = -float::ln(share) / LN_2 - f64::from(params.tau);
        self.mu = Some(self.mu(params) - f64::from(params.eta) * error);
    }
}

/// The share of the probability below which a token is more surprising than `mu`.
pub(crate) fn least_share(mu: f64) -> f64 {
    if mu <= 0.0 { 1.0 } else { float::exp(-mu * LN_2) }
}

/// How many of `vocab_size` tokens stay: Zipf's exponent is estimated from the weights of the likeliest, in order.
pub(crate) fn num_kept(
    weights: impl Iterator<Item = f64> + Clone,
    mu: f64,
    vocab_size: usize,
) -> usize {
    let (mut products, mut squares) = (0.0, 0.0);
    for (rank, (weight, next)) in (1..).zip(weights.clone().zip(weights.skip(1))) {
        let rank = f64::from(rank);
        let t = float::ln((rank + 1.0) / rank);
        products += t * float::ln(weight / next);
        squares += t * t;
    }
    let exponent = if squares == 0.0 { 0.0 } else { products / squares };
    if exponent <= 0.0 {
        return vocab_size;
    }
    let ln_size = float::ln(vocab_size as f64);
    let excess = exponent - 1.0;
    // k = (ε·2^μ / (1 − N^−ε))^(1/s), ε = s − 1, by logarithms; for ε < 0 both signs change.
    let ratio = if excess.abs() < NEAR {
        -float::ln(ln_size)
    } else {
        let tail = float::ln(1.0 - float::exp(-excess.abs() * ln_size));
        let growth = if excess < 0.0 { -excess * ln_size } else { 0.0 };
        float::ln(excess.abs()) - tail - growth
    };
    let ln_k = (ratio + mu * LN_2) / exponent;
    if ln_size <= ln_k {
        return vocab_size;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1 and the size of the vocabulary"
    )]
    let k = if ln_k <= 0.0 { 1 } else { (1.0 / float::exp(-ln_k)) as usize };
    k.clamp(1, vocab_size)
}

//! Rotary position embedding, with the scalings that files ask for.
//!
//! Frequencies are computed as transformers does (`modeling_rope_utils.py`, 5.23), in f32 in the
//! same order of operations. The one difference: a power is taken in f64 and rounded, so that it
//! is the nearest f32 whatever the platform's `powf` does; PyTorch's may be one unit away.
//!
//! Sources: Su et al. 2021, eq. 34, <https://arxiv.org/abs/2104.09864>; YaRN: Peng et al. 2023,
//! section 3, <https://arxiv.org/abs/2309.00071>; the `llama3` rule:
//! <https://github.com/meta-llama/llama-models>, `apply_scaling`.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "parameters are rounded to f32 where PyTorch rounds them; indices are below 2^12"
)]

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// A rotation of queries and keys by their position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Leading dimensions of a head that are rotated; even.
    pub rotary_dim: usize,
    /// Whether neighbors form a pair (GPT-J, DeepSeek) or the two halves do (LLaMA).
    pub interleaved: bool,
    /// Change to the frequencies for longer texts.
    pub scaling: RopeScaling,
}

/// Changes to the frequencies of a [`Rope`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All positions divided by a factor.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// The base grows with the length once a text is longer than the model was made for.
    Dynamic {
        /// At least 1.
        factor: f64,
        /// Tokens the model was made for.
        original_max_position_embeddings: usize,
    },
    /// Frequencies divided by a factor each: one list for short texts, another for long ones.
    Longrope(LongropeScaling),
    /// Low frequencies interpolated, high ones kept, attention sharpened.
    Yarn(YarnScaling),
    /// Low frequencies interpolated, high ones kept, a smooth step between.
    Llama3(Llama3Scaling),
}

/// Parameters of YaRN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct YarnScaling {
    /// How many times longer than the original the texts may be.
    pub factor: f64,
    /// Tokens the model was first trained on.
    pub original_max_position_embeddings: usize,
    /// Rotations over the original length above which a dimension is kept.
    pub beta_fast: f64,
    /// Rotations over the original length below which a dimension is interpolated.
    pub beta_slow: f64,
    /// Factor on cosine and sine, if the file fixes it.
    pub attention_factor: Option<f64>,
    /// DeepSeek's numerator of that factor.
    pub mscale: Option<f64>,
    /// DeepSeek's denominator of that factor.
    pub mscale_all_dim: Option<f64>,
    /// Whether the bounds of the ramp are rounded outward to whole dimensions.
    pub truncate: bool,
}

/// Parameters of `LongRoPE` (Ding et al. 2024, <https://arxiv.org/abs/2402.13753>).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LongropeScaling {
    /// A divisor for each pair of dimensions, for texts of at most the original length.
    pub short_factor: Vec<f64>,
    /// The same for longer texts.
    pub long_factor: Vec<f64>,
    /// How many times longer than the original the texts may be.
    pub factor: f64,
    /// Factor on cosine and sine, if the file fixes it.
    pub attention_factor: Option<f64>,
    /// Tokens the model was first trained on.
    pub original_max_position_embeddings: usize,
}

/// Parameters of the `llama3` rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Llama3Scaling {
    /// Divides low frequencies.
    pub factor: f64,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are scaled.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
    pub high_freq_factor: f64,
    /// Tokens the model was first trained on.
    pub original_max_position_embeddings: usize,
}

impl Rope {
    /// A rotation of all `head_dim` dimensions, halves paired, without scaling.
    pub const fn new(theta: f64, head_dim: usize) -> Self {
        Self { theta, rotary_dim: head_dim, interleaved: false, scaling: RopeScaling::Default }
    }

    /// Angle per position of each pair of dimensions, in radians; `rotary_dim / 2` of them. Where
    /// they depend on the length of the text, these are for [the short ones](Self::text_limit).
    pub fn inv_freq(&self) -> Vec<f32> {
        self.inv_freq_for(0)
    }

    /// Longest text, in tokens, with the frequencies of short texts; `None` if there is no other
    /// kind. A key that was rotated for a shorter text is wrong in a longer one.
    pub const fn text_limit(&self) -> Option<usize> {
        match &self.scaling {
            RopeScaling::Default
            | RopeScaling::Linear { .. }
            | RopeScaling::Yarn(_)
            | RopeScaling::Llama3(_) => None,
            RopeScaling::Dynamic { original_max_position_embeddings, .. } => {
                Some(*original_max_position_embeddings)
            }
            RopeScaling::Longrope(scaling) => Some(scaling.original_max_position_embeddings),
        }
    }

    /// [`inv_freq`](Self::inv_freq) for a text of `text_len` tokens.
    pub fn inv_freq_for(&self, text_len: usize) -> Vec<f32> {
        let theta = self.theta_for(text_len);
        let pos_freqs: Vec<f32> =
            (0..self.rotary_dim).step_by(2).map(|i| self.pos_freq(theta, i)).collect();
        let inv_freq = pos_freqs.iter().map(|freq| 1.0 / freq);
        match &self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => inv_freq.collect(),
            RopeScaling::Longrope(scaling) => {
                let long = text_len > scaling.original_max_position_embeddings;
                let factors = if long { &scaling.long_factor } else { &scaling.short_factor };
                let scaled = pos_freqs.iter().zip(factors);
                scaled.map(|(freq, factor)| 1.0 / (*factor as f32 * freq)).collect()
            }
            RopeScaling::Linear { factor } => inv_freq.map(|freq| freq / *factor as f32).collect(),
            RopeScaling::Llama3(scaling) => inv_freq.map(|freq| scaling.scale(freq)).collect(),
            RopeScaling::Yarn(scaling) => {
                let (low, high) = scaling.ramp(self.rotary_dim, self.theta);
                let scaled = pos_freqs.iter().enumerate();
                scaled.map(|(i, &freq)| scaling.scale(freq, i, low, high)).collect()
            }
        }
    }

    /// Factor on cosine and sine.
    pub fn attention_scaling(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(scaling) => scaling.attention_factor() as f32,
            RopeScaling::Longrope(scaling) => scaling.attention_factor() as f32,
            RopeScaling::Default
            | RopeScaling::Linear { .. }
            | RopeScaling::Dynamic { .. }
            | RopeScaling::Llama3(_) => 1.0,
        }
    }

    /// The base for a text of `text_len` tokens.
    fn theta_for(&self, text_len: usize) -> f64 {
        let RopeScaling::Dynamic { factor, original_max_position_embeddings: original } =
            self.scaling
        else {
            return self.theta;
        };
        if text_len <= original || self.rotary_dim <= 2 {
            return self.theta;
        }
        let dim = self.rotary_dim as f64;
        let stretch = factor * text_len as f64 / original as f64 - (factor - 1.0);
        self.theta * stretch.powf(dim / (dim - 2.0))
    }

    /// `theta^(i / rotary_dim)`; the exponent is rounded to f32 first, as in PyTorch.
    fn pos_freq(&self, theta: f64, i: usize) -> f32 {
        let exponent = i as f32 / self.rotary_dim as f32;
        // PyTorch takes a Python number raised to an f32 tensor in f32.
        f64::from(theta as f32).powf(f64::from(exponent)) as f32
    }
}

impl LongropeScaling {
    fn attention_factor(&self) -> f64 {
        self.attention_factor.unwrap_or_else(|| {
            if self.factor <= 1.0 {
                return 1.0;
            }
            let original = self.original_max_position_embeddings as f64;
            (1.0 + self.factor.ln() / original.ln()).sqrt()
        })
    }
}

impl Llama3Scaling {
    fn scale(&self, inv_freq: f32) -> f32 {
        let original = self.original_max_position_embeddings as f64;
        let low_freq_wavelen = (original / self.low_freq_factor) as f32;
        let high_freq_wavelen = (original / self.high_freq_factor) as f32;
        let factor = self.factor as f32;
        // A number divided by a tensor is the tensor's reciprocal times the number in PyTorch.
        let wavelen = 1.0 / inv_freq * (2.0 * PI) as f32;
        if wavelen > low_freq_wavelen {
            return inv_freq / factor;
        }
        if wavelen < high_freq_wavelen {
            return inv_freq;
        }
        let smooth = (1.0 / wavelen * original as f32 - self.low_freq_factor as f32)
            / (self.high_freq_factor - self.low_freq_factor) as f32;
        (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
    }
}

impl YarnScaling {
    /// First and last dimension pair of the ramp between kept and interpolated.
    fn ramp(&self, rotary_dim: usize, theta: f64) -> (f64, f64) {
        let dim = rotary_dim as f64;
        let correction_dim = |rotations: f64| {
            let turns = self.original_max_position_embeddings as f64 / (rotations * 2.0 * PI);
            dim * turns.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (correction_dim(self.beta_fast), correction_dim(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // As in transformers: keeps the slope finite.
        #[expect(clippy::float_cmp, reason = "the exact coincidence is what divides by zero")]
        let high = if low == high { high + 0.001 } else { high };
        (low, high)
    }

    fn scale(&self, pos_freq: f32, pair: usize, low: f64, high: f64) -> f32 {
        let extrapolation = 1.0 / pos_freq;
        let interpolation = 1.0 / (self.factor as f32 * pos_freq);
        let ramp = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let keep = 1.0 - ramp;
        interpolation * (1.0 - keep) + extrapolation * keep
    }

    fn attention_factor(&self) -> f64 {
        let mscale = |by: f64| {
            if self.factor <= 1.0 { 1.0 } else { 0.1 * by * self.factor.ln() + 1.0 }
        };
        if let Some(factor) = self.attention_factor {
            return factor;
        }
        match (self.mscale, self.mscale_all_dim) {
            // A zero counts as absent, as in Python.
            (Some(by), Some(all)) if by != 0.0 && all != 0.0 => mscale(by) / mscale(all),
            _ => mscale(1.0),
        }
    }
}

#[cfg(test)]
mod tests;

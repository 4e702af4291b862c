//! What a model computes, as data: [`ModelSpec`].
//!
//! A spec says everything that decides the numbers of a forward pass except the weights, and
//! nothing about how it is run. It is read from a `config.json` ([`ModelSpec::from_hf_config`]) or
//! built from a recipe, and written back by [`ModelSpec::to_hf_config`].
//!
//! **Invariant:** a [`ModelSpec`] that exists is valid: sizes are nonzero and within the limits
//! below, heads divide, numbers are finite. [`ModelFields`] is the same data before that check.

pub mod attention;
mod count;
mod error;
mod family;
pub mod hf;
pub mod moe;
pub mod rope;
#[cfg(test)]
mod tests;
mod validate;

use crate::{Activation, DType};
pub use attention::{
    Attention, AttentionForm, Gqa, MaskKind, Mla, QkNorm, SlidingWindow, WindowedLayers,
};
pub use count::ParameterCount;
pub use error::SpecError;
pub use family::{Family, RegistryEntry, registry};
pub use moe::Moe;
pub use rope::{Llama3Scaling, LongropeScaling, Rope, RopeScaling, YarnScaling};
use serde::{Deserialize, Serialize};
use std::ops::Deref;

/// Largest accepted `num_hidden_layers`.
pub const NUM_HIDDEN_LAYERS_MAX: usize = 4096;
/// Largest accepted `hidden_size`.
pub const HIDDEN_SIZE_MAX: usize = 1 << 20;
/// Largest accepted `intermediate_size`.
pub const INTERMEDIATE_SIZE_MAX: usize = 1 << 22;
/// Largest accepted `vocab_size`.
pub const VOCAB_SIZE_MAX: usize = 1 << 24;
/// Largest accepted `max_position_embeddings`, in tokens. Positions reach the rotary embedding as
/// f32, which holds every whole number up to 2²⁴.
pub const MAX_POSITION_EMBEDDINGS_MAX: usize = 1 << 24;
/// Largest accepted number of attention heads.
pub const NUM_ATTENTION_HEADS_MAX: usize = 1 << 12;
/// Largest accepted number of experts in a layer.
pub const NUM_EXPERTS_MAX: usize = 1 << 14;
/// Largest accepted number of experts in all layers together: five times as many as in any model
/// seen, and their tensors are still listed within a second.
pub const EXPERTS_OF_ALL_LAYERS_MAX: usize = 1 << 17;
/// Largest accepted size of one attention head.
pub const HEAD_DIM_MAX: usize = 1 << 12;

/// A valid description of a model. Fields are read through [`ModelFields`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "ModelFields", into = "ModelFields")]
pub struct ModelSpec(ModelFields);

impl ModelSpec {
    /// Checks `fields` and makes them a spec.
    ///
    /// # Errors
    ///
    /// [`SpecError`] naming the first field that cannot describe a working model.
    pub fn new(fields: ModelFields) -> Result<Self, SpecError> {
        validate::validate(&fields)?;
        Ok(Self(fields))
    }

    /// Gives the fields back, to change some and build another spec.
    pub fn into_fields(self) -> ModelFields {
        self.0
    }

    /// The same model with a head of its own, whether or not its head is the embedding.
    #[must_use]
    pub fn untied(&self) -> Self {
        Self(ModelFields { tie_word_embeddings: false, ..self.0.clone() })
    }
}

impl Deref for ModelSpec {
    type Target = ModelFields;

    fn deref(&self) -> &ModelFields {
        &self.0
    }
}

impl TryFrom<ModelFields> for ModelSpec {
    type Error = SpecError;

    fn try_from(fields: ModelFields) -> Result<Self, SpecError> {
        Self::new(fields)
    }
}

impl From<ModelSpec> for ModelFields {
    fn from(spec: ModelSpec) -> Self {
        spec.0
    }
}

/// The contents of a [`ModelSpec`], not yet checked.
///
/// Letters: `d` hidden, `h` query heads, `g` key/value heads, `k` head dim, `f` feed-forward,
/// `v` vocabulary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFields {
    /// Whose tensor names and `config.json` this model uses.
    pub family: Family,
    /// `v`: rows of the embedding and of the head.
    pub vocab_size: usize,
    /// `d`: width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Longest sequence the model is made for, in tokens.
    pub max_position_embeddings: usize,
    /// What happens to a token's embedding before the first block.
    pub embedding: Embedding,
    /// Every normalisation of the residual stream.
    pub norm: Norm,
    /// Where normalisations and additions sit in a block.
    pub block: BlockForm,
    /// Whether the first block normalizes what its attention reads; ModernBERT's does not, the
    /// embedding's norm having just done so.
    #[serde(default = "yes")]
    pub first_attention_norm: bool,
    /// The attention of every block.
    pub attention: Attention,
    /// How positions enter.
    pub position: Position,
    /// The feed-forward part of every block.
    pub mlp: Mlp,
    /// What turns the last hidden state into logits; `None` in a file that holds the body alone,
    /// which ends in hidden states.
    pub head: Option<Head>,
    /// Whether the head's weight is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of freshly initialised weights.
    pub initializer_range: f64,
    /// Dropout rates while training.
    pub dropout: Dropout,
    /// Token ids with a meaning to the model.
    pub tokens: SpecialTokens,
    /// The element type that the weights are stored in.
    pub dtype: DType,
}

/// What a spec says that was written before the field existed.
const fn yes() -> bool {
    true
}

impl ModelFields {
    /// Whether the block of layer `layer_idx` normalizes what its attention reads.
    pub const fn has_attention_norm(&self, layer_idx: usize) -> bool {
        layer_idx != 0 || self.first_attention_norm
    }

    /// Longest text, in tokens, whose keys stay the same as it grows: `max_position_embeddings`, or
    /// less where longer texts are rotated by other frequencies (dynamic, longrope).
    pub fn context_limit(&self) -> usize {
        let ropes = (0..self.num_hidden_layers).filter_map(|layer| self.rope(layer));
        let limits = ropes.filter_map(Rope::text_limit);
        limits.fold(self.max_position_embeddings, usize::min)
    }

    /// The rotation of layer `layer_idx`; `None` where positions are learned vectors.
    pub fn rope(&self, layer_idx: usize) -> Option<&Rope> {
        let windowed = self.attention.sliding_window.as_ref();
        let own = windowed.filter(|window| window.layers.contains(layer_idx));
        match (&self.position, own.and_then(|window| window.rope.as_ref())) {
            (Position::Learned, _) => None,
            (Position::Rope(_), Some(rope)) | (Position::Rope(rope), None) => Some(rope),
        }
    }
}

/// What happens to a token's embedding before the first block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    /// Factor on the embedding; Gemma's is the square root of `hidden_size`.
    pub scale: Option<f64>,
    /// Whether a norm follows (BERT, ModernBERT).
    pub norm: bool,
    /// Rows of the token-type embedding, if there is one (BERT).
    pub type_vocab_size: Option<usize>,
}

/// A normalisation of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// Which statistic it divides by.
    pub kind: NormKind,
    /// Added to the variance or mean square.
    pub eps: f64,
    /// Whether the factor is `1 + weight` (Gemma).
    pub plus_one: bool,
    /// Whether a bias is added.
    pub bias: bool,
}

/// The statistic of a [`Norm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Root mean square (Zhang and Sennrich 2019).
    Rms,
    /// Mean and variance (Ba et al. 2016).
    Layer,
}

/// Where the norms and the additions of a block sit. `F` stands for attention or feed-forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockForm {
    /// `x + F(norm(x))`, and a final norm: LLaMA, GPT-2, Qwen.
    PreNorm,
    /// `x + norm(F(x))`, and a final norm: OLMo 2.
    PostNorm,
    /// `x + norm(F(norm(x)))`, and a final norm: Gemma 2 and 3.
    SandwichNorm,
    /// `norm(x + F(x))`, no final norm: BERT.
    ResidualNorm,
    /// `x + attention(norm₁(x)) + mlp(norm₂(x))`, and a final norm: GPT-NeoX.
    ParallelResidual,
}

impl BlockForm {
    /// Norms in one block, over the width of the residual stream.
    pub const fn norms_per_block(self) -> usize {
        match self {
            Self::SandwichNorm => 4,
            Self::PreNorm | Self::PostNorm | Self::ResidualNorm | Self::ParallelResidual => 2,
        }
    }

    /// Whether a norm follows the last block.
    pub const fn final_norm(self) -> bool {
        !matches!(self, Self::ResidualNorm)
    }
}

/// How positions enter the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Position {
    /// Queries and keys are rotated.
    Rope(Rope),
    /// A learned vector per position, `[max_position_embeddings, d]`, is added to the embedding.
    Learned,
}

/// The feed-forward part of a block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Mlp {
    /// `down(activation(gate(x)) · up(x))`.
    Glu {
        /// On the gate.
        activation: Activation,
        /// `f`.
        intermediate_size: usize,
        /// Whether the three projections have biases.
        bias: bool,
    },
    /// `down(activation(up(x)))`.
    Plain {
        /// Between the two projections.
        activation: Activation,
        /// `f`.
        intermediate_size: usize,
        /// Whether the two projections have biases.
        bias: bool,
    },
    /// Experts, of which a router picks some for each token.
    Moe(Moe),
}

impl Mlp {
    /// `f`: the inner width, of dense layers where some have experts.
    pub const fn intermediate_size(&self) -> usize {
        match self {
            Self::Glu { intermediate_size, .. } | Self::Plain { intermediate_size, .. } => {
                *intermediate_size
            }
            Self::Moe(moe) => moe.intermediate_size,
        }
    }

    /// Between the projections.
    pub const fn activation(&self) -> Activation {
        match self {
            Self::Glu { activation, .. } | Self::Plain { activation, .. } => *activation,
            Self::Moe(moe) => moe.activation,
        }
    }
}

/// What turns the last hidden state into logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// A layer `norm(activation(W x + b))` before the head, `[d, d]` (BERT's masked-LM head).
    pub transform: Option<HeadTransform>,
    /// Whether a bias is added to the logits.
    pub bias: bool,
    /// Logits become `softcap · tanh(logits / softcap)` (Gemma 2).
    pub softcap: Option<f64>,
}

/// The layer before a masked-LM head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadTransform {
    /// After the product.
    pub activation: Activation,
    /// Whether the product has a bias.
    pub bias: bool,
}

/// Probabilities with which values are zeroed while training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dropout {
    /// On the sum of the embeddings.
    pub embd: f64,
    /// On attention probabilities.
    pub attn: f64,
    /// On what a block adds to the residual stream.
    pub resid: f64,
}

/// Token ids with a meaning to the model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Any of these ends a text.
    pub eos: Vec<u32>,
    /// Fills up a batch.
    pub pad: Option<u32>,
}

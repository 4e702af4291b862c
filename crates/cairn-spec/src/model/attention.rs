//! Attention, as data: which heads there are, what they see, and how scores are scaled.

use super::Rope;
use serde::{Deserialize, Serialize};

/// The attention of every block of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// How queries, keys and values come about.
    pub form: AttentionForm,
    /// Who sees whom, apart from windows.
    pub mask: MaskKind,
    /// A token sees itself and `window - 1` tokens before it, in the layers listed.
    pub sliding_window: Option<SlidingWindow>,
    /// Scores become `softcap · tanh(scores / softcap)` (Gemma 2).
    pub logit_softcap: Option<f64>,
    /// Factor on scores; the inverse square root of the key size if absent.
    pub scale: Option<f64>,
    /// Whether layer `i` divides the factor by `i + 1` (GPT-2's `scale_attn_by_inverse_layer_idx`).
    pub scale_by_inverse_layer: bool,
}

impl Attention {
    /// Causal grouped attention over everything, scaled by the size of a key.
    pub const fn causal(gqa: Gqa) -> Self {
        Self {
            form: AttentionForm::Gqa(gqa),
            mask: MaskKind::Causal,
            sliding_window: None,
            logit_softcap: None,
            scale: None,
            scale_by_inverse_layer: false,
        }
    }

    /// Factor on the scores of layer `layer_idx`.
    pub fn score_scale(&self, layer_idx: usize) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "sizes are below 2^24")]
        let by_size = 1.0 / (self.form.key_dim() as f64).sqrt();
        let scale = self.scale.unwrap_or(by_size);
        #[expect(clippy::cast_precision_loss, reason = "layers are below 2^24")]
        let layer = (layer_idx + 1) as f64;
        if self.scale_by_inverse_layer { scale / layer } else { scale }
    }

    /// The window of layer `layer_idx`, in tokens, or `None` where the layer sees everything.
    pub fn window(&self, layer_idx: usize) -> Option<usize> {
        let window = self.sliding_window.as_ref()?;
        window.layers.contains(layer_idx).then_some(window.size)
    }
}

/// How queries, keys and values come about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AttentionForm {
    /// Heads share keys and values in groups; MHA and MQA are the two ends of it.
    Gqa(Gqa),
    /// Multi-head latent attention (DeepSeek-AI 2024, <https://arxiv.org/abs/2405.04434>).
    Mla(Mla),
}

impl AttentionForm {
    /// `h`: query heads.
    pub const fn num_attention_heads(&self) -> usize {
        match self {
            Self::Gqa(gqa) => gqa.num_attention_heads,
            Self::Mla(mla) => mla.num_attention_heads,
        }
    }

    /// Size of a key, with which a query is multiplied.
    pub const fn key_dim(&self) -> usize {
        match self {
            Self::Gqa(gqa) => gqa.head_dim,
            Self::Mla(mla) => mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        }
    }

    /// Size of a value.
    pub const fn value_dim(&self) -> usize {
        match self {
            Self::Gqa(gqa) => gqa.head_dim,
            Self::Mla(mla) => mla.v_head_dim,
        }
    }

    /// Numbers that one token leaves in the cache of one layer.
    pub const fn cached_values_per_token(&self) -> usize {
        match self {
            Self::Gqa(gqa) => 2 * gqa.num_key_value_heads * gqa.head_dim,
            Self::Mla(mla) => mla.kv_lora_rank + mla.qk_rope_head_dim,
        }
    }
}

/// Grouped-query attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gqa {
    /// `h`.
    pub num_attention_heads: usize,
    /// `g`; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// `k`; need not be `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub o_bias: bool,
    /// A norm on queries and keys, before the rotation.
    pub qk_norm: Option<QkNorm>,
}

/// What a norm on queries and keys runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// Each head by itself, one weight of `[head_dim]` for all (Qwen3, Gemma 3).
    PerHead,
    /// All heads together (OLMo 2).
    AllHeads,
}

/// Multi-head latent attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mla {
    /// `h`.
    pub num_attention_heads: usize,
    /// Rank of the query projection; a plain projection if absent.
    pub q_lora_rank: Option<usize>,
    /// Size of the cached latent.
    pub kv_lora_rank: usize,
    /// Dimensions of a key that are not rotated.
    pub qk_nope_head_dim: usize,
    /// Dimensions of a key that are rotated, shared by all heads.
    pub qk_rope_head_dim: usize,
    /// Size of a value.
    pub v_head_dim: usize,
    /// Whether the projections into and out of attention have biases.
    pub bias: bool,
}

/// Who sees whom, apart from windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskKind {
    /// A token sees itself and what came before.
    Causal,
    /// A token sees its whole document.
    Bidirectional,
}

/// A limit on how far back, and for a bidirectional mask how far ahead, a token sees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlidingWindow {
    /// Tokens that a token sees on one side, itself included.
    pub size: usize,
    /// The layers with the window.
    pub layers: WindowedLayers,
    /// The rotation in those layers, where it differs from the rest (Gemma 3, ModernBERT).
    pub rope: Option<Rope>,
}

/// Which layers have a sliding window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WindowedLayers {
    /// All of them.
    All,
    /// Those marked; one entry per layer.
    Listed(Vec<bool>),
}

impl WindowedLayers {
    /// Whether layer `layer_idx` has the window.
    pub fn contains(&self, layer_idx: usize) -> bool {
        match self {
            Self::All => true,
            Self::Listed(layers) => layers.get(layer_idx).copied().unwrap_or(false),
        }
    }
}

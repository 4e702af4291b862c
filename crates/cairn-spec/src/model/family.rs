//! The families of models: whose tensor names and `config.json` a spec is mapped from and to.

use super::hf;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A family of models: one `model_type` of `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// LLaMA 1, 2, 3 and what is built like them.
    Llama,
    /// GPT-2.
    Gpt2,
    /// Mistral.
    Mistral,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3.
    Qwen3,
    /// Mixtral.
    Mixtral,
    /// Qwen 3 with experts.
    Qwen3Moe,
    /// DeepSeek V2 and V2-Lite.
    DeepseekV2,
    /// DeepSeek V3 and what is built like it.
    DeepseekV3,
    /// GPT-NeoX and Pythia.
    GptNeox,
    /// Phi-3, Phi-3.5 and Phi-4.
    Phi3,
    /// OLMo 2.
    Olmo2,
    /// Gemma 2.
    Gemma2,
    /// The text part of Gemma 3.
    Gemma3Text,
    /// BERT.
    Bert,
    /// ModernBERT.
    #[serde(rename = "modernbert")]
    ModernBert,
}

impl Family {
    /// Every family that a spec can be mapped from and to.
    pub const ALL: [Self; 16] = [
        Self::Llama,
        Self::Gpt2,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Mixtral,
        Self::Qwen3Moe,
        Self::DeepseekV2,
        Self::DeepseekV3,
        Self::GptNeox,
        Self::Phi3,
        Self::Olmo2,
        Self::Gemma2,
        Self::Gemma3Text,
        Self::Bert,
        Self::ModernBert,
    ];

    /// The `model_type` in `config.json`.
    pub const fn model_type(self) -> &'static str {
        hf::mapping(self).model_type
    }

    /// The class in `architectures` of `config.json`.
    pub const fn architecture(self) -> &'static str {
        hf::mapping(self).architecture
    }

    /// The class in `architectures` of a file that holds the body alone.
    pub const fn body_architecture(self) -> &'static str {
        hf::mapping(self).body
    }

    /// Returns the family with this `model_type`, or `None`.
    pub fn from_model_type(model_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.model_type() == model_type)
    }
}

/// One line of the registry of families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegistryEntry {
    /// The family.
    pub family: Family,
    /// Its `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Its class in `architectures`.
    pub architecture: &'static str,
    /// The class of its body alone.
    pub body_architecture: &'static str,
}

/// The registry: every family whose models are loaded, computed, trained and saved.
///
/// ```
/// use cairn_spec::model::{Family, registry};
/// let qwen3 = registry().find(|entry| entry.model_type == "qwen3").unwrap();
/// assert_eq!((qwen3.family, qwen3.architecture), (Family::Qwen3, "Qwen3ForCausalLM"));
/// ```
pub fn registry() -> impl Iterator<Item = RegistryEntry> {
    Family::ALL.into_iter().map(|family| RegistryEntry {
        family,
        model_type: family.model_type(),
        architecture: family.architecture(),
        body_architecture: family.body_architecture(),
    })
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}

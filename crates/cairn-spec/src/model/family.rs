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
}

impl Family {
    /// Every family that a spec can be mapped from and to.
    pub const ALL: [Self; 9] = [
        Self::Llama,
        Self::Gpt2,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Mixtral,
        Self::Qwen3Moe,
        Self::DeepseekV2,
        Self::DeepseekV3,
    ];

    /// The `model_type` in `config.json`.
    pub const fn model_type(self) -> &'static str {
        hf::mapping(self).model_type
    }

    /// The class in `architectures` of `config.json`.
    pub const fn architecture(self) -> &'static str {
        hf::mapping(self).architecture
    }

    /// Returns the family with this `model_type`, or `None`.
    pub fn from_model_type(model_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.model_type() == model_type)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}

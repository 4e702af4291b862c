//! Activation functions, by the names that `config.json` uses.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An elementwise function of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · sigmoid(x)`; `silu` and `swish` in files.
    Silu,
    /// `x · Φ(x)` with the exact error function; `gelu` in files.
    Gelu,
    /// The tanh form of GELU (Hendrycks and Gimpel 2016, section 2,
    /// <https://arxiv.org/abs/1606.08415>); `gelu_new`, `gelu_pytorch_tanh`, `gelu_fast` in files.
    GeluTanh,
    /// `x · sigmoid(1.702 x)`; `quick_gelu` in files.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// Returns the activation that transformers knows under `name`, or `None`.
    pub fn from_hf_name(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            // The three differ only in how the same formula is written down.
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "quick_gelu" => Self::QuickGelu,
            "relu" => Self::Relu,
            _ => return None,
        })
    }

    /// Returns a name that transformers accepts and that means the same function.
    pub fn hf_name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_new",
            Self::QuickGelu => "quick_gelu",
            Self::Relu => "relu",
        }
    }

    /// Names that [`from_hf_name`](Self::from_hf_name) accepts, for error messages.
    pub const HF_NAMES: [&'static str; 8] = [
        "silu",
        "swish",
        "gelu",
        "gelu_new",
        "gelu_pytorch_tanh",
        "gelu_fast",
        "quick_gelu",
        "relu",
    ];
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.hf_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_name_means_a_function_that_keeps_its_meaning() {
        for name in Activation::HF_NAMES {
            let activation = Activation::from_hf_name(name).unwrap();
            assert_eq!(Activation::from_hf_name(activation.hf_name()), Some(activation), "{name}");
        }
        assert_eq!(Activation::from_hf_name("relu2"), None);
    }
}

//! The layout after which the program names its weights: LLaMA, Mistral, Qwen, OLMo 2, Gemma.

use super::Names;

pub(super) const NAMES: Names = Names {
    block: "model.layers.{}.",
    places: &[],
    // The body's own files.
    wrapper: Some("model."),
    ignorable: &[".rotary_emb.inv_freq"],
    head_bias_copy: None,
    older: &[],
};

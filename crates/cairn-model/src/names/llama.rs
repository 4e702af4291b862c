//! The layout after which the program names its weights: LLaMA, Mistral, Qwen.

use super::Names;

pub(super) const NAMES: Names = Names {
    block: "model.layers.{}.",
    places: &[],
    wrapper: None,
    ignorable: &[".rotary_emb.inv_freq"],
};

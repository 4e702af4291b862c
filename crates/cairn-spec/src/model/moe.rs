//! Mixtures of experts, as data: who is asked, how they are chosen, and which layers have none.

use crate::Activation;
use serde::{Deserialize, Serialize};

/// A feed-forward part that is many experts, of which a router picks some for each token.
///
/// An expert is `down(activation(gate(x)) · up(x))`, without biases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moe {
    /// On the gate, of experts and of dense layers.
    pub activation: Activation,
    /// Inner width of dense layers; that of an expert where no layer is dense.
    pub intermediate_size: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// `e`.
    pub num_experts: usize,
    /// Experts that a token is sent to.
    pub num_experts_per_tok: usize,
    /// Inner width of the experts that every token is sent to, all together; `None` if there are
    /// none.
    pub shared_intermediate_size: Option<usize>,
    /// The layers with an ordinary feed-forward part instead.
    pub dense_layers: DenseLayers,
    /// How experts are chosen and weighted.
    pub router: Router,
}

impl Moe {
    /// Whether layer `layer_idx` has experts.
    pub fn has_experts(&self, layer_idx: usize) -> bool {
        match &self.dense_layers {
            DenseLayers::None => true,
            DenseLayers::First(count) => layer_idx >= *count,
            DenseLayers::Listed(dense) => !dense.get(layer_idx).copied().unwrap_or(false),
        }
    }
}

/// Which layers of a mixture of experts are dense.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DenseLayers {
    /// None of them (Mixtral).
    None,
    /// The first so many (DeepSeek's `first_k_dense_replace`).
    First(usize),
    /// Those marked; one entry per layer (Qwen's `mlp_only_layers` and `decoder_sparse_step`).
    Listed(Vec<bool>),
}

/// How a token's experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Router {
    /// What turns the router's logits into scores.
    pub scoring: Scoring,
    /// Whether a vector is added to the scores for choosing, not for weighting (DeepSeek-V3's
    /// `e_score_correction_bias`).
    pub correction_bias: bool,
    /// Experts are chosen from the best groups only (DeepSeek).
    pub groups: Option<RouterGroups>,
    /// Whether the weights of a token's experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the weights.
    pub routed_scaling_factor: f64,
    /// In training, factor on a loss that is smallest where tokens spread evenly over the experts;
    /// without one there is no such loss (transformers' `router_aux_loss_coef`, where
    /// `output_router_logits` asks for it).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aux_loss_coef: Option<f64>,
}

/// What turns a router's logits into scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// A softmax over all experts.
    Softmax,
    /// A sigmoid of each.
    Sigmoid,
}

/// A first choice among groups of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterGroups {
    /// Groups of equally many neighboring experts.
    pub n_group: usize,
    /// Groups that a token's experts come from.
    pub topk_group: usize,
    /// What a group is worth.
    pub score: GroupScore,
}

/// What a group of experts is worth to a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// The best score in it (DeepSeek-V2).
    Max,
    /// The sum of the two best (DeepSeek-V3).
    TopTwo,
}

//! The instruction set: every operation, its attributes and its name.
//!
//! | group | operations |
//! |---|---|
//! | lookup | `embed` `position_embed` `gather_rows` |
//! | products | `matmul` `head_matmul` `expert_matmul` |
//! | experts | `route` `expert_sum` `expert_load` `balance_loss` |
//! | rows | `rms_norm` `layer_norm` `rope` `glu` `activation` `softcap` `scale` `add` `concat` `split` `dropout` |
//! | attention | `kv_write` `attention` |
//! | head | `token_logprob` `cross_entropy` |
//! | adjoints | one for each differentiable operation, named after it |
//! | update | `global_norm` `clip` `adamw` `ema` |
//!
//! `logits` is `matmul` with the head, `head_norm` is `rms_norm` over the last axis of `[t, h, k]`:
//! the same instruction, told apart by the shapes.

use std::fmt;

use cairn_kernels::{Act, Mask, Routing};
use serde::{Deserialize, Serialize};

use crate::dim::{Dim, DimName};

/// Version of the instruction set, written with every serialized program.
pub const VIS_VERSION: u32 = 4;

/// Attributes of a normalization.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NormAttrs {
    /// Added to the mean square or variance.
    pub eps: f32,
    /// Multiplies by `1 + weight` instead of `weight` (Gemma); never set for `layer_norm`.
    pub plus_one: bool,
}

/// Attributes of a rotary embedding: the frequency table after any scaling.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeAttrs {
    /// One inverse frequency per rotated pair.
    pub inv_freq: Vec<f32>,
    /// Multiplies sine and cosine (YaRN's attention factor); 1 otherwise.
    pub attention_scaling: f32,
    /// Pairs are neighbors `(2i, 2i + 1)` instead of halves `(i, i + n)`.
    pub interleaved: bool,
}

/// Attributes of attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionAttrs {
    /// Which keys a query may see, as data.
    pub mask: Mask,
    /// Multiplies every score.
    pub scale: f32,
    /// `cap · tanh(score / cap)` after scaling, where set.
    pub softcap: Option<f32>,
    /// The values are the first columns of the keys (MLA with the latent cached, absorbed form).
    pub values_in_keys: bool,
    /// Width of one head's value.
    pub value_dim: usize,
    /// Dropout of probabilities, in training programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout: Option<DropoutAttrs>,
}

/// Attributes of a dropout.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DropoutAttrs {
    /// Probability of zero.
    pub p: f32,
    /// Which dropout of the program.
    pub site: u32,
}

/// Attributes of the head over the vocabulary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeadAttrs {
    /// Logits become `cap · tanh(logit / cap)`, where set.
    pub softcap: Option<f32>,
}

/// Attributes of the loss that asks a router to spread tokens evenly.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BalanceAttrs {
    /// Experts a token goes to.
    pub top_k: usize,
    /// Multiplies the loss.
    pub coefficient: f32,
}

/// Attributes of AdamW (Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>), in
/// PyTorch's order of operations.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWAttrs {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay; 0 for norms and biases.
    pub weight_decay: f64,
}

/// One operation with its attributes. Operands are listed in [`crate::Instr`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// `(ids[t], w[v, d]) → [t, d]`: rows of a weight.
    Embed,
    /// `(x[t, d], positions[t], w[w, d]) → [t, d]`: adds rows of a position table.
    PositionEmbed,
    /// `(x[.., d], w[d]) → [.., d]` (Zhang and Sennrich 2019); `d` may be several axes.
    RmsNorm(NormAttrs),
    /// `(x[.., d], w[d], b[d]?) → [.., d]` (Ba et al. 2016); `d` may be several axes.
    LayerNorm(NormAttrs),
    /// `(x[t, in..], w[out.., in..], bias[out..]?, sum[t, out..]?) → [t, out..]`: each chain starts from
    /// the bias or from the sum, of which there is one at most.
    Matmul,
    /// `(x[t, h, in], w[h, out, in]) → [t, h, out]`: one product per head.
    HeadMatmul,
    /// `(x[t, h, k], positions[t]) → [t, h, k]` (Su et al. 2021).
    Rope(RopeAttrs),
    /// `(k, v?, state?) → (k', v'?)`: makes keys and values readable by `attention`. In a training
    /// plan the outputs are the inputs; in a cached plan they stand for the pages of the cache.
    KvWrite {
        /// Which cache, counted over the program.
        site: u32,
    },
    /// `(q[t, h, k], k'[t, g, k], v'[t, g, v]?) → (out[t, h, v], lse[t, h])`. Dropout of probabilities
    /// is keyed by seed, step, site, token, head and the key's position in its sequence.
    Attention(AttentionAttrs),
    /// `(gate[t, f], up[t, f]) → [t, f]`: `act(gate) · up` (Shazeer 2020).
    Glu(Act),
    /// Elementwise nonlinearity.
    Activation(Act),
    /// `a + b`.
    Add,
    /// `c · x`.
    Scale(f32),
    /// `cap · tanh(x / cap)`.
    Softcap(f32),
    /// Zeroes elements with probability `p`, scales the rest by `1 / (1 − p)`. Randomness is keyed
    /// by seed, step, `site`, token and column; the adjoint is the same operation on the gradient.
    Dropout(DropoutAttrs),
    /// `(a[t, h, x], b[t, h, y]) → [t, h, x + y]`, the last axis named as given.
    Concat(DimName),
    /// `(x[t, h, x + y]) → ([t, h, x], [t, h, y])`.
    Split(Dim, Dim),
    /// `(logits[t, e], bias[e]?) → (experts[t, a] u32, weights[t, a])`: the experts of each token in
    /// order of rank, and what each is worth. The bias counts for choosing only.
    Route(Routing),
    /// `(x[t, in..] | x[t, a, in..], w[e, out.., in..], experts[t, a]) → [t, a, out..]`: each routed
    /// row times the weight of its expert; no capacity, nothing dropped.
    ExpertMatmul,
    /// `(y[t, a, d..], weights[t, a]?) → [t, d..]`: sums over a token's experts in order of rank.
    ExpertSum,
    /// `(logits[t, e], experts[t, a], choices[e]?, mass[e]?) → (choices[e], mass[e])`: how often each
    /// expert was chosen and the sum of its probabilities, added to those of the layers before.
    ExpertLoad,
    /// `(choices[e], mass[e]) → [] f32`: the load-balancing loss of all layers counted so (Fedus et al.
    /// 2022). Training starts from it as from `token_logprob`, times the input `balance_weight`.
    BalanceLoss(BalanceAttrs),
    /// `(x[t, d], rows[o]) → [o, d]`.
    GatherRows,
    /// `(x[o, d], w[v, d], targets[o], bias[v]?, low[o, r]?, b[v, r]?) → (logprob[o], lse[o])` over the
    /// whole vocabulary, in chunks: the logits of all rows never exist. The chains of an adapter,
    /// `low · bᵀ`, go on from those of the head.
    TokenLogprob(HeadAttrs),

    /// `(x[o, d], w[v, d], targets[o], loss_weights[o], dw?, bias[v]?, db?, low[o, r]?, b[v, r]?, db?) →
    /// (logprob[o], dx?, dw?, db?, dlow?, db?)`: loss and gradient in one pass; the loss is
    /// `−Σ loss_weight · logprob`.
    CrossEntropy(HeadAttrs),
    /// `(dlogprob[o], x, w, targets, lse, dw?, bias[v]?, db?, low[o, r]?, b[v, r]?, db?) → (dx?, dw?,
    /// db?, dlow?, db?)`: adjoint of `token_logprob`.
    TokenLogprobGrad(HeadAttrs),
    /// `(dy[t, d], ids[t], dw) → dw`.
    EmbedGrad,
    /// `(dy, w, sum?) → dx`: input gradient of `matmul`, added to `sum` if there is one.
    MatmulDx,
    /// `(dy, x, dw) → dw`.
    MatmulDw,
    /// `(dy, db) → db`.
    BiasGrad,
    /// `(dy[t, h, out], w[h, out, in]) → [t, h, in]`: adjoint of `head_matmul`, and in a forward pass
    /// the product by the transposed weights.
    HeadMatmulDx,
    /// `(dy, x, dw) → dw`.
    HeadMatmulDw,
    /// `(dweights, logits, experts) → dlogits`: adjoint of `route`.
    RouteGrad(Routing),
    /// `(dy[t, a, out..], w, experts) → [t, a, in..]`: adjoint of `expert_matmul`.
    ExpertMatmulDx,
    /// `(dy[t, a, out..], x, experts, dw) → dw`.
    ExpertMatmulDw,
    /// `(dout, y?, weights?) → (dy, dweights?)`: adjoint of `expert_sum`; the weights have a gradient
    /// where the rows are given.
    ExpertSumGrad,
    /// `(dmass[e], logits[t, e]) → dlogits`: adjoint of `expert_load`; choices have no gradient.
    ExpertLoadGrad,
    /// `(dloss[], choices[e]) → dmass[e]`: adjoint of `balance_loss`.
    BalanceLossGrad(BalanceAttrs),
    /// `(dy, x, w, sum?, dw?) → (dx, dw?)`.
    RmsNormGrad(NormAttrs),
    /// `(dy, x, w, sum?, dw?, db?) → (dx, dw?, db?)`.
    LayerNormGrad(NormAttrs),
    /// `(dy, positions) → dx`: rotates back.
    RopeGrad(RopeAttrs),
    /// `(dout, q, k', v'?, out, lse) → (dq, dk, dv?)`.
    AttentionGrad(AttentionAttrs),
    /// `(dy, gate, up) → (dgate, dup)`.
    GluGrad(Act),
    /// `(dy, x) → dx`.
    ActivationGrad(Act),
    /// `(dy, y) → dx`, from the result of `softcap`.
    SoftcapGrad(f32),
    /// `(dy[o, d], rows[o]) → dx[t, d]`: adjoint of `gather_rows`; other rows are zero.
    ScatterRows,

    /// `(gradients..) → [] f64`: sum of squares over all of them, in operand order.
    GlobalNorm,
    /// `(norm²) → [] f32`: the factor that limits the norm to `max_norm`.
    Clip {
        /// Largest norm that passes unchanged.
        max_norm: f32,
    },
    /// `(master, gradient, m, v, factor?, lr, step, copy?) → (master, m, v, copy?)`: the copy is the
    /// weight in the encoding that products read.
    AdamW(AdamWAttrs),
    /// `(weight, average) → average`.
    Ema {
        /// Share of the old average that stays.
        decay: f32,
    },
}

impl Op {
    /// Name in program text and in the kernel registry.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::PositionEmbed => "position_embed",
            Self::RmsNorm(_) => "rms_norm",
            Self::LayerNorm(_) => "layer_norm",
            Self::Matmul => "matmul",
            Self::HeadMatmul => "head_matmul",
            Self::Rope(_) => "rope",
            Self::KvWrite { .. } => "kv_write",
            Self::Attention(_) => "attention",
            Self::Glu(_) => "glu",
            Self::Activation(_) => "activation",
            Self::Add => "add",
            Self::Scale(_) => "scale",
            Self::Softcap(_) => "softcap",
            Self::Dropout(_) => "dropout",
            Self::Concat(_) => "concat",
            Self::Split(..) => "split",
            Self::Route(_) => "route",
            Self::ExpertMatmul => "expert_matmul",
            Self::ExpertSum => "expert_sum",
            Self::ExpertLoad => "expert_load",
            Self::BalanceLoss(_) => "balance_loss",
            Self::GatherRows => "gather_rows",
            Self::TokenLogprob(_) => "token_logprob",
            Self::CrossEntropy(_) => "cross_entropy",
            Self::TokenLogprobGrad(_) => "token_logprob_grad",
            Self::EmbedGrad => "embed_grad",
            Self::MatmulDx => "matmul_dx",
            Self::MatmulDw => "matmul_dw",
            Self::BiasGrad => "bias_grad",
            Self::HeadMatmulDx => "head_matmul_dx",
            Self::HeadMatmulDw => "head_matmul_dw",
            Self::RouteGrad(_) => "route_grad",
            Self::ExpertMatmulDx => "expert_matmul_dx",
            Self::ExpertMatmulDw => "expert_matmul_dw",
            Self::ExpertSumGrad => "expert_sum_grad",
            Self::ExpertLoadGrad => "expert_load_grad",
            Self::BalanceLossGrad(_) => "balance_loss_grad",
            Self::RmsNormGrad(_) => "rms_norm_grad",
            Self::LayerNormGrad(_) => "layer_norm_grad",
            Self::RopeGrad(_) => "rope_grad",
            Self::AttentionGrad(_) => "attention_grad",
            Self::GluGrad(_) => "glu_grad",
            Self::ActivationGrad(_) => "activation_grad",
            Self::SoftcapGrad(_) => "softcap_grad",
            Self::ScatterRows => "scatter_rows",
            Self::GlobalNorm => "global_norm",
            Self::Clip { .. } => "clip",
            Self::AdamW(_) => "adamw",
            Self::Ema { .. } => "ema",
        }
    }
}

impl Op {
    /// Whether it zeroes elements at random.
    pub fn drops(&self) -> bool {
        match self {
            Self::Dropout(_) => true,
            Self::Attention(a) | Self::AttentionGrad(a) => a.dropout.is_some(),
            _ => false,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::RmsNorm(a) | Self::RmsNormGrad(a) => {
                write!(f, " eps={:e}", a.eps)?;
                if a.plus_one { f.write_str(" plus_one") } else { Ok(()) }
            }
            Self::LayerNorm(a) | Self::LayerNormGrad(a) => write!(f, " eps={:e}", a.eps),
            Self::Rope(a) | Self::RopeGrad(a) => write!(
                f,
                " dims={} {}",
                2 * a.inv_freq.len(),
                if a.interleaved { "interleaved" } else { "halves" }
            ),
            Self::KvWrite { site } => write!(f, " site={site}"),
            Self::Route(routing) | Self::RouteGrad(routing) => write_routing(f, routing),
            Self::Attention(a) | Self::AttentionGrad(a) => {
                write!(f, " mask={:?} scale={}", a.mask, a.scale)?;
                if let Some(cap) = a.softcap {
                    write!(f, " softcap={cap}")?;
                }
                match a.dropout {
                    Some(DropoutAttrs { p, site }) => write!(f, " dropout={p} site={site}"),
                    None => Ok(()),
                }
            }
            Self::Glu(act)
            | Self::GluGrad(act)
            | Self::Activation(act)
            | Self::ActivationGrad(act) => write!(f, " {act:?}"),
            Self::BalanceLoss(a) | Self::BalanceLossGrad(a) => {
                write!(f, " top_k={} coefficient={}", a.top_k, a.coefficient)
            }
            Self::Scale(factor) => write!(f, " {factor}"),
            Self::Softcap(cap) | Self::SoftcapGrad(cap) => write!(f, " cap={cap}"),
            Self::TokenLogprob(a) | Self::CrossEntropy(a) | Self::TokenLogprobGrad(a) => {
                match a.softcap {
                    Some(cap) => write!(f, " softcap={cap}"),
                    None => Ok(()),
                }
            }
            Self::Dropout(DropoutAttrs { p, site }) => write!(f, " p={p} site={site}"),
            Self::Clip { max_norm } => write!(f, " max_norm={max_norm}"),
            Self::AdamW(a) => write!(f, " weight_decay={}", a.weight_decay),
            Self::Ema { decay } => write!(f, " decay={decay}"),
            _ => Ok(()),
        }
    }
}

fn write_routing(f: &mut fmt::Formatter<'_>, routing: &Routing) -> fmt::Result {
    write!(f, " top_k={} {:?}", routing.top_k, routing.scoring)?;
    if let Some(groups) = routing.groups {
        write!(f, " groups={}/{} {:?}", groups.kept, groups.count, groups.score)?;
    }
    if let Some(eps) = routing.normalize {
        write!(f, " normalize+{eps:e}")?;
    }
    write!(f, " scale={}", routing.scale)
}

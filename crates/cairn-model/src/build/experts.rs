//! The feed-forward part of a block with experts.

use cairn_kernels::{Encoding, ExpertGroups, GroupScore, Layout, Routing, Scoring};
use cairn_program::{BalanceAttrs, Dim, DimName, Op, ValueId, VerifyError};
use cairn_spec::Activation;
use cairn_spec::model::Mlp;
use cairn_spec::model::moe::{self, Moe, Router};

use super::{Lowering, act, to_f32};
use crate::adapter::Adapted;

/// Outputs that share a panel.
const PANEL_ROWS: usize = 16;
/// Added to the sum of V3's weights before dividing, so that experts that are all worth nothing stay
/// that; a softmax's sum is never zero.
const SIGMOID_EPS: f32 = 1e-20;

/// The kernel's form of a router.
fn routing(top_k: usize, router: &Router) -> Routing {
    let is_softmax = router.scoring == moe::Scoring::Softmax;
    Routing {
        top_k,
        scoring: if is_softmax { Scoring::Softmax } else { Scoring::Sigmoid },
        groups: router.groups.map(|groups| ExpertGroups {
            count: groups.n_group,
            kept: groups.topk_group,
            score: match groups.score {
                moe::GroupScore::Max => GroupScore::Best,
                moe::GroupScore::TopTwo => GroupScore::BestTwo,
            },
        }),
        normalize: router.norm_topk_prob.then_some(if is_softmax { 0.0 } else { SIGMOID_EPS }),
        scale: to_f32(router.routed_scaling_factor),
    }
}

/// The experts of one layer.
struct Experts {
    layer: usize,
    e: Dim,
    /// Those that each token goes to.
    chosen: ValueId,
}

impl Lowering<'_> {
    /// Router, experts, and what all tokens share.
    pub(super) fn mixture(
        &mut self,
        layer: usize,
        x: ValueId,
        moe: &Moe,
    ) -> Result<ValueId, VerifyError> {
        let (experts, weights) = self.route(layer, x, moe)?;
        let (width, inner) =
            (self.width, Dim::fixed(DimName::Intermediate, moe.moe_intermediate_size));
        let gate = self.expert_product(&experts, "gate", x, (inner, width))?;
        let up = self.expert_product(&experts, "up", x, (inner, width))?;
        let name = |what: &str| format!("{layer}.mlp.{what}");
        let op = Op::Glu(act(moe.activation));
        let hidden = self.builder.push(&name("experts.hidden"), op, &[gate, up])?;
        let down = self.expert_product(&experts, "down", hidden, (width, inner))?;
        let routed = self.builder.push(&name("routed"), Op::ExpertSum, &[down, weights])?;
        let Some(shared) = moe.shared_intermediate_size else { return Ok(routed) };
        let inner = Dim::fixed(DimName::Intermediate, shared);
        let shared = self.gated(layer, "shared_experts.", x, (moe.activation, inner))?;
        self.builder.push(&name("fed"), Op::Add, &[routed, shared])
    }

    /// The experts of each token and their weights.
    fn route(
        &mut self,
        layer: usize,
        x: ValueId,
        moe: &Moe,
    ) -> Result<(Experts, ValueId), VerifyError> {
        let name = |what: &str| format!("{layer}.mlp.{what}");
        let weight = |what: &str| format!("model.layers.{layer}.mlp.gate.{what}");
        let e = Dim::fixed(DimName::Experts, moe.num_experts);
        // A router is small, and what it chooses hangs on small differences: always f32.
        let storage = (Encoding::F32, self.options.layout);
        let gate = self.builder.matrix(&weight("weight"), &[e], &[self.width], storage);
        let names = (name("router"), weight("weight"));
        let sizes = (&[e][..], &[self.width][..]);
        let logits = self.beside((&names.0, &names.1), Op::Matmul, &[x, gate], sizes)?;
        let bias = moe.router.correction_bias;
        let bias = bias.then(|| self.builder.weight(&weight("e_score_correction_bias"), &[e]));
        let op = Op::Route(routing(moe.num_experts_per_tok, &moe.router));
        let (chosen, weights) = (name("experts"), name("weights"));
        let names = [Some(chosen.as_str()), Some(weights.as_str())];
        let routed = self.builder.push_slots(op, vec![Some(logits), bias], &names)?;
        let chosen = routed[0].expect("slot 0 was named");
        if self.options.balance && moe.router.aux_loss_coef.is_some() {
            let (choices, mass) = (name("choices"), name("mass"));
            let names = [Some(choices.as_str()), Some(mass.as_str())];
            let slots = vec![Some(logits), Some(chosen), self.load[0], self.load[1]];
            let counted = self.builder.push_slots(Op::ExpertLoad, slots, &names)?;
            self.load = [counted[0], counted[1]];
        }
        Ok((Experts { layer, e, chosen }, routed[1].expect("slot 1 was named")))
    }

    /// The loss of all routers together, where it is asked for.
    pub(super) fn balance_loss(&mut self) -> Result<(), VerifyError> {
        let ([Some(choices), Some(mass)], Mlp::Moe(moe)) = (self.load, &self.spec.mlp) else {
            return Ok(());
        };
        let attrs = BalanceAttrs {
            top_k: moe.num_experts_per_tok,
            coefficient: to_f32(moe.router.aux_loss_coef.unwrap_or(0.0)),
        };
        let loss = self.builder.push("balance_loss", Op::BalanceLoss(attrs), &[choices, mass])?;
        self.builder.output(loss);
        Ok(())
    }

    /// Each routed row times its expert's `<what>_proj`.
    fn expert_product(
        &mut self,
        experts: &Experts,
        what: &str,
        x: ValueId,
        (rows, columns): (Dim, Dim),
    ) -> Result<ValueId, VerifyError> {
        let &Experts { layer, e, chosen } = experts;
        let weight = format!("model.layers.{layer}.mlp.experts.{what}_proj.weight");
        let storage = self.experts_storage(self.options.encoding, rows);
        let (outputs, inputs) = ([e, rows], [columns]);
        let w = self.builder.matrix(&weight, &outputs, &inputs, storage);
        let name = format!("{layer}.mlp.experts.{what}");
        let operands = [x, w, chosen];
        self.beside((&name, &weight), Op::ExpertMatmul, &operands, (&outputs, &inputs))
    }

    /// How matrices of `rows` outputs, one for each expert, are stored.
    fn experts_storage(&self, encoding: Encoding, rows: Dim) -> (Encoding, Layout) {
        let fills_panels = rows.size.is_some_and(|rows| rows.is_multiple_of(PANEL_ROWS));
        if fills_panels {
            (encoding, self.options.layout)
        } else if encoding.layouts().contains(&Layout::RowMajor) {
            (encoding, Layout::RowMajor)
        } else {
            // What lies in panels only, and experts that begin inside of one.
            (Encoding::Bf16, Layout::RowMajor)
        }
    }

    /// `(s · x·Aᵀ)·Bᵀ` with the adapter of each row's expert. What is zeroed of a token in training is
    /// zeroed for all experts that it goes to.
    pub(super) fn experts_adapter(
        &mut self,
        name: &str,
        adapted: &Adapted,
        (x, chosen): (ValueId, ValueId),
        (outputs, inputs): (&[Dim], &[Dim]),
    ) -> Result<ValueId, VerifyError> {
        let &[e, rows] = outputs else { unreachable!("the outputs of each expert") };
        let rank = Dim::fixed(DimName::Rank, adapted.rank);
        let storage = self.experts_storage(Encoding::F32, rank);
        let a = self.builder.matrix(&adapted.a, &[e, rank], inputs, storage);
        let storage = self.experts_storage(Encoding::F32, rows);
        let b = self.builder.matrix(&adapted.b, outputs, &[rank], storage);
        let part = |what: &str| format!("{name}.lora{what}");
        let x = self.drop(x, self.adapters.dropout(), &part(".dropped"))?;
        let low = self.builder.push(&part(".low"), Op::ExpertMatmul, &[x, a, chosen])?;
        let scaled = self.builder.push(&part(".scaled"), Op::Scale(adapted.scale), &[low])?;
        self.builder.push(&part(""), Op::ExpertMatmul, &[scaled, b, chosen])
    }

    /// A gated feed-forward part without biases, its modules called `mlp.<group><what>_proj`.
    pub(super) fn gated(
        &mut self,
        layer: usize,
        group: &str,
        x: ValueId,
        (activation, inner): (Activation, Dim),
    ) -> Result<ValueId, VerifyError> {
        let (width, inner) = ([self.width], [inner]);
        let name = |what: &str| format!("{layer}.mlp.{group}{what}");
        let weight = |what: &str| format!("model.layers.{layer}.mlp.{group}{what}_proj");
        let sizes = (&inner[..], &width[..]);
        let gate = self.project((&name("gate"), &weight("gate")), x, sizes, false)?;
        let up = self.project((&name("up"), &weight("up")), x, sizes, false)?;
        let op = Op::Glu(act(activation));
        let hidden = self.builder.push(&name("hidden"), op, &[gate, up])?;
        self.project((&name("down"), &weight("down")), hidden, (&width, &inner), false)
    }
}

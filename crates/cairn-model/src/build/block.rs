//! The forms of a block: where norms and additions sit, and the feed-forward part.

use cairn_program::{Dim, DimName, Op, ValueId, VerifyError};
use cairn_spec::model::{BlockForm, Mlp};

use super::{Lowering, act};
use crate::weights::block_norms;

/// The two parts of a block.
#[derive(Clone, Copy)]
enum Part {
    Attention,
    FeedForward,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Self::Attention => "attn",
            Self::FeedForward => "mlp",
        }
    }
}

impl Lowering<'_> {
    /// The block of layer `layer`. Its result is called `hidden_<layer + 1>`, unless the model's
    /// final norm makes that name its own.
    pub(super) fn block(&mut self, layer: usize, x: ValueId) -> Result<ValueId, VerifyError> {
        let middle = format!("{layer}.middle");
        let middle = self.part(layer, Part::Attention, (x, x), &middle)?;
        let last = layer + 1 == self.num_blocks() && self.spec.block.final_norm();
        let name = if last { "final.input".to_owned() } else { format!("hidden_{}", layer + 1) };
        let input = if self.spec.block == BlockForm::ParallelResidual { x } else { middle };
        self.part(layer, Part::FeedForward, (input, middle), &name)
    }

    /// One part: reads `input`, adds to `residual`.
    fn part(
        &mut self,
        layer: usize,
        part: Part,
        (input, residual): (ValueId, ValueId),
        result: &str,
    ) -> Result<ValueId, VerifyError> {
        let form = self.spec.block;
        let norms = block_norms(form);
        let (first, second) = norms.split_at(norms.len() / 2);
        let norms = match part {
            Part::Attention => first,
            Part::FeedForward => second,
        };
        let module = |norm: &str| format!("model.layers.{layer}.{norm}");
        let name = |what: &str| format!("{layer}.{}.{what}", part.name());
        let (before, after, of_sum) = match form {
            BlockForm::PreNorm | BlockForm::ParallelResidual => (Some(norms[0]), None, None),
            BlockForm::PostNorm => (None, Some(norms[0]), None),
            BlockForm::SandwichNorm => (Some(norms[0]), Some(norms[1]), None),
            BlockForm::ResidualNorm => (None, None, Some(norms[0])),
        };
        let skips = matches!(part, Part::Attention) && !self.spec.has_attention_norm(layer);
        let width = [self.width];
        let mut x = input;
        if let Some(norm) = before.filter(|_| !skips) {
            x = self.norm((&name("normed"), &module(norm)), x, &width)?;
        }
        x = match part {
            Part::Attention => self.attention(layer, x)?,
            Part::FeedForward => self.feed_forward(layer, x)?,
        };
        x = self.drop(x, self.spec.dropout.resid, &name("dropped"))?;
        if let Some(norm) = after {
            x = self.norm((&name("renormed"), &module(norm)), x, &width)?;
        }
        match of_sum {
            None => self.builder.push(result, Op::Add, &[residual, x]),
            Some(norm) => {
                let sum = self.builder.push(&name("sum"), Op::Add, &[residual, x])?;
                self.norm((result, &module(norm)), sum, &width)
            }
        }
    }

    fn feed_forward(&mut self, layer: usize, x: ValueId) -> Result<ValueId, VerifyError> {
        let inner = Dim::fixed(DimName::Intermediate, self.spec.mlp.intermediate_size());
        if let Mlp::Moe(moe) = &self.spec.mlp {
            return match moe.has_experts(layer) {
                true => self.mixture(layer, x, moe),
                false => self.gated(layer, "", x, (moe.activation, inner)),
            };
        }
        let (width, inner) = ([self.width], [inner]);
        let name = |what: &str| format!("{layer}.mlp.{what}");
        let weight = |what: &str| format!("model.layers.{layer}.mlp.{what}_proj");
        let (hidden, bias) = match self.spec.mlp {
            Mlp::Glu { activation, bias, .. } => {
                let sizes = (&inner[..], &width[..]);
                let gate = self.project((&name("gate"), &weight("gate")), x, sizes, bias)?;
                let up = self.project((&name("up"), &weight("up")), x, sizes, bias)?;
                let op = Op::Glu(act(activation));
                (self.builder.push(&name("hidden"), op, &[gate, up])?, bias)
            }
            Mlp::Plain { activation, bias, .. } => {
                let up = self.project((&name("up"), &weight("up")), x, (&inner, &width), bias)?;
                let op = Op::Activation(act(activation));
                (self.builder.push(&name("hidden"), op, &[up])?, bias)
            }
            Mlp::Moe(_) => unreachable!("returned above"),
        };
        self.project((&name("down"), &weight("down")), hidden, (&width, &inner), bias)
    }
}

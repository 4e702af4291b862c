//! Lowering a [`ModelSpec`] to its forward program.
//!
//! One function for every family: what differs is data in the spec. Weights carry the names of the
//! LLaMA layout (`model.layers.0.self_attn.q_proj.weight`) whatever the family; `names` maps them
//! to the family's own tensors.
//!
//! Inputs: `ids [t]`, `positions [t]`; `rows [o]` where the head reads gathered rows; `targets`
//! for log-probabilities. Outputs are named `logits`, `logprob`, and `hidden_0 … hidden_L`: the
//! first block's input, each block's output, the last one after the final norm.

mod experts;
mod latent;

use cairn_kernels::{Act, Encoding, Layout, Mask};
use cairn_program::{
    AttentionAttrs, Builder, Dim, DimName, NormAttrs, Op, Program, RopeAttrs, ValueId, ValueType,
    VerifyError,
};
use cairn_spec::model::{
    AttentionForm, BlockForm, Gqa, MaskKind, Mlp, Norm, NormKind, Position, QkNorm, RopeScaling,
};
use cairn_spec::{Activation, ModelSpec};

use crate::adapter::{Adapted, AdapterMap};

/// What the program ends in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The final hidden states, `hidden_L`.
    Hidden,
    /// `logits [t, v]` of every token.
    Logits,
    /// `logits [o, v]` of the tokens listed in the input `rows`.
    GatheredLogits,
    /// `logprob [t]` of the input `targets`, in chunks; training starts from it.
    TokenLogprob,
}

/// How a program is built from a spec.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BuildOptions {
    /// Storage of weight matrices; norms and biases are always `f32`.
    pub encoding: Encoding,
    /// Layout of weight matrices: row-major to train, panels to stream them in generation.
    pub layout: Layout,
    /// What the program ends in.
    pub head: Head,
    /// Keeps `hidden_0 … hidden_L` readable.
    pub keep_hidden: bool,
    /// Inserts the spec's dropout.
    pub dropout: bool,
}

impl BuildOptions {
    /// Row-major `f32` weights, ending in `head`.
    pub fn new(head: Head) -> Self {
        Self {
            encoding: Encoding::F32,
            layout: Layout::RowMajor,
            head,
            keep_hidden: false,
            dropout: false,
        }
    }
}

/// Why a spec has no program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The spec asks for something that is not built yet.
    #[error("{feature} is not supported yet")]
    Unsupported {
        /// What the spec asks for.
        feature: &'static str,
    },
    /// The program does not verify: a bug in the lowering.
    #[error("the program of this spec does not verify")]
    Verify(#[from] VerifyError),
}

/// Lowers `spec` to its forward program.
///
/// # Errors
///
/// [`BuildError::Unsupported`] names what the spec asks for and no instruction does yet.
pub fn build_program(spec: &ModelSpec, options: &BuildOptions) -> Result<Program, BuildError> {
    build_adapted_program(spec, options, &AdapterMap::default())
}

/// As [`build_program`], with low-rank adapters beside some projections.
///
/// # Errors
///
/// As [`build_program`].
pub fn build_adapted_program(
    spec: &ModelSpec,
    options: &BuildOptions,
    adapters: &AdapterMap,
) -> Result<Program, BuildError> {
    refuse_unsupported(spec, options)?;
    let mut lowering = Lowering {
        spec,
        options,
        width: Dim::fixed(DimName::Hidden, spec.hidden_size),
        builder: Builder::new(),
        dropout_sites: 0,
        adapters,
    };
    let mut x = lowering.embedding()?;
    for layer in 0..spec.num_hidden_layers {
        lowering.keep_hidden(x);
        let block = u32::try_from(layer).expect("the spec limits the layers");
        lowering.builder.set_block(Some(block));
        x = lowering.block(layer, x)?;
    }
    lowering.builder.set_block(None);
    lowering.head(x)?;
    Ok(lowering.builder.finish()?)
}

fn refuse_unsupported(spec: &ModelSpec, options: &BuildOptions) -> Result<(), BuildError> {
    let unsupported = [
        (spec.embedding.norm, "a norm on the embedding"),
        (spec.embedding.type_vocab_size.is_some(), "token types"),
        (spec.block != BlockForm::PreNorm, "a block other than pre-norm"),
        (spec.head.transform.is_some(), "a transform before the head"),
        (spec.head.bias, "a bias on the logits"),
        (spec.head.softcap.is_some(), "a softcap on the logits"),
        (
            spec.attention.sliding_window.as_ref().is_some_and(|window| window.rope.is_some()),
            "a second rotation for windowed layers",
        ),
        (
            options.dropout && spec.dropout.attn > 0.0,
            "dropout on attention probabilities (set it to 0)",
        ),
        (
            matches!(&spec.attention.form, AttentionForm::Gqa(g) if g.qk_norm == Some(QkNorm::AllHeads)),
            "a norm over all query or key heads together",
        ),
        (
            matches!(&spec.position, Position::Rope(r) if matches!(r.scaling, RopeScaling::Dynamic { .. })),
            "dynamic rope scaling",
        ),
    ];
    match unsupported.into_iter().find(|(asked, _)| *asked) {
        Some((_, feature)) => Err(BuildError::Unsupported { feature }),
        None => Ok(()),
    }
}

struct Lowering<'a> {
    spec: &'a ModelSpec,
    options: &'a BuildOptions,
    width: Dim,
    builder: Builder,
    dropout_sites: u32,
    adapters: &'a AdapterMap,
}

impl Lowering<'_> {
    fn keep_hidden(&mut self, x: ValueId) {
        if self.options.keep_hidden {
            self.builder.output(x);
        }
    }

    fn embedding(&mut self) -> Result<ValueId, VerifyError> {
        let ids = self.builder.input("ids", ValueType::U32, &[Dim::TOKENS]);
        let positions = self.builder.input("positions", ValueType::U32, &[Dim::TOKENS]);
        let table = self.embed_tokens();
        let mut steps = vec![(Op::Embed, vec![ids, table])];
        if let Some(scale) = self.spec.embedding.scale {
            steps.push((Op::Scale(to_f32(scale)), vec![]));
        }
        if self.spec.position == Position::Learned {
            let rows = Dim::fixed(DimName::Positions, self.spec.max_position_embeddings);
            let table = self.matrix("model.embed_positions.weight", &[rows], &[self.width]);
            steps.push((Op::PositionEmbed, vec![positions, table]));
        }
        steps.extend(self.dropout_op(self.spec.dropout.embd).map(|op| (op, vec![])));
        // The last step is the first block's input, whichever it is.
        let last = steps.len() - 1;
        let mut x = None;
        for (index, (op, operands)) in steps.into_iter().enumerate() {
            let name = if index == last { "hidden_0" } else { &format!("embedded.{index}") };
            let operands: Vec<ValueId> = x.into_iter().chain(operands).collect();
            x = Some(self.builder.push(name, op, &operands)?);
        }
        Ok(x.expect("the first step is the lookup"))
    }

    fn embed_tokens(&mut self) -> ValueId {
        let vocab = Dim::fixed(DimName::Vocab, self.spec.vocab_size);
        self.matrix("model.embed_tokens.weight", &[vocab], &[self.width])
    }

    fn matrix(&mut self, name: &str, outputs: &[Dim], inputs: &[Dim]) -> ValueId {
        let storage = (self.options.encoding, self.options.layout);
        self.builder.matrix(name, outputs, inputs, storage)
    }

    fn dropout_op(&mut self, rate: f64) -> Option<Op> {
        if !self.options.dropout || rate <= 0.0 {
            return None;
        }
        let site = self.dropout_sites;
        self.dropout_sites += 1;
        Some(Op::Dropout { p: to_f32(rate), site })
    }

    fn drop(&mut self, x: ValueId, rate: f64, name: &str) -> Result<ValueId, VerifyError> {
        match self.dropout_op(rate) {
            Some(op) => self.builder.push(name, op, &[x]),
            None => Ok(x),
        }
    }

    fn norm(
        &mut self,
        norm: &Norm,
        name: &str,
        weight: &str,
        x: ValueId,
        axis: Dim,
    ) -> Result<ValueId, VerifyError> {
        let attrs = NormAttrs { eps: to_f32(norm.eps), plus_one: norm.plus_one };
        let scale = self.builder.weight(&format!("{weight}.weight"), &[axis]);
        let mut operands = vec![x, scale];
        let op = match norm.kind {
            NormKind::Rms => Op::RmsNorm(attrs),
            NormKind::Layer => {
                if norm.bias {
                    operands.push(self.builder.weight(&format!("{weight}.bias"), &[axis]));
                }
                Op::LayerNorm(attrs)
            }
        };
        self.builder.push(name, op, &operands)
    }

    /// `x · Wᵀ (+ b)` with the weight `<prefix>.weight` and, where asked, `<prefix>.bias`.
    fn project(
        &mut self,
        (name, prefix): (&str, &str),
        x: ValueId,
        (outputs, inputs): (&[Dim], &[Dim]),
        bias: bool,
    ) -> Result<ValueId, VerifyError> {
        let full = format!("{prefix}.weight");
        let weight = self.matrix(&full, outputs, inputs);
        let mut operands = vec![x, weight];
        if bias {
            operands.push(self.builder.weight(&format!("{prefix}.bias"), outputs));
        }
        let Some(adapted) = self.adapters.get(&full) else {
            return self.builder.push(name, Op::Matmul, &operands);
        };
        let base = self.builder.push(&format!("{name}.base"), Op::Matmul, &operands)?;
        let delta = self.adapter(name, adapted, x, (outputs, inputs))?;
        self.builder.push(name, Op::Add, &[base, delta])
    }

    /// `(s · x·Aᵀ)·Bᵀ`. The adapter's weights are `f32` whatever the model's are.
    fn adapter(
        &mut self,
        name: &str,
        adapted: &Adapted,
        x: ValueId,
        (outputs, inputs): (&[Dim], &[Dim]),
    ) -> Result<ValueId, VerifyError> {
        let rank = [Dim::fixed(DimName::Rank, adapted.rank)];
        let storage = (Encoding::F32, self.options.layout);
        let a = self.builder.matrix(&adapted.a, &rank, inputs, storage);
        let b = self.builder.matrix(&adapted.b, outputs, &rank, storage);
        let x = self.drop(x, self.adapters.dropout(), &format!("{name}.lora.dropped"))?;
        let low = self.builder.push(&format!("{name}.lora.low"), Op::Matmul, &[x, a])?;
        let scaled =
            self.builder.push(&format!("{name}.lora.scaled"), Op::Scale(adapted.scale), &[low])?;
        self.builder.push(&format!("{name}.lora"), Op::Matmul, &[scaled, b])
    }

    fn block(&mut self, layer: usize, x: ValueId) -> Result<ValueId, VerifyError> {
        let prefix = format!("model.layers.{layer}");
        let norm = self.spec.norm;
        let resid = self.spec.dropout.resid;
        let weight = format!("{prefix}.input_layernorm");
        let normed = self.norm(&norm, &format!("{layer}.attn.normed"), &weight, x, self.width)?;
        let attended = self.attention(layer, normed)?;
        let attended = self.drop(attended, resid, &format!("{layer}.attn.dropped"))?;
        let x = self.builder.push(&format!("{layer}.middle"), Op::Add, &[x, attended])?;
        let weight = format!("{prefix}.post_attention_layernorm");
        let normed = self.norm(&norm, &format!("{layer}.mlp.normed"), &weight, x, self.width)?;
        let fed = self.feed_forward(layer, normed)?;
        let fed = self.drop(fed, resid, &format!("{layer}.mlp.dropped"))?;
        // `hidden_L` is what the head reads, after the final norm.
        let last = layer + 1 == self.spec.num_hidden_layers;
        let name = if last { "final.input".to_owned() } else { format!("hidden_{}", layer + 1) };
        self.builder.push(&name, Op::Add, &[x, fed])
    }

    fn attention(&mut self, layer: usize, x: ValueId) -> Result<ValueId, VerifyError> {
        match &self.spec.attention.form {
            AttentionForm::Gqa(gqa) => self.grouped_attention(layer, x, gqa),
            AttentionForm::Mla(mla) => self.latent_attention(layer, x, mla),
        }
    }

    fn grouped_attention(
        &mut self,
        layer: usize,
        x: ValueId,
        gqa: &Gqa,
    ) -> Result<ValueId, VerifyError> {
        let Gqa { num_attention_heads, num_key_value_heads, head_dim, qkv_bias, o_bias, .. } = *gqa;
        let heads = Dim::fixed(DimName::Heads, num_attention_heads);
        let kv_heads = Dim::fixed(DimName::KvHeads, num_key_value_heads);
        let head = Dim::fixed(DimName::HeadDim, head_dim);
        let prefix = format!("model.layers.{layer}.self_attn");
        let width = [self.width];
        let mut project = |what: &str, count: Dim| {
            let names = (format!("{layer}.attn.{what}"), format!("{prefix}.{what}_proj"));
            self.project((&names.0, &names.1), x, (&[count, head], &width), qkv_bias)
        };
        let (q, k, v) = (project("q", heads)?, project("k", kv_heads)?, project("v", kv_heads)?);
        let q = self.position_head(layer, "q", q, gqa)?;
        let k = self.position_head(layer, "k", k, gqa)?;
        let site = u32::try_from(layer).expect("the spec limits the layers");
        let keys = format!("{layer}.attn.keys");
        let values = format!("{layer}.attn.values");
        let names = [Some(keys.as_str()), Some(values.as_str())];
        let cached =
            self.builder.push_slots(Op::KvWrite { site }, vec![Some(k), Some(v)], &names)?;
        let attrs = AttentionAttrs {
            mask: self.mask(layer),
            scale: to_f32(self.spec.attention.score_scale(layer)),
            softcap: self.spec.attention.logit_softcap.map(to_f32),
            values_in_keys: false,
            value_dim: head_dim,
        };
        let out = format!("{layer}.attn.out");
        let lse = format!("{layer}.attn.lse");
        let inputs = vec![Some(q), cached[0], cached[1]];
        let names = [Some(out.as_str()), Some(lse.as_str())];
        let results = self.builder.push_slots(Op::Attention(attrs), inputs, &names)?;
        let out = results[0].expect("slot 0 was named");
        let names = (format!("{layer}.attn.o"), format!("{prefix}.o_proj"));
        self.project((&names.0, &names.1), out, (&width, &[heads, head]), o_bias)
    }

    /// Norm and rotation of queries or keys, where the spec has them.
    fn position_head(
        &mut self,
        layer: usize,
        what: &str,
        x: ValueId,
        gqa: &Gqa,
    ) -> Result<ValueId, VerifyError> {
        let mut x = x;
        if gqa.qk_norm == Some(QkNorm::PerHead) {
            let name = format!("{layer}.attn.{what}.normed");
            let weight = format!("model.layers.{layer}.self_attn.{what}_norm");
            let axis = Dim::fixed(DimName::HeadDim, gqa.head_dim);
            let norm = self.spec.norm;
            x = self.norm(&norm, &name, &weight, x, axis)?;
        }
        if let Position::Rope(rope) = &self.spec.position {
            let attrs = RopeAttrs {
                inv_freq: rope.inv_freq(),
                attention_scaling: rope.attention_scaling(),
                interleaved: rope.interleaved,
            };
            let positions = self.builder.find("positions").expect("declared with the embedding");
            let name = format!("{layer}.attn.{what}.rotated");
            x = self.builder.push(&name, Op::Rope(attrs), &[x, positions])?;
        }
        Ok(x)
    }

    fn mask(&self, layer: usize) -> Mask {
        Mask {
            causal: self.spec.attention.mask == MaskKind::Causal,
            window: self.spec.attention.window(layer),
            ..Mask::default()
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

    fn head(&mut self, x: ValueId) -> Result<(), VerifyError> {
        let norm = self.spec.norm;
        let name = format!("hidden_{}", self.spec.num_hidden_layers);
        let hidden = self.norm(&norm, &name, "model.norm", x, self.width)?;
        self.keep_hidden(hidden);
        let vocab = [Dim::fixed(DimName::Vocab, self.spec.vocab_size)];
        let head = if self.options.head == Head::Hidden {
            self.builder.output(hidden);
            return Ok(());
        } else if self.spec.tie_word_embeddings {
            self.embed_tokens()
        } else {
            self.matrix("lm_head.weight", &vocab, &[self.width])
        };
        let result = match self.options.head {
            Head::Hidden => unreachable!("returned above"),
            Head::Logits => self.builder.push("logits", Op::Matmul, &[hidden, head])?,
            Head::GatheredLogits => {
                let rows = self.builder.input("rows", ValueType::U32, &[Dim::OUTPUTS]);
                let last = self.builder.push("gathered", Op::GatherRows, &[hidden, rows])?;
                self.builder.push("logits", Op::Matmul, &[last, head])?
            }
            Head::TokenLogprob => {
                let targets = self.builder.input("targets", ValueType::U32, &[Dim::TOKENS]);
                let inputs = vec![Some(hidden), Some(head), Some(targets)];
                let names = [Some("logprob"), Some("lse")];
                let results = self.builder.push_slots(Op::TokenLogprob, inputs, &names)?;
                results[0].expect("slot 0 was named")
            }
        };
        self.builder.output(result);
        Ok(())
    }
}

/// The kernel's name of an activation.
fn act(activation: Activation) -> Act {
    match activation {
        Activation::Silu => Act::Silu,
        Activation::Gelu => Act::Gelu,
        Activation::GeluTanh => Act::GeluTanh,
        Activation::QuickGelu => Act::QuickGelu,
        Activation::Relu => Act::Relu,
    }
}

#[expect(clippy::cast_possible_truncation, reason = "hyper-parameters are rounded to f32 here")]
fn to_f32(value: f64) -> f32 {
    value as f32
}

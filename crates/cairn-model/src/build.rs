//! Lowering a [`ModelSpec`] to its forward program.
//!
//! One lowering for every family: what differs is data in the spec. Weights carry the names of the
//! LLaMA layout (`model.layers.0.self_attn.q_proj.weight`) whatever the family; `names` maps them
//! to the family's own tensors.
//!
//! | file | noun |
//! |---|---|
//! | `build` | embedding, norms and products; what a program ends in |
//! | `build/block` | the forms of a block, and its feed-forward part |
//! | `build/attention`, `build/latent` | the attention of a block |
//! | `build/experts` | a feed-forward part of experts |
//! | `build/stored` | some weights in encodings of their own |
//!
//! Inputs: `ids [t]`, `positions [t]`; `token_types [t]` where the model has token types (zero
//! unless fed); `rows [o]` where the head reads gathered rows; `targets` for log-probabilities.
//! Outputs are named `logits`, `logprob`, and `hidden_0 … hidden_L`: the first block's input, each
//! block's output, the last one after the final norm.

mod attention;
mod block;
mod experts;
mod latent;
mod stored;

use cairn_kernels::{Act, Compute, Encoding, Layout};
use cairn_program::{
    Builder, Dim, DimName, DropoutAttrs, HeadAttrs, NormAttrs, Op, Program, TOKEN_TYPES, ValueId,
    ValueType, VerifyError,
};
use cairn_spec::model::{Norm, NormKind, Position};
use cairn_spec::{Activation, ModelSpec, model};

use crate::adapter::{Adapted, AdapterMap};

pub use stored::build_stored_program;

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
    /// Arithmetic of the products by those matrices; anything but f32 wants them stored in what it
    /// multiplies. Routers, adapters and attention stay in f32.
    pub compute: Compute,
    /// What the program ends in.
    pub head: Head,
    /// Keeps `hidden_0 … hidden_L` readable.
    pub keep_hidden: bool,
    /// Inserts the spec's dropout.
    pub dropout: bool,
    /// Adds the spec's load-balancing loss, `balance_loss`, where it has one.
    pub balance: bool,
    /// Tokens of the text, for rotations that change with its length (dynamic, longrope). `None`
    /// is any length up to [`ModelFields::context_limit`](model::ModelFields::context_limit).
    pub text_len: Option<usize>,
    /// Only the first so many blocks, then what follows the last: what a model guesses by before
    /// it has gone through all of them. `None` is all.
    pub num_blocks: Option<usize>,
}

impl BuildOptions {
    /// Row-major `f32` weights, ending in `head`.
    pub fn new(head: Head) -> Self {
        Self {
            encoding: Encoding::F32,
            layout: Layout::RowMajor,
            compute: Compute::F32,
            head,
            keep_hidden: false,
            dropout: false,
            balance: false,
            text_len: None,
            num_blocks: None,
        }
    }
}

/// Why a spec has no program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The arithmetic multiplies what the weights are not stored as.
    #[error("{compute} products need weights stored as {}; these are {encoding}", .compute.weights())]
    Compute {
        /// The arithmetic asked for.
        compute: Compute,
        /// How the weights are stored.
        encoding: Encoding,
    },
    /// The program asked for ends in a head, and the model is a body alone.
    #[error("the model has no head over the vocabulary: it ends in hidden states")]
    NoHead,
    /// An adapter belongs to a module that the program does not multiply by: a bug in the map of
    /// adapters.
    #[error("an adapter has no place in the program")]
    UnusedAdapter,
    /// A weight would be stored in a form that the program does not multiply by.
    #[error("weight {weight} cannot be stored as {found}: the program needs {expected}")]
    Stored {
        /// The weight.
        weight: String,
        /// What the instruction that reads it needs.
        expected: String,
        /// The form and the shape that it would have.
        found: String,
    },
    /// The program does not verify: a bug in the lowering.
    #[error("the program of this spec does not verify")]
    Verify(#[from] VerifyError),
}

/// Lowers `spec` to its forward program.
///
/// # Errors
///
/// [`BuildError::NoHead`] if the program shall end in a head that the model does not have.
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
    let (compute, encoding) = (options.compute, options.encoding);
    if !compute.multiplies(encoding) {
        return Err(BuildError::Compute { compute, encoding });
    }
    if spec.head.is_none() && options.head != Head::Hidden {
        return Err(BuildError::NoHead);
    }
    let mut lowering = Lowering {
        spec,
        options,
        width: Dim::fixed(DimName::Hidden, spec.hidden_size),
        builder: Builder::new(),
        dropout_sites: 0,
        load: [None; 2],
        adapters,
    };
    lowering.builder.set_compute(compute);
    let mut x = lowering.embedding()?;
    for layer in 0..lowering.num_blocks() {
        lowering.keep_hidden(x);
        let block = u32::try_from(layer).expect("the spec limits the layers");
        lowering.builder.set_block(Some(block));
        x = lowering.block(layer, x)?;
    }
    lowering.builder.set_block(None);
    lowering.balance_loss()?;
    lowering.head(x)?;
    let program = lowering.builder.finish()?;
    // An adapter that nothing reads would be dropped without a word.
    let is_read = |weight: &str| program.find(weight).is_some();
    let all_are_read = if is_cut(spec, options) {
        true
    } else if options.head == Head::Hidden {
        adapters.weights_of_blocks().into_iter().all(is_read)
    } else {
        adapters.weights().iter().all(|weight| is_read(weight))
    };
    if all_are_read { Ok(program) } else { Err(BuildError::UnusedAdapter) }
}

/// Whether blocks are left out.
fn is_cut(spec: &ModelSpec, options: &BuildOptions) -> bool {
    options.num_blocks.is_some_and(|blocks| blocks < spec.num_hidden_layers)
}

struct Lowering<'a> {
    spec: &'a ModelSpec,
    options: &'a BuildOptions,
    width: Dim,
    builder: Builder,
    dropout_sites: u32,
    /// Choices and probabilities of the experts, counted over the layers so far.
    load: [Option<ValueId>; 2],
    adapters: &'a AdapterMap,
}

impl Lowering<'_> {
    /// Blocks that the program has.
    fn num_blocks(&self) -> usize {
        let all = self.spec.num_hidden_layers;
        self.options.num_blocks.map_or(all, |blocks| blocks.min(all))
    }

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
        if let Some(rows) = self.spec.embedding.type_vocab_size {
            let types = self.builder.input(TOKEN_TYPES, ValueType::U32, &[Dim::TOKENS]);
            let rows = Dim::fixed(DimName::Positions, rows);
            let table = self.matrix("model.embed_token_types.weight", &[rows], &[self.width]);
            steps.push((Op::PositionEmbed, vec![types, table]));
        }
        if self.spec.position == Position::Learned {
            let rows = Dim::fixed(DimName::Positions, self.spec.max_position_embeddings);
            let table = self.matrix("model.embed_positions.weight", &[rows], &[self.width]);
            steps.push((Op::PositionEmbed, vec![positions, table]));
        }
        if self.spec.embedding.norm {
            let (op, operands) = self.norm_op(&self.spec.norm, "model.embed_norm", &[self.width]);
            steps.push((op, operands));
        }
        steps
            .extend(self.dropout(self.spec.dropout.embd).map(|attrs| (Op::Dropout(attrs), vec![])));
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

    /// The next dropout of the program, if it has any of that rate.
    fn dropout(&mut self, rate: f64) -> Option<DropoutAttrs> {
        if !self.options.dropout || rate <= 0.0 {
            return None;
        }
        let site = self.dropout_sites;
        self.dropout_sites += 1;
        Some(DropoutAttrs { p: to_f32(rate), site })
    }

    fn drop(&mut self, x: ValueId, rate: f64, name: &str) -> Result<ValueId, VerifyError> {
        match self.dropout(rate) {
            Some(attrs) => self.builder.push(name, Op::Dropout(attrs), &[x]),
            None => Ok(x),
        }
    }

    /// A norm's operation and its operands after the first.
    fn norm_op(&mut self, norm: &Norm, module: &str, axes: &[Dim]) -> (Op, Vec<ValueId>) {
        let attrs = NormAttrs { eps: to_f32(norm.eps), plus_one: norm.plus_one };
        let mut operands = vec![self.builder.weight(&format!("{module}.weight"), axes)];
        match norm.kind {
            NormKind::Rms => (Op::RmsNorm(attrs), operands),
            NormKind::Layer => {
                if norm.bias {
                    operands.push(self.builder.weight(&format!("{module}.bias"), axes));
                }
                (Op::LayerNorm(attrs), operands)
            }
        }
    }

    /// Normalizes `x` over `axes`, its last, with the weights of `module`.
    fn norm(
        &mut self,
        (name, module): (&str, &str),
        x: ValueId,
        axes: &[Dim],
    ) -> Result<ValueId, VerifyError> {
        let (op, rest) = self.norm_op(&self.spec.norm, module, axes);
        let operands: Vec<ValueId> = std::iter::once(x).chain(rest).collect();
        self.builder.push(name, op, &operands)
    }

    /// `x · Wᵀ (+ b)` with the weight `<module>.weight` and, where asked, `<module>.bias`.
    fn project(
        &mut self,
        (name, module): (&str, &str),
        x: ValueId,
        (outputs, inputs): (&[Dim], &[Dim]),
        bias: bool,
    ) -> Result<ValueId, VerifyError> {
        let full = format!("{module}.weight");
        let weight = self.matrix(&full, outputs, inputs);
        let mut operands = vec![x, weight];
        if bias {
            operands.push(self.builder.weight(&format!("{module}.bias"), outputs));
        }
        self.beside((name, &full), Op::Matmul, &operands, (outputs, inputs))
    }

    /// A product of `operands`, its inputs first, and what the adapter of `weight` adds to it. An
    /// adapter's own products are of the same kind.
    fn beside(
        &mut self,
        (name, weight): (&str, &str),
        op: Op,
        operands: &[ValueId],
        sizes: (&[Dim], &[Dim]),
    ) -> Result<ValueId, VerifyError> {
        let Some(adapted) = self.adapters.get(weight) else {
            return self.builder.push(name, op, operands);
        };
        let base = self.builder.push(&format!("{name}.base"), op.clone(), operands)?;
        let delta = match op {
            Op::ExpertMatmul => {
                self.experts_adapter(name, adapted, (operands[0], operands[2]), sizes)?
            }
            _ => self.adapter(name, adapted, operands[0], sizes)?,
        };
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
        let low = self.low(name, adapted, x, (&rank, inputs))?;
        let storage = (Encoding::F32, self.options.layout);
        let b = self.builder.matrix(&adapted.b, outputs, &rank, storage);
        self.builder.push(&format!("{name}.lora"), Op::Matmul, &[low, b])
    }

    /// `s · x·Aᵀ`, of inputs of which some are zeroed in training.
    fn low(
        &mut self,
        name: &str,
        adapted: &Adapted,
        x: ValueId,
        (rank, inputs): (&[Dim], &[Dim]),
    ) -> Result<ValueId, VerifyError> {
        let storage = (Encoding::F32, self.options.layout);
        let a = self.builder.matrix(&adapted.a, rank, inputs, storage);
        let x = self.drop(x, self.adapters.dropout(), &format!("{name}.lora.dropped"))?;
        let low = self.builder.push(&format!("{name}.lora.low"), Op::Matmul, &[x, a])?;
        self.builder.push(&format!("{name}.lora.scaled"), Op::Scale(adapted.scale), &[low])
    }

    fn head(&mut self, x: ValueId) -> Result<(), VerifyError> {
        let width = [self.width];
        let mut hidden = x;
        if self.spec.block.final_norm() {
            let name = format!("hidden_{}", self.num_blocks());
            hidden = self.norm((&name, "model.norm"), x, &width)?;
        }
        self.keep_hidden(hidden);
        let result = match (self.options.head, self.spec.head) {
            (Head::Hidden, _) | (_, None) => hidden,
            (Head::Logits, Some(head)) => self.logits(&head, hidden)?,
            (Head::GatheredLogits, Some(head)) => {
                let rows = self.builder.input("rows", ValueType::U32, &[Dim::OUTPUTS]);
                let gathered = self.builder.push("gathered", Op::GatherRows, &[hidden, rows])?;
                self.logits(&head, gathered)?
            }
            (Head::TokenLogprob, Some(head)) => self.token_logprob(&head, hidden)?,
        };
        self.builder.output(result);
        Ok(())
    }

    /// What the head multiplies, its weight, and its bias if it has one.
    fn head_operands(
        &mut self,
        head: &model::Head,
        hidden: ValueId,
    ) -> Result<(ValueId, ValueId, Option<ValueId>), VerifyError> {
        let width = [self.width];
        let mut x = hidden;
        if let Some(transform) = head.transform {
            let names = ("head.projected", "head.dense");
            x = self.project(names, x, (&width, &width), transform.bias)?;
            let op = Op::Activation(act(transform.activation));
            x = self.builder.push("head.activated", op, &[x])?;
            x = self.norm(("head.normed", "head.norm"), x, &width)?;
        }
        let vocab = [Dim::fixed(DimName::Vocab, self.spec.vocab_size)];
        let weight = if self.spec.tie_word_embeddings {
            self.embed_tokens()
        } else {
            self.matrix("lm_head.weight", &vocab, &width)
        };
        let bias = head.bias.then(|| self.builder.weight("lm_head.bias", &vocab));
        Ok((x, weight, bias))
    }

    fn logits(&mut self, head: &model::Head, hidden: ValueId) -> Result<ValueId, VerifyError> {
        let (x, weight, bias) = self.head_operands(head, hidden)?;
        let operands: Vec<ValueId> = [x, weight].into_iter().chain(bias).collect();
        let name = if head.softcap.is_some() { "logits.uncapped" } else { "logits" };
        let raw = match self.head_adapter(x)? {
            None => self.builder.push(name, Op::Matmul, &operands)?,
            Some((low, b)) => {
                // The chains go on from the head's, as they do in `token_logprob`.
                let base = self.builder.push("logits.base", Op::Matmul, &operands)?;
                let operands = vec![Some(low), Some(b), None, Some(base)];
                let logits = self.builder.push_slots(Op::Matmul, operands, &[Some(name)])?;
                logits[0].expect("slot 0 was named")
            }
        };
        match head.softcap {
            None => Ok(raw),
            Some(cap) => self.builder.push("logits", Op::Softcap(to_f32(cap)), &[raw]),
        }
    }

    /// The inputs and the matrix of the second product of the head's adapter, if it has one.
    fn head_adapter(&mut self, x: ValueId) -> Result<Option<(ValueId, ValueId)>, VerifyError> {
        let Some(adapted) = self.adapters.get("lm_head.weight") else { return Ok(None) };
        let rank = [Dim::fixed(DimName::Rank, adapted.rank)];
        let low = self.low("logits", adapted, x, (&rank, &[self.width]))?;
        let vocab = [Dim::fixed(DimName::Vocab, self.spec.vocab_size)];
        let storage = (Encoding::F32, self.options.layout);
        Ok(Some((low, self.builder.matrix(&adapted.b, &vocab, &rank, storage))))
    }

    fn token_logprob(
        &mut self,
        head: &model::Head,
        hidden: ValueId,
    ) -> Result<ValueId, VerifyError> {
        let (x, weight, bias) = self.head_operands(head, hidden)?;
        let targets = self.builder.input("targets", ValueType::U32, &[Dim::TOKENS]);
        let mut operands = vec![Some(x), Some(weight), Some(targets)];
        operands.extend(bias.map(Some));
        if let Some((low, b)) = self.head_adapter(x)? {
            operands.resize(4, None);
            operands.extend([Some(low), Some(b)]);
        }
        let op = Op::TokenLogprob(HeadAttrs { softcap: head.softcap.map(to_f32) });
        let names = [Some("logprob"), Some("lse")];
        let results = self.builder.push_slots(op, operands, &names)?;
        Ok(results[0].expect("slot 0 was named"))
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

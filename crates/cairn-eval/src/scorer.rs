//! Log-probabilities of given tokens: the model as a measure.
//!
//! Letters: `t` tokens of a run, pieces of documents laid end to end.
//!
//! The program is the one that trains and generates, ending in the chunked head: the logits of all
//! tokens never exist. What a token scores depends on the tokens before it in its piece and on
//! nothing else, so batches may be cut in any way.

use std::collections::BTreeMap;

use cairn_kernels::{Compute, Cpu, Encoding, Layout, SeqSlot};
use cairn_model::{
    AdapterMap, BuildOptions, Head, TensorSource, build_stored_program, load_adapter, load_weights,
};
use cairn_program::{
    Feed, KvPlacement, MemoryPlan, PlannedBytes, ProgramId, Run, Session, SessionProgram, Sizes,
};
use cairn_spec::ModelSpec;
use cairn_spec::model::MaskKind;

use crate::error::EvalError;

/// Pieces of documents, to score in one run.
#[derive(Clone, Copy, Debug)]
pub struct ScoreBatch<'a> {
    /// The tokens that are read, `[t]`.
    pub ids: &'a [u32],
    /// Place of each in its piece, from 0, `[t]`.
    pub positions: &'a [u32],
    /// The token after each, `[t]`.
    pub targets: &'a [u32],
    /// The pieces; they see nothing of each other.
    pub pieces: &'a [SeqSlot<'a>],
}

/// How much a scorer takes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreLimits {
    /// Tokens of a run.
    pub tokens: usize,
    /// Pieces of a run.
    pub pieces: usize,
    /// Tokens of a piece.
    pub context: usize,
}

/// Something that gives log-probabilities: a model, or in tests a formula.
pub trait TokenScorer {
    /// How much it takes at once.
    fn limits(&self) -> ScoreLimits;

    /// Tokens it chooses among.
    fn vocab_size(&self) -> usize;

    /// The log-probability of each target, `[t]`, in nats.
    ///
    /// # Errors
    ///
    /// [`EvalError::Run`] for a batch over the limits or a token outside the vocabulary.
    fn logprobs(&mut self, batch: &ScoreBatch<'_>) -> Result<&[f32], EvalError>;
}

/// A scorer over one program of somebody's session: how a training run measures its weights as they
/// are.
#[derive(Debug)]
pub struct SessionScorer<'a> {
    session: &'a mut Session,
    program: ProgramId,
    limits: ScoreLimits,
    vocab_size: usize,
}

impl<'a> SessionScorer<'a> {
    /// `program` ends in [`Head::TokenLogprob`] and is planned for `limits`.
    pub fn new(
        session: &'a mut Session,
        program: ProgramId,
        limits: ScoreLimits,
        vocab_size: usize,
    ) -> Self {
        Self { session, program, limits, vocab_size }
    }
}

impl TokenScorer for SessionScorer<'_> {
    fn limits(&self) -> ScoreLimits {
        self.limits
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn logprobs(&mut self, batch: &ScoreBatch<'_>) -> Result<&[f32], EvalError> {
        let feeds = [
            Feed::u32("ids", batch.ids),
            Feed::u32("positions", batch.positions),
            Feed::u32("targets", batch.targets),
        ];
        self.session.run(self.program, &Run::forward(&feeds, batch.pieces))?;
        Ok(self.session.output(self.program, "logprob"))
    }
}

/// How a model is held to be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelScorerOptions {
    /// Storage of weight matrices.
    pub encoding: Encoding,
    /// Arithmetic of the products by them.
    pub compute: Compute,
    /// How much is scored at once.
    pub limits: ScoreLimits,
}

impl ModelScorerOptions {
    /// `f32` weights; pieces of up to `context` tokens, `tokens` at once.
    pub fn new(context: usize, tokens: usize) -> Self {
        let tokens = tokens.max(context);
        // A piece has at least one token; short documents come many at once.
        let compute = Compute::F32;
        Self {
            encoding: Encoding::F32,
            compute,
            limits: ScoreLimits { tokens, pieces: tokens, context },
        }
    }
}

/// A model to measure, laid out but not allocated.
#[derive(Debug)]
pub struct ModelScorerPlan {
    memory: MemoryPlan,
    spec: ModelSpec,
    adapters: AdapterMap,
    limits: ScoreLimits,
}

impl ModelScorerPlan {
    /// Lays out the scoring program of a model.
    ///
    /// # Errors
    ///
    /// [`EvalError::Limit`] if the context is longer than the model's, [`EvalError::Build`] or
    /// [`EvalError::Session`] if the model has no plan.
    pub fn new(spec: &ModelSpec, options: ModelScorerOptions) -> Result<Self, EvalError> {
        Self::with_adapters(spec, options, &AdapterMap::default())
    }

    /// As [`new`](Self::new), with low-rank adapters beside the model's projections.
    ///
    /// # Errors
    ///
    /// As from [`new`](Self::new).
    pub fn with_adapters(
        spec: &ModelSpec,
        options: ModelScorerOptions,
        adapters: &AdapterMap,
    ) -> Result<Self, EvalError> {
        Self::with_storage(spec, options, adapters, &BTreeMap::new())
    }

    /// As [`with_adapters`](Self::with_adapters), with encodings of their own for some weights, by name.
    ///
    /// # Errors
    ///
    /// As from [`new`](Self::new).
    pub fn with_storage(
        spec: &ModelSpec,
        options: ModelScorerOptions,
        adapters: &AdapterMap,
        encodings: &BTreeMap<String, Encoding>,
    ) -> Result<Self, EvalError> {
        let ModelScorerOptions { encoding, compute, limits } = options;
        if spec.attention.mask != MaskKind::Causal {
            return Err(EvalError::NotCausal);
        }
        check_limit("context", limits.context, spec.context_limit())?;
        let build = BuildOptions {
            encoding,
            compute,
            layout: Layout::Panel,
            ..BuildOptions::new(Head::TokenLogprob)
        };
        let program = build_stored_program(spec, &build, adapters, encodings)?;
        let sizes = Sizes::dense(limits.tokens, limits.pieces);
        let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
        let memory = MemoryPlan::new(vec![program], None)?;
        Ok(Self { memory, spec: spec.clone(), adapters: adapters.clone(), limits })
    }

    /// Bytes of weights and arena; exactly what the scorer will allocate.
    pub fn bytes(&self) -> PlannedBytes {
        self.memory.bytes()
    }
}

/// A model that is loaded to be measured.
#[derive(Debug)]
pub struct ModelScorer {
    session: Session,
    limits: ScoreLimits,
    vocab_size: usize,
}

impl ModelScorer {
    /// Allocates the plan and loads the weights.
    ///
    /// # Errors
    ///
    /// [`EvalError::Session`] without the memory, [`EvalError::Load`] if the tensors are not the
    /// model's.
    pub fn load(
        plan: ModelScorerPlan,
        cpu: Cpu,
        source: &dyn TensorSource,
    ) -> Result<Self, EvalError> {
        Self::load_adapted(plan, cpu, (source, None))
    }

    /// As [`load`](Self::load), with the weights of the plan's adapters from PEFT's tensors.
    ///
    /// # Errors
    ///
    /// As from [`load`](Self::load).
    pub fn load_adapted(
        plan: ModelScorerPlan,
        cpu: Cpu,
        (source, adapter): (&dyn TensorSource, Option<&dyn TensorSource>),
    ) -> Result<Self, EvalError> {
        let ModelScorerPlan { memory, spec, adapters, limits } = plan;
        let lent = source.lend(&spec, &memory, &cpu)?;
        let mut session = Session::to_be_loaded(memory, cpu, lent)?;
        load_weights(&mut session, &spec, source)?;
        if let Some(adapter) = adapter {
            load_adapter(&mut session, &spec, &adapters, adapter)?;
        }
        Ok(Self { session, limits, vocab_size: spec.vocab_size })
    }

    fn scorer(&mut self) -> SessionScorer<'_> {
        SessionScorer::new(&mut self.session, ProgramId(0), self.limits, self.vocab_size)
    }
}

impl TokenScorer for ModelScorer {
    fn limits(&self) -> ScoreLimits {
        self.limits
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn logprobs(&mut self, batch: &ScoreBatch<'_>) -> Result<&[f32], EvalError> {
        self.scorer().logprobs(batch)?;
        Ok(self.session.output(ProgramId(0), "logprob"))
    }
}

pub(crate) fn check_limit(name: &'static str, value: usize, max: usize) -> Result<(), EvalError> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err(EvalError::Limit { name, value, min: 1, max })
}

//! Runs of the model: pieces of sequences in, rows of logits out.
//!
//! One session holds the weights and the cache, and the same program planned for several numbers of
//! tokens; a run takes the smallest plan that holds it. All plans compute the same bits.
//!
//! A run allocates nothing: inputs are gathered in buffers as large as the largest plan, and all else
//! lies in the session's memory.

use cairn_kernels::{SeqSlot, log_sum_exp};
use cairn_program::{Feed, ProgramId, Run, RunError, Session, Sizes};
use cairn_spec::ModelSpec;

use crate::block_table::BlockCopy;
use crate::mirostat::MirostatState;
use crate::model::{Depth, Model, Piece};
use crate::request::PositionLogprobs;
use crate::sampler::{SampleContext, SampleError, Sampler, rank, top_logprobs};
use crate::sampling::SamplingParams;

/// Bounds of the programs of a plan, those of the whole model before the shallow ones, each smallest
/// first.
#[derive(Debug)]
pub(crate) struct Buckets {
    pub(crate) whole: Vec<Sizes>,
    pub(crate) shallow: Vec<Sizes>,
}

impl Buckets {
    fn largest(&self) -> Sizes {
        *self.whole.last().expect("a plan has programs")
    }

    /// The smallest program that holds a run; the largest where none does, to refuse it.
    fn program(&self, depth: Depth, run: &Sizes) -> ProgramId {
        let (first, bounds) = match depth {
            Depth::Whole => (0, &self.whole),
            Depth::Shallow => (self.whole.len(), &self.shallow),
        };
        let fits = |bound: &Sizes| {
            run.tokens <= bound.tokens
                && run.sequences <= bound.sequences
                && run.outputs <= bound.outputs
        };
        let index = bounds.iter().position(fits).unwrap_or(bounds.len().saturating_sub(1));
        ProgramId(first + index)
    }
}

/// A model as a program: its session, and the buffers of a run's inputs.
#[derive(Debug)]
pub struct Executor {
    session: Session,
    buckets: Buckets,
    spec: ModelSpec,
    sampler: Sampler,
    last: ProgramId,
    ids: Vec<u32>,
    positions: Vec<u32>,
    rows: Vec<u32>,
    /// Always empty; keeps its memory from one run to the next.
    slots: Vec<SeqSlot<'static>>,
}

impl Executor {
    /// `buckets` are the bounds of the session's programs.
    pub(crate) fn new(session: Session, buckets: Buckets, spec: ModelSpec) -> Self {
        let largest = buckets.largest();
        Self {
            session,
            buckets,
            sampler: Sampler::new(spec.vocab_size),
            spec,
            last: ProgramId(0),
            ids: Vec::with_capacity(largest.tokens),
            positions: Vec::with_capacity(largest.tokens),
            rows: Vec::with_capacity(largest.outputs),
            slots: Vec::with_capacity(largest.sequences),
        }
    }

    /// The session, to load weights and to read what it holds.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// The model.
    pub(crate) fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// As [`run`](Model::run), one token that is by itself in the cache's first block; `observe` is called
    /// with the index of each instruction and its seconds.
    pub(crate) fn run_observed(
        &mut self,
        token: u32,
        observe: &mut dyn FnMut(usize, f64),
    ) -> Result<(), RunError> {
        let piece = Piece { tokens: &[token], cached: 0, blocks: &[0], num_logits: 1 };
        self.execute(Depth::Whole, std::iter::once(piece), Some(observe))
    }

    fn execute<'a>(
        &mut self,
        depth: Depth,
        pieces: impl Iterator<Item = Piece<'a>>,
        observe: Option<&mut dyn FnMut(usize, f64)>,
    ) -> Result<(), RunError> {
        let Self { ids, positions, rows, .. } = self;
        [&mut *ids, positions, rows].into_iter().for_each(Vec::clear);
        let mut slots = recycle(std::mem::take(&mut self.slots));
        for piece in pieces {
            let (start, len) = (ids.len(), piece.tokens.len());
            ids.extend_from_slice(piece.tokens);
            positions.extend((piece.cached..piece.cached + len).map(to_u32));
            rows.extend((start + len - piece.num_logits..start + len).map(to_u32));
            slots.push(SeqSlot { start, len, cached: piece.cached, blocks: piece.blocks });
        }
        let feeds = [
            Feed::u32("ids", &self.ids),
            Feed::u32("positions", &self.positions),
            Feed::u32("rows", &self.rows),
        ];
        let run = Run { outputs: self.rows.len(), ..Run::forward(&feeds, &slots) };
        let program = self.buckets.program(depth, &run.sizes());
        let result = match observe {
            Some(observe) => self.session.run_observed(program, &run, observe),
            None => self.session.run(program, &run),
        };
        self.slots = recycle(slots);
        self.last = program;
        result
    }

    /// Logits `[v]` of the `index`-th token of the last run after which they were wanted.
    pub(crate) fn logits(&self, index: usize) -> &[f32] {
        let logits_ov = self.session.output(self.last, "logits");
        &logits_ov[index * self.spec.vocab_size..][..self.spec.vocab_size]
    }
}

impl Model for Executor {
    fn vocab_size(&self) -> usize {
        self.spec.vocab_size
    }

    fn run<'a>(
        &mut self,
        depth: Depth,
        pieces: impl Iterator<Item = Piece<'a>>,
    ) -> Result<(), RunError> {
        self.execute(depth, pieces, None)
    }

    fn keep(&mut self) -> Result<(), RunError> {
        self.session.keep_lent()
    }

    fn copy_block(&mut self, copy: BlockCopy) {
        self.session.copy_block(copy.from, copy.to);
    }

    fn choose(
        &mut self,
        row: usize,
        context: SampleContext<'_>,
        params: &SamplingParams,
        state: &mut MirostatState,
    ) -> Result<u32, SampleError> {
        let logits_ov = self.session.output(self.last, "logits");
        let logits_v = &logits_ov[row * self.spec.vocab_size..][..self.spec.vocab_size];
        self.sampler.steered(logits_v, context, params, state)
    }

    fn logprobs(&mut self, row: usize, token: u32, count: usize) -> PositionLogprobs {
        let logits_v = self.logits(row);
        let lse = log_sum_exp(self.session.cpu(), logits_v);
        PositionLogprobs {
            chosen: logits_v[token as usize] - lse,
            rank: rank(logits_v, token),
            top: top_logprobs(logits_v, lse, count),
        }
    }
}

/// An empty vector with the same memory and another lifetime.
fn recycle<'b>(mut slots: Vec<SeqSlot<'_>>) -> Vec<SeqSlot<'b>> {
    slots.clear();
    // Nothing is mapped; collecting in place keeps the allocation.
    slots.into_iter().map(|_| SeqSlot { start: 0, len: 0, cached: 0, blocks: &[] }).collect()
}

fn to_u32(position: usize) -> u32 {
    u32::try_from(position).expect("contexts and steps are limited far below 2^32 tokens")
}

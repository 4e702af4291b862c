//! The engine: requests in, events out, one step of the model at a time.
//!
//! A step first admits waiting requests in order of arrival, then fills the run: one token of every
//! sequence that decodes, then chunks of prompts in order of arrival until the step is full. A
//! request is admitted when the pool has blocks for its whole context, so nothing that runs can run
//! out of them.
//!
//! After [`Engine::generate_kept`] the keys and values of its sequence stay until another request
//! comes: the next turn of a conversation runs only what is new.
//!
//! **Invariant:** every block in use belongs to a running sequence, a beam, or the kept sequence; a
//! kept sequence is there only while nothing runs.
//! **Invariant:** tokens of a request do not depend on what else the engine does: the kernels are
//! batch invariant, and randomness is keyed by seed and position.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use cairn_kernels::{Cpu, log_sum_exp};
use cairn_model::{TensorSource, init_weights, load_adapter, load_weights};
use cairn_program::Session;
use cairn_spec::ModelSpec;

use crate::block_pool::{BlockPool, blocks_for};
use crate::block_table::BlockTable;
use crate::error::{EngineError, GenerateError, RequestError};
use crate::executor::{Executor, Piece};
use crate::options::{EngineOptions, EnginePlan};
use crate::request::{Event, Finish, Output, PositionLogprobs, Request, RequestId};
use crate::sampler::{SampleContext, SampleError, Sampler, top_logprobs};

/// A request that has a place in the cache or waits for one.
#[derive(Debug)]
struct Sequence {
    id: RequestId,
    request: Request,
    /// Prompt and output; never reallocated.
    tokens: Vec<u32>,
    /// Blocks of the tokens that have been run.
    table: BlockTable,
}

/// A sequence that has ended, with what was computed for it.
#[derive(Debug)]
struct Kept {
    /// As many tokens as the table holds.
    tokens: Vec<u32>,
    table: BlockTable,
}

impl Kept {
    /// Tokens of `prompt` whose keys are there. The last one is run in any case: its logits are
    /// what the next token is chosen by.
    fn num_common(&self, prompt: &[u32]) -> usize {
        let common = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        common.min(prompt.len().saturating_sub(1))
    }
}

impl Sequence {
    fn new(id: RequestId, request: Request, table: Option<BlockTable>) -> Self {
        let context = request.prompt.len() + request.max_new_tokens;
        let mut tokens = Vec::with_capacity(context);
        tokens.extend_from_slice(&request.prompt);
        let table = table.unwrap_or_else(|| BlockTable::with_capacity(context));
        Self { id, request, tokens, table }
    }

    /// Blocks at its longest; the last token is chosen but never run.
    fn num_blocks_max(&self) -> usize {
        blocks_for(self.request.prompt.len() + self.request.max_new_tokens - 1)
    }

    /// Tokens that have not been run.
    fn num_pending(&self) -> usize {
        self.tokens.len() - self.table.num_tokens()
    }

    fn num_new(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Why the output is complete, if it is.
    fn finish(&self) -> Option<Finish> {
        let last = self.tokens.last().filter(|_| 0 < self.num_new())?;
        if self.request.stop_tokens.contains(last) {
            return Some(Finish::Stop);
        }
        (self.num_new() == self.request.max_new_tokens).then_some(Finish::Length)
    }
}

/// A running sequence's part in a step.
#[derive(Clone, Copy, Debug)]
struct Share {
    /// Index in `running`.
    sequence: usize,
    num_tokens: usize,
    wants_logits: bool,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Tokens that were run.
    pub num_tokens: usize,
    /// Tokens that were chosen.
    pub num_new: usize,
    /// Requests that run, after the step.
    pub num_running: usize,
    /// Requests that wait, after the step.
    pub num_waiting: usize,
}

/// A model, its cache and its requests.
///
/// One thread drives it. Add requests, then call [`step`](Self::step) until nothing runs.
#[derive(Debug)]
pub struct Engine {
    pub(crate) executor: Executor,
    pub(crate) pool: BlockPool,
    spec: ModelSpec,
    options: EngineOptions,
    sampler: Sampler,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// Blocks that running sequences may come to need, together.
    reserved: usize,
    next_id: u64,
    shares: Vec<Share>,
    /// The last sequence of `generate_kept`.
    kept: Option<Kept>,
    /// Whether the sequence that runs is to be kept.
    keeps: bool,
}

impl Engine {
    /// Allocates the plan and loads the weights.
    ///
    /// # Errors
    ///
    /// [`EngineError::Session`] without the memory, [`EngineError::Load`] if the tensors are not the
    /// model's.
    pub fn load(
        plan: EnginePlan,
        cpu: Cpu,
        source: &dyn TensorSource,
    ) -> Result<Self, EngineError> {
        Self::load_adapted(plan, cpu, (source, None))
    }

    /// As [`load`](Self::load), with the weights of the plan's adapters from PEFT's tensors.
    ///
    /// # Errors
    ///
    /// As from [`load`](Self::load).
    pub fn load_adapted(
        plan: EnginePlan,
        cpu: Cpu,
        (source, adapter): (&dyn TensorSource, Option<&dyn TensorSource>),
    ) -> Result<Self, EngineError> {
        let adapters = plan.adapters.clone();
        Self::with_weights(plan, cpu, |session, spec| {
            load_weights(session, spec, source)?;
            match adapter {
                Some(adapter) => load_adapter(session, spec, &adapters, adapter),
                None => Ok(()),
            }
        })
    }

    /// Allocates the plan and fills it with fresh weights: to measure speed, not to generate text.
    ///
    /// # Errors
    ///
    /// [`EngineError::Session`] without the memory.
    pub fn with_fresh_weights(plan: EnginePlan, cpu: Cpu, seed: u64) -> Result<Self, EngineError> {
        Self::with_weights(plan, cpu, |session, spec| {
            init_weights(session, spec, seed);
            Ok(())
        })
    }

    fn with_weights(
        plan: EnginePlan,
        cpu: Cpu,
        fill: impl FnOnce(&mut Session, &ModelSpec) -> Result<(), cairn_model::LoadError>,
    ) -> Result<Self, EngineError> {
        let EnginePlan { memory, buckets, spec, options, .. } = plan;
        let mut session = Session::to_be_loaded(memory, cpu)?;
        fill(&mut session, &spec)?;
        Ok(Self {
            executor: Executor::new(session, buckets, spec.vocab_size),
            pool: BlockPool::new(options.num_blocks),
            sampler: Sampler::new(spec.vocab_size),
            waiting: VecDeque::new(),
            running: Vec::with_capacity(options.max_num_seqs),
            reserved: 0,
            next_id: 0,
            shares: Vec::with_capacity(options.max_num_seqs),
            kept: None,
            keeps: false,
            spec,
            options,
        })
    }

    /// The model.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What it was planned for.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// The session that holds weights and cache.
    pub fn session(&self) -> &Session {
        self.executor.session()
    }

    /// Blocks in use; zero when nothing runs and nothing is kept.
    pub fn num_blocks_used(&self) -> usize {
        self.pool.num_blocks() - self.pool.num_free()
    }

    /// Requests that run or wait.
    pub fn num_requests(&self) -> usize {
        self.running.len() + self.waiting.len()
    }

    /// Queues a request.
    ///
    /// # Errors
    ///
    /// [`RequestError`] says what is wrong with it, or that too many wait.
    pub fn add_request(&mut self, request: Request) -> Result<RequestId, RequestError> {
        request.check(self.spec.vocab_size, self.options.max_context)?;
        if self.options.max_num_waiting <= self.waiting.len() {
            return Err(RequestError::QueueFull { limit: self.options.max_num_waiting });
        }
        self.forget_kept();
        Ok(self.enqueue(request, None))
    }

    fn enqueue(&mut self, request: Request, table: Option<BlockTable>) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.waiting.push_back(Sequence::new(id, request, table));
        id
    }

    /// Drops a request and gives its blocks back; false if there is none of this id any more.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(index) = self.waiting.iter().position(|sequence| sequence.id == id) {
            self.waiting.remove(index);
            return true;
        }
        let Some(index) = self.running.iter().position(|sequence| sequence.id == id) else {
            return false;
        };
        self.retire(index);
        true
    }

    /// Runs one step and appends what happened to `events`.
    ///
    /// # Errors
    ///
    /// [`EngineError::Run`] only by a bug; the engine must not be used after it.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<StepReport, EngineError> {
        self.admit();
        self.schedule();
        let num_tokens = self.shares.iter().map(|share| share.num_tokens).sum();
        let before = events.len();
        if num_tokens != 0 {
            self.run_shares()?;
            self.choose_tokens(events);
        }
        let chosen = |event: &&Event| matches!(event, Event::Token { .. });
        Ok(StepReport {
            num_tokens,
            num_new: events[before..].iter().filter(chosen).count(),
            num_running: self.running.len(),
            num_waiting: self.waiting.len(),
        })
    }

    /// Moves requests from waiting to running while there is a place and blocks for all they may
    /// need. Strictly in order: a small request does not overtake a large one.
    fn admit(&mut self) {
        while let Some(next) = self.waiting.front() {
            let needed = next.num_blocks_max();
            let full = self.running.len() == self.options.max_num_seqs;
            if full || self.pool.num_blocks() < self.reserved + needed {
                return;
            }
            self.reserved += needed;
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Decides how many tokens of which sequence the step runs.
    fn schedule(&mut self) {
        self.shares.clear();
        let mut budget = self.options.max_num_batched_tokens;
        // Sequences that decode come first: their tokens are awaited.
        for decoding in [true, false] {
            for (index, sequence) in self.running.iter().enumerate() {
                let pending = sequence.num_pending();
                if (pending == 1) != decoding || budget == 0 {
                    continue;
                }
                let num_tokens = pending.min(budget);
                budget -= num_tokens;
                let wants_logits = num_tokens == pending;
                self.shares.push(Share { sequence: index, num_tokens, wants_logits });
            }
        }
    }

    fn run_shares(&mut self) -> Result<(), EngineError> {
        for share in &self.shares {
            let table = &mut self.running[share.sequence].table;
            let copy = table.append(&mut self.pool, share.num_tokens);
            let copy = copy.expect("blocks for the whole context were reserved");
            assert_eq!(copy, None, "sequences of requests share no blocks yet");
        }
        let pieces = self.shares.iter().map(|share| {
            let Sequence { tokens, table, .. } = &self.running[share.sequence];
            let end = table.num_tokens();
            let cached = end - share.num_tokens;
            let wants_logits = share.wants_logits;
            Piece { tokens: &tokens[cached..end], cached, blocks: table.blocks(), wants_logits }
        });
        Ok(self.executor.run(pieces)?)
    }

    /// Samples for every sequence whose logits are there, and retires those that are done.
    fn choose_tokens(&mut self, events: &mut Vec<Event>) {
        let mut done = Vec::new();
        let shares = self.shares.iter().filter(|share| share.wants_logits);
        for (row, share) in shares.enumerate() {
            let logits_v = self.executor.logits(row);
            let sequence = &mut self.running[share.sequence];
            let request = sequence.id;
            let cpu = self.executor.session().cpu();
            match choose(cpu, &mut self.sampler, logits_v, sequence) {
                Ok((token, logprobs)) => events.push(Event::Token { request, token, logprobs }),
                Err(error) => {
                    events.push(Event::Failed { request, error });
                    done.push(share.sequence);
                    continue;
                }
            }
            if let Some(finish) = sequence.finish() {
                events.push(Event::Finished { request, finish });
                done.push(share.sequence);
            }
        }
        // From the back, so that the indices in front stay right.
        done.sort_unstable();
        done.into_iter().rev().for_each(|index| self.retire(index));
    }

    fn retire(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        self.reserved -= sequence.num_blocks_max();
        if self.keeps {
            sequence.tokens.truncate(sequence.table.num_tokens());
            self.kept = Some(Kept { tokens: sequence.tokens, table: sequence.table });
        } else {
            sequence.table.release(&mut self.pool);
        }
    }

    /// Gives back the blocks of the kept sequence.
    pub(crate) fn forget_kept(&mut self) {
        if let Some(mut kept) = self.kept.take() {
            kept.table.release(&mut self.pool);
        }
    }

    /// Tokens at the beginning of `prompt` that [`generate_kept`](Self::generate_kept) would not
    /// have to run again.
    pub fn num_reusable(&self, prompt: &[u32]) -> usize {
        self.kept.as_ref().map_or(0, |kept| kept.num_common(prompt))
    }

    /// As [`generate`](Self::generate), but what was computed stays for the next call: a prompt that
    /// begins like the sequence before runs only the rest. The tokens are the same.
    ///
    /// # Errors
    ///
    /// As [`generate`](Self::generate).
    pub fn generate_kept(
        &mut self,
        request: Request,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Output, GenerateError> {
        self.check_idle()?;
        request.check(self.spec.vocab_size, self.options.max_context)?;
        let table = self.kept.take().map(|mut kept| {
            let common = kept.num_common(&request.prompt);
            kept.table.truncate(&mut self.pool, common);
            kept.table
        });
        let id = self.enqueue(request, table);
        self.keeps = true;
        let output = self.run_alone(id, on_token);
        self.keeps = false;
        output
    }

    /// Runs one request to its end, handing each token to `on_token` as it comes; `Break` ends the
    /// output there.
    ///
    /// # Errors
    ///
    /// [`GenerateError::Busy`] while other requests run (use [`step`](Self::step) then),
    /// [`GenerateError::Request`] if it is refused, [`GenerateError::Sample`] if no token can be
    /// chosen.
    pub fn generate(
        &mut self,
        request: Request,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Output, GenerateError> {
        self.check_idle()?;
        let id = self.add_request(request)?;
        self.run_alone(id, on_token)
    }

    /// Runs the only request to its end.
    fn run_alone(
        &mut self,
        id: RequestId,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Output, GenerateError> {
        let mut output =
            Output { tokens: Vec::new(), logprobs: Vec::new(), finish: Finish::Cancelled };
        let mut events = Vec::new();
        loop {
            self.step(&mut events)?;
            for event in events.drain(..) {
                match event {
                    Event::Token { token, logprobs, .. } => {
                        output.tokens.push(token);
                        output.logprobs.extend(logprobs);
                        if on_token(token).is_break() {
                            self.cancel(id);
                            return Ok(output);
                        }
                    }
                    Event::Finished { finish, .. } => return Ok(Output { finish, ..output }),
                    Event::Failed { error, .. } => return Err(error.into()),
                }
            }
        }
    }

    pub(crate) fn check_idle(&self) -> Result<(), GenerateError> {
        match self.num_requests() {
            0 => Ok(()),
            running => Err(GenerateError::Busy { running }),
        }
    }
}

/// Chooses a sequence's next token and appends it.
fn choose(
    cpu: &Cpu,
    sampler: &mut Sampler,
    logits_v: &[f32],
    sequence: &mut Sequence,
) -> Result<(u32, Option<PositionLogprobs>), SampleError> {
    let Sequence { request, tokens, .. } = sequence;
    let context = SampleContext { tokens, prompt_len: request.prompt.len(), stream: 0 };
    let token = sampler.sample(logits_v, context, &request.sampling)?;
    let logprobs = request.logprobs.map(|count| {
        let lse = log_sum_exp(cpu, logits_v);
        let chosen = logits_v[token as usize] - lse;
        PositionLogprobs { chosen, top: top_logprobs(logits_v, lse, count) }
    });
    tokens.push(token);
    Ok((token, logprobs))
}

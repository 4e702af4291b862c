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
//! Where the options ask for it, tokens of sequences that decode are guessed ahead and run with
//! them; see `speculation`.
//!
//! **Invariant:** every block in use belongs to a running sequence, a beam, or the kept sequence; a
//! kept sequence is there only while nothing runs.
//! **Invariant:** a step allocates nothing but what it hands out (log-probabilities, and events beyond
//! the room there was) and takes no lock.
//! **Invariant:** tokens of a request do not depend on what else the engine does: the kernels are
//! batch invariant, and randomness is keyed by seed and position.

use std::collections::VecDeque;
use std::ops::{ControlFlow, Range};
use std::time::Instant;

use cairn_kernels::{Cpu, log_sum_exp};
use cairn_model::{TensorSource, init_weights, load_adapter, load_weights};
use cairn_program::{LentWeights, Session};
use cairn_spec::ModelSpec;

use crate::block_pool::BlockPool;
use crate::block_table::BlockTable;
use crate::error::{EngineError, GenerateError, RequestError};
use crate::executor::{Depth, Executor, Piece};
use crate::options::{EngineOptions, EnginePlan};
use crate::request::{Event, Finish, Output, PositionLogprobs, Request, RequestId};
use crate::sampler::{Sampler, top_logprobs};
use crate::sampling::SamplingParams;
use crate::sequence::{Kept, Sequence};
use crate::speculation::{
    DraftFor, DraftModel, Drafter, Drafting, NUM_SPECULATIVE_TOKENS_MAX, Pace, SpeculationFigures,
    SpeculativeOptions,
};

/// Events of one step of one request, at most: tokens, and an ending.
const EVENTS_OF_ONE: usize = NUM_SPECULATIVE_TOKENS_MAX + 2;

/// A running sequence's part in a step.
#[derive(Clone, Copy, Debug)]
struct Share {
    /// Index in `running`.
    sequence: usize,
    num_tokens: usize,
    /// After how many of its last tokens a choice is made.
    num_logits: usize,
}

/// How guessing ahead goes.
#[derive(Debug)]
struct Speculation {
    options: SpeculativeOptions,
    drafter: Drafter,
    pace: Pace,
    figures: SpeculationFigures,
}

impl Speculation {
    fn new(options: SpeculativeOptions) -> Self {
        Self {
            options,
            drafter: Drafter::new(options.method),
            pace: Pace::new(options.always),
            figures: SpeculationFigures::new(options.num_speculative_tokens),
        }
    }
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
    speculation: Option<Speculation>,
    /// Sequences that the step ended, by index in `running`.
    done: Vec<usize>,
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
        let lent = source.lend(&cpu)?;
        Self::with_weights(plan, cpu, lent, |session, spec| {
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
        Self::with_weights(plan, cpu, None, |session, spec| {
            init_weights(session, spec, seed);
            Ok(())
        })
    }

    fn with_weights(
        plan: EnginePlan,
        cpu: Cpu,
        lent: Option<LentWeights>,
        fill: impl FnOnce(&mut Session, &ModelSpec) -> Result<(), cairn_model::LoadError>,
    ) -> Result<Self, EngineError> {
        let EnginePlan { memory, buckets, spec, options, .. } = plan;
        let mut session = Session::to_be_loaded(memory, cpu, lent)?;
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
            speculation: options.speculative.map(Speculation::new),
            done: Vec::with_capacity(options.max_num_seqs),
            spec,
            options,
        })
    }

    /// Makes another engine's model the one that guesses.
    ///
    /// # Errors
    ///
    /// [`EngineError::NoDraftPlanned`] if the options do not say [`DraftMethod::Model`](crate::DraftMethod::Model),
    /// [`EngineError::DraftVocabulary`] if it has other tokens.
    pub fn attach_draft(&mut self, draft: Self) -> Result<(), EngineError> {
        let Some(Speculation { drafter: Drafter::Model(model), .. }) = &mut self.speculation else {
            return Err(EngineError::NoDraftPlanned);
        };
        let vocab_size = self.spec.vocab_size;
        if draft.spec.vocab_size != vocab_size {
            let draft = draft.spec.vocab_size;
            return Err(EngineError::DraftVocabulary { draft, vocab_size });
        }
        let Self { executor, pool, sampler, options, .. } = draft;
        *model = Some(Box::new(DraftModel::new(executor, pool, sampler, options)));
        Ok(())
    }

    /// What came of guessing ahead; `None` where nothing is guessed.
    pub fn speculation(&self) -> Option<SpeculationFigures> {
        let Speculation { pace, figures, .. } = self.speculation.as_ref()?;
        let [speculating, plain] = pace.seconds_per_token();
        Some(SpeculationFigures {
            num_stops: pace.num_stops(),
            speculating_seconds_per_token: speculating,
            plain_seconds_per_token: plain,
            ..figures.clone()
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
        let begin = self.draft()?;
        let num_tokens = self.shares.iter().map(|share| share.num_tokens).sum();
        let before = events.len();
        if num_tokens != 0 {
            self.run_shares()?;
            self.choose_tokens(events);
        }
        let chosen = |event: &&Event| matches!(event, Event::Token { .. });
        let num_new = events[before..].iter().filter(chosen).count();
        self.note_pace(begin, num_new);
        Ok(StepReport {
            num_tokens,
            num_new,
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
                let num_logits = usize::from(num_tokens == pending);
                self.shares.push(Share { sequence: index, num_tokens, num_logits });
            }
        }
    }

    /// Adds guesses to the shares of sequences that decode, as far as the step has room for them.
    /// Returns when that began, if the step is one whose time says what guessing is worth: all of it
    /// decodes.
    fn draft(&mut self) -> Result<Option<Instant>, EngineError> {
        let Some(speculation) = &mut self.speculation else { return Ok(None) };
        let decodes = |share: &Share| share.num_logits == 1 && share.num_tokens == 1;
        let speculates = speculation.pace.speculates();
        if speculates {
            for share in self.shares.iter().filter(|share| decodes(share)) {
                speculation.drafter.catch_up(&self.running[share.sequence])?;
            }
        }
        let begin = self.shares.iter().all(decodes).then(Instant::now);
        if !speculates {
            return Ok(begin);
        }
        let run: usize = self.shares.iter().map(|share| share.num_tokens).sum();
        let mut budget = self.options.max_num_batched_tokens - run;
        for share in self.shares.iter_mut().filter(|share| decodes(share)) {
            let sequence = &mut self.running[share.sequence];
            let count = speculation.options.num_speculative_tokens.min(sequence.draft_length);
            let count = count.min(sequence.room_for_drafts()).min(budget);
            let Self { executor, pool, sampler, .. } = self;
            let drafting = Drafting { executor, pool, sampler };
            speculation.drafter.draft(drafting, DraftFor { sequence, count })?;
            share.num_tokens += sequence.num_drafts;
            share.num_logits += sequence.num_drafts;
            budget -= sequence.num_drafts;
        }
        Ok(begin)
    }

    /// Notes what a step in which all sequences decode has taken, and what it gave.
    fn note_pace(&mut self, begin: Option<Instant>, num_new: usize) {
        let (Some(speculation), Some(begin)) = (&mut self.speculation, begin) else { return };
        if num_new == 0 {
            return;
        }
        let seconds = begin.elapsed().as_secs_f64();
        let Speculation { pace, figures, .. } = speculation;
        if self.shares.iter().any(|share| 1 < share.num_tokens) {
            figures.num_speculating_steps += 1;
            pace.speculating(seconds, num_new);
        } else {
            figures.num_plain_steps += 1;
            pace.plain(seconds, num_new);
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
            let num_logits = share.num_logits;
            Piece { tokens: &tokens[cached..end], cached, blocks: table.blocks(), num_logits }
        });
        Ok(self.executor.run(Depth::Whole, pieces)?)
    }

    /// Samples for every sequence whose logits are there, and retires those that are done.
    fn choose_tokens(&mut self, events: &mut Vec<Event>) {
        let mut row = 0;
        for share in &self.shares {
            let rows = row..row + share.num_logits;
            row = rows.end;
            let (executor, sampler) = (&self.executor, &mut self.sampler);
            let sequence = &mut self.running[share.sequence];
            let drafted = sequence.num_drafts;
            let (accepted, ended) = choose(executor, sampler, rows, sequence, events);
            if let (1.., Some(speculation)) = (drafted, &mut self.speculation) {
                speculation.figures.note(drafted, accepted);
                let most = speculation.options.num_speculative_tokens;
                sequence.adapt_draft_length(accepted == drafted, most);
            }
            if ended {
                self.done.push(share.sequence);
            } else if share.num_logits != 0 {
                sequence.roll_back(&mut self.pool);
            }
        }
        // From the back, so that the indices in front stay right.
        self.done.sort_unstable();
        while let Some(index) = self.done.pop() {
            self.retire(index);
        }
    }

    fn retire(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        self.reserved -= sequence.num_blocks_max();
        sequence.roll_back(&mut self.pool);
        if let Some(speculation) = &mut self.speculation {
            speculation.drafter.forget(&sequence);
        }
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

    /// The log-probability of every token after `tokens`: `[v]`.
    ///
    /// # Errors
    ///
    /// As [`generate`](Self::generate).
    pub fn next_logprobs(&mut self, tokens: &[u32]) -> Result<Vec<f32>, GenerateError> {
        let request = Request::new(tokens.to_vec(), SamplingParams::greedy(), 1);
        self.generate(request, &mut |_| ControlFlow::Continue(()))?;
        // The only sequence of the last step is in its first row.
        let logits_v = self.executor.logits(0);
        let lse = log_sum_exp(self.executor.session().cpu(), logits_v);
        Ok(logits_v.iter().map(|logit| logit - lse).collect())
    }

    /// Runs the model over one token by itself and calls `observe` with the index of each instruction of
    /// the session's first program and its seconds. Kept prompts are forgotten.
    ///
    /// # Errors
    ///
    /// [`GenerateError::Busy`] with requests under way, [`GenerateError::Engine`] if the run fails.
    pub fn observe_token(
        &mut self,
        token: u32,
        observe: &mut dyn FnMut(usize, f64),
    ) -> Result<(), GenerateError> {
        self.check_idle()?;
        self.forget_kept();
        self.executor.run_observed(token, observe).map_err(EngineError::from)?;
        Ok(())
    }

    /// Runs the only request to its end.
    fn run_alone(
        &mut self,
        id: RequestId,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Output, GenerateError> {
        let room = self.waiting.back().map_or(0, |sequence| sequence.request.max_new_tokens);
        let tokens = Vec::with_capacity(room);
        let mut output = Output { tokens, logprobs: Vec::new(), finish: Finish::Cancelled };
        let mut events = Vec::with_capacity(EVENTS_OF_ONE);
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

/// Chooses tokens after the rows of logits `rows`, one after the other, as long as what was guessed
/// is what is chosen. How many guesses were right, and whether the sequence has ended.
fn choose(
    executor: &Executor,
    sampler: &mut Sampler,
    rows: Range<usize>,
    sequence: &mut Sequence,
    events: &mut Vec<Event>,
) -> (usize, bool) {
    let request = sequence.id;
    let mut accepted = 0;
    for row in rows {
        let logits_v = executor.logits(row);
        let token = match sampler.sample(logits_v, sequence.context(), &sequence.request.sampling) {
            Ok(token) => token,
            Err(error) => {
                events.push(Event::Failed { request, error });
                return (accepted, true);
            }
        };
        let logprobs = sequence.request.logprobs.map(|count| {
            let lse = log_sum_exp(executor.session().cpu(), logits_v);
            let chosen = logits_v[token as usize] - lse;
            PositionLogprobs { chosen, top: top_logprobs(logits_v, lse, count) }
        });
        events.push(Event::Token { request, token, logprobs });
        let was_guessed = sequence.push(token);
        accepted += usize::from(was_guessed);
        if let Some(finish) = sequence.finish() {
            events.push(Event::Finished { request, finish });
            return (accepted, true);
        }
        if !was_guessed {
            break;
        }
    }
    (accepted, false)
}

//! The engine: requests in, events out, one step of the model at a time.
//!
//! The [scheduler](crate::scheduler) decides who runs; the engine copies blocks, runs the model, makes
//! the choices and reports them. Keys and values stay in the cache after their request, until somebody
//! needs the room: a prompt that begins like an earlier one, the next turn of a conversation among them,
//! runs only what is new.
//!
//! Where the options ask for it, tokens of sequences that decode are guessed ahead and run with
//! them; see `speculation`.
//!
//! **Invariant:** every block in use belongs to a running sequence or a beam.
//! **Invariant:** a step that decodes allocates nothing but what it hands out (log-probabilities, and
//! events beyond the room there was) and what a request's constraint takes, and takes no lock.
//! **Invariant:** tokens of a request do not depend on what else the engine does: the kernels are
//! batch invariant, and randomness is keyed by seed and position.

mod generate;
mod load;

use std::ops::Range;
use std::time::Duration;

use crate::clock::{Clock, MonotonicClock};
use crate::error::{EngineError, GenerateError, RequestError};
use crate::executor::Executor;
use crate::model::{Depth, Model, Piece};
use crate::options::EngineOptions;
use crate::request::{Event, Finish, Request, RequestId};
use crate::scheduler::{Scheduler, Share};
use crate::sequence::Sequence;
use crate::speculation::{
    DraftFor, DraftModel, Drafter, Pace, SpeculationFigures, SpeculativeOptions,
};

/// How guessing ahead goes.
#[derive(Debug)]
struct Speculation<M> {
    options: SpeculativeOptions,
    drafter: Drafter<M>,
    pace: Pace,
    figures: SpeculationFigures,
}

impl<M: Model> Speculation<M> {
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
    /// Requests that gave way to others: they wait again.
    pub num_preempted: usize,
}

/// A model, its cache and its requests.
///
/// One thread drives it. Add requests, then call [`step`](Self::step) until nothing runs.
#[derive(Debug)]
pub struct Engine<M = Executor> {
    pub(crate) model: M,
    pub(crate) scheduler: Scheduler,
    options: EngineOptions,
    speculation: Option<Speculation<M>>,
    clock: Box<dyn Clock>,
    /// Sequences that the step ended, by index.
    done: Vec<usize>,
}

impl<M: Model> Engine<M> {
    /// An engine around a model with a cache of `options.num_blocks` blocks.
    ///
    /// # Errors
    ///
    /// [`EngineError::Limit`] names a limit that makes no engine.
    pub fn with_model(model: M, options: EngineOptions) -> Result<Self, EngineError> {
        options.check_limits()?;
        Ok(Self {
            model,
            scheduler: Scheduler::new(&options),
            speculation: options.speculative.map(Speculation::new),
            clock: Box::new(MonotonicClock::start()),
            done: Vec::with_capacity(options.max_num_seqs),
            options,
        })
    }

    /// Takes the time from another clock.
    pub fn set_clock(&mut self, clock: Box<dyn Clock>) {
        self.clock = clock;
    }

    /// Makes another engine's model the one that guesses.
    ///
    /// # Errors
    ///
    /// [`EngineError::NoDraftPlanned`] if the options do not say [`DraftMethod::Model`](crate::DraftMethod::Model),
    /// [`EngineError::DraftVocabulary`] if it has other tokens, [`EngineError::Limit`] if its cache does not
    /// hold all its sequences at their longest.
    pub fn attach_draft(&mut self, draft: Self) -> Result<(), EngineError> {
        let Some(Speculation { drafter: Drafter::Model(model), .. }) = &mut self.speculation else {
            return Err(EngineError::NoDraftPlanned);
        };
        let vocab_size = self.model.vocab_size();
        if draft.model.vocab_size() != vocab_size {
            let draft = draft.model.vocab_size();
            return Err(EngineError::DraftVocabulary { draft, vocab_size });
        }
        draft.options.check_whole_contexts()?;
        *model = Some(Box::new(DraftModel::new(draft.model, draft.options)));
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

    /// What it was planned for.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Blocks that running requests have; zero when nothing runs.
    pub fn num_blocks_used(&self) -> usize {
        self.scheduler.pool.num_blocks() - self.scheduler.pool.num_free()
    }

    /// Blocks that nobody has, whose keys and values may still serve a request.
    pub fn num_blocks_idle(&self) -> usize {
        self.scheduler.pool.num_idle()
    }

    /// Keeps what the model is lent while nothing runs: a step does so itself, and who waits for requests calls this
    /// every few seconds, so that nobody who wants to replace a mapped file waits in vain.
    ///
    /// # Errors
    ///
    /// [`EngineError`] when it is gone.
    pub fn keep(&mut self) -> Result<(), EngineError> {
        self.model.keep()?;
        if let Some(speculation) = &mut self.speculation {
            speculation.drafter.keep()?;
        }
        Ok(())
    }

    /// Forgets what requests have left in the cache; those that run go on.
    pub fn reset_prefix_cache(&mut self) {
        self.scheduler.pool.forget_idle();
    }

    /// Requests that run or wait.
    pub fn num_requests(&self) -> usize {
        self.scheduler.num_running() + self.scheduler.num_waiting()
    }

    /// Queues a request.
    ///
    /// # Errors
    ///
    /// [`RequestError`] says what is wrong with it, or that too many wait.
    pub fn add_request(&mut self, request: Request) -> Result<RequestId, RequestError> {
        request.check(self.model.vocab_size(), self.options.max_context)?;
        self.scheduler.add(request)
    }

    /// Queues a further step of what was taken as a request before: however many wait.
    ///
    /// # Errors
    ///
    /// [`RequestError`] says what is wrong with it.
    pub fn add_further(&mut self, request: Request) -> Result<RequestId, RequestError> {
        request.check(self.model.vocab_size(), self.options.max_context)?;
        self.scheduler.add_further(request)
    }

    /// Drops a request and gives its blocks back; false if there is none of this id any more.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let was_there = self.scheduler.cancel(id);
        if let (true, Some(speculation)) = (was_there, &mut self.speculation) {
            speculation.drafter.forget(id);
        }
        was_there
    }

    /// Runs one step and appends what happened to `events`.
    ///
    /// # Errors
    ///
    /// [`EngineError::Run`] only by a bug; the engine must not be used after it.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<StepReport, EngineError> {
        self.scheduler.schedule();
        let admitted = self.scheduler.admitted().iter();
        events.extend(admitted.map(|&(request, prefix)| Event::Admitted { request, prefix }));
        if let Some(speculation) = &mut self.speculation {
            let preempted = self.scheduler.preempted().iter();
            preempted.for_each(|&id| speculation.drafter.forget(id));
        }
        // Before anything is written; in order, since a copy may be copied.
        self.scheduler.copies().iter().for_each(|&copy| self.model.copy_block(copy));
        let begin = self.draft()?;
        let num_tokens = self.scheduler.shares().iter().map(|share| share.num_tokens).sum();
        let mut num_new = 0;
        if num_tokens != 0 {
            self.run_shares()?;
            num_new = self.read_rows(events);
        }
        self.note_pace(begin, num_new);
        Ok(StepReport {
            num_tokens,
            num_new,
            num_running: self.scheduler.num_running(),
            num_waiting: self.scheduler.num_waiting(),
            num_preempted: self.scheduler.preempted().len(),
        })
    }

    /// Adds guesses to the shares of sequences that decode, as far as the step has room for them.
    /// Returns when that began, if the step is one whose time says what guessing is worth: all of it
    /// decodes.
    fn draft(&mut self) -> Result<Option<Duration>, EngineError> {
        let Self { model, scheduler, speculation, clock, .. } = self;
        let Some(speculation) = speculation else { return Ok(None) };
        let speculates = speculation.pace.speculates();
        if speculates {
            for share in scheduler.shares().iter().filter(|share| share.decodes()) {
                speculation.drafter.catch_up(scheduler.sequence(share.sequence))?;
            }
        }
        let all_decode = scheduler.shares().iter().all(Share::decodes);
        let begin = all_decode.then(|| clock.now());
        if !speculates {
            return Ok(begin);
        }
        for index in 0..scheduler.shares().len() {
            let share = scheduler.shares()[index];
            if !share.decodes() {
                continue;
            }
            let wanted = scheduler.sequence(share.sequence).draft_length;
            let wanted = wanted.min(speculation.options.num_speculative_tokens);
            let count = scheduler.grant_drafts(index, wanted);
            let sequence = scheduler.sequence_mut(share.sequence);
            speculation.drafter.draft(model, DraftFor { sequence, count })?;
            scheduler.note_drafts(index);
        }
        Ok(begin)
    }

    /// Notes what a step in which all sequences decode has taken, and what it gave.
    fn note_pace(&mut self, begin: Option<Duration>, num_new: usize) {
        let (Some(speculation), Some(begin)) = (&mut self.speculation, begin) else { return };
        if num_new == 0 {
            return;
        }
        let seconds = self.clock.now().saturating_sub(begin).as_secs_f64();
        let Speculation { pace, figures, .. } = speculation;
        if self.scheduler.shares().iter().any(|share| 1 < share.num_tokens) {
            figures.num_speculating_steps += 1;
            pace.speculating(seconds, num_new);
        } else {
            figures.num_plain_steps += 1;
            pace.plain(seconds, num_new);
        }
    }

    fn run_shares(&mut self) -> Result<(), EngineError> {
        let scheduler = &self.scheduler;
        let pieces = scheduler.shares().iter().map(|share| {
            let Sequence { tokens, table, num_computed: cached, .. } =
                scheduler.sequence(share.sequence);
            let tokens = &tokens[*cached..cached + share.num_tokens];
            let num_logits = share.num_logits;
            Piece { tokens, cached: *cached, blocks: table.blocks(), num_logits }
        });
        Ok(self.model.run(Depth::Whole, pieces)?)
    }

    /// Reports what was asked about the tokens that were run, chooses the next ones, and takes leave of
    /// those that are done. How many tokens were chosen.
    fn read_rows(&mut self, events: &mut Vec<Event>) -> usize {
        let (mut row, mut num_new) = (0, 0);
        for index in 0..self.scheduler.shares().len() {
            let Self { model, scheduler, .. } = self;
            let share = scheduler.shares()[index];
            let scored = row..row + share.num_scored;
            let choices = scored.end..row + share.num_logits;
            row = choices.end;
            let sequence = scheduler.sequence_mut(share.sequence);
            if !scored.is_empty() {
                score(model, scored, sequence, events);
            }
            let ended = if share.chooses {
                let before = sequence.num_new();
                let drafted = sequence.num_drafts;
                let (accepted, ended) = choose(model, choices, sequence, events);
                num_new += sequence.num_new() - before;
                if let (1.., Some(speculation)) = (drafted, &mut self.speculation) {
                    speculation.figures.note(drafted, accepted);
                    let most = speculation.options.num_speculative_tokens;
                    sequence.adapt_draft_length(accepted == drafted, most);
                }
                ended
            } else {
                let (request, finish) = (sequence.id, Finish::Length);
                let read = sequence.num_computed + share.num_tokens == sequence.tokens.len();
                events.extend(read.then_some(Event::Finished { request, finish }));
                read
            };
            scheduler.note_run(share);
            if ended {
                self.done.push(share.sequence);
            }
        }
        self.retire_done();
        num_new
    }

    fn retire_done(&mut self) {
        // From the back, so that the indices in front stay right.
        self.done.sort_unstable();
        while let Some(index) = self.done.pop() {
            if let Some(speculation) = &mut self.speculation {
                speculation.drafter.forget(self.scheduler.sequence(index).id);
            }
            self.scheduler.remove(index);
        }
    }

    pub(crate) fn check_idle(&self) -> Result<(), GenerateError> {
        match self.num_requests() {
            0 => Ok(()),
            running => Err(GenerateError::Busy { running }),
        }
    }
}

/// Reports the log-probabilities of the tokens of a prompt that follow those of the rows.
fn score<M: Model>(
    model: &mut M,
    rows: Range<usize>,
    sequence: &Sequence,
    events: &mut Vec<Event>,
) {
    let Sequence { id, ref request, num_scored, .. } = *sequence;
    let count = request.prompt_logprobs.unwrap_or(0);
    let next = &request.prompt[num_scored + 1..];
    let logprobs = rows.zip(next).map(|(row, &token)| model.logprobs(row, token, count)).collect();
    events.push(Event::PromptLogprobs { request: id, logprobs });
}

/// Chooses tokens after the rows, one after the other, as long as what was guessed is what is chosen.
/// How many guesses were right, and whether the sequence has ended.
fn choose<M: Model>(
    model: &mut M,
    rows: Range<usize>,
    sequence: &mut Sequence,
    events: &mut Vec<Event>,
) -> (usize, bool) {
    let request = sequence.id;
    let mut accepted = 0;
    for row in rows {
        let chosen = sequence.allow(model.vocab_size()).and_then(|()| {
            let mut state = sequence.mirostat;
            let sampling = &sequence.request.sampling;
            let token = model.choose(row, sequence.context(), sampling, &mut state)?;
            sequence.mirostat = state;
            sequence.accept(token)?;
            Ok(token)
        });
        let token = match chosen {
            Ok(token) => token,
            Err(error) => {
                events.push(Event::Failed { request, error });
                return (accepted, true);
            }
        };
        let logprobs = sequence.request.logprobs.map(|count| model.logprobs(row, token, count));
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

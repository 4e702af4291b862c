//! The engine as a simulator: a model that costs nothing, a clock that is made up, and random
//! operations from a seed, against the plainest idea of what each request gives.
//!
//! The model's cache is checked whenever it is read, the scheduler's books after every step.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;

use cairn_kernels::splitmix;

use crate::clock::Clock;
use crate::constraint::Constraint;
use crate::engine::Engine;
use crate::mirostat::{MirostatParams, MirostatState, MirostatVersion};
use crate::mock::MockModel;
use crate::options::EngineOptions;
use crate::request::{Event, Finish, PositionLogprobs, Request, RequestId};
use crate::sampling::{SamplingFields, SamplingParams};
use crate::sequence::num_common;
use crate::speculation::{DraftMethod, SpeculativeOptions};

/// Random numbers from a seed.
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(1);
        usize::try_from(splitmix(self.0) % bound as u64).unwrap()
    }

    fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }
}

/// A clock that jumps ahead by anything, so that guessing is on and off at random, and now and then back, which
/// no clock should.
#[derive(Debug)]
struct WildClock {
    looks: Cell<u64>,
    now: Cell<u64>,
}

impl Clock for WildClock {
    fn now(&self) -> Duration {
        let (looks, now) = (self.looks.get() + 1, self.now.get());
        let random = splitmix(looks);
        self.looks.set(looks);
        let next = if random.is_multiple_of(16) { now / 2 } else { now + random % 1000 };
        self.now.set(next);
        Duration::from_micros(next)
    }
}

/// So many tokens, even and odd ones in turns.
#[derive(Clone, Debug)]
struct Turns {
    is_odd: bool,
    left: usize,
}

impl Constraint for Turns {
    fn allow(&mut self, allowed: &mut [u32]) -> Result<(), String> {
        allowed.fill(if self.is_odd { 0xAAAA_AAAA } else { 0x5555_5555 });
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        let goes_on = self.left != 0 && (token % 2 == 1) == self.is_odd;
        self.is_odd = !self.is_odd;
        self.left = self.left.saturating_sub(1);
        goes_on.then_some(()).ok_or_else(|| format!("{token} is not its turn"))
    }

    fn is_complete(&self) -> bool {
        self.left == 0
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// What a request must give, and what it has given.
#[derive(Debug)]
struct Expected {
    request: Request,
    tokens: Vec<u32>,
    finish: Finish,
    scores: Vec<PositionLogprobs>,
    admitted: bool,
    given: usize,
    scored: usize,
}

const VOCAB: usize = 5;
const CONTEXT: usize = 96;

#[derive(Debug)]
struct Simulator {
    dice: Dice,
    engine: Engine<MockModel>,
    live: BTreeMap<RequestId, Expected>,
    /// Salt, prompt and output of every request there was.
    said: BTreeMap<RequestId, (u64, Vec<u32>)>,
    /// Beginnings that prompts share.
    texts: Vec<Vec<u32>>,
    num_preempted: usize,
    num_cached: usize,
    num_finished: usize,
    /// Of these, how many by a constraint.
    num_constrained: usize,
}

fn options(dice: &mut Dice) -> EngineOptions {
    let max_num_seqs = 1 + dice.below(6);
    let least = crate::blocks_for(CONTEXT);
    let speculative = (!dice.chance(2)).then(|| SpeculativeOptions {
        method: [DraftMethod::Ngram, DraftMethod::Depth(1), DraftMethod::Model][dice.below(3)],
        num_speculative_tokens: 1 + dice.below(4),
        always: dice.chance(2),
    });
    EngineOptions {
        max_num_batched_tokens: max_num_seqs + dice.below(40),
        num_blocks: least + dice.below(3 * least),
        max_num_waiting: 1 + dice.below(20),
        max_num_prompt_logits: 1 + dice.below(20),
        enable_prefix_caching: !dice.chance(5),
        speculative,
        ..EngineOptions::new(max_num_seqs, CONTEXT)
    }
}

impl Simulator {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(splitmix(seed));
        let options = options(&mut dice);
        let model = MockModel::checking(VOCAB, options.num_blocks);
        let mut engine = Engine::with_model(model, options).unwrap();
        engine.set_clock(Box::new(WildClock { looks: Cell::new(seed), now: Cell::new(seed) }));
        if matches!(
            options.speculative,
            Some(SpeculativeOptions { method: DraftMethod::Model, .. })
        ) {
            let draft = EngineOptions::new(options.max_num_seqs, CONTEXT);
            let model = MockModel::checking(VOCAB, draft.num_blocks);
            engine.attach_draft(Engine::with_model(model, draft).unwrap()).unwrap();
        }
        let text = |dice: &mut Dice| (0..CONTEXT).map(|_| token(dice)).collect();
        let texts = (0..4).map(|_| text(&mut dice)).collect();
        let live = BTreeMap::new();
        Self {
            dice,
            engine,
            live,
            said: BTreeMap::new(),
            texts,
            num_preempted: 0,
            num_cached: 0,
            num_finished: 0,
            num_constrained: 0,
        }
    }

    /// A request, and what its output follows.
    fn request(&mut self) -> (Request, Option<Turns>) {
        let dice = &mut self.dice;
        let shared = dice.below(70);
        let mut prompt = self.texts[dice.below(4)][..shared].to_vec();
        let own = 1 + dice.below(20);
        prompt.extend((0..own).map(|_| token(dice)));
        let room = CONTEXT - prompt.len();
        let steering = MirostatParams::new(MirostatVersion::V2);
        let sampling = SamplingFields {
            seed: dice.below(3) as u64,
            mirostat: dice.chance(4).then_some(steering),
            ..SamplingFields::default()
        };
        let scores = dice.chance(4);
        let max_new_tokens = match dice.chance(4) {
            true if scores => 0,
            _ => 1 + dice.below(room.min(30)),
        };
        let turns = dice.chance(4);
        let turns = turns.then(|| Turns { is_odd: dice.chance(2), left: 1 + dice.below(20) });
        let request = Request {
            stop_tokens: if dice.chance(3) { vec![token(dice)] } else { Vec::new() },
            prompt_logprobs: scores.then(|| dice.below(3)),
            priority: i32::try_from(dice.below(3)).unwrap() - 1,
            choice: u32::from(dice.chance(3)),
            reuse_prefix: !dice.chance(8),
            cache_salt: u64::from(dice.chance(6)),
            constraint: turns.clone().map(|turns| turns.boxed_clone()),
            ..Request::new(prompt, SamplingParams::new(sampling).unwrap(), max_new_tokens)
        };
        (request, turns)
    }

    /// What a request gives where there is nobody and nothing else.
    fn expected(&self, request: Request, turns: Option<Turns>) -> Expected {
        let model = &self.engine.model;
        let mut all = request.prompt.clone();
        let mut finish = Finish::Length;
        let mut state = MirostatState::default();
        while all.len() < request.prompt.len() + request.max_new_tokens {
            let chosen = (&request.sampling, request.choice);
            let mut token = model.expected(&all, chosen, &mut state);
            let given = all.len() - request.prompt.len();
            let mut is_last = false;
            if let Some(Turns { is_odd, left }) = turns {
                let is_odd = is_odd != (given % 2 == 1);
                while (token % 2 == 1) != is_odd {
                    token = (token + 1) % u32::try_from(VOCAB).unwrap();
                }
                is_last = given + 1 == left;
            }
            all.push(token);
            if is_last || request.stop_tokens.contains(&token) {
                finish = Finish::Stop;
                break;
            }
        }
        let scores = request.prompt_logprobs;
        let scores = scores.map(|count| model.expected_logprobs(&request.prompt, count));
        let tokens = all.split_off(request.prompt.len());
        let scores = scores.unwrap_or_default();
        Expected { request, tokens, finish, scores, admitted: false, given: 0, scored: 0 }
    }

    fn add(&mut self) {
        let (request, turns) = self.request();
        let full = self.engine.scheduler.num_waiting() >= self.engine.options().max_num_waiting;
        match self.engine.add_request(request.clone()) {
            Ok(id) => {
                assert!(!full, "the queue has a limit");
                let expected = self.expected(request, turns);
                let all = expected.request.prompt.iter().chain(&expected.tokens).copied();
                self.said.insert(id, (expected.request.cache_salt, all.collect()));
                if self.dice.chance(2) {
                    // Others will begin with what this one is only going to say.
                    let index = self.dice.below(self.texts.len());
                    let text = expected.request.prompt.iter().chain(&expected.tokens).copied();
                    let rest = std::mem::take(&mut self.texts[index]);
                    self.texts[index] = text.chain(rest).take(CONTEXT).collect();
                }
                self.live.insert(id, expected);
            }
            Err(error) => assert!(full, "{error}"),
        }
    }

    fn cancel(&mut self) {
        let Some(index) = self.live.len().checked_sub(1).map(|last| self.dice.below(last + 1))
        else {
            return;
        };
        let id = *self.live.keys().nth(index).unwrap();
        self.live.remove(&id);
        assert!(self.engine.cancel(id));
        assert!(!self.engine.cancel(id), "it is gone");
    }

    fn step(&mut self) {
        let first = self.engine.scheduler.first();
        let before = first.and_then(|first| self.engine.scheduler.progress(first));
        let mut events = Vec::new();
        let report = self.engine.step(&mut events).unwrap();
        self.num_preempted += report.num_preempted;
        let shares = self.engine.scheduler.shares();
        let num_tokens: usize = shares.iter().map(|share| share.num_tokens).sum();
        assert!(num_tokens <= self.engine.options().max_num_batched_tokens);
        assert_eq!(
            (report.num_tokens, report.num_running + report.num_waiting),
            (num_tokens, self.engine.num_requests())
        );
        // Whoever is first and has not ended has got on.
        if let Some(first) = first.filter(|&first| self.engine.scheduler.first() == Some(first)) {
            let after = self.engine.scheduler.progress(first);
            assert_ne!(before, after, "the first of all requests did not get on");
        }
        let num_new = events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
        assert_eq!(report.num_new, num_new);
        events.into_iter().for_each(|event| self.note(event));
        self.engine.scheduler.check();
    }

    fn note(&mut self, event: Event) {
        let id = match event {
            Event::Admitted { request, .. }
            | Event::PromptLogprobs { request, .. }
            | Event::Token { request, .. }
            | Event::Finished { request, .. }
            | Event::Failed { request, .. } => request,
        };
        let expected = self.live.get_mut(&id).expect("nobody hears of it after its end");
        match event {
            Event::Admitted { prefix, .. } => {
                assert!(!std::mem::replace(&mut expected.admitted, true), "admitted twice");
                assert!(prefix.num_cached_tokens < expected.request.prompt.len());
                let may =
                    expected.request.reuse_prefix && expected.request.prompt_logprobs.is_none();
                assert!(may || prefix.num_cached_tokens == 0 || expected.request.prompt.len() == 1);
                let Request { prompt, cache_salt, .. } = &expected.request;
                let others = self
                    .said
                    .iter()
                    .filter(|&(&other, (salt, _))| other != id && salt == cache_salt);
                let common = others.map(|(_, (_, said))| num_common(prompt, said)).max();
                assert!(prefix.num_cached_tokens <= common.unwrap_or(0), "from another's salt");
                self.num_cached += prefix.num_cached_tokens;
            }
            Event::PromptLogprobs { logprobs, .. } => {
                let end = expected.scored + logprobs.len();
                assert_eq!(logprobs, expected.scores[expected.scored..end]);
                expected.scored = end;
            }
            Event::Token { token, .. } => {
                assert!(expected.admitted);
                assert_eq!(expected.scored, expected.scores.len(), "the prompt comes first");
                assert_eq!(token, expected.tokens[expected.given], "{:?}", expected.request);
                expected.given += 1;
            }
            Event::Finished { finish, .. } => {
                assert_eq!(finish, expected.finish);
                assert_eq!(expected.given, expected.tokens.len());
                assert_eq!(expected.scored, expected.scores.len());
                self.num_finished += 1;
                self.num_constrained += usize::from(expected.request.constraint.is_some());
                self.live.remove(&id);
            }
            Event::Failed { error, .. } => panic!("{error}"),
        }
    }

    /// Runs what is left, which must end within as many steps as there are tokens.
    fn drain(&mut self) {
        let left = self.live.values();
        let bound: usize =
            left.map(|expected| expected.request.prompt.len() + expected.tokens.len() + 1).sum();
        for _ in 0..bound {
            if self.live.is_empty() {
                break;
            }
            self.step();
        }
        assert!(self.live.is_empty(), "{} requests starve", self.live.len());
        assert_eq!(self.engine.num_requests(), 0);
        assert_eq!(self.engine.num_blocks_used(), 0, "a block leaked");
        self.engine.reset_prefix_cache();
        assert_eq!(self.engine.num_blocks_idle(), 0);
        self.engine.scheduler.check();
    }
}

fn token(dice: &mut Dice) -> u32 {
    u32::try_from(dice.below(VOCAB)).unwrap()
}

#[test]
fn whatever_happens_each_request_gives_what_it_gives_alone() {
    let (mut num_preempted, mut num_cached, mut num_finished, mut num_constrained) = (0, 0, 0, 0);
    for seed in 0..1000 {
        let run = || {
            let mut simulator = Simulator::new(seed);
            for _ in 0..100 {
                match simulator.dice.below(10) {
                    0..3 => simulator.add(),
                    3 if simulator.dice.chance(3) => simulator.cancel(),
                    4 if simulator.dice.chance(20) => simulator.engine.reset_prefix_cache(),
                    _ => simulator.step(),
                }
            }
            simulator.drain();
            simulator
        };
        let run = std::panic::catch_unwind(run);
        let simulator = run.unwrap_or_else(|_| panic!("seed {seed} went wrong, see above"));
        num_preempted += simulator.num_preempted;
        num_cached += simulator.num_cached;
        num_finished += simulator.num_finished;
        num_constrained += simulator.num_constrained;
    }
    // What is to be tested has happened.
    assert!(10_000 < num_finished, "{num_finished} requests finished");
    assert!(2000 < num_constrained, "{num_constrained} of them with a constraint");
    assert!(2000 < num_preempted, "{num_preempted} gave way");
    assert!(50_000 < num_cached, "{num_cached} tokens were in the cache");
}

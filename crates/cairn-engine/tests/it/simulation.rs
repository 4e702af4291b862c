//! Random requests, steps and cancellations: whatever happens around it, a request gets the tokens
//! it gets alone, in order, and blocks come back.

use std::collections::BTreeMap;

use cairn_engine::{Engine, EngineOptions, Event, Request, RequestId, SamplingFields};
use cairn_engine::{Finish, SamplingParams};
use proptest::prelude::*;

use crate::model::{engine_with, generate};

/// An engine under random operations, and one that runs each request alone.
struct Simulator {
    engine: Engine,
    alone: Engine,
    expected: BTreeMap<RequestId, Vec<u32>>,
    found: BTreeMap<RequestId, Vec<u32>>,
    events: Vec<Event>,
}

fn request(seed: u64, prompt: usize, new: usize) -> Request {
    let token = |at: usize| u32::try_from((at * at * 13 + 5 * at + prompt) % 320).unwrap();
    let sampling = SamplingFields { seed, repetition_penalty: 1.1, ..SamplingFields::default() };
    let mut request =
        Request::new((0..prompt).map(token).collect(), SamplingParams::new(sampling).unwrap(), new);
    request.stop_tokens = (0..8).collect();
    request
}

impl Simulator {
    fn new(max_num_seqs: usize, max_num_batched_tokens: usize, num_blocks: usize) -> Self {
        let options = EngineOptions {
            max_num_batched_tokens: max_num_batched_tokens.max(max_num_seqs),
            num_blocks,
            ..EngineOptions::new(max_num_seqs, 96)
        };
        Self {
            engine: engine_with("llama", options),
            alone: engine_with("llama", EngineOptions::new(1, 96)),
            expected: BTreeMap::new(),
            found: BTreeMap::new(),
            events: Vec::new(),
        }
    }

    fn add(&mut self, request: Request) {
        let tokens = generate(&mut self.alone, request.clone());
        let id = self.engine.add_request(request).unwrap();
        self.expected.insert(id, tokens);
        self.found.insert(id, Vec::new());
    }

    fn cancel(&mut self, which: usize) {
        let Some(which) = which.checked_rem(self.expected.len()) else { return };
        let id = *self.expected.keys().nth(which).unwrap();
        assert!(self.engine.cancel(id));
        self.expected.remove(&id);
    }

    fn step(&mut self) {
        let report = self.engine.step(&mut self.events).unwrap();
        assert_eq!(report.num_running + report.num_waiting, self.engine.num_requests());
        for event in self.events.drain(..) {
            match event {
                Event::Token { request, token, .. } => {
                    let found = self.found.get_mut(&request).unwrap();
                    found.push(token);
                    assert_eq!(*found, self.expected[&request][..found.len()]);
                }
                Event::Finished { request, finish } => {
                    let expected = self.expected.remove(&request).unwrap();
                    assert_eq!(self.found[&request], expected);
                    assert_eq!(finish == Finish::Stop, expected.last().is_some_and(|&t| t < 8));
                }
                Event::Failed { request, error } => panic!("{request:?}: {error}"),
            }
        }
        assert_eq!(self.engine.num_requests(), self.expected.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn requests_do_not_disturb_each_other(
        max_num_seqs in 1_usize..5,
        max_num_batched_tokens in 1_usize..40,
        spare_blocks in 0_usize..12,
        operations in prop::collection::vec(
            (0_u8..8, any::<u64>(), 1_usize..64, 1_usize..32), 1..40,
        ),
    ) {
        let mut simulator =
            Simulator::new(max_num_seqs, max_num_batched_tokens, 6 + spare_blocks);
        for (operation, seed, prompt, new) in operations {
            match operation {
                0 | 1 => simulator.add(request(seed, prompt, new)),
                2 => simulator.cancel(prompt),
                _ => simulator.step(),
            }
        }
        // Nobody starves: what is left ends within one step a token.
        let mut steps = 0;
        while simulator.engine.num_requests() != 0 {
            simulator.step();
            steps += 1;
            prop_assert!(steps < 40 * 96);
        }
        prop_assert_eq!(simulator.engine.num_blocks_used(), 0);
    }
}

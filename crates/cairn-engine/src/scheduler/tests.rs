//! Who goes first, who shares what, and who gives way.

use super::*;
use crate::engine::{Engine, StepReport};
use crate::mock::MockModel;
use crate::request::Event;
use crate::sampling::SamplingParams;

fn engine(options: EngineOptions) -> Engine<MockModel> {
    Engine::with_model(MockModel::checking(1000, options.num_blocks), options).unwrap()
}

/// A prompt of its own.
fn request(first: u32, length: usize, max_new_tokens: usize) -> Request {
    let prompt = (0..length).map(|at| (first + u32::try_from(at * at).unwrap()) % 1000).collect();
    Request::new(prompt, SamplingParams::greedy(), max_new_tokens)
}

/// A step, and whose tokens it chose.
fn step(engine: &mut Engine<MockModel>) -> (StepReport, Vec<RequestId>) {
    let mut events = Vec::new();
    let report = engine.step(&mut events).unwrap();
    engine.scheduler.check();
    let chosen = events.into_iter().filter_map(|event| match event {
        Event::Token { request, .. } => Some(request),
        _ => None,
    });
    (report, chosen.collect())
}

/// Runs until nothing is left: reports, and whose tokens came.
fn drain(engine: &mut Engine<MockModel>) -> (Vec<StepReport>, Vec<RequestId>) {
    let (mut reports, mut order) = (Vec::new(), Vec::new());
    while engine.num_requests() != 0 {
        assert!(reports.len() < 5000, "somebody starves");
        let (report, chosen) = step(engine);
        reports.push(report);
        order.extend(chosen);
    }
    (reports, order)
}

/// In which step each request's first token comes.
fn first_tokens(engine: &mut Engine<MockModel>, ids: &[RequestId]) -> Vec<usize> {
    let mut steps = vec![None; ids.len()];
    for at in 0..1000 {
        let (_, chosen) = step(engine);
        for id in chosen {
            let index = ids.iter().position(|&other| other == id).unwrap();
            steps[index].get_or_insert(at);
        }
        if steps.iter().all(Option::is_some) {
            break;
        }
    }
    steps.into_iter().map(|at| at.expect("a first token")).collect()
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let options = EngineOptions { max_num_batched_tokens: 64, ..EngineOptions::new(4, 1024) };
    let mut engine = engine(options);
    let ids = [(0, 640), (1, 30), (2, 700)]
        .map(|(first, length)| engine.add_request(request(first, length, 90)).unwrap());
    let steps = first_tokens(&mut engine, &ids);
    assert_eq!(steps[1], 0, "there was room for it in the first step");
    // Of the long ones the first has all the room that decoding leaves, after the first step.
    assert_eq!(steps[0], (640_usize - 34).div_ceil(63));
    assert!(steps[0] < steps[2]);
}

#[test]
fn of_equal_prompts_the_first_is_done_first() {
    let options = EngineOptions { max_num_batched_tokens: 64, ..EngineOptions::new(3, 1024) };
    let mut engine = engine(options);
    let ids = [0, 1, 2].map(|first| engine.add_request(request(first, 128, 90)).unwrap());
    assert_eq!(first_tokens(&mut engine, &ids), [1, 4, 6], "64 tokens a step, less those decoding");
}

#[test]
fn the_smaller_priority_takes_the_place_of_the_larger() {
    let mut engine = engine(EngineOptions::new(2, 256));
    let with = |priority, first| Request { priority, ..request(first, 20, 40) };
    let [patient, usual] = [(1, 0), (0, 1)]
        .map(|(priority, first)| engine.add_request(with(priority, first)).unwrap());
    for _ in 0..5 {
        assert_eq!(step(&mut engine).1, [usual, patient]);
    }
    let urgent = engine.add_request(with(-1, 2)).unwrap();
    let another = engine.add_request(with(0, 3)).unwrap();
    let (report, chosen) = step(&mut engine);
    assert_eq!((report.num_preempted, report.num_waiting, chosen), (1, 2, vec![usual, urgent]));
    let (_, order) = drain(&mut engine);
    // Nobody of its own priority gives way; the patient one goes last.
    let last = |id| order.iter().rposition(|&other| other == id).unwrap();
    assert!(last(usual) < last(another) && last(urgent) < last(another));
    assert!(last(another) < last(patient));
}

#[test]
fn nobody_gives_way_where_that_makes_no_room() {
    let options = EngineOptions {
        num_blocks: 100,
        max_num_batched_tokens: 2048,
        ..EngineOptions::new(4, 1600)
    };
    let mut engine = engine(options);
    let with = |priority, first, length| Request { priority, ..request(first, length, 40) };
    // 60 blocks and 10.
    let usual = engine.add_request(with(0, 0, 945)).unwrap();
    let patient = engine.add_request(with(1, 1, 145)).unwrap();
    assert_eq!(step(&mut engine).1, [usual, patient]);
    // 50 blocks do not fit beside 60, and 60 stay.
    let large = engine.add_request(with(0, 2, 785)).unwrap();
    for _ in 0..3 {
        let (report, chosen) = step(&mut engine);
        assert_eq!((report.num_preempted, chosen), (0, vec![usual, patient]));
    }
    assert!(engine.cancel(large));
    // 35 do, if the 10 go.
    let small = engine.add_request(with(0, 3, 545)).unwrap();
    let (report, chosen) = step(&mut engine);
    assert_eq!((report.num_preempted, chosen), (1, vec![usual, small]));
    drain(&mut engine);
}

/// Blocks that several have come free with the last of them.
#[test]
fn all_give_way_that_share_what_is_needed() {
    let options = EngineOptions {
        num_blocks: 40,
        max_num_batched_tokens: 2048,
        ..EngineOptions::new(8, 640)
    };
    let mut engine = engine(options);
    let ids = [(0, 0), (1, 0), (1, 1), (1, 2)].map(|(priority, choice)| {
        let first = u32::try_from(priority).unwrap();
        let length = if priority == 0 { 145 } else { 305 };
        engine.add_request(Request { priority, choice, ..request(first, length, 40) }).unwrap()
    });
    while step(&mut engine).1.len() != ids.len() {}
    // 10 blocks, and three times the same 19 with one more each.
    assert_eq!(engine.num_blocks_used(), 10 + 19 + 3);
    // Beside 10 and one to grow by there are 29.
    let large = engine.add_request(request(7, 465, 40)).unwrap();
    assert_eq!(step(&mut engine).0.num_preempted, 0);
    assert!(engine.cancel(large));
    let urgent = engine.add_request(request(7, 464, 40)).unwrap();
    let (report, chosen) = step(&mut engine);
    assert_eq!((report.num_preempted, chosen), (3, vec![ids[0], urgent]));
    drain(&mut engine);
}

/// The log-probabilities of a prompt that a step has given.
fn scored(engine: &mut Engine<MockModel>, id: RequestId) -> usize {
    let mut events = Vec::new();
    engine.step(&mut events).unwrap();
    let of_id = events.into_iter().filter_map(|event| match event {
        Event::PromptLogprobs { request, logprobs } if request == id => Some(logprobs.len()),
        _ => None,
    });
    of_id.sum()
}

#[test]
fn prompts_that_are_scored_take_the_rows_that_they_use() {
    let options = EngineOptions {
        max_num_batched_tokens: 20,
        max_num_prompt_logits: 21,
        ..EngineOptions::new(2, 256)
    };
    let mut engine = engine(options);
    let with = |first, length| Request { prompt_logprobs: Some(0), ..request(first, length, 1) };
    engine.add_request(with(0, 100)).unwrap();
    let short = engine.add_request(with(1, 12)).unwrap();
    assert_eq!(scored(&mut engine, short), 10, "the long one has half of the tokens");
    assert_eq!(scored(&mut engine, short), 1);
    drain(&mut engine);
}

#[test]
fn nobody_waits_for_a_prompt_that_is_scored() {
    let options = EngineOptions { max_num_batched_tokens: 700, ..EngineOptions::new(2, 1024) };
    let mut engine = engine(options);
    let slow = Request { prompt_logprobs: Some(0), ..request(5, 600, 1) };
    engine.add_request(slow).unwrap();
    let usual = engine.add_request(request(5, 600, 1)).unwrap();
    assert_eq!(step(&mut engine).1, [usual], "one row of logits: the other goes token by token");
    drain(&mut engine);
}

#[test]
fn blocks_are_taken_as_they_are_needed() {
    // Four contexts would take 64 blocks.
    let options = EngineOptions { num_blocks: 20, ..EngineOptions::new(4, 256) };
    let mut engine = engine(options);
    (0..4).for_each(|first| _ = engine.add_request(request(first, 20, 200)).unwrap());
    let (report, chosen) = step(&mut engine);
    assert_eq!((report.num_running, chosen.len(), engine.num_blocks_used()), (4, 4, 8));
    let (reports, order) = drain(&mut engine);
    assert!(reports.iter().any(|report| report.num_preempted != 0), "220 tokens each do not fit");
    assert_eq!(order.len(), 4 * 199, "the first tokens came before");
}

#[test]
fn one_reads_what_all_begin_with() {
    let options = EngineOptions { max_num_batched_tokens: 100, ..EngineOptions::new(8, 1024) };
    let mut engine = engine(options);
    let ids: Vec<RequestId> = (0..8)
        .map(|choice| engine.add_request(Request { choice, ..request(5, 600, 3) }).unwrap())
        .collect();
    let (mut num_run, mut cached) = (0, Vec::new());
    let mut events = Vec::new();
    for _ in 0..20 {
        num_run += engine.step(&mut events).unwrap().num_tokens;
    }
    assert_eq!(engine.num_requests(), 0);
    for event in events {
        if let Event::Admitted { prefix, request } = event {
            cached.push((request, prefix.num_cached_tokens));
        }
    }
    // The first reads all, the others what follows the last full block; then two tokens each.
    assert_eq!(num_run, 600 + 7 * (600 - 592) + 8 * 2);
    assert_eq!(cached[0], (ids[0], 0));
    assert!(cached[1..].iter().all(|&(_, num_cached_tokens)| num_cached_tokens == 592));
}

#[test]
fn what_never_fits_is_refused_and_so_is_one_too_many() {
    let options = EngineOptions { num_blocks: 4, max_num_waiting: 2, ..EngineOptions::new(1, 256) };
    let mut scheduler = Scheduler::new(&options);
    let refused = scheduler.add(request(0, 60, 6)).unwrap_err();
    assert_eq!(refused, RequestError::Blocks { needed: 5, num_blocks: 4 });
    // The last token is never run.
    scheduler.add(request(0, 60, 5)).unwrap();
    scheduler.add(request(0, 1, 1)).unwrap();
    assert_eq!(scheduler.add(request(0, 1, 1)), Err(RequestError::QueueFull { limit: 2 }));
    // What was taken before goes on.
    scheduler.add_further(request(0, 1, 1)).unwrap();
    let refused = scheduler.add_further(request(0, 60, 6)).unwrap_err();
    assert_eq!(refused, RequestError::Blocks { needed: 5, num_blocks: 4 });
}

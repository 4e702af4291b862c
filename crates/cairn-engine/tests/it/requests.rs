//! Limits, endings and refusals.

use std::ops::ControlFlow;

use cairn_engine::{
    Engine, EngineError, EngineOptions, EnginePlan, Event, Finish, GenerateError, RequestError,
};
use cairn_kernels::Cpu;
use cairn_spec::Hint;

use crate::model::{CONTEXT, engine, engine_with, generate, golden_ids, greedy, spec};

#[test]
fn a_stop_token_ends_the_output_and_is_its_last() {
    let ids = golden_ids("llama", "greedy_ids");
    let mut engine = engine("llama", 1);
    let mut request = greedy(&ids[..8], 24);
    let stop = ids[12];
    let first = ids[8..].iter().position(|&id| id == stop).unwrap();
    request.stop_tokens = vec![stop];
    let output = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(output.tokens, ids[8..=8 + first]);
    assert_eq!(output.finish, Finish::Stop);
    assert_eq!(engine.num_blocks_used(), 0);
}

#[test]
fn the_caller_can_break_off() {
    let ids = golden_ids("llama", "greedy_ids");
    let mut engine = engine("llama", 1);
    let mut left = 3;
    let output = engine
        .generate(greedy(&ids[..8], 24), &mut |_| {
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!(output.tokens, ids[8..11]);
    assert_eq!(output.finish, Finish::Cancelled);
    assert_eq!((engine.num_blocks_used(), engine.num_requests()), (0, 0));
}

#[test]
fn the_context_is_filled_to_its_last_token_and_not_beyond() {
    let mut engine = engine("gpt2", 1);
    let prompt = golden_ids("gpt2", "input_ids");
    let room = CONTEXT - prompt.len();
    assert_eq!(generate(&mut engine, greedy(&prompt, room)).len(), room);
    let error = engine.add_request(greedy(&prompt, room + 1)).unwrap_err();
    let (prompt, max_new_tokens) = (prompt.len(), room + 1);
    assert_eq!(error, RequestError::Context { prompt, max_new_tokens, max_context: CONTEXT });
    assert_eq!(error.hints(), [format!("set max_new_tokens to at most {room}")]);
}

#[test]
fn impossible_requests_are_refused() {
    let mut engine = engine("llama", 1);
    let refused = |engine: &mut Engine, request| engine.add_request(request).unwrap_err();
    assert_eq!(refused(&mut engine, greedy(&[], 1)), RequestError::EmptyPrompt);
    assert_eq!(refused(&mut engine, greedy(&[1], 0)), RequestError::NothingAsked);
    let too_far = refused(&mut engine, greedy(&[1], usize::MAX));
    assert!(matches!(too_far, RequestError::Context { .. }), "{too_far}");
    let too_far = engine.generate(greedy(&[1], usize::MAX), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(too_far, Err(GenerateError::Request(RequestError::Context { .. }))));
    let foreign = refused(&mut engine, greedy(&[1, 320], 1));
    let message = "prompt: token 320 at position 1 is not below 320";
    assert_eq!(foreign.to_string(), message);
    let mut request = greedy(&[1], 1);
    request.stop_tokens = vec![u32::MAX];
    assert!(matches!(refused(&mut engine, request), RequestError::TokenRange { .. }));
    let mut request = greedy(&[1], 1);
    request.logprobs = Some(129);
    assert_eq!(refused(&mut engine, request), RequestError::TooManyLogprobs { asked: 129 });
    assert_eq!(engine.num_requests(), 0);
}

#[test]
fn the_queue_is_bounded_and_cancelling_makes_room() {
    let options = EngineOptions { max_num_waiting: 2, ..EngineOptions::new(1, CONTEXT) };
    let mut engine = engine_with("llama", options);
    let first = engine.add_request(greedy(&[1], 20)).unwrap();
    let second = engine.add_request(greedy(&[2], 20)).unwrap();
    let full = engine.add_request(greedy(&[3], 20)).unwrap_err();
    assert_eq!(full, RequestError::QueueFull { limit: 2 });
    let mut events = Vec::new();
    engine.step(&mut events).unwrap();
    assert!(matches!(events[1], Event::Token { request, .. } if request == first));
    assert_ne!(engine.num_blocks_used(), 0);
    let busy = engine.generate(greedy(&[1], 1), &mut |_| ControlFlow::Continue(()));
    assert!(matches!(busy, Err(GenerateError::Busy { running: 2 })));
    assert!(engine.cancel(first) && engine.cancel(second));
    assert!(!engine.cancel(first), "it is gone");
    assert_eq!((engine.num_blocks_used(), engine.num_requests()), (0, 0));
    assert_eq!(engine.step(&mut events).unwrap().num_tokens, 0, "nothing to do");
}

#[test]
fn plans_out_of_range_are_refused_by_name() {
    let refused = |options: EngineOptions| match EnginePlan::new(&spec("gpt2"), options) {
        Err(EngineError::Limit { name, .. }) => name,
        Err(other) => panic!("{other}"),
        Ok(_) => "accepted",
    };
    let base = EngineOptions::new(2, 128);
    assert_eq!(refused(base), "accepted");
    assert_eq!(refused(EngineOptions { max_context: 129, ..base }), "max_context");
    assert_eq!(refused(EngineOptions { max_context: 0, ..base }), "max_context");
    assert_eq!(refused(EngineOptions { max_num_seqs: 0, ..base }), "max_num_seqs");
    let few = EngineOptions { max_num_batched_tokens: 1, ..base };
    assert_eq!(refused(few), "max_num_batched_tokens");
    assert_eq!(refused(EngineOptions { num_blocks: 7, ..base }), "num_blocks");
}

#[test]
fn planned_bytes_are_what_the_session_holds() {
    let options = EngineOptions::new(3, CONTEXT);
    let plan = EnginePlan::new(&spec("llama"), options).unwrap();
    let planned = plan.bytes();
    // 16 tokens a block; keys and values of 2 heads of 16, 4 bytes each, in 3 layers.
    assert_eq!(planned.cache, options.num_blocks * 16 * 2 * (2 * 16) * 4 * 3);
    let engine = Engine::with_fresh_weights(plan, Cpu::detect(1), 1).unwrap();
    assert_eq!(engine.session().bytes(), planned);
}

//! Conversations: the keys of one turn serve the next.

use std::ops::ControlFlow;

use cairn_engine::{Engine, EngineOptions, Request, SamplingFields, SamplingParams};

use crate::model::{CONTEXT, engine, engine_with, generate, golden_ids, greedy};

fn kept(engine: &mut Engine, request: Request) -> Vec<u32> {
    engine.generate_kept(request, &mut |_| ControlFlow::Continue(())).unwrap().tokens
}

fn sampled(prompt: &[u32], max_new_tokens: usize) -> Request {
    let fields = SamplingFields { seed: 7, repetition_penalty: 1.2, ..SamplingFields::default() };
    Request::new(prompt.to_vec(), SamplingParams::new(fields).unwrap(), max_new_tokens)
}

#[test]
fn turns_give_the_tokens_that_they_give_alone() {
    for name in ["llama", "gpt2"] {
        let ids = golden_ids(name, "greedy_ids");
        let mut chat = engine(name, 1);
        let mut history = ids[..5].to_vec();
        for turn in 0..4 {
            let reused = chat.num_reusable(&history);
            let request = if turn % 2 == 0 { greedy(&history, 9) } else { sampled(&history, 9) };
            let alone = generate(&mut engine(name, 1), request.clone());
            assert_eq!(kept(&mut chat, request), alone, "{name}, turn {turn}");
            // All but the last token of the answer has been run, and the new ones of this turn.
            assert_eq!(reused, if turn == 0 { 0 } else { history.len() - 1 - 4 }, "{name} {turn}");
            history.extend(&alone);
            history.extend([3, 1, 4, 1]);
        }
    }
}

#[test]
fn a_changed_prefix_is_run_again_from_the_change() {
    let ids = golden_ids("llama", "greedy_ids");
    let mut chat = engine("llama", 1);
    kept(&mut chat, greedy(&ids[..30], 8));
    // In the middle of a block, at its border, at the first token, and not at all.
    for change in [20, 16, 15, 0, 30] {
        let mut prompt = ids[..30].to_vec();
        if let Some(token) = prompt.get_mut(change) {
            *token = (*token + 1) % 300;
        }
        let expected = generate(&mut engine("llama", 1), greedy(&prompt, 8));
        assert!(chat.num_reusable(&prompt) <= change.min(29));
        assert_eq!(kept(&mut chat, greedy(&prompt, 8)), expected, "changed at {change}");
        // And back.
        let expected = generate(&mut engine("llama", 1), greedy(&ids[..30], 8));
        assert_eq!(kept(&mut chat, greedy(&ids[..30], 8)), expected);
    }
}

#[test]
fn what_is_kept_takes_nothing_from_others() {
    let ids = golden_ids("llama", "greedy_ids");
    let mut chat = engine_with("llama", EngineOptions::new(1, CONTEXT));
    for _ in 0..20 {
        kept(&mut chat, greedy(&ids[..30], CONTEXT - 30));
    }
    assert_ne!(chat.num_blocks_used(), 0);
    // Another request needs every block.
    let expected = generate(&mut engine("llama", 1), greedy(&ids[..8], CONTEXT - 8));
    assert_eq!(generate(&mut chat, greedy(&ids[..8], CONTEXT - 8)), expected);
    assert_eq!((chat.num_blocks_used(), chat.num_reusable(&ids)), (0, 0));
}

#[test]
fn an_answer_that_was_broken_off_is_kept_as_far_as_it_went() {
    let ids = golden_ids("llama", "greedy_ids");
    let mut chat = engine("llama", 1);
    let output =
        chat.generate_kept(greedy(&ids[..8], 20), &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!(output.tokens, ids[8..9]);
    assert_eq!(chat.num_reusable(&ids), 8);
    assert_eq!(kept(&mut chat, greedy(&ids[..12], 20)), ids[12..32]);
}

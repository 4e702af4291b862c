//! What one request leaves in the cache serves the next, and changes nothing but the time.

use std::ops::ControlFlow;

use cairn_engine::{
    DraftMethod, Engine, EngineOptions, Event, Output, PrefixEnd, PrefixOutcome, Request,
    SamplingFields, SamplingParams, SpeculativeOptions,
};
use cairn_kernels::CacheType;

use crate::model::{
    CONTEXT, causal_folders, context, engine, engine_with, generate, golden_ids, greedy, run_all,
};

fn output(engine: &mut Engine, request: Request) -> Output {
    engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// Tokens that were found.
fn cached(engine: &mut Engine, request: Request) -> (Vec<u32>, usize) {
    let Output { tokens, prefix, .. } = output(engine, request);
    (tokens, prefix.num_cached_tokens)
}

fn sampled(prompt: &[u32], max_new_tokens: usize) -> Request {
    let fields = SamplingFields { seed: 7, repetition_penalty: 1.2, ..SamplingFields::default() };
    Request::new(prompt.to_vec(), SamplingParams::new(fields).unwrap(), max_new_tokens)
}

#[test]
fn turns_give_the_tokens_that_they_give_alone() {
    for name in causal_folders() {
        let room = context(&name);
        let ids = golden_ids(&name, "input_ids");
        let mut chat = engine(&name, 1);
        let mut history = ids[..5].to_vec();
        for turn in 0.. {
            if room < history.len() + 9 {
                break;
            }
            let request = if turn % 2 == 0 { greedy(&history, 9) } else { sampled(&history, 9) };
            let alone = generate(&mut engine(&name, 1), request.clone());
            let (tokens, reused) = cached(&mut chat, request);
            assert_eq!(tokens, alone, "{name}, turn {turn}");
            // All but the last token of the answer has been run, and the new ones of this turn.
            assert_eq!(reused, if turn == 0 { 0 } else { history.len() - 1 - 4 }, "{name} {turn}");
            history.extend(&alone);
            history.extend([3, 1, 4, 1]);
        }
        assert!(5 < history.len(), "{name} had a turn");
    }
}

/// So many tokens that a model knows.
fn text(name: &str, length: usize) -> Vec<u32> {
    golden_ids(name, "input_ids").into_iter().cycle().take(length).collect()
}

#[test]
fn a_hit_changes_nothing_however_keys_are_stored_and_tokens_guessed() {
    let methods =
        [None, Some(DraftMethod::Ngram), Some(DraftMethod::Depth(1)), Some(DraftMethod::Model)];
    for name in ["llama", "gpt2", "deepseek_v2", "mixtral"] {
        for cache_type in [CacheType::F32, CacheType::Bf16, CacheType::Q8] {
            for method in methods {
                let speculative = method.map(|method| SpeculativeOptions {
                    always: true,
                    ..SpeculativeOptions::new(method, 3)
                });
                let plain = EngineOptions {
                    cache_type,
                    max_num_batched_tokens: 24,
                    ..EngineOptions::new(2, context(name))
                };
                let mut engine = engine_with(name, EngineOptions { speculative, ..plain });
                if method == Some(DraftMethod::Model) {
                    engine.attach_draft(engine_with(name, plain)).unwrap();
                }
                let off = EngineOptions { enable_prefix_caching: false, ..plain };
                let mut without = engine_with(name, off);
                // Half of each prompt is common; the ends differ inside a block and at its border.
                let requests: Vec<Request> = [30, 31, 32, 33, 48, 50]
                    .into_iter()
                    .map(|length| {
                        let mut prompt = text(name, length);
                        *prompt.last_mut().unwrap() = u32::try_from(length).unwrap();
                        Request { logprobs: Some(2), ..sampled(&prompt, 12) }
                    })
                    .collect();
                for (index, request) in requests.iter().chain(&requests).enumerate() {
                    let Output { tokens, logprobs, prefix, .. } =
                        output(&mut engine, request.clone());
                    let expected = output(&mut without, request.clone());
                    let what = format!("{name} {cache_type:?} {method:?} {index}");
                    assert_eq!((tokens, logprobs), (expected.tokens, expected.logprobs), "{what}");
                    assert_eq!(expected.prefix.end, PrefixEnd::TurnedOff);
                    assert_eq!(prefix.end == PrefixEnd::Whole, requests.len() <= index, "{what}");
                    assert!(index == 0 || 29 <= prefix.num_cached_tokens, "{what}");
                }
                assert_eq!(run_all(&mut engine, &requests), run_all(&mut without, &requests));
            }
        }
    }
}

#[test]
fn a_changed_prefix_is_run_again_from_the_change() {
    let ids = golden_ids("llama", "greedy_ids");
    let mut chat = engine("llama", 1);
    generate(&mut chat, greedy(&ids[..30], 8));
    // In the middle of a block, at its border, at the first token, and not at all.
    for change in [20, 16, 15, 0, 30] {
        let mut prompt = ids[..30].to_vec();
        if let Some(token) = prompt.get_mut(change) {
            *token = (*token + 1) % 300;
        }
        let expected = generate(&mut engine("llama", 1), greedy(&prompt, 8));
        let (tokens, reused) = cached(&mut chat, greedy(&prompt, 8));
        assert_eq!(tokens, expected, "changed at {change}");
        assert_eq!(reused, change.min(29));
        // And back.
        let expected = generate(&mut engine("llama", 1), greedy(&ids[..30], 8));
        assert_eq!(cached(&mut chat, greedy(&ids[..30], 8)), (expected, 29));
    }
}

#[test]
fn what_stays_takes_nothing_from_others_and_is_missed_by_name() {
    let ids = golden_ids("llama", "greedy_ids");
    let mut engine =
        engine_with("llama", EngineOptions { num_blocks: 8, ..EngineOptions::new(1, CONTEXT) });
    for _ in 0..20 {
        generate(&mut engine, greedy(&ids[..30], CONTEXT - 30));
    }
    assert_eq!((engine.num_blocks_used(), engine.num_blocks_idle()), (0, 8));
    let prefix = |engine: &mut Engine, prompt: &[u32]| output(engine, greedy(prompt, 1)).prefix;
    let whole = PrefixOutcome { num_cached_tokens: 29, end: PrefixEnd::Whole };
    assert_eq!(prefix(&mut engine, &ids[..30]), whole);
    // Another request needs every block.
    let other: Vec<u32> = (100..108).collect();
    let expected = generate(&mut self::engine("llama", 1), greedy(&other, CONTEXT - 8));
    assert_eq!(generate(&mut engine, greedy(&other, CONTEXT - 8)), expected);
    let evicted = PrefixOutcome { num_cached_tokens: 0, end: PrefixEnd::Evicted };
    assert_eq!(prefix(&mut engine, &ids[..30]), evicted);
    let cold = PrefixOutcome { num_cached_tokens: 0, end: PrefixEnd::Cold };
    assert_eq!(prefix(&mut engine, &[200; 40]), cold);
    engine.reset_prefix_cache();
    assert_eq!(engine.num_blocks_idle(), 0);
    assert_eq!(prefix(&mut engine, &[200; 40]), cold);
}

#[test]
fn who_does_not_share_gets_nothing() {
    let ids = golden_ids("llama", "greedy_ids");
    let mut engine = engine("llama", 1);
    let tokens = generate(&mut engine, greedy(&ids[..30], 8));
    let request = Request { reuse_prefix: false, ..greedy(&ids[..30], 8) };
    let found = output(&mut engine, request);
    assert_eq!((found.prefix.end, found.prefix.num_cached_tokens), (PrefixEnd::NotAsked, 0));
    assert_eq!(found.tokens, tokens);
    let salted = Request { cache_salt: 1, ..greedy(&ids[..30], 8) };
    assert_eq!(cached(&mut engine, salted.clone()), (tokens.clone(), 0));
    assert_eq!(cached(&mut engine, salted), (tokens, 29));
}

#[test]
fn an_answer_that_was_broken_off_stays_as_far_as_it_went() {
    let ids = golden_ids("llama", "greedy_ids");
    let mut chat = engine("llama", 1);
    let output = chat.generate(greedy(&ids[..8], 20), &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!(output.tokens, ids[8..9]);
    assert_eq!(cached(&mut chat, greedy(&ids[..12], 20)), (ids[12..32].to_vec(), 8));
}

#[test]
fn requests_that_run_together_come_to_share_blocks() {
    let mut engine = engine("llama", 4);
    (0..4).for_each(|_| _ = engine.add_request(greedy(&text("llama", 64), 20)).unwrap());
    let mut events: Vec<Event> = Vec::new();
    engine.step(&mut events).unwrap();
    // All blocks of the prompt are common once they are full.
    assert_eq!(engine.num_blocks_used(), 4);
    engine.step(&mut events).unwrap();
    assert_eq!(engine.num_blocks_used(), 4 + 1, "the others read the last block for its logits");
    engine.step(&mut events).unwrap();
    assert_eq!(engine.num_blocks_used(), 4 + 4, "then each has its own");
}

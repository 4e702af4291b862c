//! What transformers generates, and what the same weights give in other layouts and encodings.

use std::ops::ControlFlow;

use cairn_engine::{
    EngineError, EngineOptions, EnginePlan, Request, SamplingFields, SamplingParams,
};
use cairn_kernels::{CacheType, Encoding, Layout};
use cairn_model::Head;

use crate::model::{
    Uncached, bits, causal_folders, context, engine, engine_with, generate, golden_ids, greedy,
    spec,
};

fn check_greedy(name: &str) {
    let ids = golden_ids(name, "greedy_ids");
    let tokens = generate(&mut engine(name, 1), greedy(&ids[..8], ids.len() - 8));
    assert_eq!(tokens, ids[8..], "{name}");
}

#[test]
fn every_family_generates_what_transformers_does() {
    for name in causal_folders() {
        check_greedy(&name);
    }
}

#[test]
fn encoders_are_refused() {
    for name in ["bert", "modernbert"] {
        let error = EnginePlan::new(&spec(name), EngineOptions::new(1, 8)).unwrap_err();
        assert!(matches!(error, EngineError::NotCausal), "{error}");
    }
}

/// Every token, sampled with a cache, is the one that a fresh run over the whole sequence gives:
/// its log-probability has the bits that scoring gives it, in every encoding and layout.
#[test]
fn cached_log_probabilities_are_those_of_scoring() {
    for name in causal_folders() {
        let name = name.as_str();
        for encoding in Encoding::ALL {
            let options = EngineOptions { encoding, ..EngineOptions::new(1, context(name)) };
            let room = context(name);
            let prompt = golden_ids(name, "input_ids")[..19.min(room / 2)].to_vec();
            let sampling = SamplingFields { seed: 11, ..SamplingFields::default() };
            let new = 40.min(room - prompt.len());
            let request = Request {
                logprobs: Some(2),
                ..Request::new(prompt.clone(), SamplingParams::new(sampling).unwrap(), new)
            };
            let mut engine = engine_with(name, options);
            let output = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
            let chosen: Vec<f32> = output.logprobs.iter().map(|at| at.chosen).collect();
            let ids: Vec<u32> = prompt.iter().chain(&output.tokens).copied().collect();
            for layout in [Layout::Panel, Layout::RowMajor] {
                let mut scorer = Uncached::new(name, Head::TokenLogprob, (encoding, layout));
                let scored = scorer.logprobs(&ids)[prompt.len() - 1..].to_vec();
                assert_eq!(bits(&chosen), bits(&scored), "{name} {encoding} {layout:?}");
            }
        }
    }
}

#[test]
fn cached_tokens_are_uncached_tokens() {
    for name in causal_folders() {
        let name = name.as_str();
        for encoding in Encoding::ALL {
            let options = EngineOptions { encoding, ..EngineOptions::new(1, context(name)) };
            let prompt = &golden_ids(name, "input_ids")[..5];
            let tokens = generate(
                &mut engine_with(name, options),
                greedy(prompt, 50.min(context(name) - 5)),
            );
            let mut uncached = Uncached::new(name, Head::Logits, (encoding, Layout::RowMajor));
            let mut ids = prompt.to_vec();
            for token in tokens {
                let logits = uncached.last_logits(&ids);
                let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
                assert_eq!(Some(token as usize), best, "{name} {encoding} after {}", ids.len());
                ids.push(token);
            }
        }
    }
}

/// Log-probabilities of the first new token, over the whole vocabulary that is reported.
fn first_logprobs(name: &str, options: EngineOptions, prompt: &[u32]) -> Vec<(u32, u32)> {
    let reported = spec(name).vocab_size.min(100);
    let request = Request { logprobs: Some(reported), ..greedy(prompt, 1) };
    let mut engine = engine_with(name, options);
    let output = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
    output.logprobs[0].top.iter().map(|&(token, x)| (token, x.to_bits())).collect()
}

#[test]
fn every_prompt_token_is_read() {
    for name in causal_folders() {
        let name = name.as_str();
        let prompt = golden_ids(name, "input_ids")[..20.min(context(name) - 1)].to_vec();
        let options = EngineOptions::new(1, context(name));
        let base = first_logprobs(name, options, &prompt);
        for position in 0..prompt.len() {
            let mut changed = prompt.clone();
            changed[position] =
                (changed[position] + 7) % u32::try_from(spec(name).vocab_size).unwrap();
            assert_ne!(first_logprobs(name, options, &changed), base, "{name} at {position}");
        }
    }
}

#[test]
fn prefill_in_chunks_is_prefill_at_once() {
    for name in causal_folders() {
        let name = name.as_str();
        let length = 100.min(context(name) - 1);
        let prompt: Vec<u32> =
            golden_ids(name, "input_ids").into_iter().cycle().take(length).collect();
        for cache_type in [CacheType::F32, CacheType::Bf16, CacheType::Q8] {
            let options = |max_num_batched_tokens| EngineOptions {
                max_num_batched_tokens,
                cache_type,
                ..EngineOptions::new(1, context(name))
            };
            let whole = first_logprobs(name, options(128), &prompt);
            for chunk in [1, 7, 16, 33, 64, 99] {
                assert_eq!(
                    first_logprobs(name, options(chunk), &prompt),
                    whole,
                    "{name} by {chunk}"
                );
            }
        }
    }
}

#[test]
fn layouts_threads_and_plans_agree() {
    for name in causal_folders() {
        let name = name.as_str();
        let prompt = golden_ids(name, "input_ids")[..30.min(context(name) - 1)].to_vec();
        for encoding in Encoding::ALL {
            let options = EngineOptions { encoding, ..EngineOptions::new(1, context(name)) };
            let panel = first_logprobs(name, options, &prompt);
            let row_major = EngineOptions { layout: Layout::RowMajor, ..options };
            assert_eq!(first_logprobs(name, row_major, &prompt), panel, "{name} {encoding}");
        }
    }
}

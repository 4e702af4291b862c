//! Products in bf16 and in bytes: a token's numbers are its own, however prompts are cut and whoever shares the step.

use std::ops::ControlFlow;

use cairn_engine::{
    EngineError, EngineOptions, EnginePlan, Request, SamplingFields, SamplingParams,
};
use cairn_kernels::{Compute, Encoding, Layout};
use cairn_model::Head;

use crate::model::{
    Uncached, bits, causal_folders, context, engine_with, generate, golden_ids, greedy, run_all,
    spec,
};

/// Weights, and the arithmetic of the products by them.
const NARROW: [(Encoding, Compute); 4] = [
    (Encoding::Bf16, Compute::Bf16),
    (Encoding::Bf16z, Compute::Bf16),
    (Encoding::Q8, Compute::Int8),
    (Encoding::Q4, Compute::Int8),
];

fn narrow(num_seqs: usize, name: &str, (encoding, compute): (Encoding, Compute)) -> EngineOptions {
    EngineOptions { encoding, compute, ..EngineOptions::new(num_seqs, context(name)) }
}

fn in_bf16(num_seqs: usize, name: &str) -> EngineOptions {
    narrow(num_seqs, name, NARROW[0])
}

#[test]
fn weights_must_be_stored_in_what_is_multiplied() {
    for encoding in [Encoding::F32, Encoding::Q8] {
        let options = EngineOptions { encoding, ..in_bf16(1, "llama") };
        let error = EnginePlan::new(&spec("llama"), options).unwrap_err();
        let EngineError::Build(error) = error else { panic!("{error}") };
        let expected = format!(
            "bf16 products need weights stored as bf16 or bf16z; these are {}",
            encoding.name()
        );
        assert_eq!(error.to_string(), expected);
    }
}

/// Every token, chosen with a cache after a prompt in chunks, has the log-probability that one run over
/// the whole sequence gives it, in either layout; the f32 products of the same weights give others.
#[test]
fn cached_log_probabilities_are_those_of_scoring() {
    for narrowed in NARROW {
        let (encoding, compute) = narrowed;
        let mut differ = 0;
        for name in causal_folders() {
            let name = name.as_str();
            let options = EngineOptions { max_num_batched_tokens: 18, ..narrow(1, name, narrowed) };
            let room = context(name);
            let prompt = golden_ids(name, "input_ids")[..40.min(room / 2)].to_vec();
            let sampling = SamplingFields { seed: 11, ..SamplingFields::default() };
            let (sampling, new) =
                (SamplingParams::new(sampling).unwrap(), 20.min(room - prompt.len()));
            let request =
                Request { logprobs: Some(2), ..Request::new(prompt.clone(), sampling, new) };
            let mut engine = engine_with(name, options);
            let output = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
            let chosen: Vec<f32> = output.logprobs.iter().map(|at| at.chosen).collect();
            let ids: Vec<u32> = prompt.iter().chain(&output.tokens).copied().collect();
            let scored = |layout, compute| {
                let storage = (encoding, layout);
                let mut scorer =
                    Uncached::in_arithmetic(name, Head::TokenLogprob, storage, compute);
                bits(&scorer.logprobs(&ids)[prompt.len() - 1..])
            };
            for layout in Layout::ALL {
                assert_eq!(bits(&chosen), scored(layout, compute), "{name} {encoding} {layout:?}");
            }
            differ += usize::from(bits(&chosen) != scored(Layout::Panel, Compute::F32));
        }
        assert!(differ > 10, "{compute} products of {encoding} gave f32's numbers");
    }
}

#[test]
fn tokens_are_the_same_alone_and_in_a_batch() {
    for (name, narrowed) in
        ["llama", "gpt2", "mixtral", "deepseek_v2"].into_iter().flat_map(|n| NARROW.map(|w| (n, w)))
    {
        let ids = golden_ids(name, "input_ids");
        let requests: Vec<Request> = [(1, 30), (17, 9), (40, 20), (5, 1), (33, 40)]
            .into_iter()
            .enumerate()
            .map(|(index, (prompt, new))| {
                let sampling =
                    SamplingFields { seed: 7 + index as u64, ..SamplingFields::default() };
                let prompt = ids.iter().copied().cycle().skip(3 * index).take(prompt).collect();
                Request::new(prompt, SamplingParams::new(sampling).unwrap(), new)
            })
            .collect();
        let mut engine = engine_with(name, narrow(4, name, narrowed));
        let alone: Vec<Vec<u32>> =
            requests.iter().map(|request| generate(&mut engine, request.clone())).collect();
        assert_eq!(run_all(&mut engine, &requests), alone, "{name} {narrowed:?}");
        let small = EngineOptions { max_num_batched_tokens: 9, ..narrow(4, name, narrowed) };
        assert_eq!(run_all(&mut engine_with(name, small), &requests), alone, "{name} {narrowed:?}");
    }
}

/// The tokens that transformers chooses in f32, up to the first choice between two tokens that lie closer
/// together than bf16 products can tell.
#[test]
fn bf16_generates_what_transformers_does_where_margins_permit() {
    const MARGIN: f32 = 0.05;
    let (mut equal, mut all) = (0, 0);
    for name in causal_folders() {
        let name = name.as_str();
        let ids = golden_ids(name, "greedy_ids");
        let request = Request { logprobs: Some(2), ..greedy(&ids[..8], ids.len() - 8) };
        let mut engine = engine_with(name, in_bf16(1, name));
        let output = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
        for (i, (token, at)) in output.tokens.iter().zip(&output.logprobs).enumerate() {
            all += 1;
            if *token == ids[8 + i] {
                equal += 1;
                continue;
            }
            let margin = at.top[0].1 - at.top[1].1;
            assert!(margin < MARGIN, "{name}: token {i} is another by {margin}");
            break;
        }
    }
    assert!(equal * 10 > all * 8, "only {equal} of {all} tokens agree");
}

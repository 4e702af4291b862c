//! Beam search over the golden models.

use std::collections::HashMap;

use cairn_engine::{
    BeamParams, BeamRequest, EarlyStopping, EngineOptions, GenerateError, Hypothesis,
};
use cairn_kernels::{Encoding, Layout};
use cairn_model::Head;

use crate::model::{CONTEXT, Uncached, engine, engine_with, generate, golden_ids, greedy};

fn request(prompt: &[u32], beams: BeamParams, max_new_tokens: usize) -> BeamRequest {
    BeamRequest { prompt: prompt.to_vec(), beams, max_new_tokens, stop_tokens: Vec::new() }
}

#[test]
fn one_beam_is_greedy() {
    for name in ["llama", "gpt2"] {
        let mut engine = engine(name, 1);
        let prompt = &golden_ids(name, "input_ids")[..9];
        let tokens = generate(&mut engine, greedy(prompt, 40));
        let found = engine.beam_search(&request(prompt, BeamParams::new(1), 40)).unwrap();
        assert_eq!(found[0].tokens, tokens);
    }
}

/// A search that knows no cache: every hypothesis is scored by a run over all of it.
fn uncached_search(name: &str, prompt: &[u32], num_beams: usize, length: usize) -> Vec<Hypothesis> {
    let mut model = Uncached::new(name, Head::Logits, (Encoding::F32, Layout::RowMajor));
    let cpu = cairn_kernels::Cpu::detect(1);
    let mut beams: Vec<(Vec<u32>, f32)> = vec![(prompt.to_vec(), 0.0)];
    for _ in 0..length {
        let mut next: Vec<(Vec<u32>, f32)> = Vec::new();
        for (ids, score) in &beams {
            let logits = model.last_logits(ids);
            let lse = cairn_kernels::log_sum_exp(&cpu, &logits);
            for (token, logit) in (0_u32..).zip(&logits) {
                next.push((ids.iter().copied().chain([token]).collect(), score + (logit - lse)));
            }
        }
        next.sort_by(|a, b| b.1.total_cmp(&a.1));
        next.truncate(num_beams);
        beams = next;
    }
    let mean = |score: f32| score / length as f32;
    beams
        .into_iter()
        .map(|(ids, score)| Hypothesis { tokens: ids[prompt.len()..].to_vec(), score: mean(score) })
        .collect()
}

#[test]
fn shared_blocks_give_what_separate_runs_give() {
    for name in ["llama", "gpt2"] {
        // 13 prompt tokens: beams part inside a block and cross into the next.
        let prompt = &golden_ids(name, "input_ids")[..13];
        let beams = BeamParams { num_return_sequences: 4, ..BeamParams::new(4) };
        let mut engine = engine(name, 4);
        let found = engine.beam_search(&request(prompt, beams, 12)).unwrap();
        assert_eq!(found, uncached_search(name, prompt, 4, 12), "{name}");
        assert_eq!(engine.num_blocks_used(), 0, "a block leaked");
        assert_eq!(found, engine.beam_search(&request(prompt, beams, 12)).unwrap(), "again");
    }
}

#[test]
fn stop_tokens_end_hypotheses() {
    let prompt = &golden_ids("llama", "input_ids")[..6];
    let mut engine = engine("llama", 3);
    let free = engine.beam_search(&request(prompt, BeamParams::new(3), 20)).unwrap();
    let mut counts: HashMap<u32, usize> = HashMap::new();
    free[0].tokens.iter().for_each(|&token| *counts.entry(token).or_default() += 1);
    let stop = free[0].tokens[2];
    for early_stopping in
        [EarlyStopping::WhenUnlikely, EarlyStopping::AtOnce, EarlyStopping::WhenImpossible]
    {
        let beams = BeamParams { early_stopping, num_return_sequences: 3, ..BeamParams::new(3) };
        let request = BeamRequest { stop_tokens: vec![stop], ..request(prompt, beams, 20) };
        for hypothesis in engine.beam_search(&request).unwrap() {
            let at = hypothesis.tokens.iter().position(|&token| token == stop);
            assert!(at.is_none_or(|at| at + 1 == hypothesis.tokens.len()), "nothing after it");
            assert!(at.is_some() || hypothesis.tokens.len() == 20);
        }
        assert_eq!(engine.num_blocks_used(), 0);
    }
}

#[test]
fn beams_that_outgrow_the_cache_are_an_error_and_leak_nothing() {
    let options = EngineOptions { num_blocks: 9, ..EngineOptions::new(4, CONTEXT) };
    let mut engine = engine_with("llama", options);
    let error = engine.beam_search(&request(&[1, 2, 3], BeamParams::new(4), 100)).unwrap_err();
    assert!(matches!(error, GenerateError::Blocks(_)), "{error}");
    assert_eq!(engine.num_blocks_used(), 0);
    assert_eq!(generate(&mut engine, greedy(&[1, 2, 3], 5)).len(), 5, "the engine goes on");
    let many = engine.beam_search(&request(&[1], BeamParams::new(5), 1));
    assert!(matches!(many, Err(GenerateError::Beam(_))));
}

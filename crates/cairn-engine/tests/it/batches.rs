//! A request's tokens are its own, whoever shares the step.

use cairn_engine::{
    EngineOptions, MirostatParams, MirostatVersion, Request, SamplingFields, SamplingParams,
};
use cairn_kernels::{CacheType, Encoding};

use crate::model::{CONTEXT, engine_with, generate, golden_ids, run_all};

/// Requests of several lengths and settings.
fn requests(name: &str) -> Vec<Request> {
    let ids = golden_ids(name, "input_ids");
    let sampled = |seed, change: fn(&mut SamplingFields)| {
        let mut fields = SamplingFields { seed, ..SamplingFields::default() };
        change(&mut fields);
        SamplingParams::new(fields).unwrap()
    };
    let settings = [
        sampled(1, |_| ()),
        sampled(2, |f| f.temperature = 0.0),
        sampled(3, |f| (f.top_k, f.top_p) = (Some(40), Some(0.9))),
        sampled(4, |f| (f.repetition_penalty, f.no_repeat_ngram_size) = (1.3, Some(2))),
        sampled(5, |f| (f.typical_p, f.presence_penalty) = (Some(0.8), 0.7)),
        sampled(6, |f| (f.min_p, f.temperature) = (Some(0.05), 1.7)),
        sampled(7, |f| f.mirostat = Some(MirostatParams::new(MirostatVersion::V2))),
        sampled(8, |f| f.mirostat = Some(MirostatParams::new(MirostatVersion::V1))),
        sampled(9, |f| (f.tfs_z, f.eta_cutoff) = (Some(0.95), Some(1e-3))),
    ];
    let lengths =
        [(1, 40), (17, 9), (40, 30), (5, 1), (33, 60), (16, 17), (9, 30), (12, 25), (3, 20)];
    settings
        .into_iter()
        .zip(lengths)
        .enumerate()
        .map(|(index, (sampling, (prompt, new)))| {
            let prompt = ids.iter().copied().cycle().skip(3 * index).take(prompt).collect();
            Request::new(prompt, sampling, new)
        })
        .collect()
}

#[test]
fn tokens_are_the_same_alone_and_in_a_batch() {
    for name in ["llama", "gpt2", "mixtral", "deepseek_v2"] {
        for (cache_type, encoding) in [
            (CacheType::F32, Encoding::F32),
            (CacheType::Bf16, Encoding::Bf16),
            (CacheType::F32, Encoding::F16),
            (CacheType::Bf16, Encoding::Q8),
            (CacheType::Q8, Encoding::Bf16),
        ] {
            let options = EngineOptions { cache_type, encoding, ..EngineOptions::new(4, CONTEXT) };
            let mut engine = engine_with(name, options);
            let requests = requests(name);
            let alone: Vec<Vec<u32>> =
                requests.iter().map(|request| generate(&mut engine, request.clone())).collect();
            for (tokens, request) in alone.iter().zip(&requests) {
                assert_eq!(tokens.len(), request.max_new_tokens);
            }
            assert_eq!(run_all(&mut engine, &requests), alone, "{name} {encoding}");
            // Small steps mix chunks of prompts with decoding sequences in every way.
            for max_num_batched_tokens in [4, 9, 21] {
                let mut small =
                    engine_with(name, EngineOptions { max_num_batched_tokens, ..options });
                assert_eq!(run_all(&mut small, &requests), alone, "{max_num_batched_tokens}");
            }
            assert_eq!(engine.num_blocks_used(), 0, "a block leaked");
        }
    }
}

#[test]
fn requests_wait_for_blocks_and_get_them() {
    // Blocks for one context: requests run one or two at a time, and none starves.
    let options = EngineOptions { num_blocks: 8, ..EngineOptions::new(6, CONTEXT) };
    let mut engine = engine_with("llama", options);
    let requests = requests("llama");
    let together = run_all(&mut engine, &requests);
    for (tokens, request) in together.iter().zip(&requests) {
        assert_eq!(tokens, &generate(&mut engine, request.clone()));
    }
    assert_eq!(engine.num_blocks_used(), 0);
}

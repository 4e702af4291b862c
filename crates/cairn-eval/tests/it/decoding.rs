//! The arithmetic of the decode figures. How fast it is depends on the machine, and is no test.

use cairn_engine::{Engine, EngineOptions, EnginePlan};
use cairn_eval::{DecodeBench, EvalError, bench_decode};
use cairn_kernels::{Cpu, Encoding};

use crate::model::spec;

fn engine(name: &str, encoding: Encoding) -> Engine {
    let options = EngineOptions { encoding, ..EngineOptions::new(1, 64) };
    let plan = EnginePlan::new(&spec(name), options).unwrap();
    Engine::with_fresh_weights(plan, Cpu::detect(1), 1).unwrap()
}

#[test]
fn figures_count_the_bytes_that_a_token_reads() {
    let mut llama = engine("llama", Encoding::F32);
    let bench = DecodeBench { prompt: vec![1; 8], num_new: 9, repetitions: 2, keeps_prompt: false };
    let found = bench_decode(&mut llama, &bench).unwrap();
    // Untied: the head is read whole, of the embedding one row. 64 wide, 160 inside, 3 layers.
    let layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160 + 2 * 64;
    assert_eq!(found.weight_bytes, 4 * (3 * layer + 64 + 320 * 64 + 64));
    // Keys and values of 12.5 tokens in the mean: 3 layers, 2 heads of 16.
    assert!((found.cache_bytes - 12.5 * 3.0 * 2.0 * 32.0 * 4.0).abs() < 1e-9);
    assert_eq!((found.tokens_per_s.len(), found.prefill_tokens_per_s.len()), (2, 2));
    let bytes = found.tokens_per_s_median * (found.weight_bytes as f64 + found.cache_bytes);
    assert!((found.bytes_per_s - bytes).abs() < 1e-6 * bytes);
    assert!((found.bandwidth_share * found.bandwidth.gbs * 1e9 - bytes).abs() < 1e-6 * bytes);
    assert_eq!(llama.num_blocks_used(), 0);
}

#[test]
fn a_tied_embedding_is_read_whole_and_positions_by_row() {
    let mut gpt2 = engine("gpt2", Encoding::Bf16);
    let bench = DecodeBench { prompt: vec![1; 2], num_new: 2, repetitions: 1, keeps_prompt: false };
    let found = bench_decode(&mut gpt2, &bench).unwrap();
    let d = 48_u64;
    let matrices = 3 * (4 * d * d + 2 * d * 4 * d) + 320 * d;
    let vectors = 3 * (4 * d + 4 * d + d + 4 * d) + 2 * d;
    // Positions are a table: one row of it, bf16.
    assert_eq!(found.weight_bytes, 2 * matrices + 4 * vectors + 2 * d);
}

#[test]
fn a_prompt_that_is_kept_is_read_once() {
    let mut llama = engine("llama", Encoding::F32);
    let bench = DecodeBench { prompt: vec![1; 8], num_new: 9, repetitions: 3, keeps_prompt: true };
    let found = bench_decode(&mut llama, &bench).unwrap();
    assert_eq!((found.tokens_per_s.len(), found.prefill_tokens_per_s.len()), (3, 1));
    assert_eq!(found.speculation, None);
}

#[test]
fn impossible_benches_are_refused() {
    let mut llama = engine("llama", Encoding::F32);
    let bench = DecodeBench { prompt: vec![1], num_new: 64, repetitions: 1, keeps_prompt: false };
    let too_long = bench_decode(&mut llama, &bench);
    assert!(matches!(too_long, Err(EvalError::Request(_))));
    let none = DecodeBench { repetitions: 0, num_new: 2, ..bench.clone() };
    assert!(matches!(bench_decode(&mut llama, &none), Err(EvalError::Limit { .. })));
    let one = DecodeBench { num_new: 1, ..bench };
    assert!(matches!(bench_decode(&mut llama, &one), Err(EvalError::Limit { .. })));
}

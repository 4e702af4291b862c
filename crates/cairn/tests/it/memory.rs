//! Predicted memory is actual memory: plans against fresh processes that carry them out.

use serde_json::Value;

use crate::{cairn, succeed};

/// The prediction may miss the measured anonymous memory by this share.
const TOLERANCE: f64 = 0.05;
/// Smaller plans say little: the process itself weighs too much.
const BYTES_MIN: f64 = 256.0 * 1024.0 * 1024.0;

/// A recipe whose memory the cases below put together in different ways.
const RECIPE: &str = r#"
schema = "train/2"
[run]
name = "memory"
threads = 2
[model]
family = "llama"
vocab_size = 1024
hidden_size = 256
num_hidden_layers = 4
num_attention_heads = 4
intermediate_size = 688
tie_word_embeddings = true
[data]
corpus = "none"
seq_len = 128
[optimizer]
learning_rate = 1e-3
[batch]
micro_batch_size = 4
[budget]
steps = 10
"#;

/// Weights and moments of a wide vocabulary; activations of many tokens, kept, partly and wholly
/// computed again; bf16 weights with masters; an average; adapters beside frozen weights of 8 and 16
/// bits; biases and learned positions.
const CASES: [&[&str]; 10] = [
    &["model.vocab_size=50257"],
    &["model.vocab_size=50257", "run.weights=\"bf16\"", "optimizer.ema_decay=0.99"],
    &["batch.micro_batch_size=32", "run.recompute=\"none\""],
    &["batch.micro_batch_size=32", "run.recompute=\"auto\""],
    &["batch.micro_batch_size=48", "run.recompute=2"],
    &["batch.micro_batch_size=64", "run.recompute=\"blocks\"", "model.num_hidden_layers=6"],
    &["model.vocab_size=16000", "data.seq_len=512", "batch.micro_batch_size=8"],
    &[
        "model.initial=none",
        "adapter.r=16",
        "adapter.base_encoding=q8",
        "model.hidden_size=1024",
        "model.num_hidden_layers=6",
        "model.intermediate_size=2816",
        "model.vocab_size=32000",
        "run.recompute=\"cheap\"",
    ],
    &[
        "model.initial=none",
        "adapter.r=8",
        "adapter.lora_dropout=0.1",
        "adapter.base_encoding=bf16",
        "model.hidden_size=768",
        "model.intermediate_size=2048",
        "batch.micro_batch_size=16",
    ],
    &["model.family=\"gpt2\"", "model.vocab_size=40000", "model.max_position_embeddings=256"],
];

#[test]
fn predicted_memory_is_actual_memory() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("memory.toml");
    std::fs::write(&recipe, RECIPE).unwrap();
    let mut large = 0;
    for overrides in CASES {
        let mut command = cairn(["bench", "train"]);
        command.arg(&recipe).args(overrides).args(["--steps", "1", "--json"]);
        let record: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
        let figure = |name: &str| record["figures"][name].as_f64().unwrap();
        let (predicted, actual) = (figure("predicted_bytes"), figure("anonymous_bytes"));
        let miss = (predicted - actual) / actual;
        assert!(miss.abs() <= TOLERANCE, "{overrides:?}: {predicted} predicted, {actual} measured");
        large += usize::from(actual >= BYTES_MIN);
    }
    assert!(large >= 6, "only {large} of the plans are large enough to count");
}

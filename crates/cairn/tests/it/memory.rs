//! Predicted memory is actual memory: plans against fresh processes that carry them out.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use cairn_artifacts::safetensors::{self, OutTensor};
use cairn_spec::{DType, ModelSpec};
use serde_json::Value;

use crate::{cairn, golden, succeed};

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

/// Bytes of a shard of the model below: far fewer than the model has, more than its largest tensor and
/// than the rest of the process varies by.
const SHARD_BYTES: usize = 32 << 20;
/// A model of 57 million parameters, so that it weighs more than the process.
const LARGE: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 2048, "max_position_embeddings": 64, "tie_word_embeddings": false}"#;

/// A folder of the model in shards, every weight the same small number.
fn large_model(folder: &Path, dtype: DType) {
    let spec = ModelSpec::from_hf_json(LARGE).unwrap();
    let element: &[u8] = match dtype {
        DType::F32 => &[0, 0, 0, 0x3c],
        DType::Bf16 => &[0, 0x3c],
        _ => &[0, 0x20],
    };
    let tensors = cairn_model::tensors(&spec);
    let largest = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).max().unwrap();
    let bytes = element.repeat(largest);
    let tensors = tensors.iter().map(|(name, shape)| {
        let len = element.len() * shape.iter().product::<usize>();
        OutTensor::bytes(name.as_str(), dtype, shape, &bytes[..len])
    });
    safetensors::write_sharded(tensors.collect(), SHARD_BYTES, |name, contents| match contents {
        safetensors::Contents::Tensors(tensors) => {
            let mut file = File::create(folder.join(name))?;
            safetensors::write(&mut file, tensors, &BTreeMap::new()).map(|_| ())
        }
        safetensors::Contents::Index(index) => std::fs::write(folder.join(name), index.to_string()),
    })
    .unwrap();
    std::fs::write(folder.join("config.json"), LARGE).unwrap();
}

/// What loading took of memory: planned, and the most there ever was, mapped files included.
fn load_bytes(model: &Path, dtype: &str) -> (f64, f64) {
    let mut command = cairn(["bench", "decode", "--json", "--dtype", dtype, "--model"]);
    command.arg(model).args(["--prompt-tokens", "1", "--new-tokens", "2", "--repetitions", "1"]);
    let record: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
    let load = &record["figures"]["load"];
    (load["planned_bytes"].as_f64().unwrap(), load["peak_bytes"].as_f64().unwrap())
}

#[test]
fn loading_takes_the_model_and_no_more_than_a_shard() {
    let (planned, peak) = load_bytes(&golden("llama"), "auto");
    // Code, stacks and scratch memory, whatever the model.
    let process = peak - planned;
    for (stored, kept) in [(DType::F32, "f32"), (DType::Bf16, "bf16"), (DType::F16, "f16")] {
        let folder = tempfile::tempdir().unwrap();
        large_model(folder.path(), stored);
        let (whole, _) = load_bytes(folder.path(), kept);
        let shards = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap());
        let shard = shards.map(|file| file.metadata().unwrap().len()).max().unwrap() as f64;
        for dtype in ["auto", "f32", "bf16", "f16", "q8"] {
            let (planned, peak) = load_bytes(folder.path(), dtype);
            assert!(planned > 1.5 * shard, "{planned} bytes say little");
            assert!(dtype != "auto" || planned.to_bits() == whole.to_bits(), "kept as {kept}");
            assert!(
                peak <= planned + shard + process,
                "{stored} as {dtype}: {peak} bytes, {planned} planned, {process} without a model"
            );
        }
    }
}

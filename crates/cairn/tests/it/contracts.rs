//! The commands that outside checks use, against what transformers computes.

use cairn_artifacts::safetensors::SafetensorsFile;

use serde_json::Value;

use crate::{cairn, golden, succeed};

/// Against transformers in f32, per element: 1e-4 · max(1, max|reference|).
const TOLERANCE: f32 = 1e-4;

fn check_logits(name: &str) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    let input = golden(name).join("golden.safetensors");
    let mut command = cairn(["logits", "--model"]);
    command.arg(golden(name)).arg("--input").arg(&input).arg("--output").arg(&output);
    assert_eq!(succeed(&mut command), "", "nothing but the file is asked for");
    let expected = SafetensorsFile::open(&input).unwrap();
    let actual = SafetensorsFile::open(&output).unwrap();
    let mut compared = 0;
    for tensor in expected.tensors() {
        if tensor.name != "logits" && !tensor.name.starts_with("hidden_") {
            continue;
        }
        let found = actual.tensor(tensor.name).unwrap();
        assert_eq!(found.shape, tensor.shape, "{name} {}", tensor.name);
        let (found, wanted) = (found.to_f32().unwrap(), tensor.to_f32().unwrap());
        let largest = wanted.iter().fold(1.0_f32, |largest, x| largest.max(x.abs()));
        let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= TOLERANCE * largest, "{name} {}: off by {worst}", tensor.name);
        compared += 1;
    }
    assert_eq!(compared, actual.tensors().len(), "every output has its reference");
}

#[test]
fn logits_of_llama_are_those_of_transformers() {
    check_logits("llama");
}

#[test]
fn logits_of_a_sharded_llama_are_those_of_transformers() {
    check_logits("llama_sharded");
}

#[test]
fn logits_of_gpt2_are_those_of_transformers() {
    check_logits("gpt2");
}

fn generate(name: &str, more: &[&str]) -> (Vec<i64>, Vec<i64>) {
    let golden_file = SafetensorsFile::open(&golden(name).join("golden.safetensors")).unwrap();
    let expected = golden_file.tensor("greedy_ids").unwrap().to_i64().unwrap();
    let prompt: Vec<String> = expected[..8].iter().map(i64::to_string).collect();
    let mut command = cairn(["generate", "--model"]);
    command.arg(golden(name)).args(["--prompt-ids", &prompt.join(","), "--json"]);
    command.args(["--max-new-tokens", "24", "--temperature", "0"]).args(more);
    let object: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
    assert_eq!(object["num_new_tokens"], 24);
    let ids = object["token_ids"].as_array().unwrap();
    (ids.iter().map(|id| id.as_i64().unwrap()).collect(), expected)
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for name in ["llama", "llama_sharded", "gpt2"] {
        let (actual, expected) = generate(name, &[]);
        assert_eq!(actual, expected, "{name}");
    }
}

#[test]
fn tokens_depend_on_neither_threads_nor_quiet() {
    let (one, expected) = generate("llama", &["--threads", "1", "--quiet"]);
    assert_eq!(one, expected);
}

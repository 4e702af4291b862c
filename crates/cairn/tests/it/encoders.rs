//! Encoders as a user has them: embeddings and masks, against transformers.

use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use crate::{cairn, golden, shown, succeed};

/// The small BERT with a tokenizer of word pieces.
fn model() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: &Path, name: &str| {
        std::fs::copy(from.join(name), folder.path().join(name)).unwrap();
    };
    for name in ["config.json", "model.safetensors"] {
        copy(&golden("bert"), name);
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        copy(&golden("tokenizers/word_piece"), name);
    }
    folder
}

fn expected() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("embeddings.json")).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn embed(folder: &Path, arguments: &[&str], texts: &[&str]) -> Value {
    let mut command = cairn(["embed", "--json", "--model"]);
    command.arg(folder).args(arguments).arg("--").args(texts);
    serde_json::from_str(&succeed(&mut command)).unwrap()
}

#[test]
fn embeddings_are_those_of_transformers() {
    let folder = model();
    let expected = expected();
    let cases = expected["embeddings"].as_array().unwrap();
    let texts: Vec<&str> = cases.iter().map(|case| case["text"].as_str().unwrap()).collect();
    for pooling in ["mean", "cls", "last"] {
        let found = embed(folder.path(), &["--pooling", pooling], &texts);
        for (case, vector) in cases.iter().zip(found["embeddings"].as_array().unwrap()) {
            let (found, wanted) = (numbers(vector), numbers(&case[pooling]));
            let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-5 && 0.999_999 < cosine(&found, &wanted), "{pooling} {worst}");
        }
        let counts: Vec<Value> = cases.iter().map(|case| case["num_tokens"].clone()).collect();
        assert_eq!(found["num_tokens"], Value::from(counts));
    }
}

#[test]
fn a_text_is_embedded_alike_alone_and_among_others() {
    let folder = model();
    let together = embed(folder.path(), &["--pooling", "mean"], &["one stone", "two", "the way"]);
    let alone = embed(folder.path(), &["--pooling", "mean"], &["two"]);
    assert_eq!(together["embeddings"][1], alone["embeddings"][0]);
    let unit = embed(folder.path(), &["--pooling", "mean", "--normalize"], &["two"]);
    let squares: f64 = numbers(&unit["embeddings"][0]).iter().map(|x| x * x).sum();
    assert!((squares - 1.0).abs() < 1e-6);
}

#[test]
fn masks_are_filled_as_by_transformers() {
    let folder = model();
    for case in expected()["masks"].as_array().unwrap() {
        let mut command = cairn(["fill-mask", "--json", "--model"]);
        command.arg(folder.path()).arg(case["text"].as_str().unwrap());
        let found: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
        let masks = found["masks"].as_array().unwrap();
        assert_eq!(masks.len(), case["token_ids"].as_array().unwrap().len());
        for (at, guesses) in masks.iter().enumerate() {
            for (rank, guess) in guesses.as_array().unwrap().iter().enumerate() {
                assert_eq!(guess["token_id"], case["token_ids"][at][rank], "{found}");
                let wanted = case["probabilities"][at][rank].as_f64().unwrap();
                assert!((guess["probability"].as_f64().unwrap() - wanted).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn what_cannot_be_done_is_refused_with_what_can() {
    let folder = model();
    let long = "stone ".repeat(300);
    for (arguments, part) in [
        (vec!["embed", "x"], "--pooling mean"),
        (vec!["embed", "--pooling", "cls", long.as_str()], "--truncate"),
        (vec!["fill-mask", "no mask"], "write [MASK]"),
        (vec!["fill-mask", "[MASK]", "--top-k", "0"], "--top-k is 0"),
    ] {
        let mut command = cairn(&arguments[..1]);
        let output = command.arg("--model").arg(folder.path()).args(&arguments[1..]).output();
        let text = shown(&output.unwrap(), None);
        assert!(text.starts_with("exit 1\n") && text.contains(part), "{text}");
    }
    let cut = embed(folder.path(), &["--pooling", "cls", "--truncate"], &[&long]);
    assert_eq!(cut["num_tokens"], serde_json::json!([256]));
    let mut command = cairn(["fill-mask", "--model"]);
    let text = shown(&command.arg(golden("llama")).arg("[MASK]").output().unwrap(), None);
    assert!(text.contains("was not made to fill masks"), "{text}");
}

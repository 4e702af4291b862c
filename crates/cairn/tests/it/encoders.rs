//! Encoders as a user has them: embeddings and masks, against transformers.

use std::path::Path;

use cairn_artifacts::safetensors::{self, OutTensor, SafetensorsFile};
use cairn_data::tokenizer::{SpelledSpecials, Tokenizer};
use serde_json::Value;
use tempfile::TempDir;

use crate::workplace::Workplace;
use crate::{cairn, golden, shown, succeed};

/// The small BERT with a tokenizer of word pieces.
pub(crate) fn model() -> TempDir {
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

pub(crate) fn embed(folder: &Path, arguments: &[&str], texts: &[&str]) -> Value {
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

/// The file decides what stands around a text and what a mask is.
#[test]
fn tokenizers_without_the_tokens_of_encoders_are_told() {
    let folder = model();
    let path = folder.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&text).unwrap();
    let run = |arguments: &[&str], tokenizer: &Value| {
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let mut command = cairn(&arguments[..1]);
        let command = command.arg("--model").arg(folder.path()).args(&arguments[1..]);
        shown(&command.output().unwrap(), None)
    };
    let embed = ["embed", "--pooling", "cls", "--json", "a cairn"];
    let around = run(&embed, &tokenizer);
    assert!(around.contains("\"num_tokens\":[4]") && !around.contains("[CLS]"), "{around}");
    tokenizer["post_processor"] = Value::Null;
    for arguments in [&embed[..], &["fill-mask", "a [MASK]"]] {
        let bare = run(arguments, &tokenizer);
        assert!(bare.contains("puts no [CLS] and [SEP] around texts"), "{bare}");
    }
    assert!(run(&embed, &tokenizer).contains("\"num_tokens\":[2]"));
    for token in tokenizer["added_tokens"].as_array_mut().unwrap() {
        if token["content"] == "[MASK]" {
            token["content"] = "[BLANK]".into();
        }
    }
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let id = vocab.remove("[MASK]").unwrap();
    vocab.insert("[BLANK]".to_owned(), id);
    let refused = run(&["fill-mask", "a [MASK]"], &tokenizer);
    let contradiction = "mask_token is \"[MASK]\", which tokenizer.json does not have";
    assert!(refused.starts_with("exit 1\n") && refused.contains(contradiction), "{refused}");
    std::fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
    let refused = run(&["fill-mask", "a [MASK]"], &tokenizer);
    assert!(refused.starts_with("exit 1\n") && refused.contains("has no mask token"), "{refused}");
    assert!(refused.contains("mask_token of tokenizer_config.json"), "{refused}");
}

#[test]
fn modernbert_embeds_what_its_hidden_states_say() {
    let folder = tempfile::tempdir().unwrap();
    for (from, name) in [
        ("modernbert", "config.json"),
        ("modernbert", "model.safetensors"),
        ("tokenizers/word_piece", "tokenizer.json"),
    ] {
        std::fs::copy(golden(from).join(name), folder.path().join(name)).unwrap();
    }
    // Longer than the local windows of its layers.
    let text = "a cairn is a stack of stones that shows the way ".repeat(4);
    let found = embed(folder.path(), &["--pooling", "mean"], &[&text]);
    let tokenizer = Tokenizer::load(&folder.path().join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode_for_model(&text, SpelledSpecials::Text).unwrap();
    assert_eq!(found["num_tokens"], serde_json::json!([ids.len()]));
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    let shape = [1, ids.len()];
    let tensor = OutTensor::bytes("input_ids", cairn_spec::DType::I64, &shape, &bytes);
    let [input, output] = ["ids", "hidden"].map(|name| folder.path().join(name));
    let mut file = std::fs::File::create(&input).unwrap();
    safetensors::write(&mut file, vec![tensor], &Default::default()).unwrap();
    let mut command = cairn(["logits", "--model"]);
    command.arg(folder.path()).arg("--input").arg(&input).arg("--output").arg(&output);
    succeed(&mut command);
    let file = SafetensorsFile::open(&output).unwrap();
    let last = file.tensors().filter(|tensor| tensor.name.starts_with("hidden_"));
    let last = last.max_by_key(|tensor| tensor.name[7..].parse::<usize>().unwrap()).unwrap();
    let (width, hidden) = (*last.shape.last().unwrap(), last.to_f32().unwrap());
    let vector = numbers(&found["embeddings"][0]);
    for (index, value) in vector.iter().enumerate() {
        let sum: f64 = hidden.iter().skip(index).step_by(width).map(|&x| f64::from(x)).sum();
        assert!((value - sum / ids.len() as f64).abs() < 1e-5, "{index}: {value}");
    }
    assert_eq!(vector.len(), width);
}

/// Trains an encoder by masked LM.
const RECIPE: &str = r#"
schema = "train/2"
[run]
name = "encoder"
threads = 1
[model]
initial = "base"
[data]
corpus = "data/pieces"
seq_len = 48
[optimizer]
learning_rate = 2e-3
[batch]
micro_batch_size = 8
[budget]
steps = 40
[eval]
every = 20
[checkpoint]
every = 20
"#;

#[test]
fn an_encoder_goes_on_learning_what_is_masked() {
    let workplace = Workplace::with_text();
    let base = model();
    std::os::unix::fs::symlink(base.path(), workplace.path().join("base")).unwrap();
    workplace.write("encoder.toml", RECIPE);
    let build = ["corpus", "build", "--input", "text", "--output", "data/pieces"];
    let mut command = workplace.cairn(&build);
    command.args(["--tokenizer", "base/tokenizer.json", "--validation-fraction", "0.3"]);
    succeed(&mut command);
    succeed(&mut workplace.cairn(&["train", "encoder.toml"]));
    let losses: Vec<f64> = workplace
        .metrics("encoder")
        .iter()
        .filter(|metric| metric["perplexity"].is_number())
        .map(|metric| metric["loss"].as_f64().unwrap())
        .collect();
    assert!(losses.len() == 2 && losses[1] < losses[0] && losses[1] < 4.0, "{losses:?}");
    let mut command = workplace.cairn(&["fill-mask", "--json", "--model", "runs/encoder"]);
    let found: Value = serde_json::from_str(&succeed(command.arg("fn larch [MASK] 3"))).unwrap();
    assert_eq!(found["masks"].as_array().unwrap().len(), 1);
    let text = workplace.failure(&["eval", "--model", "runs/encoder"]);
    assert!(text.starts_with("exit 1\n") && text.contains("the model is an encoder"), "{text}");
    let text = workplace.failure(&["train", "encoder.toml", "objective.kind=causal_lm"]);
    assert!(text.contains("bidirectional cannot learn by causal_lm"), "{text}");
}

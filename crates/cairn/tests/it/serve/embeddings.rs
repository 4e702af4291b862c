//! Texts as vectors: those that `cairn embed` gives.

use std::path::Path;

use serde_json::{Value, json};

use super::Server;
use crate::encoders::{embed, model};

fn server(folder: &Path, pooling: &str) -> Server {
    Server::start_model(folder, &["--pooling", pooling, "--served-model-name", "bert"])
}

#[test]
fn vectors_are_those_of_embed() {
    let folder = model();
    let texts = ["one stone", "two", "the way is marked"];
    for pooling in ["mean", "cls"] {
        let server = server(folder.path(), pooling);
        let expected = embed(folder.path(), &["--pooling", pooling], &texts);
        let ask = |body: &Value| {
            let (status, answer) = server.post("/v1/embeddings", &body.to_string());
            assert_eq!(status, 200, "{answer}");
            answer
        };
        let answer = ask(&json!({ "input": texts, "model": "bert" }));
        for (index, entry) in answer["data"].as_array().unwrap().iter().enumerate() {
            assert_eq!(entry["index"], index);
            // One prints the shortest text of an f32, the other its double.
            let close =
                |(a, b): (&Value, &Value)| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-7;
            let (found, wanted) =
                (entry["embedding"].as_array().unwrap(), expected["embeddings"][index].as_array());
            assert!(found.iter().zip(wanted.unwrap()).all(close), "{pooling} {index}");
        }
        let counts = expected["num_tokens"].as_array().unwrap().iter();
        let total: u64 = counts.map(|count| count.as_u64().unwrap()).sum();
        assert_eq!(answer["usage"]["total_tokens"].as_u64(), Some(total));
        // Alone, as ids and as bytes it is the same vector.
        let alone = ask(&json!({ "input": texts[1] }));
        assert_eq!(alone["data"][0]["embedding"], answer["data"][1]["embedding"]);
        let (_, ids) = server.post("/tokenize", &json!({ "prompt": texts[1] }).to_string());
        let of_ids = ask(
            &json!({ "input": [ids["tokens"]], "dimensions": alone["data"][0]["embedding"].as_array().unwrap().len() }),
        );
        assert_eq!(of_ids["data"], alone["data"]);
        let bytes = ask(&json!({ "input": texts[1], "encoding_format": "base64" }));
        assert!(bytes["data"][0]["embedding"].as_str().unwrap().len() > 8);
    }
}

#[test]
fn what_cannot_be_embedded_is_refused_by_name() {
    let folder = model();
    let server = server(folder.path(), "mean");
    let many = vec!["a"; 2049];
    let long = "stone ".repeat(300);
    for (body, field) in [
        (json!({}), "input"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": many }), "input"),
        (json!({ "input": [[]] }), "input"),
        (json!({ "input": [[4_000_000_000_u32]] }), "input"),
        (json!({ "input": ["a", 7] }), "input"),
        (json!({ "input": long }), "input"),
        (json!({ "input": "a", "dimensions": 3 }), "dimensions"),
        (json!({ "input": "a", "encoding_format": "hex" }), "encoding_format"),
        (json!({ "input": "a", "truncate": true }), "truncate"),
    ] {
        let (status, answer) = server.post("/v1/embeddings", &body.to_string());
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(field)), "{answer}");
    }
    // One embeds and the other generates.
    let (status, answer) = server.post("/v1/completions", &json!({ "prompt": "a" }).to_string());
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("model")), "{answer}");
    let decoder = Server::start(&[]);
    let (status, answer) = decoder.post("/v1/embeddings", &json!({ "input": "a" }).to_string());
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("model")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("'chat' generates"), "{answer}");
}

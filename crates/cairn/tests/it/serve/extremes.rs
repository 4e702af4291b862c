//! Requests at the ends of what can be said: each is honored or refused with a field's name, and none hurts another.

use serde_json::{Value, json};

use super::{Server, greedy};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// The refusals of fields that hold what no field may.
#[test]
fn what_no_field_may_hold_is_refused_by_name() {
    let server = Server::start(&[]);
    let good = server.complete(&greedy("stone", 8));
    let many = |count: usize, one: Value| Value::Array(vec![one; count]);
    for (field, value) in [
        ("n", json!(-1)),
        ("n", json!(1_u64 << 31)),
        ("n", json!(1.5)),
        ("max_tokens", json!(-1)),
        ("logprobs", json!(-1)),
        ("temperature", json!(1e39)),
        ("temperature", json!("hot")),
        ("presence_penalty", json!(-1e9)),
        ("frequency_penalty", json!(1e9)),
        ("repetition_penalty", json!(0)),
        ("repetition_penalty", json!(-1)),
        ("top_p", json!(-0.5)),
        ("min_p", json!(1.5)),
        ("typical_p", json!(0)),
        ("top_k", json!(-2)),
        ("no_repeat_ngram_size", json!(0)),
        ("seed", json!(1_u64 << 63)),
        ("seed", json!(0.5)),
        ("stop", many(10_000, json!("a"))),
        ("stop", json!([1])),
        ("stop", json!("a".repeat(2000))),
        ("logit_bias", json!({ "-1": 1 })),
        ("priority", json!(1_u64 << 40)),
        ("stream", json!(1)),
        ("chat_template", json!("{{ messages }}")),
    ] {
        let mut body = greedy("stone", 8);
        body[field] = value;
        let (status, answer) = server.post(COMPLETIONS, &body.to_string());
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(field)), "{answer}");
    }
    for number in ["18446744073709551616", "-18446744073709551617", "1e999", "NaN", "-Infinity"] {
        let body = format!(r#"{{"prompt": "a", "seed": {number}}}"#);
        assert_eq!(server.post(COMPLETIONS, &body).0, 400, "{number}");
    }
    let deep = format!(r#"{{"prompt": {}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(server.post(COMPLETIONS, &deep).0, 400);
    let surrogate = r#"{"prompt": "a", "stop": "\ud83d"}"#;
    assert_eq!(server.post(COMPLETIONS, surrogate).0, 400);
    assert_eq!(server.complete(&greedy("stone", 8)), good);
}

#[test]
fn what_is_extreme_and_allowed_is_done() {
    let server = Server::start(&[]);
    let good = server.complete(&greedy("stone", 8));
    for (field, value) in [
        ("seed", json!(i64::MIN)),
        ("seed", json!(i64::MAX)),
        ("seed", json!(-1)),
        ("top_k", json!(1_u64 << 40)),
        ("top_k", json!(-1)),
        ("priority", json!(i32::MIN)),
        ("stop", Value::Array(vec![json!("\u{10ffff}\u{0}"); 16])),
        ("cache_salt", json!("a".repeat(10_000))),
        ("user", json!("a".repeat(10_000))),
    ] {
        let mut body = greedy("stone", 8);
        body[field] = value;
        let (status, answer) = server.post(COMPLETIONS, &body.to_string());
        assert_eq!(status, 200, "{field}: {answer}");
        assert_eq!(answer["choices"][0]["text"], good.as_str(), "{field}: greedy stays greedy");
    }
    // A bias against a thousand tokens leaves the others.
    let biases: serde_json::Map<String, Value> =
        (0..599).map(|id| (id.to_string(), json!(-100))).collect();
    let mut body = greedy("stone", 2);
    body["logit_bias"] = biases.into();
    body["ignore_eos"] = true.into();
    assert_eq!(server.post(COMPLETIONS, &body.to_string()).0, 200);
    assert_eq!(server.complete(&greedy("stone", 8)), good);
}

#[test]
fn prompts_at_the_end_of_the_context() {
    let server = Server::start(&["--max-model-len", "64"]);
    let good = server.complete(&greedy("stone", 8));
    let ask = |length: usize, tokens: usize| {
        let body = json!({ "prompt": vec![5; length], "max_tokens": tokens, "temperature": 0 });
        server.post(COMPLETIONS, &body.to_string())
    };
    assert_eq!(ask(63, 1).0, 200);
    for (length, tokens) in [(63, 2), (64, 1), (65, 1), (640, 1), (1, 64)] {
        let (status, answer) = ask(length, tokens);
        let code = answer["error"]["code"].as_str();
        assert_eq!((status, code), (400, Some("context_length_exceeded")), "{length}: {answer}");
    }
    assert_eq!(server.post(COMPLETIONS, r#"{"prompt": ""}"#).0, 200, "the token that begins texts");
    let (status, answer) = server.post(COMPLETIONS, r#"{"prompt": [], "max_tokens": 1}"#);
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("prompt")));
    assert_eq!(server.complete(&greedy("stone", 8)), good);
}

#[test]
fn conversations_that_are_none() {
    let server = Server::start(&[]);
    let good = server.complete(&greedy("stone", 8));
    let user = json!({ "role": "user", "content": "a" });
    for (messages, field) in [
        (json!([]), "messages"),
        (json!("a"), "messages"),
        (json!([{ "role": "", "content": "a" }]), "messages"),
        (json!([{ "content": "a" }]), "messages"),
        (json!([{ "role": "user", "content": [{ "type": "image_url" }] }]), "messages"),
        (json!([{ "role": "user", "content": 1 }]), "messages"),
        (json!([user, { "role": "function", "name": "f", "content": "a" }]), "messages"),
    ] {
        let body = json!({ "messages": messages, "max_tokens": 1 }).to_string();
        let (status, answer) = server.post(CHAT, &body);
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(field)), "{answer}");
    }
    // Turns in any order are what the template makes of them.
    let turns = ["assistant", "assistant", "system", "user", "system"];
    let messages: Vec<Value> =
        turns.iter().map(|role| json!({ "role": role, "content": "" })).collect();
    let body = json!({ "messages": messages, "max_tokens": 1, "temperature": 0 }).to_string();
    assert!([200, 400].contains(&server.post(CHAT, &body).0));
    for (field, value) in [
        ("chat_template", json!("{% for i in range(10**9) %}a{% endfor %}")),
        ("template", json!("a")),
        ("chat_template_kwargs", json!({ "messages": true })),
    ] {
        let mut body = json!({ "messages": [user], "max_tokens": 1 });
        body[field] = value;
        let (status, answer) = server.post(CHAT, &body.to_string());
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(field)), "{answer}");
    }
    assert_eq!(server.complete(&greedy("stone", 8)), good);
}

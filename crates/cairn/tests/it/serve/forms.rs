//! The forms in which answers are written: log-probabilities, `/v1/responses`, `/v1/messages`.

use serde_json::{Value, json};

use super::{Server, events, greedy};
use crate::{cairn, golden, succeed};

/// A conversation answered greedily, by `/v1/chat/completions`.
fn chat(server: &Server, more: &Value) -> Value {
    let mut body = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 8, "temperature": 0,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let (status, answer) = server.post("/v1/chat/completions", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    answer
}

/// Events with names: each is called as its data is.
pub(super) fn named(mut reader: impl std::io::Read) -> Vec<Value> {
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let mut found = Vec::new();
    for block in text.split("\n\n") {
        let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
        let Some(data) = field("data: ") else { continue };
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(field("event: "), data["type"].as_str(), "{block}");
        found.push(data);
    }
    found
}

pub(super) fn types(events: &[Value]) -> Vec<&str> {
    let mut types: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    types.dedup();
    types
}

#[test]
fn log_probabilities_belong_to_their_tokens() {
    let server = Server::start(&[]);
    let mut body = greedy("one stone", 6);
    body["logprobs"] = 2.into();
    let (_, whole) = server.post("/v1/completions", &body.to_string());
    let found = &whole["choices"][0]["logprobs"];
    let count = found["tokens"].as_array().unwrap().len();
    assert_eq!(count as u64, whole["usage"]["completion_tokens"].as_u64().unwrap(), "{whole}");

    // Each is that of the token by itself, after the prompt and what came before.
    let mut by_ids = body.clone();
    by_ids["return_tokens_as_token_ids"] = true.into();
    let (_, by_ids) = server.post("/v1/completions", &by_ids.to_string());
    let names = by_ids["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone();
    let id = |name: &Value| -> u32 {
        name.as_str().unwrap().strip_prefix("token_id:").unwrap().parse().unwrap()
    };
    let ids: Vec<Value> = names.iter().map(|name| id(name).into()).collect();
    let (_, prompt) = server.post("/tokenize", r#"{"prompt": "one stone"}"#);
    let mut prompt = prompt["tokens"].as_array().unwrap().clone();
    for index in 0..count {
        let alone = json!({
            "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5, "logit_bias": {},
        });
        let (_, alone) = server.post("/v1/completions", &alone.to_string());
        let alone = &alone["choices"][0]["logprobs"];
        assert_eq!(alone["token_logprobs"][0], found["token_logprobs"][index]);
        assert_eq!(alone["tokens"][0], found["tokens"][index]);
        // Probabilities of different tokens do not exceed one.
        let top = alone["top_logprobs"][0].as_object().unwrap();
        let sum: f64 = top.values().map(|logprob| logprob.as_f64().unwrap().exp()).sum();
        assert!((0.0..1.000_01).contains(&sum), "{top:?}");
        prompt.push(ids[index].clone());
    }
    // The likeliest is the one that a greedy choice takes.
    for index in 0..count {
        let token = found["tokens"][index].as_str().unwrap();
        assert!(found["top_logprobs"][index].get(token).is_some(), "{found}");
        assert!((1..=3).contains(&found["top_logprobs"][index].as_object().unwrap().len()));
    }
    // Spelled one after the other they are the text, and each is where it stands in it.
    let spelled: Vec<&str> =
        found["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    let text = whole["choices"][0]["text"].as_str().unwrap();
    if !spelled.concat().contains('\u{fffd}') {
        assert_eq!(spelled.concat().trim_start(), text.trim_start());
    }
    // Piece by piece they are the same, each told once.
    body["stream"] = true.into();
    let events = events(server.stream("/v1/completions", &body));
    let streamed = |name: &str| -> Vec<Value> {
        let lists = events.iter().filter_map(|e| e["choices"][0]["logprobs"][name].as_array());
        lists.flatten().cloned().collect()
    };
    assert_eq!(Value::from(streamed("token_logprobs")), found["token_logprobs"]);
    assert_eq!(Value::from(streamed("text_offset")), found["text_offset"]);

    let chatted = chat(&server, &json!({ "logprobs": true, "top_logprobs": 3 }));
    let content = chatted["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len() as u64, chatted["usage"]["completion_tokens"].as_u64().unwrap());
    for entry in content {
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(
            entry["top_logprobs"][0]["logprob"], entry["logprob"],
            "greedy is the likeliest"
        );
    }
}

#[test]
fn responses_are_chats_in_another_form() {
    let server = Server::start(&[]);
    let chatted = chat(&server, &json!({}));
    let text = &chatted["choices"][0]["message"]["content"];
    let mut body = json!({ "input": "Hi", "max_output_tokens": 8, "temperature": 0 });
    let (status, whole) = server.post("/v1/responses", &body.to_string());
    assert_eq!(status, 200, "{whole}");
    assert_eq!(&whole["output"][0]["content"][0]["text"], text);
    assert_eq!(whole["usage"]["total_tokens"], chatted["usage"]["total_tokens"]);
    let is_cut = chatted["choices"][0]["finish_reason"] == "length";
    assert_eq!(whole["status"], if is_cut { "incomplete" } else { "completed" });

    // Messages, with an instruction, are the conversation with a system's word.
    let (_, instructed) = server.post(
        "/v1/responses",
        &json!({
            "instructions": "Be brief.", "max_output_tokens": 8, "temperature": 0,
            "input": [{ "role": "user", "content": [{ "type": "input_text", "text": "Hi" }] }],
        })
        .to_string(),
    );
    let messages = json!([
        { "role": "developer", "content": "Be brief." }, { "role": "user", "content": "Hi" },
    ]);
    let chatted = chat(&server, &json!({ "messages": messages }));
    let said = &instructed["output"][0]["content"][0]["text"];
    assert_eq!(said, &chatted["choices"][0]["message"]["content"], "{instructed}");

    body["stream"] = true.into();
    let events = named(server.stream("/v1/responses", &body));
    let numbers = events.iter().map(|event| event["sequence_number"].as_u64().unwrap());
    assert!(numbers.eq(0..events.len() as u64));
    let last = if is_cut { "response.incomplete" } else { "response.completed" };
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        last,
    ];
    assert_eq!(types(&events), expected);
    let deltas = events.iter().filter_map(|event| event["delta"].as_str());
    assert_eq!(deltas.collect::<String>(), text.as_str().unwrap());
    let end = &events.last().unwrap()["response"];
    assert_eq!(end["output"][0]["content"], whole["output"][0]["content"]);
    assert_eq!(end["usage"]["output_tokens"], whole["usage"]["output_tokens"]);
}

#[test]
fn messages_are_chats_in_another_form() {
    let server = Server::start(&[]);
    let chatted = chat(&server, &json!({}));
    let text = chatted["choices"][0]["message"]["content"].as_str().unwrap();
    let hi = json!([{ "role": "user", "content": [{ "type": "text", "text": "Hi" }] }]);
    let mut body = json!({ "messages": hi, "max_tokens": 8, "temperature": 0 });
    let (status, whole) = server.post("/v1/messages", &body.to_string());
    assert_eq!(status, 200, "{whole}");
    assert_eq!(whole["content"], json!([{ "type": "text", "text": text }]));
    assert_eq!(whole["usage"]["output_tokens"], chatted["usage"]["completion_tokens"]);
    let (_, count) =
        server.post("/v1/messages/count_tokens", &json!({ "messages": hi }).to_string());
    // What was in the cache is counted apart.
    let counted = |name: &str| whole["usage"][name].as_u64().unwrap();
    let input = counted("input_tokens") + counted("cache_read_input_tokens");
    assert_eq!(count["input_tokens"].as_u64(), Some(input));

    body["stream"] = true.into();
    let events = named(server.stream("/v1/messages", &body));
    let expected = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(types(&events), expected);
    let deltas = events.iter().filter_map(|event| event["delta"]["text"].as_str());
    assert_eq!(deltas.collect::<String>(), text);
    let reason = events.iter().find_map(|event| event["delta"]["stop_reason"].as_str());
    assert_eq!(reason, whole["stop_reason"].as_str());

    // The stop string that came is told.
    body["stream"] = false.into();
    let middle: String = text.chars().skip(1).take(2).collect();
    body["stop_sequences"] = json!(["\u{1F5FF}", middle]);
    let (_, stopped) = server.post("/v1/messages", &body.to_string());
    assert_eq!(stopped["stop_reason"], "stop_sequence", "{stopped}");
    assert_eq!(stopped["stop_sequence"], middle);

    // Errors are written as Anthropic does.
    for (wrong, status, kind) in [
        (json!({ "messages": hi }), 400, "invalid_request_error"),
        (json!({ "messages": hi, "max_tokens": 8, "tools": [{}] }), 400, "invalid_request_error"),
        (json!({ "messages": hi, "max_tokens": 8, "model": "x" }), 404, "not_found_error"),
        (
            json!({ "messages": [hi[0], { "role": "assistant", "content": "We" }], "max_tokens": 8 }),
            400,
            "invalid_request_error",
        ),
    ] {
        let (found, answer) = server.post("/v1/messages", &wrong.to_string());
        assert_eq!((found, &answer["type"]), (status, &json!("error")), "{answer}");
        assert_eq!(answer["error"]["type"], kind, "{answer}");
    }
}

#[test]
fn prompts_are_repeated_with_their_log_probabilities() {
    let server = Server::start(&[]);
    let (_, ids) = server.post("/tokenize", r#"{"prompt": "one stone upon another"}"#);
    let ids = ids["tokens"].as_array().unwrap().clone();
    let ask = |more: &Value| {
        let mut body = json!({
            "prompt": ids, "echo": true, "temperature": 0, "return_tokens_as_token_ids": true,
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, answer) = server.post("/v1/completions", &body.to_string());
        assert_eq!(status, 200, "{answer}");
        answer
    };
    // As lm-evaluation-harness asks: one entry more than the prompt has tokens, the first of them null.
    let answer = ask(&json!({ "max_tokens": 1, "logprobs": 1, "seed": 1234 }));
    let found = &answer["choices"][0]["logprobs"];
    let logprobs = found["token_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), ids.len() + 1, "{answer}");
    assert!(logprobs[0].is_null() && found["top_logprobs"][0].is_null());
    // Each is what a greedy choice after what is in front of it says.
    let mut num_compared = 0;
    for position in 1..ids.len() {
        let alone = json!({
            "prompt": ids[..position], "max_tokens": 1, "temperature": 0, "logprobs": 128,
            "return_tokens_as_token_ids": true,
        });
        let (_, alone) = server.post("/v1/completions", &alone.to_string());
        let top = &alone["choices"][0]["logprobs"]["top_logprobs"][0];
        if let Some(expected) = top.get(format!("token_id:{}", ids[position])) {
            assert_eq!(expected, &logprobs[position], "{position}");
            num_compared += 1;
        }
        let likeliest = top.as_object().unwrap().values().map(|value| value.as_f64().unwrap());
        let likeliest = likeliest.fold(f64::NEG_INFINITY, f64::max);
        let tops = found["top_logprobs"][position].as_object().unwrap().values();
        let greatest = tops.map(|value| value.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
        assert!((likeliest - greatest).abs() < f64::EPSILON, "{position}");
    }
    assert!(0 < num_compared, "some are among the likeliest");
    // The same after the prompt is known, in pieces, and with nothing to add.
    assert_eq!(ask(&json!({ "max_tokens": 1, "logprobs": 1 }))["choices"], answer["choices"]);
    let alone = ask(&json!({ "max_tokens": 0, "logprobs": 1 }));
    let alone = &alone["choices"][0]["logprobs"]["token_logprobs"];
    assert_eq!(alone.as_array().unwrap(), &logprobs[..ids.len()]);
    let text = ask(&json!({ "max_tokens": 4 }))["choices"][0]["text"].clone();
    let (_, prompt) = server.post("/detokenize", &json!({ "tokens": ids }).to_string());
    assert!(text.as_str().unwrap().starts_with(prompt["prompt"].as_str().unwrap()), "{text}");
}

#[test]
fn a_prompt_that_is_known_is_not_read_again() {
    let server = Server::start(&[]);
    let long = "one stone upon another ".repeat(12);
    let first = server.post("/v1/completions", &greedy(&long, 6).to_string()).1;
    let again = server.post("/v1/completions", &greedy(&long, 6).to_string()).1;
    assert_eq!(first["choices"], again["choices"]);
    let cached = |answer: &Value| {
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(&first), 0);
    assert!(16 <= cached(&again), "{again}");
    assert!(cached(&again) < again["usage"]["prompt_tokens"].as_u64().unwrap());
}

#[test]
fn a_load_is_measured() {
    let server = Server::start(&["--max-num-seqs", "4"]);
    let url = format!("http://{}", server.address);
    let mut command =
        cairn(["--quiet", "bench", "serve", "--url", &url, "--against", &url, "--json"]);
    command.args(["--clients", "1,3", "--requests", "6", "--max-tokens", "5"]);
    let record: Value = serde_json::from_str(&succeed(command.args([
        "--prompt-chars",
        "20",
        "--shared-chars",
        "10",
    ])))
    .unwrap();
    let levels = record["figures"]["levels"].as_array().unwrap();
    assert_eq!(levels.len(), 2, "{record}");
    for sides in levels {
        for measured in [&sides[0][0], &sides[1][0]] {
            assert_eq!((&measured["answered"], &measured["failed"]), (&json!(6), &json!(0)));
            // No token ends an answer before its length.
            assert_eq!(measured["new_tokens"], 30, "{measured}");
            let seconds = |name: &str, index: usize| measured[name][index].as_f64().unwrap();
            assert!(0.0 < seconds("ttft_s", 0) && seconds("ttft_s", 0) <= seconds("e2e_s", 2));
        }
    }
    let mut wrong = cairn(["bench", "serve", "--url", "http://127.0.0.1:9"]);
    let refused = wrong.output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("start a server first"), "{said}");
}

#[test]
fn the_likeliest_answers_are_those_of_generate() {
    let server = Server::start(&["--max-num-seqs", "4"]);
    for (beams, penalty) in [(3, 1.0), (4, 0.2)] {
        let mut command = cairn(["--quiet", "generate", "--prompt", "one stone", "--json"]);
        let (beams_text, penalty_text) = (beams.to_string(), format!("{penalty}"));
        command.args(["--beams", &beams_text, "--length-penalty", &penalty_text]);
        command.args(["--max-new-tokens", "10", "--model"]);
        let printed = succeed(command.arg(golden("gguf").join("chat.gguf")));
        let expected: Value = serde_json::from_str(&printed).unwrap();
        let body = json!({
            "prompt": "one stone", "use_beam_search": true, "n": beams, "length_penalty": penalty,
            "max_tokens": 10,
        });
        let (status, found) = server.post("/v1/completions", &body.to_string());
        assert_eq!(status, 200, "{found}");
        assert_eq!(found["choices"].as_array().unwrap().len(), beams, "{found}");
        assert_eq!(found["choices"][0]["text"], expected["text"], "{found} {printed}");
        // Two prompts, two searches.
        let both = json!({
            "prompt": ["one stone", "one stone"], "use_beam_search": true, "n": beams,
            "length_penalty": penalty, "max_tokens": 10,
        });
        let (_, both) = server.post("/v1/completions", &both.to_string());
        assert_eq!(both["choices"][beams]["text"], found["choices"][0]["text"], "{both}");
    }
    let chatted = json!({ "use_beam_search": true, "n": 2, "temperature": 1, "max_tokens": 6 });
    assert_eq!(chat(&server, &chatted)["choices"].as_array().unwrap().len(), 2);
    for (more, field) in [
        (json!({ "use_beam_search": true, "top_p": 0.5 }), "top_p"),
        (json!({ "use_beam_search": true, "stream": true }), "stream"),
        (json!({ "use_beam_search": true, "temperature": 0.3 }), "temperature"),
        (json!({ "length_penalty": 2 }), "length_penalty"),
        (json!({ "use_beam_search": true, "early_stopping": 1 }), "early_stopping"),
        (json!({ "use_beam_search": true, "n": 65 }), "n"),
        (json!({ "use_beam_search": true, "max_tokens": 1000 }), "max_tokens"),
        (json!({ "mirostat": 3 }), "mirostat"),
        (json!({ "mirostat_tau": 3 }), "mirostat_tau"),
        (json!({ "mirostat": 2, "top_k": 3 }), "top_k"),
        (json!({ "tfs_z": 0.5, "tfs": 0.6 }), "tfs"),
        (json!({ "eta_cutoff": 1 }), "eta_cutoff"),
    ] {
        let mut body = json!({ "prompt": "a", "max_tokens": 4 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, answer) = server.post("/v1/completions", &body.to_string());
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(field)), "{answer}");
    }
    // What is steered is the same again, and not what is not.
    let text = |more: Value| {
        let mut body = json!({ "prompt": "one stone", "max_tokens": 24, "seed": 4 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.complete(&body)
    };
    let steered = json!({ "mirostat": 2, "mirostat_tau": 2, "mirostat_eta": 0.5 });
    assert_eq!(text(steered.clone()), text(steered.clone()));
    assert_ne!(text(steered), text(json!({})));
    assert_ne!(text(json!({ "tfs": 0.2 })), text(json!({})));
}

#[test]
fn a_search_is_one_request() {
    let server = Server::start(&[]);
    // However many steps it takes, a search is one request; its answers are not more than may wait.
    let counts = || {
        let names = ["requests_total ", "requests_finished_total ", "prompt_tokens_total "];
        let [all, ended, prompt] = names.map(|name| server.metric(&format!("cairn_{name}")));
        (all, ended, prompt, server.metric("cairn_time_to_first_token_seconds_count "))
    };
    let before = counts();
    let body = json!({ "prompt": "one stone", "use_beam_search": true, "n": 3, "max_tokens": 6 });
    let (_, found) = server.post("/v1/completions", &body.to_string());
    let num_prompt = found["usage"]["prompt_tokens"].as_u64().unwrap();
    let one_more = (before.0 + 1, before.1 + 1, before.2 + num_prompt, before.3 + 1);
    assert_eq!(counts(), one_more);
    let narrow = Server::start(&["--max-num-waiting", "2"]);
    let (status, answer) = narrow.post("/v1/completions", &body.to_string());
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("n")), "{answer}");
}

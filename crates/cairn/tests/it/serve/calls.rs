//! Calls of functions, in all three forms, by a model whose template has a form for them.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde_json::{Value, json};

use super::forms::{named, types};
use super::{Server, events};
use crate::golden;

/// The model of the other tests with more positions: descriptions of functions are long.
fn long_model() -> &'static Path {
    static MODEL: LazyLock<PathBuf> = LazyLock::new(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("long_chat");
        std::fs::create_dir_all(&folder).unwrap();
        let source = golden("gguf").join("chat");
        for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(source.join(name), folder.join(name)).unwrap();
        }
        let config = std::fs::read_to_string(source.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        config["max_position_embeddings"] = 2048.into();
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        folder
    });
    &MODEL
}

/// A server whose template writes calls like this.
pub(super) fn server(template: &Path, more: &[&str]) -> Server {
    let mut arguments = vec!["--chat-template", template.to_str().unwrap()];
    arguments.extend(["--max-model-len", "1024"]);
    arguments.extend(more);
    Server::start_model(long_model(), &arguments)
}

fn with_template(name: &str) -> Server {
    // Fresh weights that may think first would think for ever.
    let template = golden("chat").join(format!("{name}.jinja"));
    server(&template, &["--reasoning-markers", "off"])
}

fn parameters() -> Value {
    json!({
        "type": "object",
        "properties": {
            "where": { "type": "string", "maxLength": 3 }, "hours": { "enum": [1, 2] },
        },
        "required": ["where", "hours"],
        "additionalProperties": false,
    })
}

fn tools() -> Value {
    let tool = |name: &str| {
        let function = json!({ "name": name, "description": "Rain.", "parameters": parameters() });
        json!({ "type": "function", "function": function })
    };
    json!([tool("rain"), tool("wind")])
}

fn check(arguments: &str) {
    let found: Value = serde_json::from_str(arguments).expect(arguments);
    assert!(found["where"].as_str().unwrap().chars().count() <= 3, "{found}");
    assert!([json!(1), json!(2)].contains(&found["hours"]), "{found}");
}

fn ask(server: &Server, more: &Value) -> (u16, Value) {
    let mut body = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 150, "seed": 5, "tools": tools(),
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    server.post("/v1/chat/completions", &body.to_string())
}

fn asked(server: &Server, more: &Value) -> Value {
    let (status, answer) = ask(server, more);
    assert_eq!(status, 200, "{answer}");
    answer
}

#[test]
fn a_call_that_is_wanted_comes_and_follows_its_schema() {
    for template in ["calls_hermes", "calls_mistral", "calls_tekken", "llama3", "calls_deepseek"] {
        let server = with_template(template);
        for seed in 0..3 {
            let named = json!({ "type": "function", "function": { "name": "wind" } });
            let answer = asked(&server, &json!({ "tool_choice": named, "seed": seed }));
            let choice = &answer["choices"][0];
            assert_eq!(choice["finish_reason"], "tool_calls", "{template}: {answer}");
            let calls = choice["message"]["tool_calls"].as_array().unwrap();
            assert_eq!((calls.len(), &choice["message"]["content"]), (1, &Value::Null), "{answer}");
            assert_eq!(calls[0]["function"]["name"], "wind");
            check(calls[0]["function"]["arguments"].as_str().unwrap());
            let required = json!({ "tool_choice": "required", "parallel_tool_calls": false });
            let answer = asked(&server, &required);
            let calls = answer["choices"][0]["message"]["tool_calls"].as_array().unwrap();
            assert_eq!(calls.len(), 1, "{template}: {answer}");
            check(calls[0]["function"]["arguments"].as_str().unwrap());
        }
    }
}

#[test]
fn a_stream_tells_the_name_and_then_the_arguments() {
    let server = with_template("calls_hermes");
    let body = json!({ "tool_choice": "required", "n": 2 });
    let whole = asked(&server, &body);
    let mut streamed = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 150, "seed": 5, "tools": tools(),
        "stream": true,
    });
    streamed.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
    let events = events(server.stream("/v1/chat/completions", &streamed));
    for index in 0..2 {
        let of_choice =
            || events.iter().map(|event| &event["choices"][0]).filter(|c| c["index"] == index);
        let mut calls: Vec<Value> = Vec::new();
        for delta in of_choice().filter_map(|choice| choice["delta"]["tool_calls"].as_array()) {
            let place = usize::try_from(delta[0]["index"].as_u64().unwrap()).unwrap();
            let arguments = delta[0]["function"]["arguments"].as_str().unwrap();
            if calls.len() == place {
                assert_eq!(delta[0]["type"], "function");
                calls.push(delta[0].clone());
                continue;
            }
            assert!(delta[0]["id"].is_null(), "a call has one head");
            let so_far = calls[place]["function"]["arguments"].as_str().unwrap();
            calls[place]["function"]["arguments"] = (so_far.to_owned() + arguments).into();
        }
        let place = usize::try_from(index).unwrap();
        let expected = whole["choices"][place]["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls.len(), expected.len());
        for (call, expected) in calls.iter().zip(expected) {
            assert_eq!(call["function"], expected["function"], "{index}");
        }
        let reason = of_choice().find_map(|choice| choice["finish_reason"].as_str());
        assert_eq!(reason, whole["choices"][place]["finish_reason"].as_str());
    }
    // A call has an id of its own.
    let ids: Vec<&str> = (0..2)
        .flat_map(|choice| whole["choices"][choice]["message"]["tool_calls"].as_array().unwrap())
        .map(|call| call["id"].as_str().unwrap())
        .collect();
    assert!(ids.iter().all(|id| id.starts_with("call_")), "{ids:?}");
    assert_eq!(ids.iter().collect::<std::collections::BTreeSet<_>>().len(), ids.len());
}

/// A template whose calls begin with a special token, which a bias can bring.
const SPECIAL: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}\
    {{ unk_token }}{{ c.function.name }}:{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}\
    {% endfor %}";

#[test]
fn a_model_may_call_and_need_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("special.jinja");
    std::fs::write(&path, SPECIAL).unwrap();
    let server = server(&path, &[]);
    let plain = asked(&server, &json!({ "max_tokens": 20 }));
    assert!(plain["choices"][0]["message"]["tool_calls"].is_null(), "{plain}");
    // Token 0 is the special one; once it came, the grammar decides.
    let body = json!({ "logit_bias": { "0": 100 }, "parallel_tool_calls": false });
    let called = asked(&server, &body);
    let calls = called["choices"][0]["message"]["tool_calls"].as_array().expect("a call");
    assert_eq!(calls.len(), 1, "{called}");
    check(calls[0]["function"]["arguments"].as_str().unwrap());
    assert_eq!(called["choices"][0]["finish_reason"], "tool_calls");
    // What may not be called is not told of.
    let none = asked(&server, &json!({ "tool_choice": "none", "max_tokens": 20 }));
    let without = asked(&server, &json!({ "tools": [], "max_tokens": 20 }));
    assert_eq!(none["choices"], without["choices"]);
}

#[test]
fn what_came_of_a_call_is_told_in_order() {
    let server = with_template("calls_mistral");
    let call = |id: &str| {
        let function = json!({ "name": "rain", "arguments": "{\"where\": \"x\"}" });
        json!({ "id": id, "type": "function", "function": function })
    };
    let called = |ids: &[&str]| {
        let calls: Vec<Value> = ids.iter().map(|id| call(id)).collect();
        json!({ "role": "assistant", "content": null, "tool_calls": calls })
    };
    let result = |id: &str| json!({ "role": "tool", "tool_call_id": id, "content": "wet" });
    let user = json!({ "role": "user", "content": "Hi" });
    let good = json!([user, called(&["a", "b"]), result("b"), result("a"), user]);
    let (status, answer) = ask(&server, &json!({ "messages": good, "max_tokens": 4 }));
    assert_eq!(status, 200, "{answer}");
    for (messages, words) in [
        (json!([user, result("a")]), "is for the call 'a', which is none of those"),
        (json!([user, called(&["a"]), user]), "comes before the result of the call 'a'"),
        (json!([user, called(&["a"])]), "ends before the result of the call 'a'"),
        (json!([user, called(&["a"]), result("a"), result("a")]), "is for the call 'a'"),
        (json!([user, called(&["a", "a"])]), "two calls with the id 'a'"),
        (json!([user, { "role": "tool", "content": "wet" }]), "tool_call_id is missing"),
        (
            json!([user, { "role": "assistant", "tool_calls": [{ "id": "a", "function": { "name": "f", "arguments": "[1]" } }] }]),
            "function.arguments is not the JSON of an object",
        ),
    ] {
        let (status, answer) = ask(&server, &json!({ "messages": messages }));
        assert_eq!((status, &answer["error"]["param"]), (400, &json!("messages")), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(words), "{answer}");
    }
}

#[test]
fn what_cannot_be_called_is_refused_by_name() {
    let plain = Server::start(&[]);
    let (status, answer) = ask(&plain, &json!({}));
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("tools")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("--chat-template"), "{answer}");
    let server = with_template("calls_hermes");
    let tool = |parameters: Value| {
        let function = json!({ "name": "snow", "parameters": parameters });
        json!({ "type": "function", "function": function })
    };
    for (parameters, words) in [
        (json!({ "$ref": "http://127.0.0.1:9/x.json" }), "the schema of tools[2]"),
        (json!({ "properties": { "a": { "type": "nothing" } } }), "the schema of tools[2]"),
        (json!({ "x-guidance": {} }), "'x-guidance' is not supported here"),
        (json!(7), "parameters is no schema"),
    ] {
        let mut tools = tools();
        tools.as_array_mut().unwrap().push(tool(parameters));
        let (status, answer) = ask(&server, &json!({ "tools": tools }));
        assert_eq!((status, &answer["error"]["param"]), (400, &json!("tools")), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(words), "{answer}");
    }
    let format = json!({ "response_format": { "type": "json_object" } });
    let (status, answer) = ask(&server, &format);
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("tools")), "{answer}");
    // As many as may be, all of them followed.
    let many: Vec<Value> = (0..128)
        .map(|at| {
            let mut tool = tools()[0].clone();
            tool["function"]["name"] = format!("rain_{at}").into();
            tool
        })
        .collect();
    // One that is wrong is found among them.
    for at in [0, 77, 127] {
        let mut many = many.clone();
        many[at]["function"]["parameters"] = json!({ "properties": { "a": { "type": "no" } } });
        let (status, answer) = ask(&server, &json!({ "tools": many }));
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.contains(&format!("of tools[{at}]:")), "{answer}");
    }
    let (status, answer) = ask(
        &server,
        &json!({ "tools": many, "tool_choice": "required", "chat_template_kwargs": {} }),
    );
    // So many do not fit in the prompt; what is wrong is not their grammar.
    assert_eq!(
        (status, &answer["error"]["code"]),
        (400, &json!("context_length_exceeded")),
        "{answer}"
    );
}

#[test]
fn messages_call_as_anthropic_does() {
    let server = with_template("calls_hermes");
    let tool = json!({ "name": "rain", "description": "Rain.", "input_schema": parameters() });
    let mut body = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 150, "temperature": 0,
        "tools": [tool], "tool_choice": { "type": "tool", "name": "rain" },
    });
    let (status, whole) = server.post("/v1/messages", &body.to_string());
    assert_eq!(status, 200, "{whole}");
    assert_eq!(whole["stop_reason"], "tool_use", "{whole}");
    let block = &whole["content"][0];
    assert_eq!((&block["type"], &block["name"]), (&json!("tool_use"), &json!("rain")));
    check(&block["input"].to_string());
    assert!(block["id"].as_str().unwrap().starts_with("toolu_"));

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
    let pieces = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str());
    let input: Value = serde_json::from_str(&pieces.collect::<String>()).unwrap();
    assert_eq!(input, block["input"]);

    // What came of it is told, and a failure as one.
    let result = json!({ "type": "tool_result", "tool_use_id": block["id"], "content": "wet", "is_error": true });
    body["stream"] = false.into();
    body["tool_choice"] = json!({ "type": "auto", "disable_parallel_tool_use": true });
    body["max_tokens"] = 4.into();
    let messages = |results: Value| {
        json!([
            { "role": "user", "content": "Hi" }, { "role": "assistant", "content": [block] },
            { "role": "user", "content": results },
        ])
    };
    body["messages"] = messages(json!([result, { "type": "text", "text": "So?" }]));
    let (status, answer) = server.post("/v1/messages", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    for (results, words) in [
        (json!([{ "type": "text", "text": "So?" }, result]), "results come first"),
        (json!([{ "type": "text", "text": "So?" }]), "comes before the result of the call"),
        (json!([{ "type": "tool_result", "tool_use_id": "x" }]), "is for the call 'x'"),
    ] {
        body["messages"] = messages(results);
        let (status, answer) = server.post("/v1/messages", &body.to_string());
        assert_eq!((status, &answer["error"]["type"]), (400, &json!("invalid_request_error")));
        assert!(answer["error"]["message"].as_str().unwrap().contains(words), "{answer}");
    }
}

#[test]
fn responses_call_as_openai_does() {
    let server = with_template("calls_hermes");
    let tool =
        json!({ "type": "function", "name": "rain", "parameters": parameters(), "strict": true });
    let mut body = json!({
        "input": "Hi", "max_output_tokens": 150, "temperature": 0, "tools": [tool],
        "tool_choice": { "type": "function", "name": "rain" },
    });
    let (status, whole) = server.post("/v1/responses", &body.to_string());
    assert_eq!(status, 200, "{whole}");
    let item = &whole["output"][0];
    assert_eq!(
        (&item["type"], &item["name"]),
        (&json!("function_call"), &json!("rain")),
        "{whole}"
    );
    check(item["arguments"].as_str().unwrap());
    assert_eq!(
        (&whole["status"], &whole["tools"][0]["name"]),
        (&json!("completed"), &json!("rain"))
    );

    body["stream"] = true.into();
    let events = named(server.stream("/v1/responses", &body));
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(types(&events), expected);
    let deltas = events.iter().filter_map(|event| event["delta"].as_str());
    assert_eq!(deltas.collect::<String>(), item["arguments"].as_str().unwrap());

    body["stream"] = false.into();
    body["max_output_tokens"] = 4.into();
    body["tool_choice"] = "none".into();
    let output =
        json!({ "type": "function_call_output", "call_id": item["call_id"], "output": "wet" });
    let user = json!({ "role": "user", "content": "Hi" });
    body["input"] = json!([user, item, output]);
    let (status, answer) = server.post("/v1/responses", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    for (input, words) in [
        (json!([user, output]), "is for the call"),
        (json!([user, item, user]), "comes before the result"),
        (json!([user, { "type": "web_search_call" }]), ".type is web_search_call"),
    ] {
        body["input"] = input;
        let (status, answer) = server.post("/v1/responses", &body.to_string());
        assert_eq!((status, &answer["error"]["param"]), (400, &json!("input")), "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{answer}");
    }
}

#[test]
fn what_tools_and_results_spell_is_text() {
    let server = with_template("calls_hermes");
    let count = |word: &str| {
        let call = json!({ "id": "a", "type": "function", "function": { "name": "f", "arguments": "{}" } });
        let messages = json!([
            { "role": "user", "content": "Hi" }, { "role": "assistant", "tool_calls": [call] },
            { "role": "tool", "tool_call_id": "a", "content": word },
        ]);
        let mut tools = tools();
        tools[0]["function"]["description"] = word.into();
        tools[0]["function"]["parameters"]["properties"] = json!({ word: { "enum": [word] } });
        tools[0]["function"]["parameters"]["required"] = json!([]);
        let (status, found) =
            server.post("/tokenize", &json!({ "messages": messages, "tools": tools }).to_string());
        assert_eq!(status, 200, "{found}");
        found["tokens"].as_array().unwrap().iter().filter(|id| **id == 2).count()
    };
    // Token 2 is `</s>`, which this template never writes.
    assert_eq!((count("x"), count("</s>")), (0, 0));
}

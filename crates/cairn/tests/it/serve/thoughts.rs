//! What a model thinks, apart from what it says.

use serde_json::{Value, json};

use super::calls::server;
use super::forms::{named, types};
use super::{Server, events};

/// A template that begins to think in front of an answer, unless it is told not to.
const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content is defined %}\
    <think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}{% endfor %}\
    {% if add_generation_prompt %}<assistant>{% if enable_thinking is not defined or enable_thinking %}<think>\n\
    {% endif %}{% endif %}";

fn thinker(more: &[&str]) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("thinker.jinja");
    std::fs::write(&path, TEMPLATE).unwrap();
    server(&path, more)
}

fn ask(server: &Server, more: &Value) -> Value {
    let mut body = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 40, "temperature": 0,
        "thinking_token_budget": 12,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let (status, answer) = server.post("/v1/chat/completions", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    answer
}

#[test]
fn what_is_thought_and_said_are_told_apart() {
    let server = thinker(&[]);
    let answer = ask(&server, &json!({}));
    let message = &answer["choices"][0]["message"];
    let (thought, said) = (&message["reasoning_content"], &message["content"]);
    assert!(!thought.as_str().unwrap().is_empty() && !said.as_str().unwrap().is_empty());
    assert!(!answer.to_string().contains("think>"), "{answer}");
    let counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64();
    assert!((12..40).contains(&counted.unwrap()), "{answer}");

    // The same in pieces, and in the other forms.
    let body = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 40, "temperature": 0,
        "thinking_token_budget": 12, "stream": true,
    });
    let events = events(server.stream("/v1/chat/completions", &body));
    let told = |name: &str| -> String {
        let deltas = events.iter().filter_map(|event| event["choices"][0]["delta"][name].as_str());
        deltas.collect()
    };
    assert_eq!(
        (told("reasoning_content"), told("content")),
        (thought.as_str().unwrap().into(), said.as_str().unwrap().into())
    );
    let mut body = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 40, "temperature": 0,
        "thinking": { "type": "enabled", "budget_tokens": 12 },
    });
    let (status, whole) = server.post("/v1/messages", &body.to_string());
    assert_eq!(status, 200, "{whole}");
    let block = json!({ "type": "thinking", "thinking": thought, "signature": "" });
    assert_eq!(whole["content"], json!([block, { "type": "text", "text": said }]));
    body["stream"] = true.into();
    let events = named(server.stream("/v1/messages", &body));
    let expected = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(types(&events), expected);

    // Given back it is taken, by any of its names.
    let back = json!([
        { "role": "user", "content": "Hi" },
        { "role": "assistant", "content": "a", "reasoning": "b" }, { "role": "user", "content": "c" },
    ]);
    ask(&server, &json!({ "messages": back }));
}

#[test]
fn a_response_has_items_of_both() {
    let server = thinker(&["--reasoning-markers", "<think>,e"]);
    // The first `e` ends what is thought.
    let mut body = json!({ "input": "Hi", "max_output_tokens": 200, "temperature": 3, "seed": 1 });
    let (status, whole) = server.post("/v1/responses", &body.to_string());
    assert_eq!(status, 200, "{whole}");
    let items = whole["output"].as_array().unwrap();
    let kinds: Vec<&str> = items.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["reasoning", "message"], "{whole}");
    body["stream"] = true.into();
    let events = named(server.stream("/v1/responses", &body));
    let of = |name: &str| -> String {
        let of_kind = events.iter().filter(|event| event["type"] == name);
        of_kind.filter_map(|event| event["delta"].as_str()).collect()
    };
    assert_eq!(
        of("response.reasoning_text.delta"),
        items[0]["content"][0]["text"].as_str().unwrap()
    );
    assert_eq!(of("response.output_text.delta"), items[1]["content"][0]["text"].as_str().unwrap());
    let end = &events.last().unwrap()["response"]["output"];
    assert_eq!(end[0]["content"], items[0]["content"]);
    body["stream"] = false.into();
    body["input"] = json!([{ "role": "user", "content": "Hi" }, items[0], items[1], { "role": "user", "content": "c" }]);
    let (status, answer) = server.post("/v1/responses", &body.to_string());
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn thinking_is_turned_off_and_a_format_waits_for_it() {
    let server = thinker(&[]);
    let message = |more: Value| ask(&server, &more)["choices"][0]["message"].clone();
    let off = json!({ "chat_template_kwargs": { "enable_thinking": false }, "thinking_token_budget": null });
    assert!(message(off.clone())["reasoning_content"].is_null());
    let mut effort = json!({ "reasoning_effort": "none", "thinking_token_budget": null });
    assert_eq!(message(effort.clone()), message(off));
    let format = json!({ "structured_outputs": { "regex": "[0-9]{3}" } });
    let found = message(format);
    assert!(!found["reasoning_content"].as_str().unwrap().is_empty(), "{found}");
    let said = found["content"].as_str().unwrap();
    assert!(said.len() == 3 && said.parse::<u16>().is_ok(), "{found}");

    effort["reasoning_effort"] = "high".into();
    effort["messages"] = json!([{ "role": "user", "content": "Hi" }]);
    for (more, field) in [
        (effort, "reasoning_effort"),
        (json!({ "chat_template_kwargs": { "whatever": true } }), "chat_template_kwargs"),
    ] {
        let mut body =
            json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, answer) = server.post("/v1/chat/completions", &body.to_string());
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(field)), "{answer}");
    }
    // Where nothing is told apart, there is no budget either.
    let whole = thinker(&["--reasoning-markers", "off"]);
    let body = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4, "thinking_token_budget": 2,
    });
    let (status, answer) = whole.post("/v1/chat/completions", &body.to_string());
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("thinking_token_budget")));
}

//! Answers that follow a schema, an expression or a choice, and grammars that nobody can follow.

use serde_json::{Value, json};

use super::{Server, greedy};

impl Server {
    /// The text that follows what `more` says.
    fn follow(&self, more: &Value) -> (u16, Value) {
        let mut body = json!({ "prompt": "one", "max_tokens": 200, "seed": 3, "temperature": 1.5 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.post("/v1/completions", &body.to_string())
    }

    fn followed(&self, more: &Value) -> String {
        let (status, answer) = self.follow(more);
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    }
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 5 },
            "stones": { "type": "array", "items": { "$ref": "#/$defs/stone" }, "maxItems": 2 },
        },
        "required": ["name", "stones"],
        "additionalProperties": false,
        "$defs": { "stone": { "type": "integer", "minimum": 0, "maximum": 99 } },
    })
}

fn check(text: &str) {
    let found: Value = serde_json::from_str(text).expect(text);
    assert_eq!(found.as_object().unwrap().len(), 2, "{text}");
    assert!(found["name"].as_str().unwrap().chars().count() <= 5, "{text}");
    for stone in found["stones"].as_array().unwrap() {
        assert!(stone.as_u64().unwrap() <= 99, "{text}");
    }
}

#[test]
fn answers_follow_what_is_asked() {
    let server = Server::start(&[]);
    let described = json!({ "name": "cairn", "strict": true, "schema": schema() });
    let format = json!({ "type": "json_schema", "json_schema": described });
    for seed in 0..4 {
        check(&server.followed(&json!({ "response_format": format, "seed": seed })));
        check(
            &server.followed(&json!({ "structured_outputs": { "json": schema() }, "seed": seed })),
        );
    }
    let chosen =
        server.followed(&json!({ "structured_outputs": { "choice": ["granite", "slate"] } }));
    assert!(["granite", "slate"].contains(&chosen.as_str()), "{chosen}");
    let date = server.followed(&json!({ "structured_outputs": { "regex": "[0-9]{4}-[0-9]{2}" } }));
    assert!(date.len() == 7 && date.as_bytes()[4] == b'-', "{date}");
    let lark = "start: \"<\" word \">\"\nword: /[ab]{2}/";
    let word = server.followed(&json!({ "structured_outputs": { "grammar": lark } }));
    assert!(word.len() == 4 && word.starts_with('<') && word.ends_with('>'), "{word}");

    // In a chat and in a response, too.
    let hi = json!([{ "role": "user", "content": "Hi" }]);
    let body = json!({ "messages": hi, "max_tokens": 200, "response_format": format, "seed": 1 });
    let (status, chat) = server.post("/v1/chat/completions", &body.to_string());
    assert_eq!(status, 200, "{chat}");
    check(chat["choices"][0]["message"]["content"].as_str().unwrap());
    let text = json!({ "format": { "type": "json_schema", "name": "cairn", "schema": schema() } });
    let body = json!({ "input": "Hi", "text": text, "seed": 1 });
    let (status, response) = server.post("/v1/responses", &body.to_string());
    assert_eq!(status, 200, "{response}");
    check(response["output"][0]["content"][0]["text"].as_str().unwrap());
    assert_eq!(response["text"], text);
}

#[test]
fn several_answers_follow_on_their_own() {
    let server = Server::start(&[]);
    let ask = json!({ "structured_outputs": { "regex": "[a-z]{3,9}" }, "n": 8 });
    let (status, answer) = server.follow(&ask);
    assert_eq!(status, 200, "{answer}");
    let texts: Vec<&str> =
        (0..8).map(|index| answer["choices"][index]["text"].as_str().unwrap()).collect();
    for text in &texts {
        assert!((3..=9).contains(&text.len()), "{texts:?}");
        assert!(text.bytes().all(|byte| byte.is_ascii_lowercase()), "{texts:?}");
    }
    assert!(texts.iter().any(|text| text != &texts[0]), "each has its own randomness: {texts:?}");
}

#[test]
fn grammars_that_are_none_hurt_nobody() {
    let server = Server::start(&["--max-body-bytes", "1048576"]);
    let good = server.complete(&greedy("stone", 8));
    let deep = (0..60).fold(
        json!({ "type": "string" }),
        |inner, _| json!({ "type": "object", "properties": { "a": inner }, "required": ["a"] }),
    );
    let wide: serde_json::Map<String, Value> =
        (0..4000).map(|index| (format!("field{index}"), json!({ "type": "string" }))).collect();
    for (grammar, is_refused) in [
        (json!({ "regex": "(a+)+b" }), false),
        (json!({ "regex": "(" }), true),
        (json!({ "regex": "a{1,100000}" }), false),
        (json!({ "regex": "((a{1,500}){1,500}){1,500}" }), false),
        (json!({ "json": { "$ref": "http://127.0.0.1:9/x.json" } }), true),
        (json!({ "json": { "$ref": "file:///etc/passwd" } }), true),
        (json!({ "json": { "$ref": "#/nowhere" } }), true),
        (json!({ "json": { "$ref": "#" } }), true),
        (json!({ "json": { "type": "string", "minLength": 5, "maxLength": 1 } }), true),
        (json!({ "json": { "type": "nothing" } }), true),
        (json!({ "json": { "x-guidance": { "lenient": true } } }), true),
        (json!({ "json": 7 }), true),
        (json!({ "json": deep }), false),
        (json!({ "json": { "type": "object", "properties": wide } }), false),
        (json!({ "grammar": "start: start" }), true),
        (json!({ "grammar": "start: %json {\"$ref\": \"http://a/b\"}" }), true),
        (json!({ "choice": [] }), true),
        (json!({ "choice": ["a", 1] }), true),
        (json!({ "json": {}, "regex": "a" }), true),
        (json!({ "whatever": "a" }), true),
    ] {
        let (status, answer) =
            server.follow(&json!({ "structured_outputs": grammar, "max_tokens": 4 }));
        let shown: String = grammar.to_string().chars().take(80).collect();
        match is_refused {
            true => {
                assert_eq!(status, 400, "{shown}: {answer}");
                assert_eq!(answer["error"]["param"], "structured_outputs", "{shown}: {answer}");
            }
            // What can be compiled within the bounds is followed; what cannot is refused, never more.
            false => assert!([200, 400].contains(&status), "{shown}: {answer}"),
        }
    }
    for seed in 0..30 {
        let fresh = json!({ "json": { "const": format!("schema {seed}") } });
        let text = server.followed(&json!({ "structured_outputs": fresh }));
        assert_eq!(text, format!("\"schema {seed}\""));
    }
    assert_eq!(server.complete(&greedy("stone", 8)), good);
}

//! Who may ask what, and how much: every address without a key, with a wrong one, with one for something else.

use serde_json::{Value, json};

use super::{Server, greedy};

const TEXT: &str = "\
[[key]]
name = \"asks\"
key = \"a-key-that-asks-only\"
scopes = [\"generate\"]
tokens_per_minute = 100

[[key]]
name = \"looks\"
# a-key-that-only-looks
sha256 = \"SHA256\"
scopes = [\"metrics\"]

[[key]]
name = \"rules\"
key = \"a-key-that-rules-all\"
scopes = [\"generate\", \"embed\", \"metrics\", \"admin\"]
";

/// The SHA-256 of `a-key-that-only-looks`.
const LOOKS: &str = "894e4cf5ecc7547c3f6800babe10636877daabec916980514963d439b587cc82";

/// A server with the keys above.
fn server() -> (tempfile::TempDir, Server) {
    server_with(&[])
}

fn server_with(more: &[&str]) -> (tempfile::TempDir, Server) {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.toml");
    std::fs::write(&keys, TEXT.replace("SHA256", LOOKS)).unwrap();
    let models = folder.path().to_str().unwrap().to_owned();
    let all = ["--api-keys", keys.to_str().unwrap(), "--models-dir", &models];
    let server = Server::start(&[&all[..], more].concat());
    (folder, server)
}

impl Server {
    /// The status, `Retry-After` and body of an answer to a request with a key.
    fn ask(
        &self,
        (method, path): (&str, &str),
        key: Option<&str>,
        body: &str,
    ) -> (u16, Option<u64>, Value) {
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address));
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut answer = agent.run(request.body(body.to_owned()).unwrap()).unwrap();
        let retry = answer.headers().get("retry-after");
        let retry = retry.map(|value| value.to_str().unwrap().parse().unwrap());
        let text = answer.body_mut().read_to_string().unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        (answer.status().as_u16(), retry, body)
    }
}

#[test]
fn every_address_asks_for_its_key() {
    let (_folder, server) = server();
    let document: Value = serde_json::from_str(&server.get("/openapi.json").1).unwrap();
    let paths = document["paths"].as_object().unwrap();
    let mut open = Vec::new();
    let mut count = 0;
    for (path, methods) in paths {
        for (method, described) in methods.as_object().unwrap() {
            count += 1;
            let (method, at) = (method.to_uppercase(), path.replace("{id}", "chat"));
            let status = |key: Option<&str>| server.ask((&method, &at), key, "{}").0;
            if described.get("security").is_none() {
                open.push(path.as_str());
                assert_eq!(status(None), 200, "{method} {path}");
                continue;
            }
            for key in [None, Some(""), Some("a-key-that-nobody-has"), Some("a-key-that-asks-onl")]
            {
                assert_eq!(status(key), 401, "{method} {path} {key:?}");
            }
            let about = described["description"].as_str().unwrap();
            let with = ["generate", "metrics", "admin"].map(|scope| {
                let is_scoped = about.contains("scope");
                !is_scoped || about.contains(&format!("'{scope}'"))
            });
            let keys = ["a-key-that-asks-only", "a-key-that-only-looks", "a-key-that-rules-all"];
            for (key, is_enough) in keys.into_iter().zip([with[0], with[1], true]) {
                let found = status(Some(key));
                assert_eq!(found != 403, is_enough, "{method} {path} {key}: {found}");
                assert_ne!(found, 401, "{method} {path} {key}");
            }
            // Nor does another method tell what is there.
            assert_eq!(server.ask(("DELETE", &at), None, "").0, 401, "{path}");
        }
    }
    assert_eq!(open, ["/", "/health", "/ready", "/openapi.json"]);
    assert!(20 <= count, "{count}");
    assert_eq!(server.ask(("GET", "/nowhere"), None, "").0, 401);
    assert_eq!(server.ask(("GET", "/nowhere"), Some("a-key-that-only-looks"), "").0, 404);
}

#[test]
fn tokens_a_minute_are_counted_before_they_are_made() {
    let (_folder, server) = server();
    let ask = |key: &str, tokens: usize, n: usize| {
        let mut body = greedy("stone", tokens);
        body["n"] = n.into();
        server.ask(("POST", "/v1/completions"), Some(key), &body.to_string())
    };
    // More than a minute ever has is wrong, whenever it is asked.
    let (status, _, answer) = ask("a-key-that-asks-only", 60, 2);
    assert_eq!((status, answer["error"]["code"].as_str()), (400, Some("tokens_per_minute")));
    let (status, _, answer) = ask("a-key-that-asks-only", 20, 2);
    assert_eq!(status, 200, "{answer}");
    // The prompt and both answers count, made or not: less than sixty are left.
    let (status, retry, answer) = ask("a-key-that-asks-only", 60, 1);
    assert_eq!((status, answer["error"]["code"].as_str()), (429, Some("rate_limit_exceeded")));
    assert!(retry.is_some_and(|seconds| (1..=60).contains(&seconds)), "{retry:?}");
    assert_eq!(ask("a-key-that-rules-all", 200, 2).0, 200, "others have their own");
}

#[test]
fn what_was_not_taken_is_not_paid() {
    let (_folder, server) = server_with(&["--max-num-waiting", "2"]);
    let ask = |n: usize, beams: bool| {
        let mut body = greedy("stone", 20);
        (body["n"], body["use_beam_search"]) = (n.into(), beams.into());
        let key = Some("a-key-that-asks-only");
        server.ask(("POST", "/v1/completions"), key, &body.to_string())
    };
    // Each would be more than half of what the key has.
    for beams in [false, true, false, true] {
        let (status, _, answer) = ask(3, beams);
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("n")), "{answer}");
    }
    let (status, _, answer) = ask(2, false);
    assert_eq!(status, 200, "{answer}");
    let (status, _, answer) = ask(2, true);
    assert_eq!(status, 200, "{answer}");
    let (status, _, answer) = ask(2, true);
    assert_eq!((status, answer["error"]["code"].as_str()), (429, Some("rate_limit_exceeded")));
}

/// Words of the source that may be names of fields.
fn words() -> std::collections::BTreeSet<String> {
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../cairn-serve/src");
    let mut words = std::collections::BTreeSet::new();
    for folder in [source.clone(), source.join("api")] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|kind| kind == "rs") {
                let text = std::fs::read_to_string(path).unwrap();
                let is_name = |word: &&str| {
                    word.bytes()
                        .all(|byte| byte.is_ascii_lowercase() || b"_0123456789".contains(&byte))
                };
                let found = text.split('"').filter(is_name).filter(|word| !word.is_empty());
                words.extend(found.map(ToOwned::to_owned));
            }
        }
    }
    words
}

#[test]
fn what_is_known_is_described() {
    let server = Server::start(&[]);
    let agent: ureq::Agent =
        ureq::Agent::config_builder().http_status_as_error(false).build().into();
    // The fields that an address knows: all words that it does not refuse for being there.
    let known = |path: &str, body: &Value| {
        let mut body = body.clone();
        for word in words() {
            body.as_object_mut().unwrap().entry(word).or_insert(Value::Null);
        }
        loop {
            let url = format!("http://{}{path}", server.address);
            let mut answer = agent.post(&url).send(body.to_string()).unwrap();
            let text = answer.body_mut().read_to_string().unwrap();
            let answer: Value = serde_json::from_str(&text).unwrap();
            let message = answer["error"]["message"].as_str().unwrap_or_default();
            let unknown = message.split_once("there is no field '").map(|(_, rest)| rest);
            let Some((unknown, _)) = unknown.and_then(|rest| rest.split_once('\'')) else { break };
            body.as_object_mut().unwrap().remove(unknown).unwrap();
        }
        body.as_object().unwrap().keys().cloned().collect::<std::collections::BTreeSet<_>>()
    };
    let hi = json!([{ "role": "user", "content": "a" }]);
    let document: Value = serde_json::from_str(&server.get("/openapi.json").1).unwrap();
    let mut count = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let schema = &methods["post"]["requestBody"]["content"]["application/json"]["schema"];
        let Some(properties) = schema["properties"].as_object() else { continue };
        let bodies = match path.as_str() {
            "/v1/completions" => vec![json!({ "prompt": "a", "max_tokens": 1 })],
            "/v1/chat/completions" | "/v1/messages" => {
                vec![json!({ "messages": hi, "max_tokens": 1 })]
            }
            "/v1/messages/count_tokens" => vec![json!({ "messages": hi })],
            "/v1/responses" => vec![json!({ "input": "a", "max_output_tokens": 1 })],
            "/v1/embeddings" => vec![json!({ "input": "a" })],
            "/tokenize" => vec![json!({ "prompt": "a" }), json!({ "messages": hi })],
            "/detokenize" => vec![json!({ "tokens": [1] })],
            "/v1/load_lora_adapter" => vec![json!({ "lora_name": "a", "lora_path": "a" })],
            "/v1/unload_lora_adapter" => vec![json!({ "lora_name": "a" })],
            _ => vec![json!({ "model": "a" })],
        };
        let known = bodies.iter().flat_map(|body| known(path, body));
        let known: std::collections::BTreeSet<String> = known.collect();
        count += known.len();
        assert_eq!(known, properties.keys().cloned().collect(), "{path}");
    }
    assert!(150 < count, "{count}");
}

#[test]
fn the_page_and_the_description_are_there_for_all() {
    let (_folder, server) = server();
    let (status, page) = server.get("/");
    assert_eq!(status, 200);
    assert!(page.contains("<!doctype html>") && !page.contains("chat.gguf"));
    let answer = ureq::get(format!("http://{}/", server.address)).call().unwrap();
    let policy = answer.headers()["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
}

#[test]
fn what_is_described_is_known() {
    let server = Server::start(&[]);
    let document: Value = serde_json::from_str(&server.get("/openapi.json").1).unwrap();
    let mut count = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let schema = &methods["post"]["requestBody"]["content"]["application/json"]["schema"];
        let Some(properties) = schema["properties"].as_object() else { continue };
        for name in properties.keys() {
            count += 1;
            // A value of no field's type: the field is blamed for it, or an earlier one; never for being there.
            let mut body = json!({ "prompt": "a", "max_tokens": 1, "tokens": [1], "input": "a" });
            for other in ["prompt", "max_tokens", "tokens", "input"] {
                if !properties.contains_key(other) {
                    body.as_object_mut().unwrap().remove(other);
                }
            }
            let is_text =
                path == "/tokenize" && ["prompt", "add_special_tokens"].contains(&name.as_str());
            if properties.contains_key("messages") && !is_text {
                body.as_object_mut().unwrap().remove("prompt");
                body["messages"] = json!([{ "role": "user", "content": "a" }]);
            }
            body[name] = json!([[{ "of": "no type" }]]);
            let (status, answer) = server.post(path, &body.to_string());
            let message = answer["error"]["message"].as_str().unwrap_or_default();
            assert!(!message.contains("there is no field"), "{path} {name}: {answer}");
            assert!(status < 500, "{path} {name}: {answer}");
        }
    }
    assert!(80 < count, "{count}");
}

//! `cairn serve`: what it answers, what it refuses by name, and that one request does not hurt another.

mod calls;
mod embeddings;
mod extremes;
mod forms;
mod grammars;
mod keys;
mod process;
mod stock;
mod survives;
mod thoughts;
mod tls;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{cairn, golden, succeed};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server that ends with its test.
struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Serves a small model.
    fn start(arguments: &[&str]) -> Self {
        Self::start_model(&golden("gguf").join("chat.gguf"), arguments)
    }

    fn start_model(model: &Path, arguments: &[&str]) -> Self {
        let mut command = cairn(["--threads", "1", "serve", "--port", "0", "--model"]);
        Self::of(command.arg(model).args(arguments))
    }

    /// Serves what the arguments say.
    fn start_with(arguments: &[&str]) -> Self {
        Self::of(cairn(["--threads", "1", "serve", "--port", "0"]).args(arguments))
    }

    fn of(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        let address = lines.by_ref().find_map(|line| {
            let line = line.unwrap();
            let address =
                line.split_once("Serving http").and_then(|(_, rest)| rest.split_once("://"));
            let address = address.map(|(_, address)| address.trim().to_owned());
            said.push(line);
            address
        });
        // What it says later must find a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address: address.unwrap_or_else(|| panic!("it does not serve: {said:?}")) }
    }

    fn post(&self, path: &str, body: &str) -> (u16, Value) {
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let url = format!("http://{}{path}", self.address);
        let mut answer = agent.post(&url).send(body).unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        (answer.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    fn get(&self, path: &str) -> (u16, String) {
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut answer = agent.get(&format!("http://{}{path}", self.address)).call().unwrap();
        (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
    }

    /// A text continued greedily.
    fn complete(&self, body: &Value) -> String {
        let (status, answer) = self.post("/v1/completions", &body.to_string());
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    }

    fn metric(&self, name: &str) -> u64 {
        let (_, page) = self.get("/metrics");
        let line = page.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    }

    fn wait_for(&self, name: &str, value: u64) {
        let begin = Instant::now();
        while self.metric(name) != value {
            assert!(begin.elapsed() < PATIENCE, "{name} never became {value}");
        }
    }

    fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    fn wait(&mut self) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "it does not end");
            std::thread::yield_now();
        }
    }

    /// Begins a stream of chunks; its head has come.
    fn stream(&self, path: &str, body: &Value) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body.to_string();
        let host = &self.address;
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut reader = BufReader::new(stream);
        let mut first = String::new();
        reader.read_line(&mut first).unwrap();
        assert!(first.contains("200"), "{first}");
        reader
    }
}

/// The events of a stream that ends with `[DONE]`.
fn events(mut reader: impl Read) -> Vec<Value> {
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let (last, events) = data.split_last().expect("events");
    assert_eq!(*last, "[DONE]", "{text}");
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

fn greedy(prompt: &str, max_tokens: usize) -> Value {
    json!({ "prompt": prompt, "max_tokens": max_tokens, "temperature": 0 })
}

#[test]
fn texts_are_continued_as_generate_does() {
    let server = Server::start(&[]);
    assert_eq!(server.get("/health").0, 200);
    assert_eq!(server.get("/ready").0, 200);
    let models: Value = serde_json::from_str(&server.get("/v1/models").1).unwrap();
    assert_eq!(models["data"][0]["id"], "chat");

    let (status, answer) = server.post("/v1/completions", &greedy("one stone", 12).to_string());
    assert_eq!(status, 200, "{answer}");
    let mut command = cairn(["--quiet", "generate", "--prompt", "one stone", "--json"]);
    command.args(["--temperature", "0", "--max-new-tokens", "12", "--model"]);
    let printed = succeed(command.arg(golden("gguf").join("chat.gguf")));
    let printed: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(answer["choices"][0]["text"], printed["text"], "{answer} {printed}");
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "chat");

    // Piece by piece it is the same text, with its numbers at the end.
    let mut body = greedy("one stone", 12);
    body["stream"] = true.into();
    body["stream_options"] = json!({ "include_usage": true });
    let events = events(server.stream("/v1/completions", &body));
    let pieces = events.iter().filter_map(|event| event["choices"][0]["text"].as_str());
    assert_eq!(pieces.collect::<String>(), answer["choices"][0]["text"].as_str().unwrap());
    let num_new = &answer["usage"]["completion_tokens"];
    assert_eq!(&events.last().unwrap()["usage"]["completion_tokens"], num_new);

    // Ids in, the same text out.
    let (_, ids) = server.post("/tokenize", r#"{"prompt": "one stone"}"#);
    body = json!({ "prompt": ids["tokens"], "max_tokens": 12, "temperature": 0 });
    assert_eq!(server.complete(&body), answer["choices"][0]["text"].as_str().unwrap());
    let without = json!({ "prompt": "one stone", "add_special_tokens": false });
    let (_, ids) = server.post("/tokenize", &without.to_string());
    let (_, text) = server.post("/detokenize", &json!({ "tokens": ids["tokens"] }).to_string());
    assert_eq!(text["prompt"], "one stone");
}

#[test]
fn conversations_are_answered_and_end_at_stops() {
    let server = Server::start(&[]);
    let chat = |more: &Value| {
        let mut body = json!({
            "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 8, "temperature": 0,
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/chat/completions", &body.to_string())
    };
    let (status, whole) = chat(&json!({}));
    assert_eq!(status, 200, "{whole}");
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert!(!text.is_empty());
    // A text in parts is the same text.
    let parts = json!([{ "type": "text", "text": "H" }, { "type": "text", "text": "i" }]);
    let (_, again) = chat(&json!({ "messages": [{ "role": "user", "content": parts }] }));
    assert_eq!(again["choices"], whole["choices"]);
    let middle: String = text.chars().skip(1).take(2).collect();
    let (_, stopped) = chat(&json!({ "stop": [middle] }));
    let expected = text.split(&middle).next().unwrap();
    assert_eq!(stopped["choices"][0]["message"]["content"], expected);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
}

#[test]
fn what_a_client_puts_into_the_assistants_mouth_is_text() {
    let server = Server::start(&[]);
    let num_prompt = |said: &str| {
        let message = |role: &str, content: &str| json!({ "role": role, "content": content });
        let messages = [message("user", "a"), message("assistant", said), message("user", "b")];
        let body = json!({ "messages": messages, "max_tokens": 1, "temperature": 0 });
        let (status, answer) = server.post("/v1/chat/completions", &body.to_string());
        assert_eq!(status, 200, "{answer}");
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    // One control token, or the several that spell it.
    assert!(num_prompt("") + 3 < num_prompt("</s>"));
}

#[test]
fn a_seed_decides_alone_and_in_a_crowd() {
    let server = Server::start(&["--max-num-seqs", "4"]);
    let body = |seed: u64| json!({ "prompt": "stone", "max_tokens": 16, "seed": seed });
    let alone: Vec<String> = (0..6).map(|seed| server.complete(&body(seed))).collect();
    assert!(alone.iter().any(|text| *text != alone[0]), "seeds matter");
    let crowd: Vec<String> = std::thread::scope(|scope| {
        let (server, body) = (&server, &body);
        let threads: Vec<_> =
            (0..6).map(|seed| scope.spawn(move || server.complete(&body(seed)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(crowd, alone);
    // Further answers to one prompt have randomness of their own, which the seed decides as well.
    let body = json!({ "prompt": "stone", "max_tokens": 16, "seed": 2, "n": 3 }).to_string();
    let texts = || -> Vec<String> {
        let (_, several) = server.post("/v1/completions", &body);
        let text = |index: usize| several["choices"][index]["text"].as_str().unwrap().to_owned();
        (0..3).map(text).collect()
    };
    let several = texts();
    assert_eq!(several[0], alone[2]);
    assert!(several[1] != several[0] && several[2] != several[1], "{several:?}");
    assert_eq!(texts(), several);
}

/// Path, body, status, the field that is blamed, and words of the message.
const WRONG: &[(&str, &str, u16, &str, &str)] = &[
    (
        "/v1/completions",
        r#"{"prompt": "a", "temprature": 1}"#,
        400,
        "temprature",
        "is temperature meant",
    ),
    ("/v1/completions", r#"{"prompt": "a", "n": 1, "n": 2}"#, 400, "", "'n' is there twice"),
    ("/v1/completions", r#"{"prompt": "a", "n": 0}"#, 400, "n", "n is 0"),
    ("/v1/completions", r#"{"prompt": "a", "max_tokens": 0}"#, 400, "", "max_new_tokens is 0"),
    ("/v1/completions", r#"{"prompt": "a", "max_tokens": 9223372036854775808}"#, 400, "", ""),
    ("/v1/completions", r#"{"prompt": "a", "max_tokens": -1}"#, 400, "max_tokens", "max_tokens"),
    (
        "/v1/completions",
        r#"{"prompt": "a", "temperature": -1}"#,
        400,
        "temperature",
        "temperature is -1",
    ),
    (
        "/v1/completions",
        r#"{"prompt": "a", "temperature": 1e308}"#,
        400,
        "temperature",
        "too large",
    ),
    (
        "/v1/completions",
        r#"{"prompt": "a", "repetition_penalty": 1e-40}"#,
        400,
        "repetition_penalty",
        "in [0.01, 100]",
    ),
    ("/v1/completions", r#"{"prompt": ["a", "b"], "n": 33}"#, 400, "n", "2 prompts times n = 33"),
    ("/v1/completions", r#"{"prompt": "a", "top_p": 0}"#, 400, "top_p", "top_p is 0"),
    (
        "/v1/completions",
        r#"{"prompt": "a", "logit_bias": {"x": 1}}"#,
        400,
        "logit_bias",
        "no token id",
    ),
    (
        "/v1/completions",
        r#"{"prompt": "a", "logit_bias": {"1": 1e9}}"#,
        400,
        "logit_bias",
        "in [-100, 100]",
    ),
    (
        "/v1/completions",
        r#"{"prompt": "a", "logit_bias": {"4000000000": 1}}"#,
        400,
        "",
        "4000000000",
    ),
    ("/v1/completions", r#"{"prompt": "a", "stop": [""]}"#, 400, "stop", "0 bytes"),
    ("/v1/completions", r#"{"prompt": "a", "suffix": "b"}"#, 400, "suffix", "not supported here"),
    (
        "/v1/completions",
        r#"{"prompt": "a", "stream_options": {}}"#,
        400,
        "stream_options",
        "only for stream",
    ),
    ("/v1/completions", r#"{"prompt": []}"#, 400, "prompt", "no tokens"),
    ("/v1/completions", r#"{"prompt": [4000000000]}"#, 400, "", "4000000000"),
    ("/v1/completions", r#"{"prompt": [1.5]}"#, 400, "prompt", "1.5, which is no token id"),
    ("/v1/completions", r#"{"prompt": {}}"#, 400, "prompt", "neither a text nor a list"),
    ("/v1/completions", "{}", 400, "prompt", "prompt is missing"),
    ("/v1/completions", "", 400, "", "no JSON to read"),
    ("/v1/completions", r#"{"prompt": "\ud800"}"#, 400, "", "no JSON to read"),
    ("/v1/completions", r#"{"model": "gpt-4", "prompt": "a"}"#, 404, "model", "'chat' is served"),
    (
        "/v1/chat/completions",
        r#"{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"bos_token": "<s>"}}"#,
        400,
        "chat_template_kwargs",
        "chat_template_kwargs.bos_token is neither true, false nor a number",
    ),
    (
        "/v1/chat/completions",
        r#"{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"add_generation_prompt": false}}"#,
        400,
        "chat_template_kwargs",
        "not the client's to set",
    ),
    ("/v1/chat/completions", r#"{"messages": []}"#, 400, "messages", "messages is empty"),
    (
        "/v1/chat/completions",
        r#"{"messages": [{"role": "king", "content": "a"}]}"#,
        400,
        "messages",
        "'king'",
    ),
    ("/v1/chat/completions", r#"{"messages": [{"role": "user"}]}"#, 400, "messages", "no text"),
    (
        "/v1/chat/completions",
        r#"{"messages": [], "tools": [{}]}"#,
        400,
        "tools",
        "only functions are",
    ),
    ("/v1/nothing", "{}", 404, "", "there is no POST /v1/nothing here"),
    ("/v1/models", "{}", 405, "", "/v1/models does not take POST"),
    ("/v1/completions", r#"{"prompt": "a", "logprobs": 129}"#, 400, "", "129"),
    (
        "/v1/chat/completions",
        r#"{"messages": [{"role": "user", "content": "a"}], "logprobs": true, "top_logprobs": 21}"#,
        400,
        "top_logprobs",
        "at most 20",
    ),
    (
        "/v1/chat/completions",
        r#"{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}"#,
        400,
        "top_logprobs",
        "wants logprobs",
    ),
    ("/v1/responses", r#"{"input": 1}"#, 400, "input", "neither a text nor a list"),
    (
        "/v1/responses",
        r#"{"input": [{"type": "web_search_call"}]}"#,
        400,
        "input",
        "type is web_search_call; messages, function calls",
    ),
    (
        "/v1/responses",
        r#"{"input": "a", "previous_response_id": "resp-1"}"#,
        400,
        "previous_response_id",
        "not supported here",
    ),
];

#[test]
fn what_is_wrong_is_refused_by_name() {
    let server = Server::start(&["--max-body-bytes", "4096"]);
    let good = server.complete(&greedy("stone", 4));
    for &(path, body, status, param, message) in WRONG {
        let (found, answer) = server.post(path, body);
        let error = &answer["error"];
        assert_eq!(found, status, "{body}: {answer}");
        assert_eq!(error["param"].as_str().unwrap_or(""), param, "{body}: {answer}");
        assert!(error["message"].as_str().unwrap().contains(message), "{body}: {answer}");
    }
    let long = json!({ "prompt": "a ".repeat(4096) }).to_string();
    assert_eq!(server.post("/v1/completions", &long).0, 413);
    let deep = format!("{}1", "[".repeat(4000));
    assert_eq!(server.post("/v1/completions", &deep).0, 400);
    assert_eq!(server.complete(&greedy("stone", 4)), good, "the others were not hurt");
}

#[test]
fn a_client_that_leaves_takes_its_request_with_it() {
    let server = Server::start(&["--max-num-seqs", "1"]);
    let mut body = greedy("stone", 240);
    body["logit_bias"] = never_ending(&server);
    body["stream"] = true.into();
    // So many that most of them wait when the client leaves, however late that is noticed.
    body["n"] = 64.into();
    drop(server.stream("/v1/completions", &body));
    let ended = || {
        let finished = server.metric("cairn_requests_finished_total ");
        (finished, server.metric("cairn_requests_cancelled_total "))
    };
    let begin = Instant::now();
    let mut counts = ended();
    while counts.0 + counts.1 != 64 {
        assert!(begin.elapsed() < PATIENCE, "{counts:?}");
        counts = ended();
    }
    assert!(0 < counts.1, "{counts:?}");
    server.wait_for("cairn_requests_running ", 0);
    assert_eq!(server.complete(&greedy("stone", 4)), server.complete(&greedy("stone", 4)));
}

/// Keeps special tokens, among which are those that end an answer, from being chosen.
fn never_ending(server: &Server) -> Value {
    let (_, ids) = server.post("/tokenize", r#"{"prompt": "stone", "add_special_tokens": false}"#);
    let first = ids["tokens"][0].as_u64().unwrap();
    json!({ first.to_string(): 100 })
}

#[test]
fn a_server_ends_in_good_order() {
    let mut server = Server::start(&["--max-num-seqs", "1"]);
    let mut body = greedy("stone", 200);
    body["logit_bias"] = never_ending(&server);
    body["stream"] = true.into();
    // One after the other: long enough for the signal to come in between.
    body["n"] = 64.into();
    let stream = server.stream("/v1/completions", &body);
    server.signal("-TERM");
    // What ran comes to its end, and then the process does.
    let events = events(stream);
    let ends = events.iter().filter(|event| event["choices"][0]["finish_reason"] == "length");
    assert_eq!(ends.count(), 64);
    assert!(server.wait().success());
}

#[test]
fn only_those_with_a_key_are_answered() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "a-key-of-sixteen-letters\nanother-key-of-letters\n").unwrap();
    let server = Server::start(&["--api-keys", keys.to_str().unwrap()]);
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/nowhere", "/v1//models"]
    {
        assert_eq!(server.post(path, "{}").0, 401, "{path}");
    }
    for path in ["/v1/models", "/v1/models/chat", "/metrics", "/../metrics"] {
        assert_eq!(server.get(path).0, 401, "{path}");
    }
    assert_eq!(server.get("/health").0, 200);
    let url = format!("http://{}/v1/models", server.address);
    let key = "Bearer a-key-of-sixteen-letters";
    assert!(ureq::get(&url).header("authorization", key).call().is_ok());

    // What is computed for one holder of a key tells another nothing.
    let cached = |key: &str| {
        let body = greedy(&"one stone upon another ".repeat(8), 2).to_string();
        let mut answer = ureq::post(format!("http://{}/v1/completions", server.address))
            .header("x-api-key", key)
            .send(body)
            .unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let (one, other) = ("a-key-of-sixteen-letters", "another-key-of-letters");
    assert_eq!((cached(one), cached(other)), (0, 0));
    assert!(0 < cached(one) && 0 < cached(other));

    let mut open = cairn(["serve", "--host", "0.0.0.0", "--port", "0", "--model"]);
    let refused = open.arg(golden("gguf").join("chat.gguf")).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("no key is asked for") && said.contains("--api-keys"), "{said}");
}

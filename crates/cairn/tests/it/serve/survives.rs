//! What clients do to a server, by mistake or on purpose. After each of these a good request gets what it gets
//! otherwise, and nothing of the bad one is left.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use serde_json::json;

use super::{PATIENCE, Server, events, greedy, never_ending};
use crate::{cairn, golden};

impl Server {
    /// A connection that has said `head`.
    fn say(&self, head: &[u8]) -> TcpStream {
        self.try_say(head).unwrap()
    }

    /// The same; `None` if nobody listens any more.
    fn try_say(&self, head: &[u8]) -> Option<TcpStream> {
        let mut stream = TcpStream::connect(&self.address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        // A server that has refused may have closed already.
        let _ = stream.write_all(head);
        Some(stream)
    }

    /// The status that a connection is answered with; `None` if it is closed without an answer.
    pub(super) fn status(&self, head: &[u8]) -> Option<u16> {
        let mut answer = Vec::new();
        let _ = self.try_say(head)?.read_to_end(&mut answer);
        let line = String::from_utf8_lossy(&answer);
        line.split(' ').nth(1).and_then(|status| status.parse().ok())
    }

    /// Files that its process has open.
    pub(super) fn num_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Waits for something to come true.
    pub(super) fn settles(&self, what: &str, is_settled: impl Fn() -> bool) {
        let begin = Instant::now();
        while !is_settled() {
            assert!(begin.elapsed() < PATIENCE, "{what}");
        }
    }
}

fn post(path: &str, length: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

#[test]
fn heads_and_bodies_that_are_none() {
    let server = Server::start(&[
        "--max-body-bytes",
        "4096",
        "--header-timeout",
        "1",
        "--body-timeout",
        "1",
    ]);
    let descriptors = server.num_descriptors();
    let good = server.complete(&greedy("stone", 8));
    let long_name = format!("GET / HTTP/1.1\r\n{}: a\r\n\r\n", "a".repeat(1 << 20));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n\r\n", "a: b\r\n".repeat(10_000));
    for (what, head, statuses) in [
        ("a header of 1 MB", long_name.as_bytes(), &[431, 400][..]),
        ("10,000 headers", many.as_bytes(), &[431, 400]),
        ("no HTTP", b"\x16\x03\x01\x00\x00".as_slice(), &[400]),
        ("a head that never ends", b"GET / HTTP/1.1\r\na: ", &[]),
        ("a body that never comes", &post("/tokenize", "20", ""), &[408]),
        ("a body that says it is 1 GB", &post("/tokenize", "1000000000", "{"), &[413]),
        ("a length that is none", &post("/tokenize", "twenty", "{}"), &[400]),
        ("a length of 2^70", &post("/tokenize", "1180591620717411303424", "{}"), &[400]),
        ("no body", &post("/tokenize", "0", ""), &[400]),
    ] {
        let status = server.status(head);
        assert!(
            status.is_none_or(|status| statuses.contains(&status))
                && (statuses.is_empty() || status.is_some()),
            "{what}: {status:?}"
        );
    }
    // Bodies in pieces without a length, longer than what is taken.
    let mut endless = server.say(
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n",
    );
    while endless.write_all(b"400\r\n").and_then(|()| endless.write_all(&[b'a'; 1024])).is_ok()
        && endless.write_all(b"\r\n").is_ok()
    {}
    drop(endless);
    server.settles("descriptors stay open", || server.num_descriptors() <= descriptors);
    assert_eq!(server.complete(&greedy("stone", 8)), good);
}

#[test]
fn odd_paths_and_methods() {
    let server = Server::start(&[]);
    let good = server.complete(&greedy("stone", 8));
    for (method, path, status) in [
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/health", 405),
        ("GET", "//", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/%ff%fe", 400),
        ("BREW", "/v1/models", 405),
    ] {
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        assert_eq!(server.status(head.as_bytes()), Some(status), "{method} {path}");
    }
    assert_eq!(server.complete(&greedy("stone", 8)), good);
}

#[test]
fn a_client_that_never_reads_is_let_go() {
    let server = Server::start(&["--write-timeout", "1"]);
    let descriptors = server.num_descriptors();
    let good = server.complete(&greedy("stone", 8));
    let mut body = greedy("stone", 240);
    body["logit_bias"] = never_ending(&server);
    body["stream"] = true.into();
    body["n"] = 64.into();
    body["logprobs"] = 32.into();
    let body = body.to_string();
    // Sixty-four answers with 32 alternatives a token are more than the socket's buffers take.
    let mut silent = server.say(&post("/v1/completions", &body.len().to_string(), &body));
    server.settles("it is not taken", || server.metric("cairn_requests_total ") == 65);
    server.settles("it is not let go", || server.num_descriptors() <= descriptors);
    server.wait_for("cairn_requests_running ", 0);
    // What had been sent is there, and then no end of the stream.
    let mut sent = Vec::new();
    let _ = silent.read_to_end(&mut sent);
    assert!(!String::from_utf8_lossy(&sent).contains("[DONE]"));
    assert_eq!(server.complete(&greedy("stone", 8)), good);
}

#[test]
fn more_than_the_queue_holds_is_told_to_come_back() {
    let server = Server::start(&["--max-num-seqs", "1", "--max-num-waiting", "4"]);
    let good = server.complete(&greedy("stone", 8));
    let mut body = greedy("stone", 200);
    body["logit_bias"] = never_ending(&server);
    body["stream"] = true.into();
    let running = server.stream("/v1/completions", &body);
    // All or nothing: five never fit, four do.
    body["stream"] = false.into();
    body["max_tokens"] = 1.into();
    body["n"] = 5.into();
    let (status, answer) = server.post("/v1/completions", &body.to_string());
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("n")), "{answer}");
    body["n"] = 4.into();
    let (status, answer) = server.post("/v1/completions", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 4);
    let end = events(running);
    assert_eq!(end.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(server.complete(&greedy("stone", 8)), good);
}

#[test]
fn bodies_share_a_limit() {
    let limits =
        ["--max-body-bytes", "65536", "--max-bodies-bytes", "65536", "--body-timeout", "60"];
    let server = Server::start(&limits);
    // A client that sends half of a body keeps that much room. Whoever of the two comes second is refused.
    let half = format!("{{\"prompt\": \"{}", "a".repeat(40_000));
    let half = post("/tokenize", "60000", &half);
    let large = json!({ "prompt": "a".repeat(50_000) }).to_string();
    let mut slow = server.say(&half);
    let begin = Instant::now();
    while server.post("/tokenize", &large).0 != 429 {
        assert!(begin.elapsed() < PATIENCE, "both have room");
        slow = server.say(&half);
    }
    // What is small goes on, and all of it once the room is there again.
    assert_eq!(server.post("/tokenize", r#"{"prompt": "a"}"#).0, 200);
    drop(slow);
    server.settles("the room is not given back", || server.post("/tokenize", &large).0 == 200);
}

#[test]
fn it_says_that_it_is_not_ready_while_it_ends() {
    let mut server = Server::start(&["--max-num-seqs", "1"]);
    let mut body = greedy("stone", 240);
    body["logit_bias"] = never_ending(&server);
    body["stream"] = true.into();
    body["n"] = 64.into();
    let running = server.stream("/v1/completions", &body);
    server.signal("-TERM");
    // A connection that was accepted and had asked for nothing yet is closed.
    let ask = b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    server.settles("it is ready still", || server.status(ask) == Some(503));
    // As long as it is there at all.
    let health =
        server.status(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    assert!(health.is_none_or(|status| status == 200), "{health:?}");
    let late = greedy("stone", 1).to_string();
    let late = server.status(&post("/v1/completions", &late.len().to_string(), &late));
    assert!(late.is_none_or(|status| status == 503), "{late:?}");
    let ends = events(running).into_iter().filter(|e| e["choices"][0]["finish_reason"] == "length");
    assert_eq!(ends.count(), 64, "what ran is brought to its end");
    assert!(server.wait().success());
}

#[test]
fn a_full_disk_for_the_log_hurts_nobody() {
    // Somebody may take the port in between; nobody else here listens at a fixed one.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = cairn(["--threads", "1", "serve", "--port", &port.to_string(), "--model"]);
    command.arg(golden("gguf").join("chat.gguf"));
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let child = command.stderr(full).spawn().unwrap();
    let server = Server { child, address: format!("127.0.0.1:{port}") };
    let ask = b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let begin = Instant::now();
    while TcpStream::connect(&server.address).is_err() {
        assert!(begin.elapsed() < PATIENCE, "it does not start");
    }
    assert_eq!(server.status(ask), Some(200));
    assert_eq!(server.complete(&greedy("stone", 8)), server.complete(&greedy("stone", 8)));
}

#[test]
fn a_log_that_nobody_reads_holds_nobody_up() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = cairn(["--threads", "1", "serve", "--port", &port.to_string(), "--model"]);
    command.arg(golden("gguf").join("chat.gguf"));
    let child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let server = Server { child, address: format!("127.0.0.1:{port}") };
    server.settles("it does not start", || TcpStream::connect(&server.address).is_ok());
    // More lines than a pipe takes.
    for _ in 0..1500 {
        assert_eq!(server.get("/health").0, 200);
    }
    assert_eq!(server.complete(&greedy("stone", 8)), server.complete(&greedy("stone", 8)));
}

#[test]
fn pages_of_other_sites_get_nothing() {
    let server = Server::start(&[]);
    let body = r#"{"prompt": "a"}"#;
    for (header, status) in
        [("origin: http://localhost:3000", 200), ("origin: http://evil.example", 403)]
    {
        let length = body.len();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{header}\r\nconnection: close\r\n\
             content-length: {length}\r\n\r\n{body}"
        );
        assert_eq!(server.status(head.as_bytes()), Some(status), "{header}");
    }
    let rebound = b"GET /v1/models HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n";
    assert_eq!(server.status(rebound), Some(403));
}

#[test]
fn what_is_told_is_counted_once() {
    let server = Server::start(&[]);
    let metric = |name: &str| server.metric(name);
    let text = server.complete(&greedy("one stone", 12));
    let middle: String = text.chars().skip(1).take(2).collect();
    let mut body = greedy("one stone", 12);
    body["stop"] = middle.into();
    body["n"] = 4.into();
    let (status, answer) = server.post("/v1/completions", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    server.wait_for("cairn_requests_running ", 0);
    assert_eq!(metric("cairn_requests_total "), 5);
    server.wait_for("cairn_requests_finished_total ", 5);
    assert_eq!(metric("cairn_requests_cancelled_total "), 0);
    // One first token for each answer, and every further one after another.
    assert_eq!(metric("cairn_time_to_first_token_seconds_count "), 5);
    let told = metric("cairn_generation_tokens_total ");
    assert!(metric("cairn_inter_token_latency_seconds_count ") + 5 <= told);
    assert_eq!(metric("cairn_request_seconds_count "), 2);
}

#[test]
fn answers_that_would_be_too_long_to_hold_are_refused() {
    let server = Server::start(&[]);
    let mut body = greedy("stone", 200);
    body["n"] = 64.into();
    body["logprobs"] = 128.into();
    let (status, answer) = server.post("/v1/completions", &body.to_string());
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("logprobs")), "{answer}");
}

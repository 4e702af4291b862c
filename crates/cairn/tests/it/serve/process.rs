//! What happens to the process: signals at every moment, descriptors that run out, a restart.

use std::net::TcpStream;
use std::process::Stdio;
use std::time::Instant;

use serde_json::json;

use super::{PATIENCE, Server, events, greedy, never_ending};
use crate::{cairn, golden};

#[test]
fn a_signal_while_it_loads_ends_it() {
    let mut command = cairn(["serve", "--port", "0", "--model"]);
    command.arg(golden("gguf").join("chat.gguf")).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    let mut server = Server { child, address: String::new() };
    server.signal("-TERM");
    // Whether it listened to signals already or not.
    let _ = server.wait();
}

#[test]
fn a_signal_in_a_prompt_lets_it_be_answered() {
    let mut server = Server::start(&["--max-num-batched-tokens", "8", "--max-num-seqs", "1"]);
    let (_, ids) = server.post("/tokenize", r#"{"prompt": "stone", "add_special_tokens": false}"#);
    let id = ids["tokens"][0].as_u64().unwrap();
    // Many prompts of many pieces, one after the other.
    let prompts: Vec<Vec<u64>> = (0..64).map(|index| vec![id + index % 7; 240]).collect();
    let body = json!({ "prompt": prompts, "max_tokens": 2, "temperature": 0, "stream": true });
    let stream = server.stream("/v1/completions", &body);
    server.signal("-TERM");
    let ends = events(stream).into_iter();
    let ends = ends.filter(|event| event["choices"][0]["finish_reason"].is_string());
    assert_eq!(ends.count(), 64);
    assert!(server.wait().success());
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = Server::start(&["--max-num-seqs", "1"]);
    let mut body = greedy("stone", 240);
    body["logit_bias"] = never_ending(&server);
    body["stream"] = true.into();
    body["n"] = 64.into();
    let _stream = server.stream("/v1/completions", &body);
    server.signal("-TERM");
    // Two at once may be one.
    let ask = b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    server.settles("it is ready still", || server.status(ask) == Some(503));
    server.signal("-TERM");
    assert!(!server.wait().success());
}

#[test]
fn what_is_killed_starts_again_at_its_address() {
    let mut server = Server::start(&[]);
    let good = server.complete(&greedy("stone", 8));
    let mut body = greedy("stone", 240);
    body["logit_bias"] = never_ending(&server);
    body["stream"] = true.into();
    let _stream = server.stream("/v1/completions", &body);
    server.signal("-KILL");
    assert!(!server.wait().success());
    let port = server.address.rsplit(':').next().unwrap().to_owned();
    let model = golden("gguf").join("chat.gguf");
    let mut command = cairn(["--threads", "1", "serve", "--port", &port]);
    let again = Server::of(command.arg(model));
    assert_eq!(again.address, server.address);
    assert_eq!(again.complete(&greedy("stone", 8)), good);
}

#[test]
fn descriptors_may_run_out() {
    let command = cairn(["--threads", "1", "serve", "--port", "0"]);
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "ulimit -n 64; exec \"$@\"", "sh"]).arg(command.get_program());
    limited.args(command.get_args()).arg(golden("gguf").join("chat.gguf"));
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    let server = Server::of(&mut limited);
    let good = server.complete(&greedy("stone", 8));
    let descriptors = server.num_descriptors();
    // Far more than it can have; those that it cannot take wait in the system's queue.
    let silent: Vec<TcpStream> =
        (0..120).map_while(|_| TcpStream::connect(&server.address).ok()).collect();
    assert!(64 < silent.len());
    let begin = Instant::now();
    while server.num_descriptors() < 60 {
        assert!(begin.elapsed() < PATIENCE, "{}", server.num_descriptors());
    }
    drop(silent);
    assert_eq!(server.complete(&greedy("stone", 8)), good);
    server.settles("descriptors stay open", || server.num_descriptors() <= descriptors);
}

//! Encrypted connections: who is spoken to, HTTP/2 where both agree on it, and what floods of it do.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::{PATIENCE, Server, greedy};
use crate::{cairn, golden};

type Stream = StreamOwned<ClientConnection, TcpStream>;
/// What comes next of a flood.
type Flood<'a> = &'a dyn Fn(u32) -> Vec<u8>;

/// A certificate with its key, as files.
struct Pair {
    folder: tempfile::TempDir,
    certificate: CertificateDer<'static>,
}

impl Pair {
    fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cert.pem"), made.cert.pem()).unwrap();
        std::fs::write(folder.path().join("key.pem"), made.signing_key.serialize_pem()).unwrap();
        Self { folder, certificate: made.cert.der().clone() }
    }

    fn paths(&self) -> [PathBuf; 2] {
        ["cert.pem", "key.pem"].map(|name| self.folder.path().join(name))
    }

    fn serve(&self, more: &[&str]) -> Server {
        let [cert, key] = self.paths();
        let pair = ["--tls-cert", cert.to_str().unwrap(), "--tls-key", key.to_str().unwrap()];
        Server::start(&[&pair[..], more].concat())
    }

    /// A connection whose protocol is one of these.
    fn connect(&self, server: &Server, protocols: &[&[u8]]) -> Stream {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()));
        let config = config.with_safe_default_protocol_versions().unwrap();
        let mut config = config.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        let name = ServerName::try_from("localhost").unwrap();
        let socket = TcpStream::connect(&server.address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), socket)
    }

    /// The body of an answer in HTTP/1.1.
    fn ask(&self, server: &Server, method: &str, path: &str, body: &str) -> String {
        let mut stream = self.connect(server, &[b"http/1.1"]);
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        // A server that does not say goodbye is still understood.
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    /// What a good request gets.
    fn complete(&self, server: &Server) -> String {
        let answer = self.ask(server, "POST", "/v1/completions", &greedy("stone", 8).to_string());
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    }

    /// Requests that have come to an end, whatever it was.
    fn num_ended(&self, server: &Server) -> u64 {
        let page = self.ask(server, "GET", "/metrics", "");
        let count = page.lines().find_map(|line| line.strip_prefix("cairn_request_seconds_count "));
        count.unwrap().parse().unwrap()
    }
}

/// What an HTTP/2 connection begins with: the preface, and settings that say nothing.
fn preface() -> Vec<u8> {
    [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[])].concat()
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// `GET path`, for this machine: all of its head, and no body.
fn get(stream: u32, path: &str) -> Vec<u8> {
    // GET and https by their places in the fixed table; the path and the authority in letters.
    let mut head = vec![0x82, 0x87, 0x04, u8::try_from(path.len()).unwrap()];
    head.extend(path.bytes());
    head.extend([0x01, 9]);
    head.extend(b"localhost");
    frame(1, 0x5, stream, &head)
}

/// The next frame: its kind, flags, stream and payload; `None` at the end.
fn next_frame(stream: &mut Stream) -> Option<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut payload).ok()?;
    Some((head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload))
}

#[test]
fn connections_are_encrypted_in_both_versions_of_http() {
    let pair = Pair::new();
    let mut server = pair.serve(&[]);
    assert!(!pair.complete(&server).is_empty());
    let mut stream = pair.connect(&server, &[b"h2", b"http/1.1"]);
    stream.write_all(&[preface(), get(1, "/health")].concat()).unwrap();
    let mut body = Vec::new();
    while let Some((kind, flags, id, payload)) = next_frame(&mut stream) {
        // DATA of the answer, which ends it.
        if (kind, id) == (0, 1) {
            body.extend(payload);
            if flags & 1 == 1 {
                break;
            }
        }
    }
    assert_eq!(String::from_utf8(body).unwrap(), r#"{"status":"ok"}"#);
    assert_eq!(stream.conn.alpn_protocol(), Some(&b"h2"[..]));
    drop(stream);
    // Nobody is answered in the clear, and a client that says nothing is let go in the end.
    let mut plain = TcpStream::connect(&server.address).unwrap();
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP"), "{answer:?}");
    server.signal("-TERM");
    assert!(server.wait().success());
}

#[test]
fn a_wrong_pair_is_told() {
    let (one, other) = (Pair::new(), Pair::new());
    let ([cert, key], [_, other_key]) = (one.paths(), other.paths());
    let refused = |cert: &PathBuf, key: &PathBuf| {
        let mut command = cairn(["serve", "--port", "0", "--model"]);
        command.arg(golden("gguf").join("chat.gguf"));
        let refused =
            command.arg("--tls-cert").arg(cert).arg("--tls-key").arg(key).output().unwrap();
        assert_eq!(refused.status.code(), Some(1));
        String::from_utf8(refused.stderr).unwrap()
    };
    let said = refused(&cert, &other_key);
    assert!(said.contains("are not a certificate and its key") && said.contains("hint"), "{said}");
    let said = refused(&key, &key);
    assert!(said.contains("holds no certificate"), "{said}");
    let said = refused(&cert, &cert);
    assert!(said.contains("holds no private key"), "{said}");
    let said = refused(&cert, &one.folder.path().join("nothing"));
    assert!(said.contains("nothing"), "{said}");
}

#[test]
fn floods_of_http2_end_their_connection_alone() {
    let pair = Pair::new();
    let server =
        pair.serve(&["--header-timeout", "1", "--write-timeout", "1", "--body-timeout", "1"]);
    let good = pair.complete(&server);
    let descriptors = server.num_descriptors();
    let resets = |stream: u32| frame(3, 0, stream, &8_u32.to_be_bytes());
    let odd = |index: u32| 2 * index + 1;
    let floods: [(&str, Flood<'_>); 6] = [
        ("requests that are broken off", &|index| {
            [get(odd(index), "/health"), resets(odd(index))].concat()
        }),
        ("requests that never end", &|index| {
            let mut head = get(odd(index), "/tokenize");
            // POST, and a body is still to come.
            (head[4], head[9]) = (0x4, 0x83);
            head
        }),
        ("pings", &|_| frame(6, 0, 0, &[0; 8])),
        ("settings", &|_| frame(4, 0, 0, &[])),
        ("a head that never ends", &|index| match index {
            0 => frame(1, 0, 1, &[0x82]),
            _ => frame(9, 0, 1, &[0x82; 1000]),
        }),
        ("empty frames of a stream that is not there", &|_| frame(0, 0, 1, &[])),
    ];
    for (what, flood) in floods {
        let mut stream = pair.connect(&server, &[b"h2"]);
        stream.write_all(&preface()).unwrap();
        let mut sent = 0;
        // What is refused ends the connection; what is merely answered ends with its client.
        while sent < 20_000 && stream.write_all(&flood(sent)).is_ok() {
            sent += 1;
        }
        assert_eq!(pair.complete(&server), good, "{what}");
        drop(stream);
    }
    // A client that begins and says nothing.
    let mut silent = pair.connect(&server, &[b"h2"]);
    silent.write_all(&preface()).unwrap();
    while next_frame(&mut silent).is_some() {}
    server.settles("descriptors stay open", || server.num_descriptors() <= descriptors);
    assert_eq!(pair.complete(&server), good);
}

/// A request of HTTP/2 that asks for completions.
fn post(stream: u32, body: &serde_json::Value) -> Vec<u8> {
    let mut head = get(stream, "/v1/completions");
    // POST, and a body is still to come.
    (head[4], head[9]) = (0x4, 0x83);
    [head, frame(0, 1, stream, body.to_string().as_bytes())].concat()
}

#[test]
fn a_client_of_http2_that_takes_nothing_is_let_go() {
    let pair = Pair::new();
    let server = pair.serve(&["--write-timeout", "1"]);
    let good = pair.complete(&server);
    // No room for any stream: SETTINGS_INITIAL_WINDOW_SIZE is 0.
    let no_room = frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]);
    for (is_stream, n, settings) in
        [(true, 64, vec![]), (false, 8, vec![]), (true, 1, no_room.clone()), (false, 1, no_room)]
    {
        let ended = pair.num_ended(&server);
        let mut body = greedy("stone", 240);
        body["ignore_eos"] = true.into();
        body["stream"] = is_stream.into();
        body["n"] = n.into();
        body["logprobs"] = 32.into();
        let mut stream = pair.connect(&server, &[b"h2"]);
        stream.write_all(&[preface(), settings.clone(), post(1, &body)].concat()).unwrap();
        // What may be sent without asking is read, and nothing more is asked for; pings are answered. In the end the
        // answer is broken off, and nothing else.
        let mut taken = 0;
        loop {
            let (kind, flags, id, payload) =
                next_frame(&mut stream).expect("the connection goes on");
            match (kind, flags, id) {
                (0, ..) => taken += payload.len(),
                (3, _, 1) => break,
                (6, 0, _) => stream.write_all(&frame(6, 1, 0, &payload)).unwrap(),
                _ => {}
            }
        }
        assert_eq!(taken, if settings.is_empty() { 65_535 } else { 0 });
        server.settles("it is not let go", || ended < pair.num_ended(&server));
        stream.write_all(&get(3, "/health")).unwrap();
        while next_frame(&mut stream).expect("the connection goes on").2 != 3 {}
    }
    assert_eq!(pair.complete(&server), good);
}

#[test]
fn who_takes_an_answer_of_http2_slowly_gets_all_of_it() {
    let pair = Pair::new();
    let server = pair.serve(&["--write-timeout", "1"]);
    let mut body = greedy("stone", 240);
    body["ignore_eos"] = true.into();
    (body["n"], body["logprobs"]) = (8.into(), 32.into());
    let mut stream = pair.connect(&server, &[b"h2"]);
    stream.write_all(&[preface(), post(1, &body)].concat()).unwrap();
    let mut answer = Vec::new();
    loop {
        let (kind, flags, id, payload) = next_frame(&mut stream).expect("the answer goes on");
        assert_ne!((kind, id), (3, 1), "it is broken off after {}", answer.len());
        if (kind, id) != (0, 1) {
            continue;
        }
        let count = u32::try_from(payload.len()).unwrap().to_be_bytes();
        answer.extend(payload);
        if flags & 1 == 1 {
            break;
        }
        if count != [0; 4] {
            let room = |id| frame(8, 0, id, &count);
            stream.write_all(&[room(0), room(1)].concat()).unwrap();
        }
    }
    let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(answer["choices"].as_array().unwrap().len(), 8);
}

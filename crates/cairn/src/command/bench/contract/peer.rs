//! A peer: a server of llama.cpp's kind, started here or running elsewhere.
//!
//! It reads the same token ids, keeps nothing from turn to turn, chooses the likeliest token and is
//! not ended by any. Its own clock counts, so that the way there costs it nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cairn_artifacts::gguf::GgufFile;
use cairn_artifacts::machine::ProcessMemory;
use cairn_eval::contract::{Ran, Turn, TurnBench};
use serde_json::{Value, json};

use crate::failure::UserError;

/// How long a server may take until it answers.
const START_MAX: Duration = Duration::from_secs(300);
/// Between two questions whether it answers.
const POLL: Duration = Duration::from_millis(10);
/// Bytes of an answer, at most: a distribution over a large vocabulary, with its tokens' texts.
const ANSWER_BYTES_MAX: u64 = 1 << 28;

/// A server that generates.
pub(in crate::command::bench) struct Peer {
    /// What tables call it.
    pub(in crate::command::bench) name: String,
    /// Seconds from the start of its process to its first token, where it was started here.
    pub(in crate::command::bench) start_s: Option<f64>,
    address: String,
    agent: ureq::Agent,
    process: Option<Process>,
    threads: Option<usize>,
    weights: Option<Weights>,
    /// Counts of the last turn, as it reports them.
    counts: (usize, usize),
}

/// A process that ends when it is let go of.
struct Process {
    child: Child,
    log: tempfile::NamedTempFile,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It is gone already, or it goes now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peer {
    /// Starts the command, or asks the address.
    pub(in crate::command::bench) fn start(
        peer: &str,
        threads: Option<usize>,
        wanted: usize,
    ) -> anyhow::Result<Self> {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut started = Self {
            name: "peer".to_owned(),
            start_s: None,
            address: peer.trim_end_matches('/').to_owned(),
            agent,
            process: None,
            threads,
            weights: None,
            counts: (0, 0),
        };
        if !peer.starts_with("http://") {
            let begin = Instant::now();
            started.launch(peer, wanted)?;
            started.complete(&json!({ "prompt": [1, 2, 3], "n_predict": 1 }))?;
            started.start_s = Some(begin.elapsed().as_secs_f64());
        }
        let props = started.get("/props")?;
        let path = props.get("model_path").and_then(Value::as_str);
        if let Some(path) = path {
            let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
            started.name = format!("peer, {name}");
            started.weights = Weights::of(Path::new(path));
        }
        Ok(started)
    }

    /// Starts the command and waits until it answers.
    fn launch(&mut self, command: &str, threads: usize) -> anyhow::Result<()> {
        for place in ["{port}", "{threads}"] {
            if !command.contains(place) {
                let message = format!("the peer's command has no {place}");
                let example = "llama-server -m model.gguf -t {threads} --port {port}";
                return Err(UserError::new(message).hint(format!("such as: {example}")).into());
            }
        }
        let free = TcpListener::bind("127.0.0.1:0").context("cannot find a free port")?;
        let port = free.local_addr().context("cannot find a free port")?.port();
        drop(free);
        let filled =
            command.replace("{port}", &port.to_string()).replace("{threads}", &threads.to_string());
        let log = tempfile::NamedTempFile::new().context("cannot keep the peer's output")?;
        let output = |log: &File| Ok::<_, std::io::Error>(Stdio::from(log.try_clone()?));
        let child = Command::new("sh")
            .args(["-c", &format!("exec {filled}")])
            .stdin(Stdio::null())
            .stdout(output(log.as_file())?)
            .stderr(output(log.as_file())?)
            .spawn()
            .with_context(|| format!("cannot start {filled}"))?;
        self.address = format!("http://127.0.0.1:{port}");
        self.threads = Some(threads);
        let process = self.process.insert(Process { child, log });
        let begin = Instant::now();
        let health = format!("{}/health", self.address);
        loop {
            if let Some(status) = process.child.try_wait().context("cannot ask for the peer")? {
                let text = std::fs::read_to_string(process.log.path()).unwrap_or_default();
                let last = text.lines().last().unwrap_or("none").to_owned();
                return Err(UserError::new(format!("{filled} ended: {status}"))
                    .hint(format!("its last words: {last}"))
                    .into());
            }
            let answer = self.agent.get(&health).call();
            if answer.is_ok_and(|answer| answer.status() == 200) {
                return Ok(());
            }
            if begin.elapsed() > START_MAX {
                return Err(UserError::new(format!("{filled} does not answer at {health}")).into());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Runs a turn.
    pub(in crate::command::bench) fn turn(&mut self, bench: &TurnBench) -> anyhow::Result<Turn> {
        let answer = self.complete(&json!({
            "prompt": bench.prompt,
            "n_predict": bench.new_tokens,
            "temperature": 0.0,
            "top_k": 1,
            "ignore_eos": true,
            "cache_prompt": false,
            "return_tokens": true,
        }))?;
        let number = |place: &str, key: &str| {
            let found = answer.get(place).and_then(|place| place.get(key)).and_then(Value::as_f64);
            found.ok_or_else(|| UserError::new(format!("the peer's answer has no {place}.{key}")))
        };
        let count = |key: &str| -> anyhow::Result<usize> {
            let count = number("timings", key)?;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
            let whole = count as usize;
            Ok(whole)
        };
        self.counts = (count("prompt_n")?, count("predicted_n")?);
        let tokens = answer.get("tokens").and_then(Value::as_array);
        let tokens = tokens.ok_or_else(|| UserError::new("the peer's answer has no tokens"))?;
        let id = |token: &Value| token.as_u64().and_then(|id| u32::try_from(id).ok());
        Ok(Turn {
            prefill_s: number("timings", "prompt_ms")? / 1e3,
            decode_s: number("timings", "predicted_ms")? / 1e3,
            tokens: tokens.iter().filter_map(id).collect(),
        })
    }

    /// The log-probability of every token after `tokens`.
    pub(in crate::command::bench) fn next_logprobs(
        &mut self,
        tokens: &[u32],
        vocab_size: usize,
    ) -> anyhow::Result<Vec<f32>> {
        let answer = self.complete(&json!({
            "prompt": tokens,
            "n_predict": 1,
            "temperature": 0.0,
            "ignore_eos": true,
            "n_probs": vocab_size,
        }))?;
        let top = answer.pointer("/completion_probabilities/0/top_logprobs");
        let top = top.and_then(Value::as_array);
        let top = top.ok_or_else(|| UserError::new("the peer's answer has no top_logprobs"))?;
        let mut logprobs = vec![f32::NAN; vocab_size];
        for entry in top {
            let id =
                entry.get("id").and_then(Value::as_u64).and_then(|id| usize::try_from(id).ok());
            let logprob = entry.get("logprob").and_then(Value::as_f64);
            if let (Some(id), Some(logprob)) = (id.filter(|&id| id < vocab_size), logprob) {
                #[expect(clippy::cast_possible_truncation, reason = "it is an f32 there")]
                let logprob = logprob as f32;
                logprobs[id] = logprob;
            }
        }
        match logprobs.iter().filter(|logprob| logprob.is_nan()).count() {
            0 => Ok(logprobs),
            missing => Err(UserError::new(format!(
                "the peer gives {} of {vocab_size} log-probabilities",
                vocab_size - missing
            ))
            .hint("its vocabulary may be another one; measure.kl_positions = 0 leaves this out")
            .into()),
        }
    }

    /// What its last turn ran.
    pub(in crate::command::bench) fn ran(&self) -> Ran {
        let (prompt_tokens, output_tokens) = self.counts;
        Ran {
            prompt_tokens,
            output_tokens,
            threads: self.threads,
            weight_bytes: self.weights.as_ref().map(|weights| weights.bytes),
            values: self.weights.as_ref().map(|weights| weights.types.iter().cloned().collect()),
        }
    }

    /// Its process, where it was started here.
    pub(in crate::command::bench) fn process_id(&self) -> Option<u32> {
        Some(self.process.as_ref()?.child.id())
    }

    /// The most memory it ever had, pages of its file included, where it was started here.
    pub(in crate::command::bench) fn resident_bytes(&self) -> Option<u64> {
        let process = self.process.as_ref()?;
        Some(ProcessMemory::of(process.child.id())?.peak_bytes)
    }

    fn complete(&self, request: &Value) -> anyhow::Result<Value> {
        let address = format!("{}/completion", self.address);
        let body = serde_json::to_string(request)?;
        let sent = self.agent.post(&address).content_type("application/json").send(body);
        answer(sent, &address)
    }

    fn get(&self, path: &str) -> anyhow::Result<Value> {
        let address = format!("{}{path}", self.address);
        answer(self.agent.get(&address).call(), &address)
    }
}

/// The JSON of an answer, or what kept it from coming.
fn answer(
    sent: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    address: &str,
) -> anyhow::Result<Value> {
    let mut answer = sent.with_context(|| format!("{address} does not answer"))?;
    let status = answer.status();
    let text = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string();
    let text = text.with_context(|| format!("{address} broke off"))?;
    if !status.is_success() {
        let start: String = text.chars().take(200).collect();
        return Err(UserError::new(format!("{address} answers {status}: {start}")).into());
    }
    serde_json::from_str(&text).with_context(|| format!("{address} does not answer in JSON"))
}

/// The weights in a peer's file that a decoded token reads.
struct Weights {
    /// Their bytes.
    bytes: u64,
    /// Types of the matrices among them.
    types: BTreeSet<String>,
}

impl Weights {
    /// Those of a GGUF file; `None` if it cannot be read here.
    fn of(path: &Path) -> Option<Self> {
        let file = GgufFile::open(path).ok()?;
        let has_head = file.tensors().any(|tensor| &*tensor.name == "output.weight");
        let (mut bytes, mut types) = (0, BTreeSet::new());
        for tensor in file.tensors() {
            if has_head && &*tensor.name == "token_embd.weight" {
                continue;
            }
            bytes += tensor.bytes as u64;
            // Positions are looked up, not multiplied by, and keep a type of their own.
            if tensor.shape.len() > 1 && &*tensor.name != "position_embd.weight" {
                types.insert(tensor.tensor_type.name().to_lowercase());
            }
        }
        Some(Self { bytes, types })
    }
}

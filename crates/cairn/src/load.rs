//! Load on a server that speaks `OpenAI`'s completions: many clients at once, and when each token came.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cairn_kernels::splitmix;
use serde::Deserialize;
use serde_json::{Value, json};

/// How long an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(600);
/// Between two requests that come at random, at most.
const GAP_MAX_S: f64 = 3600.0;
/// Bytes that are read of a stream at once, at most.
const READ_BYTES: usize = 32 << 10;
/// What Linux counts processor time in, on every architecture.
const TICKS_PER_SECOND: f64 = 100.0;
/// Bytes of a line of a stream, at most.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arrivals {
    /// So many clients, each of which sends its next request when its last is answered.
    Closed {
        /// Clients.
        clients: usize,
    },
    /// At random, so many a second in the mean, whether or not others are answered (a Poisson process).
    Open {
        /// Requests a second.
        rate: f64,
        /// Keys the times.
        seed: u64,
    },
}

/// What is read of an event.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct Usage {
    prompt_tokens: Option<usize>,
    completion_tokens: Option<usize>,
}

/// A load.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// The server's address, without a path.
    pub(crate) url: String,
    pub(crate) key: Option<String>,
    /// What the server calls its model.
    pub(crate) model: String,
    pub(crate) prompts: Vec<String>,
    /// New tokens of each answer; none of them ends it before.
    pub(crate) max_tokens: usize,
    pub(crate) arrivals: Arrivals,
}

/// How a request was answered.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answered {
    /// From the request to its first token.
    pub(crate) first_s: f64,
    /// Between each two events that brought text: a token each, unless the server puts several into one.
    pub(crate) between_s: Vec<f64>,
    /// Such events.
    pub(crate) num_events: usize,
    /// From the request to the end of its answer.
    pub(crate) total_s: f64,
    pub(crate) num_prompt: usize,
    pub(crate) num_new: usize,
}

/// What became of a load.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loaded {
    /// From the first request to the last answer's end.
    pub(crate) seconds: f64,
    /// Seconds of processor time that sending and reading took, of all processors together; nothing where the
    /// system does not say.
    pub(crate) cpu_s: Option<f64>,
    pub(crate) answered: Vec<Answered>,
    /// Why others were not.
    pub(crate) failed: Vec<String>,
}

impl Load {
    /// Sends all requests and waits for all answers.
    pub(crate) fn run(&self) -> Loaded {
        let loaded = Mutex::new(Loaded::default());
        let keep = |outcome: Result<Answered, String>| {
            let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
            match outcome {
                Ok(answered) => loaded.answered.push(answered),
                Err(reason) => loaded.failed.push(reason),
            }
        };
        let next = &AtomicUsize::new(0);
        let keep = &keep;
        let (begin, cpu_begin) = (Instant::now(), cpu_seconds());
        std::thread::scope(|scope| match self.arrivals {
            Arrivals::Closed { clients } => {
                for _ in 0..clients {
                    scope.spawn(move || {
                        let agent = agent();
                        while let Some(prompt) =
                            self.prompts.get(next.fetch_add(1, Ordering::Relaxed))
                        {
                            keep(self.ask(&agent, prompt));
                        }
                    });
                }
            }
            Arrivals::Open { rate, seed } => {
                let mut due = Duration::ZERO;
                for (index, prompt) in self.prompts.iter().enumerate() {
                    std::thread::sleep(due.saturating_sub(begin.elapsed()));
                    scope.spawn(move || keep(self.ask(&agent(), prompt)));
                    let gap = -uniform(seed, index as u64).ln() / rate;
                    due += Duration::from_secs_f64(gap.min(GAP_MAX_S));
                }
            }
        });
        let seconds = begin.elapsed().as_secs_f64();
        let loaded = loaded.into_inner().unwrap_or_else(PoisonError::into_inner);
        let cpu_s = cpu_begin.zip(cpu_seconds()).map(|(begin, end)| end - begin);
        Loaded { seconds, cpu_s, ..loaded }
    }

    fn ask(&self, agent: &ureq::Agent, prompt: &str) -> Result<Answered, String> {
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": self.max_tokens, "temperature": 0,
            "ignore_eos": true, "stream": true, "stream_options": { "include_usage": true },
        });
        let mut request = agent.post(&format!("{}/v1/completions", self.url));
        if let Some(key) = &self.key {
            request = request.header("authorization", &format!("Bearer {key}"));
        }
        let begin = Instant::now();
        let sent = request.header("content-type", "application/json").send(body.to_string());
        let mut answer = sent.map_err(|error| error.to_string())?;
        if answer.status() != 200 {
            let text = answer.body_mut().read_to_string().unwrap_or_default();
            return Err(format!("status {}: {}", answer.status(), text.trim()));
        }
        self.read(begin, BufReader::with_capacity(READ_BYTES, answer.body_mut().as_reader()))
    }

    /// Reads a stream to its end.
    fn read(&self, begin: Instant, mut reader: impl BufRead) -> Result<Answered, String> {
        let mut times = Vec::with_capacity(self.max_tokens);
        let mut usage = None;
        let mut line = String::new();
        loop {
            line.clear();
            let read = std::io::Read::take(&mut reader, LINE_BYTES_MAX).read_line(&mut line);
            if read.map_err(|error| error.to_string())? == 0 {
                return Err("the stream broke off".to_owned());
            }
            let Some(data) = line.strip_prefix("data: ") else { continue };
            let data = data.trim_end();
            if data == "[DONE]" {
                break;
            }
            let now = begin.elapsed().as_secs_f64();
            let event: Event = serde_json::from_str(data).map_err(|error| error.to_string())?;
            if let Some(error) = event.error {
                return Err(error.to_string());
            }
            let text = event.choices.first().and_then(|choice| choice.text.as_ref());
            if text.is_some_and(|text| !text.is_empty()) {
                times.push(now);
            }
            usage = event.usage.or(usage);
        }
        let total_s = begin.elapsed().as_secs_f64();
        let usage = usage.unwrap_or_default();
        Ok(Answered {
            first_s: times.first().copied().unwrap_or(total_s),
            between_s: times.windows(2).map(|pair| pair[1] - pair[0]).collect(),
            num_events: times.len(),
            total_s,
            num_prompt: usage.prompt_tokens.unwrap_or(0),
            num_new: usage.completion_tokens.unwrap_or(times.len()),
        })
    }
}

/// Seconds of processor time of this process, in steps of a hundredth.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name of the program, which may have spaces, is in parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let ticks: u64 = ticks.sum::<Result<_, _>>().ok()?;
    Some(ticks as f64 / TICKS_PER_SECOND)
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    config.timeout_global(Some(ANSWER_MAX)).build().into()
}

/// A number in (0, 1], the same for the same key and index.
pub(crate) fn uniform(seed: u64, index: u64) -> f64 {
    let bits = splitmix(splitmix(seed) ^ index) >> 11;
    (bits + 1) as f64 / (1_u64 << 53) as f64
}

/// The value below which a share of them lies, by the nearest rank; 0 without values.
pub(crate) fn percentile(sorted: &[f64], share: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank")]
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load() -> Load {
        Load {
            url: String::new(),
            key: None,
            model: "m".to_owned(),
            prompts: Vec::new(),
            max_tokens: 8,
            arrivals: Arrivals::Closed { clients: 1 },
        }
    }

    #[test]
    fn streams_are_read_to_their_end() {
        let text = "data: {\"choices\": [{\"text\": \"a\"}]}\n\n: alive\n\n\
            data: {\"choices\": [{\"text\": \"b\"}]}\n\n\
            data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 3, \"completion_tokens\": 2}}\n\n\
            data: [DONE]\n\n";
        let found = load().read(Instant::now(), text.as_bytes()).unwrap();
        assert_eq!((found.num_prompt, found.num_new, found.between_s.len()), (3, 2, 1));
        let broken = &text[..text.len() - 14];
        assert_eq!(
            load().read(Instant::now(), broken.as_bytes()).unwrap_err(),
            "the stream broke off"
        );
        let failed = "data: {\"error\": {\"message\": \"no\"}}\n\n";
        assert!(load().read(Instant::now(), failed.as_bytes()).unwrap_err().contains("no"));
    }

    #[test]
    fn percentiles_are_values() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        let at = |share| percentile(&values, share).to_bits();
        assert_eq!([0.5, 0.9, 0.99, 1.0].map(at), [50.0, 90.0, 99.0, 100.0_f64].map(f64::to_bits));
        assert_eq!(percentile(&[], 0.5).to_bits(), 0.0_f64.to_bits());
    }

    #[test]
    fn gaps_between_arrivals_have_their_mean() {
        let sum: f64 = (0..20_000).map(|index| -uniform(7, index).ln()).sum();
        assert!((sum / 20_000.0 - 1.0).abs() < 0.02, "{sum}");
    }
}

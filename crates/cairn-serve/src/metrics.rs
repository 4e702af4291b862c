//! What was done, for Prometheus: names that stay, and beside them, where it is asked for, those that vLLM gives the
//! same things.

use std::time::Duration;

use cairn_engine::{PrefixOutcome, StepReport};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// Upper ends of the buckets of times, in seconds.
const SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
/// Upper ends of the buckets of lengths, in tokens.
const TOKENS: [f64; 11] =
    [1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0];

/// Counters, gauges and histograms.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Counter,
    finished: Counter,
    cancelled: Counter,
    failed: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    steps: Counter,
    preempted: Counter,
    cached_tokens: Counter,
    running: Gauge,
    waiting: Gauge,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    request_seconds: Histogram,
    prompt_lengths: Histogram,
    generation_lengths: Histogram,
}

/// What registers metrics under their names.
struct Names {
    registry: Registry,
    has_aliases: bool,
}

impl Names {
    /// Registers a metric; `alias` is its name in vLLM.
    fn add<M: Metric + Clone>(&mut self, name: &str, alias: Option<&str>, help: &str, metric: &M) {
        self.registry.register(format!("cairn_{name}"), help, metric.clone());
        if let Some(alias) = alias.filter(|_| self.has_aliases) {
            self.registry.register(format!("vllm:{alias}"), help, metric.clone());
        }
    }
}

impl Metrics {
    /// Nothing has been done. `has_aliases` asks for vLLM's names beside the own ones.
    pub(crate) fn new(has_aliases: bool) -> Self {
        let mut names = Names { registry: Registry::default(), has_aliases };
        let seconds = || Histogram::new(SECONDS);
        let lengths = || Histogram::new(TOKENS);
        let mut found = Self {
            registry: Registry::default(),
            requests: Counter::default(),
            finished: Counter::default(),
            cancelled: Counter::default(),
            failed: Counter::default(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            steps: Counter::default(),
            preempted: Counter::default(),
            cached_tokens: Counter::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            time_to_first_token: seconds(),
            inter_token_latency: seconds(),
            request_seconds: seconds(),
            prompt_lengths: lengths(),
            generation_lengths: lengths(),
        };
        found.register(&mut names);
        found.registry = names.registry;
        found
    }

    fn register(&self, names: &mut Names) {
        names.add("requests", None, "Answers that the engine took on", &self.requests);
        let alias = Some("request_success");
        names.add("requests_finished", alias, "Answers that came to their end", &self.finished);
        let help = "Answers whose client left before they were done";
        names.add("requests_cancelled", None, help, &self.cancelled);
        let help = "Answers for which no token could be chosen";
        names.add("requests_failed", None, help, &self.failed);
        let help = "Tokens of prompts, each answer's counted";
        names.add("prompt_tokens", Some("prompt_tokens"), help, &self.prompt_tokens);
        let alias = Some("generation_tokens");
        names.add("generation_tokens", alias, "Tokens made", &self.generation_tokens);
        names.add("engine_steps", None, "Steps of the engine", &self.steps);
        let alias = Some("num_preemptions");
        let help = "Answers that gave way to others and were begun again";
        names.add("preemptions", alias, help, &self.preempted);
        let alias = Some("prefix_cache_hits");
        let help = "Tokens of prompts that were in the cache, each answer's counted";
        names.add("prefix_cache_hit_tokens", alias, help, &self.cached_tokens);
        let alias = Some("num_requests_running");
        names.add("requests_running", alias, "Answers that are computed", &self.running);
        let alias = Some("num_requests_waiting");
        names.add("requests_waiting", alias, "Answers that wait", &self.waiting);
        let alias = Some("time_to_first_token_seconds");
        let help = "From a request to its first token";
        names.add("time_to_first_token_seconds", alias, help, &self.time_to_first_token);
        let alias = Some("inter_token_latency_seconds");
        let help = "Between two tokens of an answer";
        names.add("inter_token_latency_seconds", alias, help, &self.inter_token_latency);
        let alias = Some("e2e_request_latency_seconds");
        let help = "From a request to the end of its answers";
        names.add("request_seconds", alias, help, &self.request_seconds);
        let alias = Some("request_prompt_tokens");
        names.add(
            "request_prompt_tokens",
            alias,
            "Tokens of a request's prompts",
            &self.prompt_lengths,
        );
        let alias = Some("request_generation_tokens");
        let help = "Tokens of a request's answers";
        names.add("request_generation_tokens", alias, help, &self.generation_lengths);
    }

    pub(crate) fn note_request(&self, num_sequences: usize, num_prompt_tokens: usize) {
        self.requests.inc_by(num_sequences as u64);
        self.prompt_tokens.inc_by(num_prompt_tokens as u64);
    }

    pub(crate) fn note_finished(&self) {
        self.finished.inc();
    }

    pub(crate) fn note_failed(&self) {
        self.failed.inc();
    }

    pub(crate) fn note_cancelled(&self) {
        self.cancelled.inc();
    }

    /// An answer is begun, so much of its prompt being there.
    pub(crate) fn note_prefix(&self, prefix: PrefixOutcome) {
        self.cached_tokens.inc_by(prefix.num_cached_tokens as u64);
    }

    pub(crate) fn note_step(&self, report: &StepReport) {
        self.steps.inc();
        self.generation_tokens.inc_by(report.num_new as u64);
        self.preempted.inc_by(report.num_preempted as u64);
    }

    /// How many answers an engine computes and has waiting, and how many it had before.
    pub(crate) fn note_load(&self, before: (usize, usize), now: (usize, usize)) {
        let more =
            |now: usize, before: usize| now.cast_signed() as i64 - before.cast_signed() as i64;
        self.running.inc_by(more(now.0, before.0));
        self.waiting.inc_by(more(now.1, before.1));
    }

    /// A token of an answer came, so long after the one before it, or after its request if it is the first.
    pub(crate) fn note_token(&self, after: Duration, has_begun: bool) {
        let times = match has_begun {
            true => &self.inter_token_latency,
            false => &self.time_to_first_token,
        };
        times.observe(after.as_secs_f64());
    }

    /// A request has ended, so long after it came.
    pub(crate) fn note_end(&self, after: Duration, num_prompt: usize, num_new: usize) {
        self.request_seconds.observe(after.as_secs_f64());
        self.prompt_lengths.observe(num_prompt as f64);
        self.generation_lengths.observe(num_new as f64);
    }

    /// The page that Prometheus reads.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a text cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_stable_names_and_vllms_on_demand() {
        let metrics = Metrics::new(true);
        metrics.note_request(2, 10);
        metrics.note_token(Duration::from_millis(20), false);
        let page = metrics.text();
        for line in [
            "cairn_requests_total 2",
            "cairn_prompt_tokens_total 10",
            "vllm:prompt_tokens_total 10",
            "vllm:num_requests_running 0",
            "cairn_time_to_first_token_seconds_bucket{le=\"0.025\"} 1",
            "vllm:time_to_first_token_seconds_count 1",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
        }
        assert!(!Metrics::new(false).text().contains("vllm"));
    }
}

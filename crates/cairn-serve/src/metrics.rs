//! What was done, in Prometheus's text format (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use cairn_engine::StepReport;

/// Counters and gauges. Relaxed order: each stands for itself.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    requests: AtomicU64,
    finished: AtomicU64,
    cancelled: AtomicU64,
    prompt_tokens: AtomicU64,
    generation_tokens: AtomicU64,
    steps: AtomicU64,
    running: AtomicUsize,
    waiting: AtomicUsize,
}

impl Metrics {
    pub(crate) fn note_request(&self, num_sequences: usize, num_prompt_tokens: usize) {
        self.requests.fetch_add(num_sequences as u64, Ordering::Relaxed);
        self.prompt_tokens.fetch_add(num_prompt_tokens as u64, Ordering::Relaxed);
    }

    pub(crate) fn note_finished(&self) {
        self.finished.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_cancelled(&self) {
        self.cancelled.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_step(&self, report: &StepReport) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.generation_tokens.fetch_add(report.num_new as u64, Ordering::Relaxed);
        self.running.store(report.num_running, Ordering::Relaxed);
        self.waiting.store(report.num_waiting, Ordering::Relaxed);
    }

    pub(crate) fn note_idle(&self) {
        self.running.store(0, Ordering::Relaxed);
        self.waiting.store(0, Ordering::Relaxed);
    }

    /// The page that Prometheus reads.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let counters = [
            ("cairn_requests_total", "Requests that the engine took.", &self.requests),
            ("cairn_requests_finished_total", "Requests that came to their end.", &self.finished),
            (
                "cairn_requests_cancelled_total",
                "Requests whose client left before they were done.",
                &self.cancelled,
            ),
            ("cairn_prompt_tokens_total", "Tokens of prompts.", &self.prompt_tokens),
            ("cairn_generation_tokens_total", "Tokens made.", &self.generation_tokens),
            ("cairn_engine_steps_total", "Steps of the engine.", &self.steps),
        ];
        for (name, help, value) in counters {
            let value = value.load(Ordering::Relaxed);
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}");
        }
        let gauges = [
            ("cairn_requests_running", "Requests that run.", &self.running),
            ("cairn_requests_waiting", "Requests that wait.", &self.waiting),
        ];
        for (name, help, value) in gauges {
            let value = value.load(Ordering::Relaxed);
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
        }
        text
    }
}

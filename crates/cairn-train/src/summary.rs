//! A run in figures, and its page.

use cairn_artifacts::run::RunRecord;
use cairn_data::corpus::{Counts, Manifest};
use cairn_eval::median;
use cairn_spec::recipe::TrainRecipe;
use cairn_spec::units::RoundedBytes;
use serde::Serialize;

use crate::metrics::Metric;
use crate::observer::{StepMetrics, ValidationMetrics};
use crate::plan::Plan;
use crate::progress::Best;
use crate::report::{Chart, Line, Report};

/// Steps over which the final training loss is averaged.
const LAST_STEPS: usize = 100;

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Finished steps.
    pub steps: u64,
    /// Tokens processed.
    pub tokens: u64,
    /// Mean loss of the last steps (up to 100), in nats.
    pub train_loss: Option<f64>,
    /// The last validation.
    pub validation: Option<ValidationMetrics>,
    /// The best validation.
    pub best: Option<Best>,
    /// Median over the steps.
    pub tokens_per_s: Option<f64>,
    /// Median over the steps: arithmetic of the model per second over this machine's peak.
    pub peak_fraction: Option<f64>,
    /// Seconds of training.
    pub elapsed_s: f64,
    /// Bytes that the plan predicted.
    pub predicted_bytes: u64,
    /// Anonymous bytes of the process at the end.
    pub anonymous_bytes: Option<u64>,
}

impl Summary {
    /// Sums up the metrics of a run.
    pub(crate) fn new(
        plan: &Plan,
        metrics: &[Metric],
        best: Option<Best>,
        anonymous_bytes: Option<u64>,
    ) -> Self {
        let steps: Vec<&StepMetrics> = steps(metrics).collect();
        let last = &steps[steps.len().saturating_sub(LAST_STEPS)..];
        let mean = last.iter().map(|step| step.loss).sum::<f64>() / last.len() as f64;
        Self {
            steps: steps.last().map_or(0, |step| step.step),
            tokens: steps.last().map_or(0, |step| step.tokens),
            train_loss: (!last.is_empty()).then_some(mean),
            validation: validations(metrics).last().cloned(),
            best,
            tokens_per_s: median(steps.iter().map(|step| step.tokens_per_s)),
            peak_fraction: median(steps.iter().filter_map(|step| step.peak_fraction)),
            elapsed_s: metrics.last().map_or(0.0, Metric::elapsed_s),
            predicted_bytes: plan.bytes.total(),
            anonymous_bytes,
        }
    }

    fn rows(&self) -> Vec<(String, String)> {
        let nats = |loss: f64| format!("{loss:.4} nats per token");
        let mut rows = vec![
            row("Steps", self.steps.to_string()),
            row("Tokens", count_text(self.tokens)),
            row("Time", format!("{:.1} min", self.elapsed_s / 60.0)),
        ];
        rows.extend(self.train_loss.map(|loss| row("Training loss, last steps", nats(loss))));
        if let Some(validation) = &self.validation {
            rows.push(row("Validation loss", nats(validation.loss)));
            rows.push(row("Validation perplexity", format!("{:.2}", validation.perplexity)));
            rows.extend(bits(validation.bits_per_byte).map(|b| row("Validation bits per byte", b)));
            if let Some(loss) = validation.average_loss {
                let bits = bits(validation.average_bits_per_byte)
                    .map_or(String::new(), |bits| format!(", {bits} bits per byte"));
                rows.push(row("Validation of the averaged weights", nats(loss) + &bits));
            }
        }
        if let Some(best) = self.best {
            let bits =
                bits(best.bits_per_byte).map_or(String::new(), |b| format!(", {b} bits per byte"));
            rows.push(row("Best", format!("{} at step {}{bits}", nats(best.loss), best.step)));
        }
        let pace = self.tokens_per_s.map(|pace| row("Tokens per second", format!("{pace:.0}")));
        rows.extend(pace);
        let percent = |fraction: f64| format!("{:.1} %", 100.0 * fraction);
        rows.extend(self.peak_fraction.map(|f| row("Of the measured peak", percent(f))));
        rows.push(row("Memory planned", bytes_text(self.predicted_bytes)));
        let measured = self.anonymous_bytes.map(|b| row("Memory measured", bytes_text(b)));
        rows.extend(measured);
        rows
    }
}

/// Everything a run's page shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunPage<'a> {
    pub(crate) recipe: &'a TrainRecipe,
    pub(crate) record: &'a RunRecord,
    pub(crate) manifest: &'a Manifest,
    pub(crate) summary: &'a Summary,
    pub(crate) metrics: &'a [Metric],
    pub(crate) parameters: u64,
}

impl RunPage<'_> {
    /// The page.
    pub(crate) fn html(&self) -> String {
        let toml = self.recipe.to_toml();
        let report = Report {
            title: &self.recipe.run.name,
            tables: vec![
                ("Summary", self.summary.rows()),
                ("Data and tokenizer", self.data_rows()),
                ("Machine and code", self.machine_rows()),
            ],
            charts: charts(self.metrics),
            recipe: &toml,
        };
        report.html()
    }

    fn data_rows(&self) -> Vec<(String, String)> {
        let manifest = self.manifest;
        let side = |counts: &Counts| {
            let Counts { documents, tokens, text_bytes } = *counts;
            let (tokens, bytes) = (count_text(tokens), bytes_text(text_bytes));
            format!("{documents} documents, {tokens} tokens, {bytes} of text")
        };
        let total = manifest.train.counts.tokens + manifest.validation.counts.tokens;
        let bytes = manifest.train.counts.text_bytes + manifest.validation.counts.text_bytes;
        vec![
            row("Parameters", count_text(self.parameters)),
            row("Training", side(&manifest.train.counts)),
            row("Validation", side(&manifest.validation.counts)),
            row("Licenses", names(manifest.licenses.iter().map(|share| share.name.as_str()))),
            row("Tokens in the vocabulary", manifest.tokenizer.vocab_size.to_string()),
            row("Bytes per token", format!("{:.2}", bytes as f64 / total as f64)),
            row("Data hash", manifest.data_hash.to_string()),
            row("Tokenizer hash", manifest.tokenizer.file.blake3.to_string()),
        ]
    }

    fn machine_rows(&self) -> Vec<(String, String)> {
        let RunRecord { machine, code, .. } = self.record;
        let unknown = || "unknown".to_owned();
        let memory = machine.memory_bytes.map(bytes_text);
        vec![
            row("Processor", machine.cpu_model.clone().unwrap_or_else(unknown)),
            row("Processors", machine.num_cpus.to_string()),
            row("Threads used", self.recipe.run.threads.to_string()),
            row("Memory", memory.unwrap_or_else(unknown)),
            row("Version", code.version.clone()),
            row("Revision", code.revision.clone().unwrap_or_else(unknown)),
            row("Begun", self.record.started.clone().unwrap_or_else(unknown)),
        ]
    }
}

fn row(name: &str, figure: String) -> (String, String) {
    (name.to_owned(), figure)
}

fn bytes_text(bytes: u64) -> String {
    RoundedBytes(bytes).to_string()
}

/// A number with a thin space between thousands.
fn count_text(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 2);
    for (index, digit) in digits.chars().enumerate() {
        if index != 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{2009}');
        }
        text.push(digit);
    }
    text
}

fn bits(bits_per_byte: Option<f64>) -> Option<String> {
    bits_per_byte.map(|bits| format!("{bits:.4}"))
}

/// The first few names and how many more there are.
fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let names: Vec<&str> = names.collect();
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn steps(metrics: &[Metric]) -> impl Iterator<Item = &StepMetrics> {
    metrics.iter().filter_map(|metric| match metric {
        Metric::Step(step) => Some(step),
        Metric::Validation(_) => None,
    })
}

fn validations(metrics: &[Metric]) -> impl Iterator<Item = &ValidationMetrics> {
    metrics.iter().filter_map(|metric| match metric {
        Metric::Validation(validation) => Some(validation),
        Metric::Step(_) => None,
    })
}

/// The curves of a run over its steps.
fn charts(metrics: &[Metric]) -> Vec<Chart> {
    let of_steps = |name, figure: fn(&StepMetrics) -> f64| Line {
        name,
        points: steps(metrics).map(|m| (m.step as f64, figure(m))).collect(),
    };
    let of_validations = |name, figure: fn(&ValidationMetrics) -> f64| Line {
        name,
        points: validations(metrics).map(|m| (m.step as f64, figure(m))).collect(),
    };
    let bits = of_validations("validation", |m| m.bits_per_byte.unwrap_or(f64::NAN));
    let loss = vec![of_steps("training", |m| m.loss), of_validations("validation", |m| m.loss)];
    vec![
        Chart { title: "Loss (nats per token)", lines: loss },
        Chart { title: "Validation bits per byte", lines: vec![bits] },
        Chart { title: "Learning rate", lines: vec![of_steps("rate", |m| m.lr)] },
        Chart { title: "Gradient norm", lines: vec![of_steps("norm", |m| m.grad_norm)] },
        Chart { title: "Tokens per second", lines: vec![of_steps("pace", |m| m.tokens_per_s)] },
    ]
}

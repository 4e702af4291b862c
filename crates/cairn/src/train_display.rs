//! A training run on the terminal: one line that moves, and lines for what should stay.

use cairn_train::{Event, Observer, StepMetrics, ValidationMetrics};

use crate::figures::{Bytes, Percent, Seconds};
use crate::progress_line::ProgressLine;
use crate::terminal::Terminal;

/// Shows a run's events.
#[derive(Debug)]
pub(crate) struct TrainDisplay {
    terminal: Terminal,
    line: ProgressLine,
    total_steps: u64,
}

impl TrainDisplay {
    /// A display of a run of `total_steps`.
    pub(crate) fn new(terminal: Terminal, total_steps: u64) -> Self {
        Self { terminal, line: ProgressLine::new(terminal, "Training"), total_steps }
    }

    /// Takes the line away.
    pub(crate) fn finish(self) {
        self.line.finish();
    }
}

impl Observer for TrainDisplay {
    fn observe(&mut self, event: &Event<'_>) {
        let terminal = self.terminal;
        match event {
            Event::Started { step, total_steps } => {
                self.total_steps = *total_steps;
                match *step {
                    0 => {}
                    step if step >= *total_steps => {
                        terminal
                            .step("Complete", format_args!("all {step} steps were done before"));
                    }
                    step => {
                        terminal.step("Resuming", format_args!("at step {step} of {total_steps}"));
                    }
                }
            }
            Event::Step(metrics) => {
                let total = self.total_steps;
                let done = metrics.step as f64 / total.max(1) as f64;
                self.line.update_within(done, |columns| line(metrics, total, columns));
            }
            Event::Measured { measured, seconds } if measured.products > 0 => {
                let took = Seconds(*seconds);
                let text = format!(
                    "{} products on this machine, once: how to cut them ({took})",
                    measured.products
                );
                self.line.above(|| terminal.step("Measured", text));
            }
            Event::Validation(metrics) => {
                let text = validation(metrics);
                self.line.above(|| terminal.step("Validated", text));
            }
            Event::Saved { step, path, seconds } => {
                let took = Seconds(*seconds);
                let text = format!("step {step} to {} ({took})", path.display());
                self.line.above(|| terminal.step("Saved", text));
            }
            Event::Warning(warning) => self.line.above(|| terminal.warn(warning)),
            // What later versions report besides is not known here.
            _ => {}
        }
    }
}

/// Loss, speed, share of the peak, memory and time left: all of them if `columns` allow, first
/// without the words that can be guessed, then without the figures that change least.
fn line(metrics: &StepMetrics, total: u64, columns: usize) -> String {
    let StepMetrics { step, loss, tokens_per_s, .. } = metrics;
    let speed = format!("{tokens_per_s:.0} tokens/s");
    let share = metrics.peak_fraction.map(|share| Percent(share).to_string());
    let memory = metrics.anonymous_bytes.map(|bytes| Bytes(bytes as f64).to_string());
    let left = Seconds(metrics.remaining_s).to_string();
    let all = |of_peak: &str, word: &str| {
        let share = share.as_ref().map(|share| format!("{share}{of_peak}"));
        let left = Some(format!("{left}{word}"));
        [Some(speed.clone()), share, memory.clone(), left]
    };
    let text = |parts: &[Option<String>]| {
        let first = format!("{step}/{total}  loss {loss:.3}");
        parts.iter().flatten().fold(first, |text, part| format!("{text}  {part}"))
    };
    let [speed, share, memory, left] = all("", "");
    let mut forms = vec![
        text(&all(" of peak", " left")),
        text(&[speed.clone(), share.clone(), memory, left.clone()]),
        text(&[speed.clone(), share, left.clone()]),
        text(&[speed, left]),
    ];
    let least = text(&[]);
    let fits = |form: &String| form.chars().count() <= columns;
    forms.iter().position(fits).map_or(least, |index| forms.swap_remove(index))
}

fn validation(metrics: &ValidationMetrics) -> String {
    let ValidationMetrics { step, loss, perplexity, .. } = metrics;
    let bits =
        metrics.bits_per_byte.map_or_else(String::new, |b| format!(", {b:.3} bits per byte"));
    let best = if metrics.best { ", the best so far" } else { "" };
    let average = metrics.average_loss.map_or_else(String::new, |loss| {
        let bits = metrics
            .average_bits_per_byte
            .map_or_else(String::new, |bits| format!(", {bits:.3} bits per byte"));
        format!("; averaged weights: loss {loss:.3}{bits}")
    });
    format!("step {step}: loss {loss:.3}, perplexity {perplexity:.1}{bits}{best}{average}")
}

#[cfg(test)]
mod tests;

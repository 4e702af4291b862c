//! One line that says how far something is: redrawn on a terminal, printed now and then elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::terminal::Terminal;

/// Between two printed lines, where lines cannot be redrawn.
const PRINT_INTERVAL: Duration = Duration::from_secs(10);
/// Parts that the bar is drawn in.
const PARTS: u64 = 1000;

/// A line under way; it is gone when it is finished or dropped.
#[derive(Debug)]
pub(crate) struct ProgressLine {
    terminal: Terminal,
    verb: &'static str,
    bar: Option<ProgressBar>,
    printed: Option<Instant>,
}

impl ProgressLine {
    /// A line that begins with `verb`.
    pub(crate) fn new(terminal: Terminal, verb: &'static str) -> Self {
        let bar = terminal.is_live().then(|| {
            let bar =
                ProgressBar::with_draw_target(Some(PARTS), ProgressDrawTarget::stderr_with_hz(8));
            let bold =
                if terminal.has_color() { "{prefix:>12.green.bold}" } else { "{prefix:>12}" };
            let template = format!("{bold} [{{bar:20}}] {{msg}}");
            let style = ProgressStyle::with_template(&template).expect("the template is sound");
            bar.set_style(style.progress_chars("=> "));
            bar.set_prefix(verb);
            bar
        });
        Self { terminal, verb, bar, printed: None }
    }

    /// Shows how far it is, `done` between 0 and 1.
    pub(crate) fn update(&mut self, done: f64, text: impl FnOnce() -> String) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 1000")]
        let parts = (done.clamp(0.0, 1.0) * PARTS as f64) as u64;
        if let Some(bar) = &self.bar {
            bar.set_position(parts);
            bar.set_message(text());
        } else if self.printed.is_none_or(|at| at.elapsed() >= PRINT_INTERVAL) {
            self.terminal.step(self.verb, text());
            self.printed = Some(Instant::now());
        }
    }

    /// Runs `print`, which writes to the terminal, above the line.
    pub(crate) fn above(&self, print: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Takes the line away.
    pub(crate) fn finish(self) {
        drop(self);
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

//! One line that says how far something is: redrawn on a terminal, printed now and then elsewhere.
//!
//! On a terminal it is one line at every width: the bar goes first, then the end of the text.

use std::time::{Duration, Instant};

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use crate::terminal::Terminal;

/// Between two printed lines, where lines cannot be redrawn.
const PRINT_INTERVAL: Duration = Duration::from_secs(10);
/// Parts that the bar is drawn in.
const PARTS: u64 = 1000;
/// Redrawn at most so often a second.
const DRAWS_PER_SECOND: u8 = 8;
/// Columns before the text: the verb, and a blank.
const VERB_COLUMNS: usize = 13;
/// Columns of the bar, its brackets and a blank.
const BAR_COLUMNS: usize = 23;

/// A line under way; it is gone when it is finished or dropped.
#[derive(Debug)]
pub(crate) struct ProgressLine {
    terminal: Terminal,
    verb: &'static str,
    live: Option<LiveLine>,
    printed: Option<Instant>,
}

/// A line that is redrawn.
#[derive(Debug)]
struct LiveLine {
    bar: ProgressBar,
    screen: Box<dyn TermLike>,
    color: bool,
    /// Columns at the last update.
    width: usize,
    /// Whether the bar had room since the width changed.
    has_bar: bool,
}

impl ProgressLine {
    /// A line that begins with `verb`.
    pub(crate) fn new(terminal: Terminal, verb: &'static str) -> Self {
        if terminal.is_live() {
            let screens: [Box<dyn TermLike>; 2] =
                [Box::new(Term::buffered_stderr()), Box::new(Term::buffered_stderr())];
            return Self::on_screen(terminal, verb, screens);
        }
        Self { terminal, verb, live: None, printed: None }
    }

    /// A line on a screen, which is given twice: to draw on and to measure.
    pub(crate) fn on_screen(
        terminal: Terminal,
        verb: &'static str,
        [drawn, screen]: [Box<dyn TermLike>; 2],
    ) -> Self {
        let target = ProgressDrawTarget::term_like_with_hz(drawn, DRAWS_PER_SECOND);
        let (color, has_bar) = (terminal.has_color(), false);
        // Nothing is drawn before the first update.
        let bar = ProgressBar::with_draw_target(Some(PARTS), target)
            .with_style(style(color, has_bar))
            .with_prefix(verb);
        let live = LiveLine { bar, screen, color, width: 0, has_bar };
        Self { terminal, verb, live: Some(live), printed: None }
    }

    /// Shows how far it is, `done` between 0 and 1 where that is known.
    pub(crate) fn update(&mut self, done: impl Into<Option<f64>>, text: impl FnOnce() -> String) {
        self.update_within(done, |_| text());
    }

    /// Shows how far it is, with a text that is told how many columns it has.
    pub(crate) fn update_within(
        &mut self,
        done: impl Into<Option<f64>>,
        text: impl FnOnce(usize) -> String,
    ) {
        if let Some(live) = &mut self.live {
            live.update(done.into(), text);
        } else if self.printed.is_none_or(|at| at.elapsed() >= PRINT_INTERVAL) {
            self.terminal.step(self.verb, text(usize::MAX));
            self.printed = Some(Instant::now());
        }
    }

    /// Runs `print`, which writes to the terminal, above the line.
    pub(crate) fn above(&self, print: impl FnOnce()) {
        match &self.live {
            Some(live) => live.bar.suspend(print),
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
        if let Some(live) = &self.live {
            live.bar.finish_and_clear();
        }
    }
}

impl LiveLine {
    fn update(&mut self, done: Option<f64>, text: impl FnOnce(usize) -> String) {
        let width = usize::from(self.screen.width());
        let text = text(width.saturating_sub(VERB_COLUMNS));
        let has_room = done.is_some() && VERB_COLUMNS + BAR_COLUMNS + text.chars().count() <= width;
        // A bar that came and went with every digit would be worse than none.
        let has_bar = has_room && (self.has_bar || width != self.width);
        if has_bar != self.has_bar || width != self.width {
            (self.has_bar, self.width) = (has_bar, width);
            self.bar.set_style(style(self.color, has_bar));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 1000")]
        let parts = (done.unwrap_or(0.0).clamp(0.0, 1.0) * PARTS as f64) as u64;
        self.bar.set_position(parts);
        self.bar.set_message(text);
    }
}

fn style(color: bool, has_bar: bool) -> ProgressStyle {
    let verb = if color { "{prefix:>12.green.bold}" } else { "{prefix:>12}" };
    let bar = if has_bar { " [{bar:20}]" } else { "" };
    let style = ProgressStyle::with_template(&format!("{verb}{bar} {{wide_msg}}"));
    style.expect("the template is sound").progress_chars("=> ")
}

//! Printing: data to standard output, talk to standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use anyhow::Context as _;

/// The two streams.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terminal {
    color: bool,
    quiet: bool,
    live: bool,
}

impl Terminal {
    /// Looks at the streams once.
    pub(crate) fn new(no_color: bool, quiet: bool) -> Self {
        let live = io::stderr().is_terminal();
        Self { color: live && !no_color, quiet, live }
    }

    /// Whether a person watches standard error, so that lines may be redrawn.
    pub(crate) fn is_live(self) -> bool {
        self.live && !self.quiet
    }

    /// Whether standard error may be colored.
    pub(crate) fn has_color(self) -> bool {
        self.color
    }

    /// Writes data and a line end to standard output.
    pub(crate) fn print(&self, data: impl Display) -> anyhow::Result<()> {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{data}").context("cannot write to standard output")
    }

    /// Writes a piece of data to standard output at once, without a line end.
    pub(crate) fn print_piece(&self, piece: &str) -> anyhow::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(piece.as_bytes()).context("cannot write to standard output")?;
        stdout.flush().context("cannot write to standard output")
    }

    /// Says something to the person, unless they asked for quiet.
    pub(crate) fn say(&self, text: impl Display) {
        if !self.quiet {
            to_stderr(format_args!("{text}"));
        }
    }

    /// Asks the person for a line.
    pub(crate) fn ask(&self, prompt: &str) {
        // A closed standard error leaves nobody to ask.
        let _ = write!(io::stderr().lock(), "{}", self.paint("1;36", prompt));
    }

    /// Says what is happening: a word in color, then the rest.
    pub(crate) fn step(&self, verb: &str, text: impl Display) {
        if !self.quiet {
            to_stderr(format_args!("{:>12} {text}", self.paint("1;32", verb)));
        }
    }

    /// Says that something is not as it should be and was gone on with.
    pub(crate) fn warn(&self, text: impl Display) {
        to_stderr(format_args!("{}: {text}", self.paint("1;33", "warning")));
    }

    /// Says what went wrong.
    pub(crate) fn error(&self, text: impl Display) {
        to_stderr(format_args!("{}: {text}", self.paint("1;31", "error")));
    }

    /// Says why.
    pub(crate) fn cause(&self, text: &str) {
        to_stderr(format_args!("  {}: {text}", self.paint("1", "because")));
    }

    /// Says what to do about it.
    pub(crate) fn hint(&self, text: impl Display) {
        to_stderr(format_args!("{}: {text}", self.paint("1;36", "hint")));
    }

    fn paint<'a>(&self, code: &'static str, text: &'a str) -> Painted<'a> {
        Painted { code: self.color.then_some(code), text }
    }
}

/// A word with its color; padding counts the word only.
struct Painted<'a> {
    code: Option<&'static str>,
    text: &'a str,
}

impl Display for Painted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let padding = f.width().unwrap_or(0).saturating_sub(self.text.chars().count());
        write!(f, "{:padding$}", "")?;
        match self.code {
            Some(code) => write!(f, "\x1b[{code}m{}\x1b[0m", self.text),
            None => f.write_str(self.text),
        }
    }
}

fn to_stderr(text: std::fmt::Arguments<'_>) {
    // A closed standard error leaves nobody to tell.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

//! What is printed when an invariant of ours is broken.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::Write;
use std::panic::PanicHookInfo;
use std::sync::{Mutex, PoisonError};

/// Reports kept at most; the first ones say what went wrong.
const REPORTS_MAX: usize = 8;

/// What the panics so far said.
static REPORTS: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Makes every panic leave a short text to send to us. It is printed only once the panic has ended
/// the program: one of a library that reads a foreign file is caught, and the file is to blame.
pub(crate) fn install() {
    std::panic::set_hook(Box::new(|panic| {
        let mut reports = REPORTS.lock().unwrap_or_else(PoisonError::into_inner);
        if reports.len() < REPORTS_MAX {
            let mut report = Vec::new();
            // Writing to memory does not fail.
            let _ = write_report(&mut report, panic);
            reports.push(report);
        }
    }));
}

/// Prints what the panics said.
pub(crate) fn print() {
    for report in &*REPORTS.lock().unwrap_or_else(PoisonError::into_inner) {
        // Nothing is left to do if even this cannot be printed.
        let _ = std::io::stderr().lock().write_all(report);
    }
}

fn write_report(out: &mut dyn Write, panic: &PanicHookInfo<'_>) -> std::io::Result<()> {
    let payload = panic.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
    writeln!(out, "error: this is a bug in cairn: {text}")?;
    let backtrace = Backtrace::capture();
    if let Some(place) = panic.location() {
        writeln!(out, "  at {place}")?;
    }
    let arguments: Vec<String> =
        std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    writeln!(out, "  in {}", arguments.join(" "))?;
    let (version, isa) = (env!("CARGO_PKG_VERSION"), cairn_kernels::Isa::best());
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    writeln!(out, "  version {version}, {os} {arch}, {isa}")?;
    if backtrace.status() == BacktraceStatus::Captured {
        writeln!(out, "{backtrace}")?;
    } else {
        writeln!(out, "hint: please report these lines; RUST_BACKTRACE=1 adds to them")?;
    }
    Ok(())
}

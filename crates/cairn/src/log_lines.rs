//! Lines of a log on the standard error, written by a thread of their own: who logs never waits for who reads.

use std::io::{self, Write};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;

use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait to be written; further ones are lost.
const LINES_MAX: usize = 4096;

/// Takes lines.
#[derive(Clone, Debug)]
pub(crate) struct LogLines {
    lines: SyncSender<Vec<u8>>,
}

impl LogLines {
    /// Starts the thread that writes. It ends with the process.
    pub(crate) fn start() -> io::Result<Self> {
        let (lines, written) = sync_channel::<Vec<u8>>(LINES_MAX);
        thread::Builder::new().name("log".to_owned()).spawn(move || {
            for line in written {
                // A disk may be full, or a reader gone; what is served does not hang on the log.
                let _ = io::stderr().write_all(&line);
            }
        })?;
        Ok(Self { lines })
    }
}

impl Write for LogLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.lines.try_send(line.to_vec()) {
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Ok(line.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogLines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

//! Ctrl-C and friends: the first asks to stop, the second stops at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::failure::EXIT_INTERRUPTED;

/// Exit code after a second signal.
const EXIT_KILLED: i32 = EXIT_INTERRUPTED as i32;

/// Whether someone asked to stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Listens to SIGINT and SIGTERM from now on. Commands that do not listen end at the first one.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset, and sets it.
            flag::register_conditional_shutdown(signal, EXIT_KILLED, Arc::clone(&asked))
                .and_then(|_| flag::register(signal, Arc::clone(&asked)))
                .context("cannot listen to signals")?;
        }
        Ok(Self(asked))
    }

    /// Listens to Ctrl-C only. After [`clear`](Self::clear) the next one asks again.
    pub(crate) fn listen_to_interrupts() -> anyhow::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        flag::register_conditional_shutdown(SIGINT, EXIT_KILLED, Arc::clone(&asked))
            .and_then(|_| flag::register(SIGINT, Arc::clone(&asked)))
            .context("cannot listen to signals")?;
        Ok(Self(asked))
    }

    /// Forgets that someone asked: what was to stop has stopped.
    pub(crate) fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Whether someone asked to stop.
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

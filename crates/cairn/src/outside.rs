//! Time, memory and the wish to stop, as a training run sees them.

use std::time::Instant;

use cairn_artifacts::machine::ProcessMemory;
use cairn_artifacts::run::CodeRevision;
use cairn_train::Host;

use crate::signals::StopFlag;

/// The process and the machine it runs on.
#[derive(Debug)]
pub(crate) struct Outside {
    start: Instant,
    stop: StopFlag,
}

impl Outside {
    /// Begins to count time.
    pub(crate) fn new(stop: StopFlag) -> Self {
        Self { start: Instant::now(), stop }
    }
}

impl Host for Outside {
    fn monotonic_s(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn unix_s(&self) -> f64 {
        jiff::Timestamp::now().as_duration().as_secs_f64()
    }

    fn anonymous_bytes(&self) -> Option<u64> {
        ProcessMemory::read().map(|memory| memory.anonymous_bytes)
    }

    fn stop_requested(&self) -> bool {
        self.stop.is_set()
    }
}

/// Seconds since 1970; 0 on a machine whose clock stands before.
pub(crate) fn unix_seconds() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or(0)
}

/// The code that is running, for records.
pub(crate) fn code_revision() -> CodeRevision {
    CodeRevision {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        revision: option_env!("CAIRN_REVISION").map(str::to_owned),
        modified: option_env!("CAIRN_MODIFIED").map(|text| text == "true"),
    }
}

/// The current date and time in UTC, for templates that tell the model.
pub(crate) fn civil_time() -> jiff::civil::DateTime {
    jiff::tz::TimeZone::UTC.to_datetime(jiff::Timestamp::now())
}

/// The current time as records write it.
pub(crate) fn timestamp() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

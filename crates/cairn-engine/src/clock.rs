//! Where an engine has the time from. It decides when tokens come, never which.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// Something that says how much time has passed.
pub trait Clock: Debug + Send {
    /// Time since some moment that stays the same. One that is less than before costs speed at most.
    fn now(&self) -> Duration;
}

/// The machine's clock, from the moment this was made.
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock(Instant);

impl MonotonicClock {
    /// Starts at zero.
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

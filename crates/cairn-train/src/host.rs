//! What lies outside a run, as one handle that is passed in: time, memory, the wish to stop and what
//! this machine can do.
//!
//! A library that asks for the wall time itself cannot be replayed, and one that installs signal
//! handlers cannot be embedded; the binary does both and hands over a [`Host`].

use cairn_kernels::Cpu;

/// What was measured of a machine while a run went on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Peak of f32 arithmetic, for the fraction of it that training reaches.
    pub peak_flops_per_s: f64,
    /// Products whose cuts were measured.
    pub products: usize,
}

/// The outside as a run sees it.
pub trait Host {
    /// Seconds since some fixed moment; never goes back.
    fn monotonic_s(&self) -> f64;

    /// Seconds since 1970-01-01 UTC, for records that people read.
    fn unix_s(&self) -> f64;

    /// Anonymous memory of this process in bytes; `None` where the system does not tell.
    fn anonymous_bytes(&self) -> Option<u64>;

    /// Whether someone asked the run to stop. It then finishes its step, saves and returns.
    fn stop_requested(&self) -> bool;

    /// Measures what is not known of the machine yet, once the first step of a session is done: a
    /// run starts at once, and one that is stopped early does not pay. Faster ways to compute are
    /// set on `cpu`; they change no bit. `room` is the run's own memory, free between two steps.
    fn measure(&self, _cpu: &mut Cpu, _room: &mut [f32]) -> Option<Measured> {
        None
    }
}

/// A host for tests: time moves by a fixed amount at each reading, nothing else happens.
#[derive(Debug)]
pub struct FakeHost {
    now_s: std::cell::Cell<f64>,
    polls_until_stop: std::cell::Cell<Option<u64>>,
}

impl FakeHost {
    /// A host on which nobody asks to stop.
    pub fn new() -> Self {
        Self { now_s: std::cell::Cell::new(0.0), polls_until_stop: std::cell::Cell::new(None) }
    }

    /// A host on which someone asks to stop before step `steps` of the run begins.
    pub fn stopping_after(steps: u64) -> Self {
        Self { polls_until_stop: std::cell::Cell::new(Some(steps)), ..Self::new() }
    }
}

impl Default for FakeHost {
    fn default() -> Self {
        Self::new()
    }
}

impl Host for FakeHost {
    fn monotonic_s(&self) -> f64 {
        self.now_s.set(self.now_s.get() + 0.125);
        self.now_s.get()
    }

    fn unix_s(&self) -> f64 {
        1_700_000_000.0 + self.monotonic_s()
    }

    fn anonymous_bytes(&self) -> Option<u64> {
        None
    }

    fn stop_requested(&self) -> bool {
        let Some(polls) = self.polls_until_stop.get() else { return false };
        self.polls_until_stop.set(Some(polls.saturating_sub(1)));
        polls == 0
    }
}

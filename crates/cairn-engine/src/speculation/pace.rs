//! Whether guessing pays, by the clock.
//!
//! Seconds a token are measured for steps with guesses and for steps without, each over the last few
//! steps of its kind. Guessing begins after [`PLAIN_TRIAL`] plain steps, is judged after
//! [`TRIAL`] steps and at every step from then on, and stops when its tokens come slower. Then it is
//! tried again after a pause, which doubles each time it loses again. What the clock says decides when
//! tokens come, never which.

/// Plain steps before the first guess, to compare with.
const PLAIN_TRIAL: u32 = 3;
/// Steps with guesses before they are judged.
const TRIAL: u32 = 4;
/// Steps with guesses after which a plain one refreshes the comparison.
const REFRESH: u32 = 64;
/// Plain steps of the first pause.
const PAUSE_MIN: u32 = 16;
/// Plain steps of the longest pause.
const PAUSE_MAX: u32 = 1024;
/// Times the mean that a step counts at most.
const OUTLIER: f64 = 3.0;
/// What a step's weight is multiplied by with each step after it.
const FADE: f64 = 0.9;

/// Seconds a token, recent steps counting more.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    seconds: f64,
    tokens: f64,
    steps: u32,
}

impl Cost {
    fn add(&mut self, seconds: f64, tokens: usize) {
        // Whoever took the processor for a moment is not to be paid by one kind of step for long.
        let usual = self.per_token().map(|per_token| OUTLIER * per_token * tokens as f64);
        let seconds = usual.filter(|_| 2 <= self.steps).map_or(seconds, |usual| seconds.min(usual));
        self.seconds = self.seconds * FADE + seconds;
        self.tokens = self.tokens * FADE + tokens as f64;
        self.steps = self.steps.saturating_add(1);
    }

    fn per_token(&self) -> Option<f64> {
        (0.0 < self.tokens).then(|| self.seconds / self.tokens)
    }
}

/// When to guess.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    always: bool,
    plain: Cost,
    speculating: Cost,
    /// Steps with guesses since the last plain one.
    since_plain: u32,
    /// Plain steps left of the pause.
    pause: u32,
    /// Length of the next pause.
    next_pause: u32,
    num_stops: u64,
}

impl Pace {
    /// Guesses as long as it pays, or `always`.
    pub(crate) fn new(always: bool) -> Self {
        Self {
            always,
            plain: Cost::default(),
            speculating: Cost::default(),
            since_plain: 0,
            pause: 0,
            next_pause: PAUSE_MIN,
            num_stops: 0,
        }
    }

    /// Whether the next step guesses.
    pub(crate) fn speculates(&self) -> bool {
        let compares = PLAIN_TRIAL <= self.plain.steps && self.since_plain < REFRESH;
        self.always || (self.pause == 0 && compares)
    }

    /// Notes a step without guesses that chose `tokens` tokens.
    pub(crate) fn plain(&mut self, seconds: f64, tokens: usize) {
        self.plain.add(seconds, tokens);
        self.since_plain = 0;
        self.pause = self.pause.saturating_sub(1);
    }

    /// Notes a step with guesses that chose `tokens` tokens; `seconds` hold the guessing.
    pub(crate) fn speculating(&mut self, seconds: f64, tokens: usize) {
        self.speculating.add(seconds, tokens);
        self.since_plain += 1;
        if self.speculating.steps < TRIAL {
            return;
        }
        match (self.speculating.per_token(), self.plain.per_token()) {
            (Some(speculating), Some(plain)) if plain < speculating => self.stop(),
            _ => self.next_pause = PAUSE_MIN,
        }
    }

    fn stop(&mut self) {
        if self.always {
            return;
        }
        self.num_stops += 1;
        self.pause = self.next_pause;
        self.next_pause = (2 * self.next_pause).min(PAUSE_MAX);
        // The next trial is judged by itself.
        self.speculating = Cost::default();
    }

    /// Times it stopped.
    pub(crate) fn num_stops(&self) -> u64 {
        self.num_stops
    }

    /// Seconds a token, with guesses and without.
    pub(crate) fn seconds_per_token(&self) -> [Option<f64>; 2] {
        [self.speculating.per_token(), self.plain.per_token()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps with guesses among `steps`, where one takes `cost` plain steps and yields `tokens`.
    fn speculated(pace: &mut Pace, steps: usize, cost: f64, tokens: usize) -> usize {
        (0..steps)
            .filter(|_| {
                let speculates = pace.speculates();
                if speculates {
                    pace.speculating(cost, tokens);
                } else {
                    pace.plain(1.0, 1);
                }
                speculates
            })
            .count()
    }

    #[test]
    fn what_pays_goes_on() {
        let mut pace = Pace::new(false);
        // Three plain steps, and one in 65 to compare with.
        assert_eq!(speculated(&mut pace, 3 + 650, 1.5, 2), 640);
        assert_eq!(pace.num_stops(), 0);
        let [speculating, plain] = pace.seconds_per_token().map(Option::unwrap);
        assert!((speculating - 0.75).abs() < 1e-9 && (plain - 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_loses_is_tried_ever_more_rarely() {
        let mut pace = Pace::new(false);
        let tried = speculated(&mut pace, 2000, 1.5, 1);
        // Trials of four steps, pauses of 16, 32, 64, … 1024 steps.
        assert_eq!(tried, 7 * 4);
        assert_eq!(pace.num_stops(), 7);
    }

    #[test]
    fn what_begins_to_pay_is_noticed_and_what_stops_paying_too() {
        let mut pace = Pace::new(false);
        speculated(&mut pace, 100, 1.5, 1);
        let stops = pace.num_stops();
        assert!(300 < speculated(&mut pace, 400, 1.5, 3));
        assert_eq!(pace.num_stops(), stops);
        assert!(speculated(&mut pace, 100, 1.5, 1) < 40);
    }

    #[test]
    fn a_moment_without_the_processor_decides_nothing() {
        let mut pace = Pace::new(false);
        speculated(&mut pace, 50, 1.5, 2);
        pace.speculating(100.0, 2);
        assert!(pace.speculates() && pace.num_stops() == 0);
    }

    #[test]
    fn always_is_always() {
        assert_eq!(speculated(&mut Pace::new(true), 100, 9.0, 1), 100);
    }
}

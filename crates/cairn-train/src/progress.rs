//! What a run remembers between steps besides the model: the best validation and how long there
//! has been none better.

use serde::{Deserialize, Serialize};

/// The lowest validation loss so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Finished steps when it was measured.
    pub step: u64,
    /// Mean negative log-likelihood, in nats.
    pub loss: f64,
    /// Bits per byte at that step.
    pub bits_per_byte: Option<f64>,
}

/// When to give up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EarlyStop {
    /// Validations without improvement after which the run ends.
    pub patience: u64,
    /// Improvement of the loss, in nats, that counts as one.
    pub min_delta: f64,
}

/// Best validation and patience; part of every checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Lowest validation loss so far.
    pub best: Option<Best>,
    /// Loss that patience is measured against: it moves only by `min_delta` or more.
    pub reference_loss: Option<f64>,
    /// Validations since that loss.
    pub validations_without_improvement: u64,
}

impl Progress {
    /// Takes a validation in; returns whether it is the best so far.
    pub fn validated(&mut self, found: Best, early_stop: Option<EarlyStop>) -> bool {
        let min_delta = early_stop.map_or(0.0, |stop| stop.min_delta);
        if self.reference_loss.is_none_or(|reference| found.loss < reference - min_delta) {
            self.reference_loss = Some(found.loss);
            self.validations_without_improvement = 0;
        } else {
            self.validations_without_improvement += 1;
        }
        let is_best = self.best.is_none_or(|best| found.loss < best.loss);
        if is_best {
            self.best = Some(found);
        }
        is_best
    }

    /// Whether patience has run out.
    pub fn exhausted(&self, early_stop: Option<EarlyStop>) -> bool {
        early_stop.is_some_and(|stop| self.validations_without_improvement >= stop.patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOP: Option<EarlyStop> = Some(EarlyStop { patience: 2, min_delta: 0.1 });

    fn feed(losses: &[f64]) -> (Progress, Vec<bool>) {
        let mut progress = Progress::default();
        let mut best = Vec::new();
        for (step, &loss) in (1..).zip(losses) {
            let found = Best { step, loss, bits_per_byte: Some(loss) };
            best.push(progress.validated(found, STOP));
        }
        (progress, best)
    }

    #[test]
    fn small_gains_are_best_but_do_not_buy_patience() {
        let (progress, best) = feed(&[3.0, 2.95, 2.92]);
        assert_eq!(best, [true, true, true]);
        assert_eq!(progress.best.unwrap().step, 3);
        assert!(progress.exhausted(STOP) && !progress.exhausted(None));
    }

    #[test]
    fn slow_steady_gains_reset_patience_once_they_add_up() {
        let (progress, _) = feed(&[3.0, 2.95, 2.89, 2.95]);
        assert_eq!(progress.validations_without_improvement, 1);
        assert!(!progress.exhausted(STOP));
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_never_best() {
        let (progress, best) = feed(&[3.0, f64::NAN]);
        assert_eq!((best, progress.best.unwrap().step), (vec![true, false], 1));
    }
}

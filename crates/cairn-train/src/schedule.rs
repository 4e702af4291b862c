//! The learning rate as a pure function of the step.
//!
//! Every shape warms up linearly from `peak / warmup_steps` to `peak`, then:
//!
//! - **constant** stays there;
//! - **cosine** falls along half a cosine to `final_fraction · peak` within `decay_steps`, and stays
//!   (Loshchilov and Hutter 2017, <https://arxiv.org/abs/1608.03983>);
//! - **WSD** stays, then falls linearly over the last `decay_steps` (Hu et al. 2024,
//!   <https://arxiv.org/abs/2404.06395>; they decay exponentially, linear to a small rate is what
//!   Hägele et al. 2024, <https://arxiv.org/abs/2405.18392>, found to do as well as cosine).
//!
//! Steps count from 0; the last one is `total_steps − 1` and runs at the final rate.

use cairn_spec::recipe::{ScheduleKind, TrainRecipe};

/// The learning rate of every step of a run.
///
/// ```
/// use cairn_spec::recipe::ScheduleKind;
/// use cairn_train::Schedule;
/// let schedule = Schedule {
///     kind: ScheduleKind::Cosine,
///     peak: 1e-3,
///     warmup_steps: 10,
///     decay_steps: 90,
///     total_steps: 100,
///     final_fraction: 0.1,
/// };
/// assert!((schedule.at(0) - 1e-4).abs() < 1e-12);
/// assert!((schedule.at(9) - 1e-3).abs() < 1e-12);
/// assert!((schedule.at(99) - 1e-4).abs() < 1e-12);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// What follows the warm-up.
    pub kind: ScheduleKind,
    /// Highest rate.
    pub peak: f64,
    /// Steps of linear warm-up; 0 starts at the peak.
    pub warmup_steps: u64,
    /// Steps of the fall: cosine's first after the warm-up, WSD's last.
    pub decay_steps: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Rate after the fall, as a fraction of the peak.
    pub final_fraction: f64,
}

impl Schedule {
    /// What a recipe asks for in a run of `total_steps`.
    pub fn of_recipe(recipe: &TrainRecipe, total_steps: u64) -> Self {
        Self {
            kind: recipe.schedule.kind,
            peak: recipe.optimizer.learning_rate,
            warmup_steps: recipe.schedule.warmup_steps,
            decay_steps: recipe.schedule.decay_steps_of(total_steps),
            total_steps,
            final_fraction: recipe.schedule.min_lr_ratio,
        }
    }

    /// The rate of `step`. Steps beyond the last keep the final rate.
    pub fn at(&self, step: u64) -> f64 {
        self.peak * self.factor(step)
    }

    /// The rate of `step` as a fraction of the peak.
    fn factor(&self, step: u64) -> f64 {
        let Self { warmup_steps, decay_steps, total_steps, final_fraction, .. } = *self;
        if step < warmup_steps {
            return (step + 1) as f64 / warmup_steps as f64;
        }
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Cosine => {
                let fallen = (step - warmup_steps) as f64;
                let span = decay_steps.saturating_sub(1) as f64;
                let progress = if fallen < span { fallen / span } else { 1.0 };
                let cosine = (1.0 + (std::f64::consts::PI * progress).cos()) / 2.0;
                final_fraction + (1.0 - final_fraction) * cosine
            }
            ScheduleKind::Wsd => {
                let start = total_steps.saturating_sub(decay_steps).max(warmup_steps);
                let fallen = (step + 1).saturating_sub(start) as f64;
                let progress = (fallen / decay_steps.max(1) as f64).min(1.0);
                1.0 - (1.0 - final_fraction) * progress
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! One optimizer step.

use cairn_artifacts::{FileError, atomic};
use cairn_data::loader::LoaderBatch;
use serde::Serialize;

use super::{SessionStart, Trainer};
use crate::batch::MicroBatch;
use crate::error::{FailedBatch, TrainError};
use crate::host::Host;
use crate::learner::Place;
use crate::observer::StepMetrics;

/// The batch of a failed step, as it is kept.
#[derive(Serialize)]
struct BatchFile<'a> {
    /// The step, from 0.
    step: u64,
    /// What was no number.
    what: &'static str,
    row_tokens: usize,
    ids: &'a [u32],
    targets: &'a [u32],
    loss_weights: &'a [f32],
    /// First token and length of each sequence.
    sequences: Vec<(usize, usize)>,
}

impl Trainer {
    /// Forward, backward and update of the next step.
    pub(super) fn train_step(
        &mut self,
        start: SessionStart,
        host: &dyn Host,
    ) -> Result<StepMetrics, TrainError> {
        let (before_s, step) = (host.monotonic_s(), self.step);
        let batch = self.loader.batch(step)?;
        let batch = match &self.masking {
            Some(masking) => masking.apply(batch, self.recipe.run.seed, step),
            None => batch,
        };
        let loss = self.accumulate_batch(&batch)?;
        if !loss.is_finite() {
            return Err(self.failed("loss", loss, &batch));
        }
        let lr = self.schedule.at(step);
        let grad_norm =
            self.learner.update(lr, step).map_err(|source| TrainError::Step { step, source })?;
        // Then nothing was applied: weights and states are still those of the last good step.
        if !grad_norm.is_finite() {
            return Err(self.failed("gradient norm", grad_norm, &batch));
        }
        self.step += 1;
        let now_s = host.monotonic_s();
        // A clock too coarse for the step must not make its pace infinite.
        let seconds = (now_s - before_s).max(1e-9);
        let peak = self.peak_flops_per_s;
        let pace_s = (now_s - start.at_s) / (self.step - start.step) as f64;
        Ok(StepMetrics {
            step: self.step,
            tokens: self.step * self.plan.tokens_per_step,
            loss,
            lr,
            grad_norm,
            tokens_per_s: self.plan.tokens_per_step as f64 / seconds,
            peak_fraction: peak.map(|peak| self.plan.model_flops_per_step / seconds / peak),
            anonymous_bytes: host.anonymous_bytes(),
            elapsed_s: self.elapsed_before_s + (now_s - start.at_s),
            remaining_s: pace_s * (self.plan.total_steps - self.step) as f64,
        })
    }

    /// Forward and backward over all micro-batches; returns the mean loss of the targets.
    ///
    /// The loss is one f64 sum over the targets in order, however they are cut.
    fn accumulate_batch(&mut self, batch: &LoaderBatch) -> Result<f64, TrainError> {
        let (step, seed) = (self.step, self.recipe.run.seed);
        let targets = batch.num_targets() as f64;
        #[expect(clippy::cast_possible_truncation, reason = "gradients are f32")]
        let weight = (1.0 / targets) as f32;
        let rows_at_a_time = self.plan.shape.micro_batch_size;
        let mut sum = 0.0;
        for first in (0..batch.num_rows()).step_by(rows_at_a_time) {
            let rows = first..batch.num_rows().min(first + rows_at_a_time);
            let micro = MicroBatch::rows(batch, rows);
            let first_token = (first * batch.row_tokens) as u64;
            let place = Place { seed, step, first_token };
            self.learner
                .accumulate(&micro, weight, place, &mut sum)
                .map_err(|source| TrainError::Step { step, source })?;
        }
        Ok(sum / targets)
    }

    /// Keeps the batch of a step whose loss or gradient is no number.
    fn failed(&self, what: &'static str, value: f64, batch: &LoaderBatch) -> TrainError {
        let step = self.step;
        let path = self.folder.failed_batch(step);
        let sequences = batch.sequences.iter().map(|sequence| (sequence.start, sequence.len));
        let kept = BatchFile {
            step,
            what,
            row_tokens: batch.row_tokens,
            ids: &batch.ids,
            targets: &batch.targets,
            loss_weights: &batch.loss_weights,
            sequences: sequences.collect(),
        };
        let json = serde_json::to_vec(&kept).map_err(|e| FileError::on("write", &path)(e.into()));
        let batch = match json.and_then(|json| atomic::write_bytes(&path, &json)) {
            Ok(()) => FailedBatch::Kept(path),
            Err(error) => FailedBatch::Lost(error),
        };
        TrainError::NotFinite { what, step, value, batch }
    }
}

//! The training loop.
//!
//! A [`Trainer`] is opened on a run folder: a new folder starts a run, one with checkpoints goes on
//! from the newest. Everything it does is a function of recipe, corpus and step; what lies outside
//! (time, memory, the wish to stop) comes through a [`Host`], what happens goes to an [`Observer`].
//!
//! **Invariant:** the state after a step depends on neither threads, instruction set,
//! recomputation, nor on how often the run was stopped, killed and resumed.

mod finish;
mod open;
mod step;

use std::fs::File;
use std::path::PathBuf;

use cairn_artifacts::hash::Hasher;
use cairn_artifacts::run::{RunFolder, RunRecord};
use cairn_artifacts::{CheckpointSeries, Hash};
use cairn_data::loader::Loader;
use cairn_data::tokenizer::Tokenizer;
use cairn_eval::EvalError;
use cairn_spec::ModelSpec;
use cairn_spec::recipe::TrainRecipe;
use serde::Serialize;
use serde_json::json;

use crate::checkpoint::{self, ModelFiles, TrainState, TrainedAdapter};
use crate::error::TrainError;
use crate::host::Host;
use crate::learner::{Learner, Weights, hash_part};
use crate::masking::Masking;
use crate::metrics::{Metric, RunLog};
use crate::observer::{Event, Observer, ValidationMetrics, Warning};
use crate::plan::Plan;
use crate::progress::{Best, EarlyStop, Progress};
use crate::resume::deciding_keys;
use crate::schedule::Schedule;
use crate::validation::{Score, Validation, ValidationError};

pub use open::Setup;

/// How a call of [`Trainer::run`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// All steps are done.
    Finished,
    /// Patience ran out.
    EarlyStopped,
    /// Someone asked to stop; the run can be resumed.
    Stopped,
}

/// What a run stands at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// Finished steps.
    pub step: u64,
    /// Best validation so far.
    pub best: Option<Best>,
    /// Seconds of training over all sessions.
    pub elapsed_s: f64,
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
}

/// A run in progress.
#[derive(Debug)]
pub struct Trainer {
    recipe: TrainRecipe,
    /// The recipe's model with the tokenizer's special tokens and the dtype of its weights.
    spec: ModelSpec,
    plan: Plan,
    schedule: Schedule,
    learner: Learner,
    loader: Loader,
    tokenizer: Tokenizer,
    /// What is taken away of a batch, where that is what the model learns to predict.
    masking: Option<Masking>,
    /// What is trained in the model's place.
    adapter: Option<TrainedAdapter>,
    validation: Option<Validation>,
    folder: RunFolder,
    checkpoints: CheckpointSeries,
    /// As it stood when the folder was opened.
    record: RunRecord,
    peak_flops_per_s: Option<f64>,
    log: RunLog,
    /// Finished steps.
    step: u64,
    progress: Progress,
    /// Seconds of training in earlier sessions.
    elapsed_before_s: f64,
    /// Steps of the newest checkpoint.
    saved_step: Option<u64>,
    /// What to say once someone observes.
    warnings: Vec<Warning>,
    /// Held as long as this process trains here; the system lets go of it if the process dies.
    _lock: File,
}

/// When this session began, for pace and elapsed time.
#[derive(Clone, Copy, Debug)]
struct SessionStart {
    at_s: f64,
    step: u64,
}

impl Trainer {
    /// Finished steps.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The plan it runs by.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The run's folder.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// The model in training.
    pub fn learner(&self) -> &Learner {
        &self.learner
    }

    /// The model in training, to change.
    pub fn learner_mut(&mut self) -> &mut Learner {
        &mut self.learner
    }

    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.step >= self.plan.total_steps || self.progress.exhausted(self.early_stop())
    }

    /// Hash of the training state: parameters, optimizer, loader and random state; of frozen weights
    /// beside an adapter, their hash. Times, paths and thread counts are no part of it.
    pub fn state_hash(&self) -> Hash {
        let mut hasher = Hasher::new();
        self.learner.hash_into(&mut hasher);
        let loader = self.loader.state(self.step);
        let loader = serde_json::to_vec(&loader).expect("a loader state is plain data");
        hash_part(&mut hasher, "loader", &loader);
        // Dropout is keyed by seed and step; there is no other randomness.
        hash_part(&mut hasher, "random.seed", &self.recipe.run.seed.to_le_bytes());
        hash_part(&mut hasher, "random.step", &self.step.to_le_bytes());
        if let Some(adapter) = &self.adapter {
            hash_part(&mut hasher, "base", adapter.base_hash.to_string().as_bytes());
        }
        hasher.finish()
    }

    /// Trains until the last step, until patience runs out or until the host asks to stop. Saves,
    /// and writes the report and the record, before it returns.
    ///
    /// # Errors
    ///
    /// [`TrainError`]; the newest complete checkpoint stays, and opening the folder again goes on
    /// from it.
    pub fn run(
        &mut self,
        host: &dyn Host,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, TrainError> {
        let result = self.run_to_end(host, observer);
        if let Err(error) = &result {
            self.note_failure(error, host);
        }
        result
    }

    fn run_to_end(
        &mut self,
        host: &dyn Host,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, TrainError> {
        let mut start = SessionStart { at_s: host.monotonic_s(), step: self.step };
        let total_steps = self.plan.total_steps;
        observer.observe(&Event::Started { step: self.step, total_steps });
        for warning in std::mem::take(&mut self.warnings) {
            observer.observe(&Event::Warning(&warning));
        }
        let mut stopped = false;
        while !self.is_done() && !stopped {
            if host.stop_requested() {
                stopped = true;
            } else {
                self.advance(start, host, observer)?;
                if self.step == start.step + 1 && !self.is_done() {
                    start.at_s += self.measure(host, observer);
                }
            }
        }
        self.save(host, observer)?;
        let ending = match (self.step >= total_steps, stopped) {
            (true, _) => Ending::Finished,
            (false, true) => Ending::Stopped,
            (false, false) => Ending::EarlyStopped,
        };
        let outcome = Outcome {
            ending,
            step: self.step,
            best: self.progress.best,
            elapsed_s: self.elapsed_s(start, host),
            checkpoint: self.checkpoints.path_of(self.step),
        };
        self.conclude(&outcome, host, observer)?;
        Ok(outcome)
    }

    /// Lets the machine be measured in the memory of the run; returns the seconds it took.
    fn measure(&mut self, host: &dyn Host, observer: &mut dyn Observer) -> f64 {
        let before_s = host.monotonic_s();
        let (cpu, room) = self.learner.session_mut().between_runs();
        let Some(measured) = host.measure(cpu, room) else { return 0.0 };
        let peak = measured.peak_flops_per_s;
        self.peak_flops_per_s = Some(peak);
        self.record.figures.insert("peak_flops_per_s".to_owned(), json!(peak));
        let seconds = host.monotonic_s() - before_s;
        observer.observe(&Event::Measured { measured, seconds });
        seconds
    }

    /// One step with what is due after it.
    fn advance(
        &mut self,
        start: SessionStart,
        host: &dyn Host,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let metrics = self.train_step(start, host)?;
        observer.observe(&Event::Step(&metrics));
        self.log.push(Metric::Step(metrics), host.unix_s())?;
        let is_due = |every: Option<u64>| every.is_some_and(|n| self.step.is_multiple_of(n));
        let is_last = self.step == self.plan.total_steps;
        let save_is_due = is_due(self.recipe.checkpoint.every);
        let mut is_best = false;
        if is_last || is_due(self.recipe.eval.every) {
            is_best = self.validate(start, host, observer)?;
        }
        if save_is_due || (is_best && self.recipe.checkpoint.keep_best) {
            self.save(host, observer)?;
        }
        Ok(())
    }

    /// Scores the validation data; returns whether it is the best so far. What is best is decided by
    /// the weights that are trained, which a checkpoint holds; their average is measured beside them.
    fn validate(
        &mut self,
        start: SessionStart,
        host: &dyn Host,
        observer: &mut dyn Observer,
    ) -> Result<bool, TrainError> {
        let Some(score) = self.score(Weights::Trained)? else { return Ok(false) };
        let average = match self.recipe.optimizer.ema_decay {
            Some(_) => self.score(Weights::Average)?,
            None => None,
        };
        let (loss, bits_per_byte) = (score.loss(), score.bits_per_byte());
        let found = Best { step: self.step, loss, bits_per_byte };
        let best = self.progress.validated(found, self.early_stop());
        let metrics = ValidationMetrics {
            step: self.step,
            loss,
            perplexity: loss.exp(),
            bits_per_byte,
            average_loss: average.map(|score| score.loss()),
            average_bits_per_byte: average.and_then(|score| score.bits_per_byte()),
            targets: score.targets,
            bytes: score.bytes,
            best,
            elapsed_s: self.elapsed_s(start, host),
        };
        observer.observe(&Event::Validation(&metrics));
        self.log.push(Metric::Validation(metrics), host.unix_s())?;
        Ok(best)
    }

    /// What the validation data says of some weights; `None` if there is none.
    fn score(&mut self, weights: Weights) -> Result<Option<Score>, TrainError> {
        let Some(validation) = &self.validation else { return Ok(None) };
        let limits = validation.limits(self.plan.tokens_per_run());
        let mut scorer = self.learner.scorer(weights, limits, self.spec.vocab_size);
        match validation.score(&mut scorer) {
            Err(ValidationError::Eval(error @ EvalError::NotANumber { .. })) => {
                Err(TrainError::ValidationNotFinite { step: self.step, source: Box::new(error) })
            }
            // Chance may have taken nothing away of a few short documents.
            result => Ok(Some(result?).filter(|score| 0 < score.targets)),
        }
    }

    /// Writes a checkpoint of this step unless there is one, and removes those no longer wanted.
    fn save(&mut self, host: &dyn Host, observer: &mut dyn Observer) -> Result<(), TrainError> {
        if self.saved_step == Some(self.step) {
            return Ok(());
        }
        let before_s = host.monotonic_s();
        let state = TrainState {
            total_steps: self.plan.total_steps,
            loader: self.loader.state(self.step),
            seed: self.recipe.run.seed,
            progress: self.progress.clone(),
            recipe: deciding_keys(&self.recipe),
            tokenizer_hash: self.tokenizer.hash(),
            state_hash: self.state_hash(),
            base_hash: self.adapter.as_ref().map(|adapter| adapter.base_hash),
        };
        let path = self.checkpoints.path_of(self.step);
        let step = (self.step, self.validation_loss(), &state);
        checkpoint::save(&path, self.learner.session(), self.files(), step)
            .map_err(|source| TrainError::Save { step: self.step, source: Box::new(source) })?;
        self.saved_step = Some(self.step);
        let seconds = host.monotonic_s() - before_s;
        observer.observe(&Event::Saved { step: self.step, path: &path, seconds });
        self.write_pages(host)?;
        let keep = &self.recipe.checkpoint;
        if let Err(error) = self.checkpoints.retain(keep.keep_last, keep.keep_best) {
            let problem = error.to_string();
            observer.observe(&Event::Warning(&Warning::Retention { problem }));
        }
        Ok(())
    }

    /// The validation loss of this step, if one was measured.
    fn validation_loss(&self) -> Option<f64> {
        match self.log.metrics().last() {
            Some(Metric::Validation(found)) if found.step == self.step => Some(found.loss),
            _ => None,
        }
    }

    fn files(&self) -> ModelFiles<'_> {
        let data_hash = self.loader.corpus().data_hash();
        let (spec, adapter) = (&self.spec, self.adapter.as_ref());
        ModelFiles { spec, adapter, tokenizer: &self.tokenizer, data_hash }
    }

    fn early_stop(&self) -> Option<EarlyStop> {
        let stop = self.recipe.early_stop?;
        Some(EarlyStop { patience: stop.patience, min_delta: stop.min_delta })
    }

    fn elapsed_s(&self, start: SessionStart, host: &dyn Host) -> f64 {
        self.elapsed_before_s + (host.monotonic_s() - start.at_s)
    }
}

#[cfg(test)]
pub(crate) mod tests;

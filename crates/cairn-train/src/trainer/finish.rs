//! What a session leaves behind: the table, the report, the record and the averaged weights.

use cairn_artifacts::atomic;
use cairn_artifacts::run::RunStatus;
use serde_json::{Value, json};

use super::{Ending, Outcome, Trainer};
use crate::checkpoint;
use crate::error::TrainError;
use crate::host::Host;
use crate::observer::{Event, Observer, Warning};
use crate::summary::{RunPage, Summary};

/// How far measured memory may lie above the plan before it is said, as a fraction.
const MEMORY_TOLERANCE: f64 = 0.05;

impl Trainer {
    /// Writes what a session leaves behind.
    pub(super) fn conclude(
        &mut self,
        outcome: &Outcome,
        host: &dyn Host,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let (measured, predicted) = (host.anonymous_bytes(), self.plan.bytes.total());
        if let Some(actual) = measured
            && actual as f64 > predicted as f64 * (1.0 + MEMORY_TOLERANCE)
        {
            observer.observe(&Event::Warning(&Warning::Memory { predicted, actual }));
        }
        if outcome.ending != Ending::Stopped && self.recipe.optimizer.ema_decay.is_some() {
            let path = self.folder.average();
            checkpoint::save_average(&path, self.learner.session(), self.files(), self.step)
                .map_err(|source| TrainError::Save { step: self.step, source: Box::new(source) })?;
        }
        let status = match outcome.ending {
            Ending::Finished => RunStatus::Finished,
            Ending::EarlyStopped => RunStatus::EarlyStopped,
            Ending::Stopped => RunStatus::Interrupted,
        };
        let summary = self.write_pages(host)?;
        let mut record = self.record.clone();
        record.status = status;
        record.finished = timestamp(host.unix_s());
        for (name, value) in [
            ("outcome", json!(outcome)),
            ("plan", json!(self.plan)),
            ("summary", json!(summary)),
            ("state_hash", json!(self.state_hash())),
        ] {
            record.figures.insert(name.to_owned(), value);
        }
        Ok(record.save(&self.folder.record())?)
    }

    /// Notes in the record that the run gave up. The error that is being reported matters more than
    /// one of writing this down.
    pub(super) fn note_failure(&self, error: &TrainError, host: &dyn Host) {
        let mut record = self.record.clone();
        record.status = RunStatus::Failed;
        record.finished = timestamp(host.unix_s());
        record.figures.insert("error".to_owned(), Value::from(error.to_string()));
        let _ = record.save(&self.folder.record());
    }

    /// Writes the table and the report as the run stands.
    pub(super) fn write_pages(&self, host: &dyn Host) -> Result<Summary, TrainError> {
        self.log.write_csv()?;
        let (best, measured) = (self.progress.best, host.anonymous_bytes());
        let summary = Summary::new(&self.plan, self.log.metrics(), best, measured);
        let page = RunPage {
            recipe: &self.recipe,
            record: &self.record,
            manifest: self.loader.corpus().manifest(),
            summary: &summary,
            metrics: self.log.metrics(),
            parameters: self.plan.parameters,
        };
        atomic::write_bytes(&self.folder.report(), page.html().as_bytes())?;
        Ok(summary)
    }
}

/// RFC 3339, to the second.
#[expect(clippy::cast_possible_truncation, reason = "whole seconds")]
pub(super) fn timestamp(unix_s: f64) -> Option<String> {
    jiff::Timestamp::from_second(unix_s as i64).ok().map(|time| time.to_string())
}

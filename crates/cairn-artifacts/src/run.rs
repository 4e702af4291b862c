//! The folder of a run: what is where, the record of the run, and its metrics.
//!
//! ```text
//! runs/NAME/
//!   recipe.toml       the resolved settings, written before step 0
//!   record.json       what ran, where, on what data, and what came of it
//!   metrics.jsonl     one line per step or evaluation
//!   metrics.csv       the same as a table
//!   report.html       the curves
//!   tensorboard/      event files
//!   checkpoints/      step-00000250, …
//!   ema/              the averaged weights, once the run has ended
//! ```

mod metrics;
mod record;

pub use metrics::{
    LINE_BYTES_MAX, MetricsError, MetricsLog, Row, for_each_row, read_metrics, write_csv,
};
pub use record::{CodeRevision, RECORD_SCHEMA, RecordError, RunRecord, RunStatus};

use crate::CheckpointSeries;
use std::path::{Path, PathBuf};

/// Where the parts of a run are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder {
    root: PathBuf,
}

impl RunFolder {
    /// The run in `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved settings.
    pub fn recipe(&self) -> PathBuf {
        self.root.join("recipe.toml")
    }

    /// The run record.
    pub fn record(&self) -> PathBuf {
        self.root.join("record.json")
    }

    /// The metrics, line by line.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The metrics as a table.
    pub fn metrics_csv(&self) -> PathBuf {
        self.root.join("metrics.csv")
    }

    /// The page with the curves.
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// TensorBoard event files.
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The checkpoints.
    pub fn checkpoints(&self) -> CheckpointSeries {
        CheckpointSeries::new(self.root.join("checkpoints"))
    }

    /// The model of the averaged weights, where the optimizer keeps an average.
    pub fn average(&self) -> PathBuf {
        self.root.join("ema")
    }

    /// Where the batch of a step whose loss was not a number is kept.
    pub fn failed_batch(&self, step: u64) -> PathBuf {
        self.root.join(format!("failed-batch-{step:08}.json"))
    }
}

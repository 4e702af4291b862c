//! The metrics of a run, as they are recorded and as TensorBoard sees them.
//!
//! JSON Lines are the record; the table is the same for spreadsheets. A run that resumes from a
//! checkpoint first drops what was recorded after it, so that no step stands there twice.

use cairn_artifacts::FileError;
use cairn_artifacts::run::{self, MetricsError, MetricsLog, Row, RunFolder};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::observer::{StepMetrics, ValidationMetrics};
use crate::tensorboard::EventFile;

/// One line of the record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Metric {
    /// An optimizer step.
    Step(StepMetrics),
    /// A validation.
    Validation(ValidationMetrics),
}

impl Metric {
    /// Finished steps when it was measured.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(step) => step.step,
            Self::Validation(validation) => validation.step,
        }
    }

    /// Seconds of training until then.
    pub fn elapsed_s(&self) -> f64 {
        match self {
            Self::Step(step) => step.elapsed_s,
            Self::Validation(validation) => validation.elapsed_s,
        }
    }

    fn scalars(&self) -> Vec<(&'static str, f64)> {
        match self {
            Self::Step(m) => {
                let mut scalars = vec![
                    ("train/loss", m.loss),
                    ("train/lr", m.lr),
                    ("train/grad_norm", m.grad_norm),
                    ("train/tokens_per_s", m.tokens_per_s),
                ];
                scalars.extend(m.peak_fraction.map(|fraction| ("train/peak_fraction", fraction)));
                scalars
            }
            Self::Validation(m) => {
                let mut scalars = vec![("val/loss", m.loss), ("val/perplexity", m.perplexity)];
                scalars.extend(m.bits_per_byte.map(|bits| ("val/bits_per_byte", bits)));
                scalars.extend(m.average_loss.map(|loss| ("val/average_loss", loss)));
                let bits = m.average_bits_per_byte;
                scalars.extend(bits.map(|bits| ("val/average_bits_per_byte", bits)));
                scalars
            }
        }
    }

    fn row(&self) -> Row {
        match serde_json::to_value(self) {
            Ok(Value::Object(row)) => row,
            other => unreachable!("a metric has named fields: {other:?}"),
        }
    }
}

/// Reads the metrics of a run.
///
/// # Errors
///
/// [`MetricsError`] if the file cannot be read or a whole line of it is no metric.
pub fn read_metrics(folder: &RunFolder) -> Result<Vec<Metric>, MetricsError> {
    let path = folder.metrics();
    if !path.exists() {
        return Ok(Vec::new());
    }
    let (mut metrics, mut bad) = (Vec::new(), None);
    let mut line = 0;
    run::for_each_row(&path, &mut |row, _| {
        line += 1;
        match serde_json::from_value(Value::Object(row)) {
            Ok(metric) => metrics.push(metric),
            Err(error) if bad.is_none() => bad = Some((line, error.to_string())),
            Err(_) => {}
        }
    })?;
    match bad {
        None => Ok(metrics),
        Some((line, reason)) => Err(MetricsError::BadLine { path, line, reason }),
    }
}

/// The open files of a run's metrics, and what they hold.
#[derive(Debug)]
pub(crate) struct RunLog {
    folder: RunFolder,
    lines: MetricsLog,
    events: EventFile,
    metrics: Vec<Metric>,
}

impl RunLog {
    /// Opens the log of a run that stands at `step`, dropping what was recorded after it.
    pub(crate) fn open(folder: &RunFolder, step: u64, unix_s: f64) -> Result<Self, MetricsError> {
        let lines = MetricsLog::resume(&folder.metrics(), step)?;
        let metrics = read_metrics(folder)?;
        let events = folder.tensorboard();
        std::fs::create_dir_all(&events).map_err(FileError::on("create", &events))?;
        // What is recorded of `step` itself stays; what comes next is about the step after it.
        let events = EventFile::create(&events, unix_s, step + 1)
            .map_err(FileError::on("create an event file in", &events))?;
        Ok(Self { folder: folder.clone(), lines, events, metrics })
    }

    /// Appends a metric.
    pub(crate) fn push(&mut self, metric: Metric, unix_s: f64) -> Result<(), MetricsError> {
        #[expect(clippy::cast_possible_truncation, reason = "TensorBoard draws f32")]
        let scalars: Vec<(&str, f32)> =
            metric.scalars().into_iter().map(|(tag, value)| (tag, value as f32)).collect();
        self.lines.append(&metric)?;
        self.events
            .scalars(unix_s, metric.step(), &scalars)
            .map_err(FileError::on("append to an event file in", &self.folder.tensorboard()))?;
        self.metrics.push(metric);
        Ok(())
    }

    /// Everything recorded so far.
    pub(crate) fn metrics(&self) -> &[Metric] {
        &self.metrics
    }

    /// Writes the table.
    pub(crate) fn write_csv(&self) -> Result<(), FileError> {
        run::write_csv(&self.folder.metrics_csv(), self.metrics.iter().map(Metric::row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Metric {
        Metric::Step(StepMetrics {
            step,
            tokens: 10 * step,
            loss: 1.0 / step as f64,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens_per_s: 100.0,
            peak_fraction: None,
            anonymous_bytes: Some(4096),
            elapsed_s: step as f64,
            remaining_s: 1.0,
        })
    }

    fn validation(step: u64) -> Metric {
        Metric::Validation(ValidationMetrics {
            step,
            loss: 2.0,
            perplexity: 2.0_f64.exp(),
            bits_per_byte: Some(1.5),
            average_loss: None,
            average_bits_per_byte: None,
            targets: 3,
            bytes: Some(7),
            best: true,
            elapsed_s: 1.0,
        })
    }

    #[test]
    fn resuming_drops_later_steps() {
        let root = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(root.path());
        let mut log = RunLog::open(&folder, 0, 5.0).unwrap();
        for metric in [step(1), step(2), validation(2), step(3)] {
            log.push(metric, 6.0).unwrap();
        }
        drop(log);
        let mut log = RunLog::open(&folder, 2, 7.0).unwrap();
        log.push(step(3), 8.0).unwrap();
        let expected = [step(1), step(2), validation(2), step(3)];
        assert_eq!(log.metrics(), expected);
        assert_eq!(read_metrics(&folder).unwrap(), expected);
        log.write_csv().unwrap();
        let csv = std::fs::read_to_string(folder.metrics_csv()).unwrap();
        assert_eq!(csv.lines().count(), 5, "{csv}");
    }

    #[test]
    fn a_line_that_is_no_metric_is_named() {
        let root = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(root.path());
        std::fs::write(folder.metrics(), "{\"kind\":\"nonsense\",\"step\":1}\n").unwrap();
        let error = read_metrics(&folder).unwrap_err();
        assert!(error.to_string().starts_with("line 1 of"), "{error}");
    }
}

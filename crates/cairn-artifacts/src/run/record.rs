//! The record of a run: no number without one.

use crate::machine::Machine;
use crate::{FileError, Hash, atomic, bounded};
use cairn_spec::Hint;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The schema of run records that this version reads and writes.
pub const RECORD_SCHEMA: &str = "run/1";

/// Largest record that is read, in bytes; real ones are some KiB.
const RECORD_BYTES_MAX: u64 = 64 << 20;

/// What ran, where, on what, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRecord {
    /// [`RECORD_SCHEMA`].
    pub schema: String,
    /// What was done: `train`, `eval`, `bench kernels` …
    pub what: String,
    /// How it ended.
    pub status: RunStatus,
    /// The resolved settings.
    pub settings: Value,
    /// The code that ran.
    pub code: CodeRevision,
    /// Where it ran.
    pub machine: Machine,
    /// Hash of the data it read, if any.
    pub data_hash: Option<Hash>,
    /// When it began, RFC 3339; given by the caller, who has a clock.
    pub started: Option<String>,
    /// When it ended, RFC 3339.
    pub finished: Option<String>,
    /// What was measured, by name; units are in the names (`tokens_per_s`, `peak_bytes`).
    pub figures: Map<String, Value>,
}

/// How a run ended, so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    /// It has not, or it was killed.
    Running,
    /// It did all it should.
    Finished,
    /// It was asked to stop and can be resumed.
    Interrupted,
    /// It ended early because the validation loss no longer fell.
    EarlyStopped,
    /// It gave up; the figures say why.
    Failed,
}

/// The code of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodeRevision {
    /// The version of the program.
    pub version: String,
    /// The commit it was built from, if it was built in a checkout.
    pub revision: Option<String>,
    /// Whether the checkout had changes that were not committed.
    pub modified: Option<bool>,
}

/// A run record that cannot be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is no run record.
    #[error("{} is not a run record: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file follows another schema.
    #[error("{} has schema '{schema}'; this version reads '{RECORD_SCHEMA}'", path.display())]
    UnknownSchema {
        /// The file.
        path: PathBuf,
        /// The schema it names.
        schema: String,
    },
}

impl Hint for RecordError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::File(error) => error.hints(),
            Self::Malformed { .. } | Self::UnknownSchema { .. } => Vec::new(),
        }
    }
}

impl RunRecord {
    /// A record of something that begins.
    pub fn new(what: impl Into<String>, settings: Value, code: CodeRevision) -> Self {
        Self {
            schema: RECORD_SCHEMA.to_owned(),
            what: what.into(),
            status: RunStatus::Running,
            settings,
            code,
            machine: Machine::read(),
            data_hash: None,
            started: None,
            finished: None,
            figures: Map::new(),
        }
    }

    /// Writes the record, replacing an earlier one at once.
    ///
    /// # Errors
    ///
    /// [`RecordError::File`] if it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), RecordError> {
        let json = serde_json::to_value(self).map_err(std::io::Error::from);
        let json = json.map_err(FileError::on("write", path))?;
        Ok(atomic::write_bytes(path, format!("{json:#}\n").as_bytes())?)
    }

    /// Reads a record.
    ///
    /// # Errors
    ///
    /// [`RecordError`] naming the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, RecordError> {
        let malformed = |reason: serde_json::Error| RecordError::Malformed {
            path: path.to_owned(),
            reason: reason.to_string(),
        };
        let text = bounded::read_bytes(path, RECORD_BYTES_MAX)?;
        let json: Value = serde_json::from_slice(&text).map_err(malformed)?;
        match json.get("schema").and_then(Value::as_str) {
            Some(schema) if schema != RECORD_SCHEMA => {
                Err(RecordError::UnknownSchema { path: path.to_owned(), schema: schema.to_owned() })
            }
            _ => serde_json::from_value(json).map_err(malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use serde_json::json;

    #[test]
    fn a_record_reads_back_equal_and_others_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        let code = CodeRevision { version: "0.1.0".to_owned(), ..CodeRevision::default() };
        let mut record = RunRecord::new("train", json!({"run": {"seed": 1}}), code);
        record.figures.insert("tokens_per_s".to_owned(), json!(2650.5));
        record.status = RunStatus::Finished;
        record.save(&path).unwrap();
        assert_eq!(RunRecord::load(&path).unwrap(), record);

        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("run/1", "run/2")).unwrap();
        let error = RunRecord::load(&path).unwrap_err().to_string();
        assert!(error.ends_with("has schema 'run/2'; this version reads 'run/1'"), "{error}");
        fs::write(&path, "{}").unwrap();
        let error = RunRecord::load(&path).unwrap_err().to_string();
        assert!(error.contains("is not a run record: missing field"), "{error}");
    }
}

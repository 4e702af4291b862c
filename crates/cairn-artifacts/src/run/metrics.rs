//! Metrics as JSON lines: appended one by one, whole lines only survive.
//!
//! A line is handed to the operating system in one piece, so that a killed process loses at most
//! the line it was writing. Readers pass over a last line that is not complete; a run that resumes
//! from a checkpoint first drops it, and the lines of the steps it will do again.

use crate::{FileError, atomic};
use serde::Serialize;
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Longest line that is read.
pub const LINE_BYTES_MAX: usize = 1 << 20;
/// The field that says which step a line is about.
const STEP: &str = "step";

/// One line of metrics.
pub type Row = Map<String, Value>;

/// Metrics that cannot be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// A line other than the last is not an object of JSON.
    #[error("line {line} of {} is malformed: {reason}", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

/// An open file of metrics.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    /// Length of the whole lines.
    bytes: u64,
}

impl MetricsLog {
    /// Begins an empty file, replacing an earlier one.
    ///
    /// # Errors
    ///
    /// [`MetricsError::File`] if that fails.
    pub fn create(path: &Path) -> Result<Self, MetricsError> {
        atomic::write_bytes(path, b"")?;
        Self::append_to(path)
    }

    /// Continues a file after `step`: from the first line of a later step on everything is dropped,
    /// and so is an incomplete last line. What stays is not touched. A file that does not exist is
    /// begun.
    ///
    /// # Errors
    ///
    /// [`MetricsError`] if the file cannot be read or written, or is damaged before its last line.
    pub fn resume(path: &Path, step: u64) -> Result<Self, MetricsError> {
        if !path.exists() {
            return Self::create(path);
        }
        let (mut kept, mut is_later) = (0, false);
        for_each_row(path, &mut |row, end| {
            is_later |= row.get(STEP).and_then(Value::as_u64).is_some_and(|at| at > step);
            if !is_later {
                kept = end;
            }
        })?;
        let file =
            OpenOptions::new().write(true).open(path).map_err(FileError::on("open", path))?;
        file.set_len(kept)
            .and_then(|()| file.sync_all())
            .map_err(FileError::on("shorten", path))?;
        Self::append_to(path)
    }

    fn append_to(path: &Path) -> Result<Self, MetricsError> {
        let file =
            OpenOptions::new().append(true).open(path).map_err(FileError::on("open", path))?;
        let bytes = file.metadata().map_err(FileError::on("read the size of", path))?.len();
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// Appends one line. `row` should be an object with the field `step`.
    ///
    /// # Errors
    ///
    /// [`MetricsError::File`] if it cannot be written, for example because the disk is full.
    pub fn append(&mut self, row: &impl Serialize) -> Result<(), MetricsError> {
        match write_line(&mut self.file, row) {
            Ok(written) => {
                self.bytes += written;
                Ok(())
            }
            Err(error) => {
                // Half a line would spoil the next one. If this fails too, nothing is lost that a
                // resumed run would not drop anyway.
                let _ = self.file.set_len(self.bytes);
                Err(FileError::on("append to", &self.path)(error).into())
            }
        }
    }
}

/// Writes a whole line at once and returns its length in bytes.
fn write_line(out: &mut dyn Write, row: &impl Serialize) -> io::Result<u64> {
    let mut line = serde_json::to_vec(row)?;
    line.push(b'\n');
    out.write_all(&line)?;
    Ok(line.len() as u64)
}

/// Reads all complete lines. A last line without its line break was being written when the process
/// was killed and is left out.
///
/// # Errors
///
/// As from [`for_each_row`].
pub fn read_metrics(path: &Path) -> Result<Vec<Row>, MetricsError> {
    let mut rows = Vec::new();
    for_each_row(path, &mut |row, _| rows.push(row))?;
    Ok(rows)
}

/// Hands over the complete lines one by one, each with where in the file it ends. Long runs have
/// more lines than anyone wants in memory as rows.
///
/// # Errors
///
/// [`MetricsError::BadLine`] if a complete line is not an object or longer than
/// [`LINE_BYTES_MAX`]; [`MetricsError::File`] if the file cannot be read.
pub fn for_each_row(path: &Path, on_row: &mut dyn FnMut(Row, u64)) -> Result<(), MetricsError> {
    let file = File::open(path).map_err(FileError::on("open", path))?;
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    let mut end = 0;
    for number in 1.. {
        line.clear();
        let mut limited = reader.by_ref().take(LINE_BYTES_MAX as u64 + 1);
        limited.read_until(b'\n', &mut line).map_err(FileError::on("read", path))?;
        let bad =
            |reason: String| MetricsError::BadLine { path: path.to_owned(), line: number, reason };
        if line.len() > LINE_BYTES_MAX {
            return Err(bad(format!("it is longer than {LINE_BYTES_MAX} bytes")));
        }
        end += line.len() as u64;
        if line.pop() != Some(b'\n') {
            break;
        }
        on_row(serde_json::from_slice(&line).map_err(|error| bad(error.to_string()))?, end);
    }
    Ok(())
}

/// Writes rows as a table, one column per field in the order of first appearance; the rows are asked
/// for twice, and one is held at a time.
///
/// # Errors
///
/// [`FileError`] if the file cannot be written.
pub fn write_csv(path: &Path, rows: impl Iterator<Item = Row> + Clone) -> Result<(), FileError> {
    let mut columns: Vec<String> = Vec::new();
    for row in rows.clone() {
        let new = row.keys().filter(|key| !columns.contains(key)).cloned();
        columns.extend(new.collect::<Vec<_>>());
    }
    atomic::write(path, |out| {
        write_cells(out, columns.iter().map(|name| Some(Value::from(name.as_str()))))?;
        let mut rows = rows;
        rows.try_for_each(|row| write_cells(out, columns.iter().map(|name| row.get(name).cloned())))
    })
}

fn write_cells(out: &mut dyn Write, cells: impl Iterator<Item = Option<Value>>) -> io::Result<()> {
    let texts: Vec<String> = cells.map(cell).collect();
    writeln!(out, "{}", texts.join(","))
}

/// A value as RFC 4180 wants it.
fn cell(value: Option<Value>) -> String {
    let text = match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        Some(other) => other.to_string(),
    };
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::fs;

    fn steps(path: &Path) -> Vec<u64> {
        let rows = read_metrics(path).unwrap();
        rows.iter().map(|row| row[STEP].as_u64().unwrap()).collect()
    }

    #[test]
    fn a_killed_run_resumes_at_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        for step in 0..5 {
            log.append(&json!({"step": step, "loss": 1.5})).unwrap();
        }
        drop(log);
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"step\": 5, \"lo");
        fs::write(&path, text).unwrap();
        assert_eq!(steps(&path), [0, 1, 2, 3, 4]);

        let mut log = MetricsLog::resume(&path, 2).unwrap();
        log.append(&json!({"step": 3})).unwrap();
        assert_eq!(steps(&path), [0, 1, 2, 3]);

        let fresh = folder.path().join("fresh.jsonl");
        MetricsLog::resume(&fresh, 9).unwrap();
        assert!(steps(&fresh).is_empty());
    }

    #[test]
    fn a_damaged_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\": 1}\n{\"step\": \n{\"step\": 3}\n").unwrap();
        let error = read_metrics(&path).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("line 2 of {} is malformed", path.display())),
            "{error}"
        );
        fs::write(&path, vec![b' '; LINE_BYTES_MAX + 1]).unwrap();
        assert!(read_metrics(&path).unwrap_err().to_string().contains("is longer than"));
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let error = MetricsLog::append_to(Path::new("/dev/full")).unwrap().append(&json!({}));
        assert_eq!(error.unwrap_err().to_string(), "cannot append to /dev/full");
    }

    #[test]
    fn tables_have_every_field_and_quote_what_needs_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.csv");
        let rows = [json!({"step": 0, "loss": 1.5}), json!({"step": 1, "note": "a,\"b\""})];
        let rows: Vec<Row> = rows.iter().map(|row| row.as_object().unwrap().clone()).collect();
        write_csv(&path, rows.into_iter()).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "step,loss,note\n0,1.5,\n1,,\"a,\"\"b\"\"\"\n");
    }

    proptest! {
        /// A figure that came back with another last bit would make a resumed run another run.
        #[test]
        fn figures_keep_every_bit(figures in prop::collection::vec(any::<f64>(), 1..20)) {
            let figures: Vec<f64> = figures.into_iter().filter(|x| x.is_finite()).collect();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("metrics.jsonl");
            let mut log = MetricsLog::create(&path).unwrap();
            for (step, loss) in figures.iter().enumerate() {
                log.append(&json!({ "step": step, "loss": loss })).unwrap();
            }
            let text = fs::read(&path).unwrap();
            MetricsLog::resume(&path, figures.len() as u64).unwrap();
            prop_assert_eq!(fs::read(&path).unwrap(), text);
            for (row, loss) in read_metrics(&path).unwrap().iter().zip(&figures) {
                prop_assert_eq!(row["loss"].as_f64().unwrap().to_bits(), loss.to_bits());
            }
        }

        #[test]
        fn a_log_cut_anywhere_keeps_its_whole_lines(cut in 0usize..120, lines in 0u64..8) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("metrics.jsonl");
            let mut log = MetricsLog::create(&path).unwrap();
            for step in 0..lines {
                log.append(&json!({ "step": step })).unwrap();
            }
            let bytes = fs::read(&path).unwrap();
            let cut = cut.min(bytes.len());
            fs::write(&path, &bytes[..cut]).unwrap();
            let whole = bytes[..cut].iter().filter(|&&byte| byte == b'\n').count() as u64;
            prop_assert_eq!(steps(&path), (0..whole).collect::<Vec<_>>());
        }
    }
}

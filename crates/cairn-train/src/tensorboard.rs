//! TensorBoard event files with scalars, written by hand.
//!
//! A file is a sequence of `TFRecord`s: length (u64), masked CRC-32C of the length, payload, masked
//! CRC-32C of the payload, all little-endian. A payload is an `Event` message in protocol-buffer
//! encoding; of it, four fields are written:
//!
//! | message | fields |
//! |---|---|
//! | `Event` | 1 `wall_time` double · 2 `step` int64 · 3 `file_version` string · 5 `summary` · 7 `session_log` |
//! | `Summary` | 1 `value` repeated |
//! | `Value` | 1 `tag` string · 2 `simple_value` float |
//! | `SessionLog` | 1 `status`; 1 is START: a reader drops steps at or after this event's step |
//!
//! Sources: `tensorflow/core/util/event.proto`, `tensorflow/core/framework/summary.proto`,
//! `tensorflow/core/lib/io/record_writer.cc`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Added by the mask, so that a CRC of data that holds CRCs stays random.
const CRC_MASK_DELTA: u32 = 0xa282_ead8;

/// An event file, open for appending.
#[derive(Debug)]
pub struct EventFile {
    file: File,
}

impl EventFile {
    /// Creates an event file in `folder` that starts at `step`: readers drop what earlier files of
    /// the folder say about `step` and later ones.
    ///
    /// # Errors
    ///
    /// Any error of creating or writing the file.
    pub fn create(folder: &Path, unix_s: f64, step: u64) -> io::Result<Self> {
        let file = create_new(folder, unix_s)?;
        let mut events = Self { file };
        let mut version = event(unix_s, 0);
        put_bytes(&mut version, 3, b"brain.Event:2");
        events.write(&version)?;
        let mut start = event(unix_s, step);
        put_bytes(&mut start, 7, &[1 << 3, 1]);
        events.write(&start)?;
        Ok(events)
    }

    /// Appends scalars of one step.
    ///
    /// # Errors
    ///
    /// Any error of writing the file.
    pub fn scalars(&mut self, unix_s: f64, step: u64, scalars: &[(&str, f32)]) -> io::Result<()> {
        self.write(&scalar_event(unix_s, step, scalars))
    }

    fn write(&mut self, payload: &[u8]) -> io::Result<()> {
        self.file.write_all(&record(payload))
    }
}

/// A file whose name sorts after those of earlier runs in the folder.
fn create_new(folder: &Path, unix_s: f64) -> io::Result<File> {
    let mut number = 0_u32;
    loop {
        // Readers look for `tfevents` and order files by name.
        let name = format!("events.out.tfevents.{unix_s:010.0}.cairn.{number:04}");
        match OpenOptions::new().append(true).create_new(true).open(folder.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < 9999 => {
                number += 1;
            }
            result => return result,
        }
    }
}

fn scalar_event(unix_s: f64, step: u64, scalars: &[(&str, f32)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in scalars {
        let mut entry = Vec::new();
        put_bytes(&mut entry, 1, tag.as_bytes());
        entry.push(2 << 3 | 5);
        entry.extend_from_slice(&value.to_le_bytes());
        put_bytes(&mut summary, 1, &entry);
    }
    let mut event = event(unix_s, step);
    put_bytes(&mut event, 5, &summary);
    event
}

/// `wall_time` and `step`.
fn event(unix_s: f64, step: u64) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend_from_slice(&unix_s.to_le_bytes());
    event.push(2 << 3);
    put_varint(&mut event, step);
    event
}

fn put_bytes(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    message.push(field << 3 | 2);
    put_varint(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

fn put_varint(message: &mut Vec<u8>, mut value: u64) {
    loop {
        let [low, ..] = value.to_le_bytes();
        value >>= 7;
        if value == 0 {
            message.push(low & 0x7f);
            return;
        }
        message.push(low | 0x80);
    }
}

/// A payload in its `TFRecord` frame.
fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(payload);
    record.extend_from_slice(&masked_crc(payload).to_le_bytes());
    record
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(CRC_MASK_DELTA)
}

#[cfg(test)]
pub(crate) mod tests;

//! Reading what somebody else wrote: up to a limit, which the error names.
//!
//! **Invariant:** memory is proportional to what was read, never to a length that a file claims.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use cairn_spec::units::RoundedBytes;

use crate::FileError;

/// Largest description of a model (`config.json`) that is read, in bytes; real ones are a few KiB.
pub const CONFIG_BYTES_MAX: u64 = 8 << 20;

/// Largest text that a person hands over as one piece, in bytes: prompts, questions, lists of texts.
pub const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Reads a text file of at most `bytes_max` bytes.
///
/// # Errors
///
/// [`FileError`] if it cannot be read, is larger, or is not UTF-8.
pub fn read_text(path: &Path, bytes_max: u64) -> Result<String, FileError> {
    let read = || text_of(File::open(path)?, bytes_max);
    read().map_err(FileError::on("read", path))
}

/// Reads a file of at most `bytes_max` bytes.
///
/// # Errors
///
/// [`FileError`] if it cannot be read or is larger.
pub fn read_bytes(path: &Path, bytes_max: u64) -> Result<Vec<u8>, FileError> {
    let read = || bytes_of(File::open(path)?, bytes_max);
    read().map_err(FileError::on("read", path))
}

/// Reads a text of at most `bytes_max` bytes to its end.
///
/// # Errors
///
/// [`io::ErrorKind::FileTooLarge`] for a longer one, [`io::ErrorKind::InvalidData`] for one that is
/// not UTF-8, and what the system says.
pub fn text_of(reader: impl Read, bytes_max: u64) -> io::Result<String> {
    String::from_utf8(bytes_of(reader, bytes_max)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

fn bytes_of(reader: impl Read, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = reader.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
    if u64::try_from(read).is_ok_and(|read| read <= bytes_max) {
        return Ok(bytes);
    }
    let reason = format!("it is larger than {}, the most that is read", RoundedBytes(bytes_max));
    Err(io::Error::new(io::ErrorKind::FileTooLarge, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_larger_than_the_limit_is_refused_with_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        std::fs::write(&path, "stone").unwrap();
        assert_eq!(read_text(&path, 5).unwrap(), "stone");
        assert_eq!(read_bytes(&path, 5).unwrap(), b"stone");
        let error = read_text(&path, 4).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(error.source.to_string(), "it is larger than 4 bytes, the most that is read");
    }

    #[test]
    fn an_endless_file_ends_at_the_limit() {
        let error = text_of(io::repeat(b'a'), 1 << 20).unwrap_err();
        assert!(error.to_string().contains("larger than 1.00 MiB"), "{error}");
    }

    #[test]
    fn what_is_no_text_is_said_with_its_place() {
        let error = text_of(&b"caf\xE9"[..], 10).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("index 3"), "{error}");
    }
}

//! The first bytes of a pack: where everything else is, and the hash of the header.
//!
//! | bytes | what |
//! |---|---|
//! | 0–7 | `LEANPACK` |
//! | 8–11 | version, 1 |
//! | 12–15 | bytes of the preamble, 128 |
//! | 16–23 | bytes of the header, which follows |
//! | 24–31 | where the data begins, a multiple of 2 MiB |
//! | 32–39 | bytes of the whole file |
//! | 40–63 | zeros |
//! | 64–95 | BLAKE3 of the header |
//! | 96–127 | BLAKE3 of bytes 0–95 |
//!
//! Numbers are little-endian.

use super::{DATA_ALIGNMENT, HEADER_BYTES_MAX, MAGIC, PREAMBLE_BYTES, PackErrorKind, VERSION};
use crate::hash::Hash;

/// Bytes before the preamble's own hash.
const HASHED_BYTES: usize = 96;
/// [`PREAMBLE_BYTES`] as the preamble states it.
const STATED_BYTES: u32 = 128;
/// How much further than needed the data may begin: a header turned out shorter than reserved.
const SLACK_BYTES: u64 = DATA_ALIGNMENT;

/// A checked preamble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Bytes of the header.
    pub header_bytes: u64,
    /// Where the data begins.
    pub data_start: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// The header's hash.
    pub header_hash: Hash,
}

impl Preamble {
    /// Reads and checks a preamble.
    ///
    /// # Errors
    ///
    /// [`PackErrorKind`] naming what is wrong; the version is looked at before anything that another
    /// version may have changed.
    pub fn parse(bytes: &[u8]) -> Result<Self, PackErrorKind> {
        if !bytes.starts_with(&MAGIC) {
            return Err(PackErrorKind::NotAPack);
        }
        let Some(bytes) = bytes.first_chunk::<PREAMBLE_BYTES>() else {
            return Err(PackErrorKind::CutShort { part: "the preamble".to_owned() });
        };
        let number = |at: usize| u64::from_le_bytes(array(bytes, at));
        let version = u32::from_le_bytes(array(bytes, 8));
        if version != VERSION {
            return Err(PackErrorKind::UnknownVersion { found: version });
        }
        let expected = Hash::from_bytes(array(bytes, HASHED_BYTES));
        let actual = Hash::of_bytes(&bytes[..HASHED_BYTES]);
        if expected != actual {
            let part = "the preamble".to_owned();
            return Err(PackErrorKind::Altered { part, expected, actual });
        }
        let preamble = Self {
            header_bytes: number(16),
            data_start: number(24),
            file_bytes: number(32),
            header_hash: Hash::from_bytes(array(bytes, 64)),
        };
        let malformed = |reason: &str| PackErrorKind::Preamble { reason: reason.to_owned() };
        if u32::from_le_bytes(array(bytes, 12)) != STATED_BYTES {
            return Err(malformed("it states another size than 128"));
        }
        if bytes[40..64].iter().any(|&byte| byte != 0) {
            return Err(malformed("bytes 40 to 63 are not zero"));
        }
        preamble.check()?;
        Ok(preamble)
    }

    fn check(&self) -> Result<(), PackErrorKind> {
        let malformed = |reason: &str| PackErrorKind::Preamble { reason: reason.to_owned() };
        if self.header_bytes > HEADER_BYTES_MAX {
            return Err(PackErrorKind::HeaderTooLong { bytes: self.header_bytes });
        }
        let least = data_start(self.header_bytes);
        if !self.data_start.is_multiple_of(DATA_ALIGNMENT) {
            return Err(malformed("the data does not begin at a multiple of 2 MiB"));
        }
        if !(least..=least + SLACK_BYTES).contains(&self.data_start) {
            return Err(malformed("the data does not begin after the header"));
        }
        if self.file_bytes < self.data_start {
            return Err(malformed("the file ends before the data begins"));
        }
        Ok(())
    }

    /// The bytes of a file.
    pub(super) fn to_bytes(self) -> [u8; PREAMBLE_BYTES] {
        let mut bytes = [0; PREAMBLE_BYTES];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &STATED_BYTES.to_le_bytes());
        put(16, &self.header_bytes.to_le_bytes());
        put(24, &self.data_start.to_le_bytes());
        put(32, &self.file_bytes.to_le_bytes());
        put(64, self.header_hash.as_bytes());
        let hash = Hash::of_bytes(&bytes[..HASHED_BYTES]);
        bytes[HASHED_BYTES..].copy_from_slice(hash.as_bytes());
        bytes
    }
}

/// Where the data begins after a header of that length.
pub(super) fn data_start(header_bytes: u64) -> u64 {
    (PREAMBLE_BYTES as u64 + header_bytes).next_multiple_of(DATA_ALIGNMENT)
}

fn array<const N: usize>(bytes: &[u8; PREAMBLE_BYTES], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("the field lies in the preamble")
}

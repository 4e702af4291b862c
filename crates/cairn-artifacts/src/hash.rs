//! BLAKE3 of bytes, of files, and of whatever is being written.

use crate::FileError;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::str::FromStr;

/// Bytes read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A 256-bit BLAKE3 hash; written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash([u8; 32]);

impl Hash {
    /// Hashes bytes in memory.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Hashes a file's contents, a megabyte at a time.
    ///
    /// # Errors
    ///
    /// [`FileError`] if the file cannot be opened or read.
    pub fn of_file(path: &Path) -> Result<Self, FileError> {
        let mut file = File::open(path).map_err(FileError::on("open", path))?;
        let mut hasher = Hasher::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let read = file.read(&mut chunk).map_err(FileError::on("read", path))?;
            if read == 0 {
                return Ok(hasher.finish());
            }
            hasher.update(&chunk[..read]);
        }
    }

    /// A hash that was kept as its 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash({self})")
    }
}

/// A text that is no hash.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a hash of 64 hexadecimal digits")]
pub struct NotAHash {
    /// The text.
    pub text: String,
}

impl FromStr for Hash {
    type Err = NotAHash;

    fn from_str(text: &str) -> Result<Self, NotAHash> {
        let hash = blake3::Hash::from_hex(text).map_err(|_| NotAHash { text: text.to_owned() })?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A hash in the making.
#[derive(Clone, Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// Starts with no bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes; how they are cut into calls does not matter.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash of all bytes so far.
    pub fn finish(&self) -> Hash {
        Hash(*self.0.finalize().as_bytes())
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hasher").finish_non_exhaustive()
    }
}

/// A writer that hashes and counts what passes through.
#[derive(Debug)]
pub struct HashingWriter<W> {
    inner: W,
    hasher: Hasher,
    bytes: u64,
}

impl<W: Write> HashingWriter<W> {
    /// Writes through to `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, hasher: Hasher::new(), bytes: 0 }
    }

    /// Bytes written so far.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The hash of all bytes written so far.
    pub fn hash(&self) -> Hash {
        self.hasher.finish()
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the test vectors of the BLAKE3 specification: no bytes at all.
    const EMPTY: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";

    #[test]
    fn bytes_files_and_writers_agree() {
        assert_eq!(Hash::of_bytes(b"").to_string(), EMPTY);
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| i.to_le_bytes()[0]).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        std::fs::write(&path, &bytes).unwrap();
        let mut writer = HashingWriter::new(Vec::new());
        for piece in bytes.chunks(777) {
            writer.write_all(piece).unwrap();
        }
        assert_eq!(Hash::of_file(&path).unwrap(), Hash::of_bytes(&bytes));
        assert_eq!((writer.hash(), writer.bytes()), (Hash::of_bytes(&bytes), 3_000_000));
    }

    #[test]
    fn hashes_read_back_and_other_texts_do_not() {
        let hash = Hash::of_bytes(b"stone");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(serde_json::from_str::<Hash>(&json).unwrap(), hash);
        assert!("00".parse::<Hash>().is_err());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Hash::of_file(Path::new("/no/such/file")).unwrap_err();
        assert_eq!(error.to_string(), "cannot open /no/such/file");
    }
}

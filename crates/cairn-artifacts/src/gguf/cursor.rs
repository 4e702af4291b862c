//! Bytes of a file taken one after the other; what would reach past the end is an error.

use super::GgufError;
use std::ops::Range;

/// A place in a file's bytes.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) const fn new(file: &'a [u8], at: usize) -> Self {
        Self { file, at }
    }

    /// Bytes from the beginning of the file to here.
    pub(super) const fn offset(&self) -> usize {
        self.at
    }

    /// Bytes from here to the end of the file.
    pub(super) const fn remaining(&self) -> usize {
        self.file.len().saturating_sub(self.at)
    }

    /// Takes `count` bytes, or says that `what` needs more than there are.
    pub(super) fn take(
        &mut self,
        count: u64,
        what: &dyn Fn() -> String,
    ) -> Result<&'a [u8], GgufError> {
        let range = self.skip(count, what)?;
        Ok(&self.file[range])
    }

    /// Moves over `count` bytes and returns where they were.
    pub(super) fn skip(
        &mut self,
        count: u64,
        what: &dyn Fn() -> String,
    ) -> Result<Range<usize>, GgufError> {
        let available = self.remaining();
        match usize::try_from(count).ok().filter(|&count| count <= available) {
            Some(count) => {
                let start = self.at;
                self.at += count;
                Ok(start..self.at)
            }
            None => {
                Err(GgufError::PastEnd { what: what(), offset: self.at, needed: count, available })
            }
        }
    }

    /// Takes `N` bytes.
    pub(super) fn array<const N: usize>(
        &mut self,
        what: &dyn Fn() -> String,
    ) -> Result<[u8; N], GgufError> {
        let bytes = self.take(N as u64, what)?;
        Ok(*bytes.first_chunk().expect("exactly so many were taken"))
    }

    pub(super) fn u32(&mut self, what: &dyn Fn() -> String) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &dyn Fn() -> String) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Takes a text: its length, then its bytes.
    pub(super) fn text(&mut self, what: &dyn Fn() -> String) -> Result<&'a str, GgufError> {
        let offset = self.at;
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        str::from_utf8(bytes).map_err(|_| GgufError::NotUtf8 { what: what(), offset })
    }

    /// Takes the text that is a name, `max` bytes at most.
    pub(super) fn name(&mut self, what: &'static str, max: usize) -> Result<&'a str, GgufError> {
        let offset = self.at;
        let bytes = self.clone().u64(&|| what.to_owned())?;
        if bytes > max as u64 {
            return Err(GgufError::NameTooLong { what, offset, bytes, max });
        }
        self.text(&|| what.to_owned())
    }
}

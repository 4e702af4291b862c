//! Read-only mappings of whole files; the only unsafe code of this crate.
//!
//! A mapped file is read straight from the page cache, without a copy and without counting as the
//! process's own memory. The price: the bytes are only as stable as the file.
//!
//! - Cairn never changes a file in place. Everything it writes goes to a temporary file that is
//!   renamed over the old name ([`crate::atomic`]), so a mapping keeps showing the old contents.
//! - Another program may still overwrite the file; the values read would change under us. They
//!   are only ever read as plain numbers and bytes, for which every bit pattern is a value, and
//!   whatever needs to be trusted is hashed first.
//! - Another program may truncate the file. The kernel then answers a read past the new end with
//!   `SIGBUS`, which ends the process at once. No data is lost by that, since writes are atomic.

#![expect(unsafe_code, reason = "mapping a file has no safe interface")]

use crate::FileError;
use crate::file_error::open_regular;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file whose contents are in the address space, for reading. Cloning shares the mapping.
#[derive(Clone, Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Arc<memmap2::Mmap>,
}

impl MappedFile {
    /// Maps the whole of a regular file; an empty file maps to no bytes.
    ///
    /// # Errors
    ///
    /// [`FileError`] if the file cannot be opened, is not a regular file or cannot be mapped.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let (file, _) = open_regular(path)?;
        // SAFETY: the mapping is read-only and private to the readers of `Deref`, who see plain
        // bytes. That the file is neither changed nor truncated while mapped is up to the system's
        // users; the module's documentation says why Cairn itself does neither, and what happens.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(FileError::on("map", path))?;
        Ok(Self { path: path.to_owned(), map: Arc::new(map) })
    }

    /// Where the file was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the pages of a range out of this process's memory; they stay in the page cache, and
    /// reading them again brings them back. Where the system does not do that, nothing happens.
    pub fn release(&self, range: Range<usize>) {
        let end = range.end.min(self.map.len());
        if range.start >= end {
            return;
        }
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the advice drops changes to private pages, but this mapping is of a file and is
            // never written to: its pages have nothing that the file does not have.
            let advised =
                unsafe { self.map.unchecked_advise_range(advice, range.start, end - range.start) };
            // A refusal leaves the pages where they are, which changes no value.
            let _refused = advised.is_err();
        }
    }

    /// The mapping itself, for an arena that keeps it alive.
    pub fn mapping(&self) -> Arc<memmap2::Mmap> {
        Arc::clone(&self.map)
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_keeps_its_bytes_when_the_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stones");
        crate::atomic::write_bytes(&path, b"one").unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        crate::atomic::write_bytes(&path, b"two, longer").unwrap();
        assert_eq!(
            (&*mapped, &*MappedFile::open(&path).unwrap()),
            (&b"one"[..], &b"two, longer"[..])
        );
    }

    #[test]
    fn released_pages_read_as_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stones");
        let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        assert!(*mapped == bytes[..]);
        for range in [0..bytes.len(), 5000..5001, 399_999..1 << 40, 7..7] {
            mapped.release(range);
            assert!(*mapped == bytes[..]);
        }
        let empty = folder.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        MappedFile::open(&empty).unwrap().release(0..10);
    }

    #[test]
    fn empty_files_map_and_folders_pipes_and_devices_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().len(), 0);
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for other in [folder.path(), &pipe, Path::new("/dev/zero"), Path::new("/no/such/file")] {
            let error = MappedFile::open(other).unwrap_err();
            assert!(error.to_string().ends_with(&other.display().to_string()), "{error}");
        }
    }
}

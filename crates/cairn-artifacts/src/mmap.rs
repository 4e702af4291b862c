//! Read-only mappings of whole files, and the system's leases on them; the only unsafe code of this
//! crate.
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
//!   Where that must not happen, [`crate::lease`] has the system hold such programs back.

#![expect(unsafe_code, reason = "neither mapping a file nor leasing it has a safe interface")]

use crate::FileError;
use crate::file_error::open_regular;
use crate::lease::{LeaseError, LeasedFile, Stamp};
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file whose contents are in the address space, for reading. Cloning shares the mapping.
#[derive(Clone, Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Arc<memmap2::Mmap>,
    stamp: Stamp,
}

impl MappedFile {
    /// Maps the whole of a regular file; an empty file maps to no bytes.
    ///
    /// # Errors
    ///
    /// [`FileError`] if the file cannot be opened, is not a regular file or cannot be mapped.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let (file, _) = open_regular(path)?;
        let stamp = Stamp::of(&file).map_err(FileError::on("read the size of", path))?;
        // SAFETY: the mapping is read-only and private to the readers of `Deref`, who see plain
        // bytes. That the file is neither changed nor truncated while mapped is up to the system's
        // users; the module's documentation says why Cairn itself does neither, and what happens.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(FileError::on("map", path))?;
        Ok(Self { path: path.to_owned(), map: Arc::new(map), stamp })
    }

    /// Maps the whole file again, under a lease: what was read of it before still holds.
    ///
    /// # Errors
    ///
    /// [`LeaseError::Changed`] if it is another file now, or of other contents; any other [`LeaseError`]
    /// says why there is no lease.
    pub fn leased(&self) -> Result<LeasedFile, LeaseError> {
        let (file, _) =
            open_regular(&self.path).map_err(|error| LeaseError::Refused(error.source))?;
        let leased = LeasedFile::map(&file, 0, self.map.len())?;
        let found = leased.stamp();
        match found.is_of_file_of(&self.stamp) && found.has_contents_of(&self.stamp) {
            true => Ok(leased),
            false => Err(LeaseError::Changed),
        }
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
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Maps a part of a file for reading; `start` is a multiple of the system's page.
pub(crate) fn map_part(file: &File, start: u64, bytes: usize) -> io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is read-only. Its one user holds a lease on the file as long as it reads:
    // the system lets nobody change or truncate the file meanwhile.
    unsafe { memmap2::MmapOptions::new().offset(start).len(bytes).map(file) }
}

/// `F_SETSIG` of Linux, which the libc crate leaves out.
#[cfg(target_os = "linux")]
const F_SETSIG: libc::c_int = 10;

/// Asks the system to hold back whoever wants to write to a file or truncate it, until
/// [`end_lease`] or the file's end. The word of it is [`lease_holds`]; the signal that also comes is
/// one that does nothing.
#[cfg(target_os = "linux")]
pub(crate) fn take_lease(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    // SAFETY: two numbers for a descriptor that is open.
    check(unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) })
}

/// Whether a lease is there and nobody waits for its end.
#[cfg(target_os = "linux")]
pub(crate) fn lease_holds(file: &File) -> bool {
    use std::os::fd::AsRawFd as _;
    // SAFETY: a number for a descriptor that is open.
    let held = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) };
    held == libc::F_RDLCK
}

/// Gives a lease back.
#[cfg(target_os = "linux")]
pub(crate) fn end_lease(file: &File) {
    use std::os::fd::AsRawFd as _;
    // SAFETY: two numbers for a descriptor that is open.
    let ended = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    // It fails where there is none any more, which is what was asked for.
    let _had_ended = ended != 0;
}

#[cfg(target_os = "linux")]
fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Other systems have no leases.
#[cfg(not(target_os = "linux"))]
pub(crate) fn take_lease(_file: &File) -> io::Result<()> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

/// Other systems have no leases.
#[cfg(not(target_os = "linux"))]
pub(crate) fn lease_holds(_file: &File) -> bool {
    false
}

/// Other systems have no leases.
#[cfg(not(target_os = "linux"))]
pub(crate) fn end_lease(_file: &File) {}

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

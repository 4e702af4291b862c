//! A part of a file, mapped while the system holds back whoever wants to change it.
//!
//! A mapping alone is at others' mercy: who overwrites the file changes what is read, and who
//! truncates it ends the process that reads past the new end. A *lease* prevents both. As long as it
//! is held, opening the file for writing and truncating it wait, for [`break_seconds`] at most;
//! before they go on, [`LeasedFile::holds`] is false.
//!
//! **The contract:** a reader asks [`holds`](LeasedFile::holds) more often than every
//! [`BREAK_SECONDS_MIN`]. When it is false, the reader stops reading the mapping, takes its bytes by
//! [`copy`](LeasedFile::copy), asks [`check_unchanged`](LeasedFile::check_unchanged), and drops this.
//! Whoever waited then goes on. A reader that was away for longer than the system waits learns from
//! `check_unchanged` that the file is another one now.
//!
//! What this does not cover: a process that is stopped in the midst of reading, by a debugger or a
//! signal, for longer than the system waits, while another truncates the file in place; and a disk
//! that fails when the system, short of memory, reads a page again.

use crate::mmap::{end_lease, lease_holds, map_part, take_lease};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

/// Leases on which the system waits for less are not taken.
pub const BREAK_SECONDS_MIN: u64 = 20;
const BREAK_SECONDS_FILE: &str = "/proc/sys/fs/lease-break-time";

/// Why a file is not mapped. It can be read by copies all the same.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// The system does not say how long it waits, or does not wait long enough.
    #[error("the system waits less than {BREAK_SECONDS_MIN} s before it ends a lease")]
    BreakTime,
    /// The system gives no lease.
    #[error("no lease: {}", refusal(.0))]
    Refused(#[source] io::Error),
    /// What was read of the file before may be of other contents.
    #[error("the file was changed since it was opened")]
    Changed,
    /// The file is shorter than it was.
    #[error("the file ends before byte {0}")]
    CutShort(u64),
    /// The system does not map it.
    #[error("it cannot be mapped")]
    Map(#[source] io::Error),
}

fn refusal(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "the file belongs to another user",
        io::ErrorKind::WouldBlock => "a program has the file open for writing",
        _ => "its file system has none",
    }
}

/// What changes when a file is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Device and inode.
    file: (u64, u64),
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// As the file is now.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            file: (found.dev(), found.ino()),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    /// Whether it is the same file, whatever its name.
    pub(crate) fn is_of_file_of(&self, other: &Self) -> bool {
        self.file == other.file
    }

    /// Whether the contents are the same. A file that was only renamed has them.
    pub(crate) fn has_contents_of(&self, other: &Self) -> bool {
        (self.bytes, self.modified) == (other.bytes, other.modified)
    }
}

/// A part of a file that cannot change while it is read; see the module's contract.
#[derive(Debug)]
pub struct LeasedFile {
    map: memmap2::Mmap,
    file: File,
    start: u64,
    stamp: Stamp,
}

impl LeasedFile {
    /// Maps `bytes` of an open file from `start` on, a multiple of the system's page.
    ///
    /// # Errors
    ///
    /// [`LeaseError`] says why it can be read by copies only.
    pub fn map(file: &File, start: u64, bytes: usize) -> Result<Self, LeaseError> {
        if break_seconds().is_none_or(|seconds| seconds < BREAK_SECONDS_MIN) {
            return Err(LeaseError::BreakTime);
        }
        // The same file, whatever has its name by now, opened again: leases belong to an opening, so
        // each mapping has its own.
        let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = File::open(opened).map_err(LeaseError::Refused)?;
        take_lease(&file).map_err(LeaseError::Refused)?;
        let stamp = Stamp::of(&file).map_err(LeaseError::Refused)?;
        let end = start + bytes as u64;
        if stamp.bytes < end {
            return Err(LeaseError::CutShort(end));
        }
        let map = map_part(&file, start, bytes).map_err(LeaseError::Map)?;
        #[cfg(target_os = "linux")]
        {
            // Advice only: what is read from the disk comes in huge pages, where the system has them.
            let _unsupported = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self { map, file, start, stamp })
    }

    /// What the file was when it was mapped.
    pub(crate) const fn stamp(&self) -> &Stamp {
        &self.stamp
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Whether nobody wants to change the file.
    pub fn holds(&self) -> bool {
        lease_holds(&self.file)
    }

    /// Makes pages resident. Where the system cannot read one, that is an error here, and would have
    /// been the end of the process later.
    ///
    /// # Errors
    ///
    /// What the system says; older ones know no such request.
    pub fn populate(&self, first: usize, bytes: usize) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        return self.map.advise_range(memmap2::Advice::PopulateRead, first, bytes);
        #[cfg(not(target_os = "linux"))]
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }

    /// Copies bytes from `first` on out of the file, not the mapping: whatever became of the file, this
    /// is an error at worst.
    ///
    /// # Errors
    ///
    /// What the system says, for instance that the file has ended.
    pub fn copy(&self, first: usize, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, self.start + first as u64)
    }

    /// Checks, after [`copy`](Self::copy), that the file is still what was mapped.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if it was changed.
    pub fn check_unchanged(&self) -> io::Result<()> {
        if Stamp::of(&self.file)? == self.stamp {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "the file was changed while it was in use"))
    }
}

impl Drop for LeasedFile {
    fn drop(&mut self) {
        end_lease(&self.file);
    }
}

/// For how long the system makes others wait for the end of a lease; `None` where there are none.
pub fn break_seconds() -> Option<u64> {
    std::fs::read_to_string(BREAK_SECONDS_FILE).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Write as _;
    use std::path::{Path, PathBuf};
    use std::sync::mpsc::channel;

    const BYTES: usize = 3 * 4096 + 100;

    fn stones() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stones");
        let bytes: Vec<u8> = (0..BYTES).map(|i| u8::try_from(i % 251).unwrap()).collect();
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    /// `None` where the system has no leases, which these tests cannot change.
    #[expect(clippy::print_stdout, reason = "a test that cannot run says so")]
    fn leased(path: &Path) -> Option<LeasedFile> {
        let leased = LeasedFile::map(&File::open(path).unwrap(), 4096, BYTES - 4096);
        leased.inspect_err(|error| println!("skipped: {error}")).ok()
    }

    #[test]
    fn who_wants_to_truncate_waits_until_the_reader_has_its_copy() {
        let (_folder, path) = stones();
        let expected = std::fs::read(&path).unwrap();
        let Some(leased) = leased(&path) else { return };
        assert!(leased.holds() && leased.bytes() == &expected[4096..]);
        leased.populate(0, BYTES - 4096).unwrap();
        let (sender, receiver) = channel();
        let writer = std::thread::spawn(move || {
            let file = OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
            sender.send(()).unwrap();
            file.metadata().unwrap().len()
        });
        while leased.holds() {
            std::thread::yield_now();
        }
        let mut copy = vec![0; BYTES - 4096];
        leased.copy(0, &mut copy).unwrap();
        leased.check_unchanged().unwrap();
        assert!(receiver.try_recv().is_err(), "the writer did not wait");
        assert!(copy == expected[4096..] && leased.bytes() == &expected[4096..]);
        drop(leased);
        assert_eq!(writer.join().unwrap(), 0);
    }

    #[test]
    fn a_change_after_the_lease_is_noticed() {
        let (_folder, path) = stones();
        let Some(leased) = leased(&path) else { return };
        end_lease(&leased.file);
        assert!(!leased.holds());
        leased.check_unchanged().unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"more").unwrap();
        assert_eq!(leased.check_unchanged().unwrap_err().kind(), io::ErrorKind::InvalidData);
        OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
        let error = leased.copy(0, &mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn readers_share_and_writers_are_refused() {
        let (_folder, path) = stones();
        let writer = OpenOptions::new().append(true).open(&path).unwrap();
        let file = File::open(&path).unwrap();
        assert!(LeasedFile::map(&file, 4096, 100).is_err(), "a writer has it open");
        drop(writer);
        let (Some(first), Some(second)) = (leased(&path), leased(&path)) else { return };
        std::fs::read(&path).unwrap();
        assert!(first.holds() && second.holds());
        drop(first);
        assert!(second.holds());
        // Replacing the file touches neither the old one nor the lease on it.
        std::fs::write(path.with_extension("new"), "other").unwrap();
        std::fs::rename(path.with_extension("new"), &path).unwrap();
        assert!(second.holds() && second.bytes()[0] == u8::try_from(4096 % 251).unwrap());
    }

    #[test]
    fn a_file_that_is_too_short_is_not_mapped() {
        let (_folder, path) = stones();
        let short = LeasedFile::map(&File::open(&path).unwrap(), 4096, BYTES);
        assert!(short.is_err(), "{short:?}");
    }
}

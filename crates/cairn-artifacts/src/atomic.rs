//! Files and folders that appear under their name complete, or not at all.
//!
//! What is written goes to a neighbor with a temporary name, is flushed to the disk, and is then
//! renamed; the containing folder is flushed last, so that the new name survives a power cut. A
//! process killed at any point leaves what was there before, and perhaps a leftover named
//! `….tmp-<process>-<number>`, which [`clean`] removes.

use crate::FileError;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Between a name and the process that is still writing it.
const TMP_MARK: &str = ".tmp-";
/// Between the name of a folder and the process that is replacing it.
const OLD_MARK: &str = ".old-";
/// Bytes collected before they are handed to the operating system.
const BUFFER_BYTES: usize = 1 << 20;

/// Writes a file through `write` and puts it under `path`, replacing what was there.
///
/// # Errors
///
/// [`FileError`] naming `path` if anything fails, `write` included; the old file is untouched and
/// the temporary one is gone.
pub fn write<T>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> Result<T, FileError> {
    let draft = neighbor(path, TMP_MARK);
    let written = write_and_sync(&draft, write).map_err(FileError::on("write", path));
    let published = written.and_then(|value| {
        fs::rename(&draft, path).map_err(FileError::on("rename a new file to", path))?;
        sync_folder(parent(path))?;
        Ok(value)
    });
    if published.is_err() {
        // The error being reported matters more than one of the clean-up.
        let _ = fs::remove_file(&draft);
    }
    published
}

/// Writes `bytes` to `path`, replacing what was there.
///
/// # Errors
///
/// [`FileError`] as from [`write()`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write(path, |file| file.write_all(bytes))
}

/// A folder under construction; [`publish`](Self::publish) gives it its name, dropping it removes
/// it.
#[derive(Debug)]
pub struct FolderDraft {
    draft: PathBuf,
    target: PathBuf,
    published: bool,
}

impl FolderDraft {
    /// Creates an empty folder next to where `target` will be. Parents are created as needed.
    ///
    /// # Errors
    ///
    /// [`FileError`] if the folder cannot be created.
    pub fn new(target: &Path) -> Result<Self, FileError> {
        let draft = neighbor(target, TMP_MARK);
        fs::create_dir_all(parent(target)).map_err(FileError::on("create", parent(target)))?;
        fs::create_dir(&draft).map_err(FileError::on("create", target))?;
        Ok(Self { draft, target: target.to_owned(), published: false })
    }

    /// Where to write the folder's files for now.
    pub fn path(&self) -> &Path {
        &self.draft
    }

    /// Creates and writes one file of the folder and flushes it to the disk.
    ///
    /// # Errors
    ///
    /// [`FileError`] naming the file as it would be called after publishing.
    pub fn write_file<T>(
        &self,
        name: &str,
        write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
    ) -> Result<T, FileError> {
        let path = self.draft.join(name);
        write_and_sync(&path, write).map_err(FileError::on("write", &self.target.join(name)))
    }

    /// Gives the folder its name. A folder that was there is replaced; killed in between, the old
    /// one waits under a temporary name until [`clean`] puts it back.
    ///
    /// # Errors
    ///
    /// [`FileError`] if flushing or renaming fails; the old folder is then back in its place.
    pub fn publish(mut self) -> Result<(), FileError> {
        sync_folder(&self.draft)?;
        let old = neighbor(&self.target, OLD_MARK);
        let replaces = self.target.exists();
        if replaces {
            fs::rename(&self.target, &old).map_err(FileError::on("move away", &self.target))?;
        }
        if let Err(source) = fs::rename(&self.draft, &self.target) {
            if replaces {
                fs::rename(&old, &self.target).map_err(FileError::on("move back", &self.target))?;
            }
            return Err(FileError {
                action: "rename a new folder to",
                path: self.target.clone(),
                source,
            });
        }
        self.published = true;
        sync_folder(parent(&self.target))?;
        if replaces {
            fs::remove_dir_all(&old).map_err(FileError::on("remove", &old))?;
        }
        Ok(())
    }
}

impl Drop for FolderDraft {
    fn drop(&mut self) {
        if !self.published {
            // Nobody is left to report to; `clean` removes what stays.
            let _ = fs::remove_dir_all(&self.draft);
        }
    }
}

/// Checks that something can be created at `target`, parents included, and leaves nothing: asked
/// before long work, it spares the work.
///
/// # Errors
///
/// [`FileError`] naming `target`, with what the system says.
pub fn check_writable(target: &Path) -> Result<(), FileError> {
    let mut above = target.ancestors().skip(1).map(|folder| match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    });
    // A relative path ends in the current folder, another one in the root.
    let Some(folder) = above.find(|folder| folder.exists()) else { return Ok(()) };
    let probe = neighbor(&folder.join("probe"), TMP_MARK);
    fs::create_dir(&probe).map_err(FileError::on("create", target))?;
    fs::remove_dir(&probe).map_err(FileError::on("remove", &probe))
}

/// What others have begun to write for `target`: a process that still runs, or one that was killed.
/// Nothing tells which, so nothing is removed; a folder that cannot be listed has none.
pub fn drafts_of(target: &Path) -> Vec<PathBuf> {
    let is_draft = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        let original = name.and_then(|name| split_mark(name, TMP_MARK)).map(|(name, _)| name);
        original.is_some_and(|original| target.file_name().is_some_and(|name| name == original))
    };
    let entries = fs::read_dir(parent(target)).into_iter().flatten();
    let mut drafts: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_draft).collect();
    drafts.sort();
    drafts
}

/// Removes what killed processes left in `folder`: unfinished files and folders go, a folder that
/// was moved away for a replacement that never came is put back. Returns the names concerned.
///
/// Only call this where no other process is writing.
///
/// # Errors
///
/// [`FileError`] if the folder cannot be listed or an entry not be removed.
pub fn clean(folder: &Path) -> Result<Vec<String>, FileError> {
    let mut concerned = Vec::new();
    for entry in fs::read_dir(folder).map_err(FileError::on("list", folder))? {
        let entry = entry.map_err(FileError::on("list", folder))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        if let Some((original, _)) = split_mark(&name, OLD_MARK)
            && !folder.join(original).exists()
        {
            let back = folder.join(original);
            fs::rename(&path, &back).map_err(FileError::on("move back", &back))?;
        } else if !is_temporary(&name) {
            continue;
        } else if path.is_dir() {
            fs::remove_dir_all(&path).map_err(FileError::on("remove", &path))?;
        } else {
            fs::remove_file(&path).map_err(FileError::on("remove", &path))?;
        }
        concerned.push(name);
    }
    concerned.sort_unstable();
    Ok(concerned)
}

/// Removes a folder so that it is gone under its name at once; killed in between, [`clean`] removes
/// the rest.
///
/// # Errors
///
/// [`FileError`] if it cannot be renamed or removed.
pub fn remove_folder(path: &Path) -> Result<(), FileError> {
    let doomed = neighbor(path, TMP_MARK);
    fs::rename(path, &doomed).map_err(FileError::on("move away", path))?;
    fs::remove_dir_all(&doomed).map_err(FileError::on("remove", &doomed))
}

/// Whether `name` is one that this module gives to what is not finished or no longer wanted.
pub fn is_temporary(name: &str) -> bool {
    split_mark(name, TMP_MARK).is_some() || split_mark(name, OLD_MARK).is_some()
}

/// Splits `name<mark>12-3` into the name and the numbers.
fn split_mark<'a>(name: &'a str, mark: &str) -> Option<(&'a str, &'a str)> {
    let (original, numbers) = name.rsplit_once(mark)?;
    let is_ours = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let (process, number) = numbers.split_once('-')?;
    (!original.is_empty() && is_ours(process) && is_ours(number)).then_some((original, numbers))
}

/// Flushes a folder's list of names to the disk.
fn sync_folder(folder: &Path) -> Result<(), FileError> {
    let handle = File::open(folder).map_err(FileError::on("open", folder))?;
    handle.sync_all().map_err(FileError::on("flush", folder))
}

fn write_and_sync<T>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> io::Result<T> {
    let mut file = BufWriter::with_capacity(BUFFER_BYTES, File::create_new(path)?);
    let value = write(&mut file)?;
    file.flush()?;
    file.get_ref().sync_all()?;
    Ok(value)
}

/// The folder that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A name in the same folder that no other call, in this process or another, uses.
fn neighbor(path: &Path, mark: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        name.push(format!("{mark}{}-{number}", std::process::id()));
        let neighbor = parent(path).join(name);
        // A killed process may have had our number: containers give the same one again and again.
        if neighbor.symlink_metadata().is_err() {
            return neighbor;
        }
    }
}

#[cfg(test)]
mod tests;

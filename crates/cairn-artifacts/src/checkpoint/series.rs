//! The checkpoints of one run: which there are, which is latest, which is best, which may go.

use super::{CheckpointError, Manifest, Verify, check_files, read_manifest};
use crate::{FileError, atomic};
use std::fs;
use std::path::{Path, PathBuf};

/// Before the number of steps in a folder's name.
const NAME_PREFIX: &str = "step-";

/// A folder of checkpoints, each named after its step: `step-00000250`.
#[derive(Clone, Debug)]
pub struct CheckpointSeries {
    folder: PathBuf,
}

/// A complete checkpoint of a series.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedCheckpoint {
    /// Where it is.
    pub folder: PathBuf,
    /// What its `cairn.json` says.
    pub manifest: Manifest,
}

impl CheckpointSeries {
    /// The series in `folder`, which need not exist yet.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The folder of all checkpoints.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the checkpoint of `step` belongs.
    pub fn path_of(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{NAME_PREFIX}{step:08}"))
    }

    /// The complete checkpoints, by step. Folders that are unfinished or damaged (no manifest, a
    /// file missing or of another size, another schema) are left out.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::File`] if the folder exists and cannot be listed.
    pub fn list(&self) -> Result<Vec<SavedCheckpoint>, CheckpointError> {
        let mut found = Vec::new();
        for folder in self.step_folders()? {
            let Ok(manifest) = read_manifest(&folder) else { continue };
            if check_files(&folder, &manifest, Verify::Sizes).is_ok() {
                found.push(SavedCheckpoint { folder, manifest });
            }
        }
        found.sort_by_key(|saved| saved.manifest.step);
        Ok(found)
    }

    /// The complete checkpoint of the highest step.
    ///
    /// # Errors
    ///
    /// As from [`list`](Self::list).
    pub fn latest(&self) -> Result<Option<SavedCheckpoint>, CheckpointError> {
        Ok(self.list()?.pop())
    }

    /// Why the newest checkpoint folder is left out of [`list`](Self::list); `None` if it is not, or
    /// if there is none.
    ///
    /// # Errors
    ///
    /// As from [`list`](Self::list).
    pub fn problem(&self) -> Result<Option<CheckpointError>, CheckpointError> {
        let Some(folder) = self.step_folders()?.into_iter().max() else { return Ok(None) };
        let checked = read_manifest(&folder)
            .and_then(|manifest| check_files(&folder, &manifest, Verify::Sizes));
        Ok(checked.err())
    }

    /// The complete checkpoint of the lowest validation loss; of equal ones, the earliest.
    ///
    /// # Errors
    ///
    /// As from [`list`](Self::list).
    pub fn best(&self) -> Result<Option<SavedCheckpoint>, CheckpointError> {
        Ok(best_of(&self.list()?).cloned())
    }

    /// Removes all but the `keep_last` latest and, if asked, the best one. Damaged folders are left
    /// for people to look at. Returns the steps removed.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::File`] if a folder cannot be removed.
    pub fn retain(&self, keep_last: usize, keep_best: bool) -> Result<Vec<u64>, CheckpointError> {
        let list = self.list()?;
        let best = best_of(&list).filter(|_| keep_best).map(|saved| saved.manifest.step);
        let mut removed = Vec::new();
        for saved in &list[..list.len().saturating_sub(keep_last.max(1))] {
            if Some(saved.manifest.step) != best {
                atomic::remove_folder(&saved.folder)?;
                removed.push(saved.manifest.step);
            }
        }
        Ok(removed)
    }

    /// Removes what killed processes left behind; see [`atomic::clean`].
    ///
    /// # Errors
    ///
    /// [`CheckpointError::File`] if that fails.
    pub fn clean(&self) -> Result<Vec<String>, CheckpointError> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        Ok(atomic::clean(&self.folder)?)
    }

    /// Folders with the name of a checkpoint.
    fn step_folders(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        let mut folders = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(FileError::on("list", &self.folder))? {
            let entry = entry.map_err(FileError::on("list", &self.folder))?;
            let name = entry.file_name();
            let step = name.to_str().and_then(|name| name.strip_prefix(NAME_PREFIX));
            if step.is_some_and(|step| step.parse::<u64>().is_ok()) {
                folders.push(entry.path());
            }
        }
        Ok(folders)
    }
}

/// The checkpoint of the lowest validation loss in a list by step.
fn best_of(list: &[SavedCheckpoint]) -> Option<&SavedCheckpoint> {
    let measured = list.iter().filter_map(|saved| Some((saved.manifest.validation_loss?, saved)));
    // `min_by` keeps the first of equal ones.
    measured.min_by(|(left, _), (right, _)| left.total_cmp(right)).map(|(_, saved)| saved)
}

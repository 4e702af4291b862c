//! The small files of a model: those of its folder, or those inside its pack.

use std::path::{Path, PathBuf};

use cairn_artifacts::FileError;
use cairn_artifacts::leanpack::PackFile;

use super::{TokenizerError, read_bounded};

/// Where the small files of a model are.
#[derive(Clone, Copy, Debug)]
pub enum ModelFiles<'a> {
    /// In a folder.
    Folder(&'a Path),
    /// In a pack.
    Pack(&'a PackFile),
}

impl ModelFiles<'_> {
    /// How a file is called in messages.
    pub fn path_of(self, name: &str) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.join(name),
            Self::Pack(pack) => pack.path().join(name),
        }
    }

    /// Reads a file; `None` where there is none.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::File`] or [`TokenizerError::Pack`] if it cannot be read,
    /// [`TokenizerError::FileTooLarge`] above `limit`.
    pub fn read(self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, TokenizerError> {
        match self {
            Self::Folder(folder) => {
                let path = folder.join(name);
                path.exists().then(|| read_bounded(&path, limit)).transpose()
            }
            Self::Pack(pack) => {
                let Some(file) = pack.file(name) else { return Ok(None) };
                if file.bytes > limit {
                    let (path, bytes) = (self.path_of(name), file.bytes);
                    return Err(TokenizerError::FileTooLarge { path, bytes, limit });
                }
                Ok(pack.read_file(name)?)
            }
        }
    }

    /// Names of the files in one of its folders, ascending; none without the folder.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::File`] if the folder cannot be listed.
    pub(super) fn names_in(self, folder: &str) -> Result<Vec<String>, TokenizerError> {
        let mut names = Vec::new();
        match self {
            Self::Folder(root) => {
                let path = root.join(folder);
                if !path.is_dir() {
                    return Ok(names);
                }
                for entry in std::fs::read_dir(&path).map_err(FileError::on("list", &path))? {
                    let entry = entry.map_err(FileError::on("list", &path))?;
                    names.extend(entry.file_name().into_string().ok());
                }
            }
            Self::Pack(pack) => {
                let files = pack.header().files.iter();
                let inside =
                    |name: &str| Some(name.strip_prefix(folder)?.strip_prefix('/')?.to_owned());
                names.extend(files.filter_map(|file| inside(&file.name)));
            }
        }
        names.sort();
        Ok(names)
    }
}

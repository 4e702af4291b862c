//! An operating system's error, with the file it is about and what was being done to it.

use cairn_spec::Hint;
use std::fs::{self, File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A failed operation on a file or folder.
#[derive(Debug, Error)]
#[error("cannot {action} {}", path.display())]
pub struct FileError {
    /// What was being done: `read`, `create`, `rename` …
    pub action: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// What the operating system said.
    #[source]
    pub source: io::Error,
}

impl FileError {
    /// Makes a closure for `map_err`.
    pub fn on<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self { action, path: path.to_owned(), source }
    }
}

/// Opens a regular file for reading; returns its size too. Whatever else has that name is refused
/// before it is opened: opening a pipe waits for somebody to write to it.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), FileError> {
    let check = |metadata: Metadata| match metadata.is_file() {
        true => Ok(metadata.len()),
        false => {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
            Err(FileError { action: "open", path: path.to_owned(), source })
        }
    };
    check(fs::metadata(path).map_err(FileError::on("open", path))?)?;
    let file = File::open(path).map_err(FileError::on("open", path))?;
    // What was opened may be something else than what was looked at.
    let bytes = check(file.metadata().map_err(FileError::on("read the size of", path))?)?;
    Ok((file, bytes))
}

impl Hint for FileError {
    fn hints(&self) -> Vec<String> {
        let hint = match self.source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "free some space, or choose a folder on another disk; what was there before is \
                 unchanged"
            }
            io::ErrorKind::NotFound => "check the path",
            io::ErrorKind::ReadOnlyFilesystem => "choose a folder that can be written to",
            io::ErrorKind::IsADirectory => "it is a folder; name a file",
            io::ErrorKind::PermissionDenied => "check who owns the file and its permissions",
            _ => return Vec::new(),
        };
        vec![hint.to_owned()]
    }
}

//! Where text comes from: folders, single files, and the package sources of Cargo's registry.
//!
//! **Invariant:** the list depends on the inputs' content only: entries are sorted by name, links are
//! not followed, and every entry is either in the list or among the skipped ones.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use walkdir::WalkDir;

use super::package::{Package, Packages};
use super::skip::{SkipReason, Skips};
use super::{CorpusError, License};

/// Marks a folder as a cache, <https://bford.info/cachedir/>; build outputs carry it.
const CACHE_TAG: &str = "CACHEDIR.TAG";

/// One place to take text from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Input {
    /// A folder, taken recursively, or a single file. `.jsonl` and `.ndjson` files hold a document
    /// a line: `{"text": …}`, with `path`, `license` and `group` where known.
    Path(PathBuf),
    /// Cargo's registry folder, `$CARGO_HOME/registry`: the unpacked sources of packages, which on
    /// a machine that has just built something hold real text under known licenses.
    CargoRegistry(PathBuf),
}

impl Input {
    /// What a manifest calls it: never more than the last name of the path.
    pub(super) fn label(&self) -> String {
        match self {
            Self::Path(path) => last_name(path),
            Self::CargoRegistry(_) => "cargo registry".to_owned(),
        }
    }
}

/// Which files of a folder are text to take, by extension.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum FileKinds {
    /// Every file; those that turn out not to be text are skipped.
    #[default]
    Any,
    /// Files with one of these extensions, lower case, without the dot.
    Extensions(BTreeSet<String>),
}

impl FileKinds {
    /// What the packages of a Rust registry hold in text: sources, prose, manifests.
    pub fn rust_sources() -> Self {
        let extensions = ["rs", "md", "markdown", "toml", "txt", "rst", "adoc"];
        Self::Extensions(extensions.map(str::to_owned).into())
    }

    fn takes(&self, path: &Path) -> bool {
        match self {
            Self::Any => true,
            Self::Extensions(extensions) => extensions.contains(&extension(path)),
        }
    }
}

/// A file to take text from.
#[derive(Debug)]
pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    /// Relative to the input's root, with `/`.
    pub(super) relative: String,
    pub(super) package: Option<Arc<Package>>,
    pub(super) license: License,
}

impl SourceFile {
    /// The group of the whole file: its package, else its top folder, else itself.
    pub(super) fn group(&self) -> &str {
        match &self.package {
            Some(package) => &package.name,
            None => top_folder(&self.relative),
        }
    }

    /// Whether it holds a document a line.
    pub(super) fn is_json_lines(&self) -> bool {
        matches!(extension(&self.path).as_str(), "jsonl" | "ndjson")
    }
}

/// The first folder of a relative path, or the path if it has none.
pub(super) fn top_folder(relative: &str) -> &str {
    relative.split_once('/').map_or(relative, |(top, _)| top)
}

/// Lists the files of all inputs.
pub(super) fn list(
    inputs: &[Input],
    kinds: &FileKinds,
    skips: &mut Skips,
) -> Result<Vec<SourceFile>, CorpusError> {
    let mut files = Vec::new();
    for input in inputs {
        match input {
            Input::Path(path) => list_path(path, kinds, &mut files, skips),
            Input::CargoRegistry(registry) => list_registry(registry, kinds, &mut files, skips)?,
        }
    }
    Ok(files)
}

fn list_path(path: &Path, kinds: &FileKinds, files: &mut Vec<SourceFile>, skips: &mut Skips) {
    let relative = last_name(path);
    match std::fs::metadata(path) {
        Err(error) => skips.push(relative, SkipReason::of_io(&error), Some(error.to_string())),
        // A file that is named is wanted, whatever its extension.
        Ok(metadata) if metadata.is_file() => {
            let license = License::Unknown;
            files.push(SourceFile { path: path.to_owned(), relative, package: None, license });
        }
        Ok(metadata) if metadata.is_dir() => {
            let mut packages = Packages::below(path);
            walk(path, "", kinds, skips, |file, relative| {
                let package = file.parent().and_then(|folder| packages.enclosing(folder));
                let license = package.as_ref().map(|package| package.license.clone());
                let license = license.unwrap_or_default();
                files.push(SourceFile { path: file.to_owned(), relative, package, license });
            });
        }
        Ok(_) => skips.push(relative, SkipReason::NotAFile, None),
    }
}

/// `registry/src/INDEX/NAME-VERSION/…`. The group is the package of `NAME-VERSION` for all its
/// files, packages nested in it (examples, fuzz targets) included; all versions share it.
fn list_registry(
    registry: &Path,
    kinds: &FileKinds,
    files: &mut Vec<SourceFile>,
    skips: &mut Skips,
) -> Result<(), CorpusError> {
    let sources = registry.join("src");
    let missing = |source| CorpusError::NoRegistry { path: sources.clone(), source };
    for index in sorted_folders(&sources).map_err(missing)? {
        for folder in sorted_folders(&index).map_err(missing)? {
            let prefix = last_name(&folder);
            let mut packages = Packages::below(&folder);
            let Some(package) = packages.enclosing(&folder) else {
                skips.push(prefix, SkipReason::NotAPackage, None);
                continue;
            };
            walk(&folder, &prefix, kinds, skips, |file, relative| {
                let nearest = file.parent().and_then(|folder| packages.enclosing(folder));
                let nearest = nearest.map(|package| package.license.clone());
                let license = nearest.unwrap_or_default().or(&package.license);
                let package = Some(Arc::clone(&package));
                files.push(SourceFile { path: file.to_owned(), relative, package, license });
            });
        }
    }
    Ok(())
}

fn walk(
    root: &Path,
    prefix: &str,
    kinds: &FileKinds,
    skips: &mut Skips,
    mut take: impl FnMut(&Path, String),
) {
    let mut entries = WalkDir::new(root).min_depth(1).sort_by_file_name().into_iter();
    while let Some(entry) = entries.next() {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                let relative = error.path().map(|path| relative(root, prefix, path));
                let detail = error.io_error().map(ToString::to_string);
                skips.push(relative.unwrap_or_default(), SkipReason::Unreadable, detail);
                continue;
            }
        };
        let relative = relative(root, prefix, entry.path());
        let is_folder = entry.file_type().is_dir();
        let skip = if entry.file_name().as_encoded_bytes().starts_with(b".") {
            SkipReason::Hidden
        } else if is_folder && entry.path().join(CACHE_TAG).is_file() {
            SkipReason::CacheFolder
        } else if is_folder {
            continue;
        } else if !entry.file_type().is_file() {
            SkipReason::NotAFile
        } else if !kinds.takes(entry.path()) {
            SkipReason::OtherKind
        } else {
            take(entry.path(), relative);
            continue;
        };
        skips.push(relative, skip, None);
        if is_folder {
            entries.skip_current_dir();
        }
    }
}

fn sorted_folders(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            folders.push(entry.path());
        }
    }
    folders.sort();
    Ok(folders)
}

fn relative(root: &Path, prefix: &str, path: &Path) -> String {
    let inner = path.strip_prefix(root).unwrap_or(path).components();
    let inner = inner.map(|part| part.as_os_str().to_string_lossy().into_owned());
    let prefix = Some(prefix.to_owned()).filter(|prefix| !prefix.is_empty());
    prefix.into_iter().chain(inner).collect::<Vec<_>>().join("/")
}

fn last_name(path: &Path) -> String {
    // `.` and `..` have no name of their own; their real one is the user's business.
    path.file_name().map_or_else(|| ".".to_owned(), |name| name.to_string_lossy().into_owned())
}

fn extension(path: &Path) -> String {
    path.extension().map(|ext| ext.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

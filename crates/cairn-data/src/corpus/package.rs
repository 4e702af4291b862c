//! The package a file belongs to: its name and the license it declares.
//!
//! Read from `Cargo.toml`, `package.json` and `pyproject.toml`, in that order, in the nearest folder
//! at or above the file and at or below the input's root: what lies above the input is not the
//! input's. A file that cannot be parsed, or names no package, is no package.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value as Json;
use toml::{Table, Value as Toml};

use super::License;

/// Largest metadata file that is read, in bytes.
const METADATA_BYTES_MAX: u64 = 1 << 20;

/// A package: something with a name and perhaps a license.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) license: License,
}

/// Finds packages below one root, asking each folder once.
#[derive(Debug)]
pub(crate) struct Packages {
    root: PathBuf,
    known: HashMap<PathBuf, Option<Arc<Package>>>,
}

impl Packages {
    pub(crate) fn below(root: &Path) -> Self {
        Self { root: root.to_owned(), known: HashMap::new() }
    }

    /// The nearest package at or above `folder`.
    pub(crate) fn enclosing(&mut self, folder: &Path) -> Option<Arc<Package>> {
        if let Some(known) = self.known.get(folder) {
            return known.clone();
        }
        let above = |packages: &mut Self| {
            folder
                .parent()
                .filter(|parent| parent.starts_with(&packages.root))
                .and_then(|parent| packages.enclosing(parent))
        };
        let found = self.read(folder).map(Arc::new).or_else(|| above(self));
        self.known.insert(folder.to_owned(), found.clone());
        found
    }

    fn read(&self, folder: &Path) -> Option<Package> {
        self.read_cargo(folder)
            .or_else(|| read_npm(folder))
            .or_else(|| read_python(folder))
            .filter(|package| !package.name.is_empty())
    }

    fn read_cargo(&self, folder: &Path) -> Option<Package> {
        let manifest = read_toml(&folder.join("Cargo.toml"))?;
        let package = manifest.get("package")?;
        let name = package.get("name")?.as_str()?.to_owned();
        let license = match package.get("license") {
            Some(Toml::String(license)) => License::parse(license),
            Some(inherited) if inherited.get("workspace") == Some(&Toml::Boolean(true)) => {
                self.workspace_license(folder)
            }
            _ => License::Unknown,
        };
        Some(Package { name, license })
    }

    /// The license that `license.workspace = true` takes over.
    fn workspace_license(&self, folder: &Path) -> License {
        folder
            .ancestors()
            .take_while(|above| above.starts_with(&self.root))
            .filter_map(|above| read_toml(&above.join("Cargo.toml")))
            .find_map(|manifest| {
                let package = manifest.get("workspace")?.get("package")?;
                Some(License::parse(package.get("license")?.as_str()?))
            })
            .unwrap_or_default()
    }
}

fn read_npm(folder: &Path) -> Option<Package> {
    let json: Json = serde_json::from_str(&read_small(&folder.join("package.json"))?).ok()?;
    let name = json.get("name")?.as_str()?.to_owned();
    // `{"type": "MIT"}` is the form before 2014, still found.
    let license = json.get("license").and_then(|license| match license {
        Json::String(license) => Some(license.as_str()),
        license => license.get("type").and_then(Json::as_str),
    });
    Some(Package { name, license: license.map(License::parse).unwrap_or_default() })
}

fn read_python(folder: &Path) -> Option<Package> {
    let manifest = read_toml(&folder.join("pyproject.toml"))?;
    let project = manifest
        .get("project")
        .or_else(|| manifest.get("tool").and_then(|tool| tool.get("poetry")))?;
    let name = project.get("name")?.as_str()?.to_owned();
    let license = project.get("license").and_then(|license| match license {
        Toml::String(license) => Some(license.as_str()),
        license => license.get("text").and_then(Toml::as_str),
    });
    Some(Package { name, license: license.map(License::parse).unwrap_or_default() })
}

fn read_toml(path: &Path) -> Option<Table> {
    read_small(path)?.parse().ok()
}

fn read_small(path: &Path) -> Option<String> {
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() || METADATA_BYTES_MAX < metadata.len() {
        return None;
    }
    std::fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes files below a fresh root and asks for the package of one folder.
    fn check(files: &[(&str, &str)], folder: &str, expected: Option<(&str, &str)>) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let folder = root.path().join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        let found = Packages::below(root.path()).enclosing(&folder);
        let found =
            found.as_deref().map(|package| (package.name.as_str(), package.license.as_str()));
        assert_eq!(found, expected);
    }

    #[test]
    fn nearest_package_wins() {
        let outer = ("a/Cargo.toml", "[package]\nname = 'outer'\nlicense = 'MIT/Apache-2.0'");
        let inner = ("a/b/package.json", r#"{"name": "inner", "license": {"type": "ISC"}}"#);
        check(&[outer, inner], "a/b/src", Some(("inner", "ISC")));
        check(&[outer, inner], "a/src/deep", Some(("outer", "MIT OR Apache-2.0")));
        check(&[outer, inner], "c", None);
    }

    #[test]
    fn workspace_license_is_inherited() {
        let root = ("Cargo.toml", "[workspace.package]\nlicense = 'Zlib'");
        let member = ("m/Cargo.toml", "[package]\nname = 'm'\nlicense.workspace = true");
        check(&[root, member], "m/src", Some(("m", "Zlib")));
        check(&[member], "m/src", Some(("m", "unknown")));
    }

    #[test]
    fn python_metadata() {
        let project = "[project]\nname = 'p'\nlicense = { text = 'BSD-3-Clause' }";
        check(&[("pyproject.toml", project)], ".", Some(("p", "BSD-3-Clause")));
        let poetry = "[tool.poetry]\nname = 'q'\nlicense = 'MIT'";
        check(&[("pyproject.toml", poetry)], "q", Some(("q", "MIT")));
    }

    #[test]
    fn broken_metadata_is_no_package() {
        check(&[("Cargo.toml", "[package")], ".", None);
        check(&[("package.json", r#"{"type": "module"}"#)], ".", None);
        check(&[("Cargo.toml", "[package]\nname = 3")], ".", None);
    }
}

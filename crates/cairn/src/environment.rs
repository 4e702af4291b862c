//! The environment, read once and only here.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::failure::UserError;

/// Threads to compute with, where `--threads` is absent.
pub(crate) const CAIRN_THREADS: &str = "CAIRN_THREADS";
/// Folder of measurements that are kept between runs; the user's cache folder if absent.
pub(crate) const CAIRN_CACHE_DIR: &str = "CAIRN_CACHE_DIR";
/// Where Cargo keeps the registry, whose sources are the default corpus; `~/.cargo` if absent.
pub(crate) const CARGO_HOME: &str = "CARGO_HOME";
/// Any value but the empty one turns color off (<https://no-color.org>).
pub(crate) const NO_COLOR: &str = "NO_COLOR";
/// The user's cache folder, by the XDG base directory specification.
const XDG_CACHE_HOME: &str = "XDG_CACHE_HOME";
/// Folder for what is gone again at the end; `/tmp` if absent.
const TMPDIR: &str = "TMPDIR";
/// The user's home.
const HOME: &str = "HOME";

/// What the process was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Environment {
    /// [`CAIRN_THREADS`] as it is; see [`Self::threads`].
    threads: Option<OsString>,
    /// [`CAIRN_CACHE_DIR`], or `cairn` in the user's cache folder; `None` without a home.
    pub(crate) cache_dir: Option<PathBuf>,
    /// [`CARGO_HOME`], or `.cargo` in the user's home; `None` without a home.
    pub(crate) cargo_home: Option<PathBuf>,
    /// [`NO_COLOR`].
    pub(crate) no_color: bool,
    /// [`TMPDIR`].
    pub(crate) temporary_dir: PathBuf,
}

impl Environment {
    /// Reads the process's environment.
    pub(crate) fn read() -> Self {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// Threads to compute with, where the variable is set.
    pub(crate) fn threads(&self) -> Result<Option<usize>, UserError> {
        self.threads.as_ref().map(parse_threads).transpose()
    }

    /// The sources of the packages that Cargo has downloaded, if there are any.
    pub(crate) fn registry_sources(&self) -> Option<PathBuf> {
        let sources = self.cargo_home.as_ref()?.join("registry").join("src");
        let mut entries = std::fs::read_dir(&sources).ok()?;
        entries.next().is_some().then_some(sources)
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        // An empty variable counts as absent, as most tools do.
        let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = path(HOME);
        let in_home = |folder| home.as_ref().map(|home| home.join(folder));
        let cache_home = path(XDG_CACHE_HOME).or_else(|| in_home(".cache"));
        Self {
            threads: variable(CAIRN_THREADS),
            cache_dir: path(CAIRN_CACHE_DIR)
                .or_else(|| cache_home.map(|folder| folder.join("cairn"))),
            cargo_home: path(CARGO_HOME).or_else(|| in_home(".cargo")),
            no_color: path(NO_COLOR).is_some(),
            temporary_dir: path(TMPDIR).unwrap_or_else(|| PathBuf::from("/tmp")),
        }
    }
}

fn parse_threads(value: &OsString) -> Result<usize, UserError> {
    let threads = value.to_str().and_then(|text| text.parse().ok()).filter(|&n| n > 0);
    threads.ok_or_else(|| {
        UserError::new(format!("{CAIRN_THREADS} is '{}', not a number above 0", value.display()))
            .hint(format!("set {CAIRN_THREADS} to 1 or more, or unset it"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(variables: &[(&str, &str)]) -> Environment {
        Environment::from_variables(|name| {
            let found = variables.iter().find(|(candidate, _)| *candidate == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn folders_follow_home_unless_named() {
        let environment = given(&[("HOME", "/home/a")]);
        assert_eq!(environment.cargo_home.unwrap(), PathBuf::from("/home/a/.cargo"));
        assert_eq!(environment.cache_dir.unwrap(), PathBuf::from("/home/a/.cache/cairn"));
        let environment = given(&[("HOME", "/home/a"), (CARGO_HOME, "/c"), (XDG_CACHE_HOME, "/x")]);
        assert_eq!(environment.cargo_home.unwrap(), PathBuf::from("/c"));
        assert_eq!(environment.cache_dir.unwrap(), PathBuf::from("/x/cairn"));
    }

    #[test]
    fn a_malformed_number_is_refused() {
        let check = |value| given(&[(CAIRN_THREADS, value)]).threads().map_err(|e| e.to_string());
        assert_eq!(check("two").unwrap_err(), "CAIRN_THREADS is 'two', not a number above 0");
        assert!(check("0").is_err());
        assert_eq!(check("2").unwrap(), Some(2));
    }

    #[test]
    fn an_empty_no_color_is_none() {
        assert!(!given(&[(NO_COLOR, "")]).no_color);
        assert!(given(&[(NO_COLOR, "1")]).no_color);
    }
}

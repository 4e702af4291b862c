//! Runs of the command and what they print.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A golden folder.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

/// The command with these arguments, in a clean environment. What the machine is measured to do is
/// kept among the tests' files.
pub(crate) fn cairn<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(arguments: I) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cairn"));
    command.args(arguments).env_clear().env("HOME", "/nonexistent");
    command.env("CAIRN_CACHE_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
    command
}

/// Exit code, standard output and standard error, with `folder` replaced by `DIR`.
pub(crate) fn shown(output: &Output, folder: Option<&Path>) -> String {
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        match folder {
            Some(folder) => text.replace(&folder.display().to_string(), "DIR"),
            None => text,
        }
    };
    let code = output.status.code().map_or_else(|| "killed".to_owned(), |code| code.to_string());
    format!("exit {code}\n--- stdout\n{}--- stderr\n{}", text(&output.stdout), text(&output.stderr))
}

/// Runs to success and returns standard output.
pub(crate) fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", shown(&output, None));
    String::from_utf8(output.stdout).unwrap()
}

//! The command as a user runs it: a process, its streams and its exit code.

mod bench;
mod contracts;
mod errors;
mod generate;
mod help;
mod inspect;
mod memory;
mod pipeline;
mod tidy;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A golden folder.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

/// The command with these arguments, in a clean environment.
fn cairn<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(arguments: I) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cairn"));
    command.args(arguments).env_clear().env("HOME", "/nonexistent");
    command
}

/// Exit code, standard output and standard error, with `folder` replaced by `DIR`.
fn shown(output: &Output, folder: Option<&Path>) -> String {
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
fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", shown(&output, None));
    String::from_utf8(output.stdout).unwrap()
}

//! Files and folders that cannot be read: left out, counted, listed, and never waited for.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::workplace::Workplace;
use crate::{shown, succeed};

/// Somebody who owns nothing: permissions mean nothing to root.
const NOBODY: u32 = 65534;

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Builds the corpus as somebody to whom permissions apply; an end that does not come is one.
fn build(workplace: &Workplace) -> Command {
    let program = workplace.path().join("cairn");
    fs::copy(env!("CARGO_BIN_EXE_cairn"), &program).unwrap();
    let mut command = Command::new("timeout");
    command.arg("60").arg(program).args(["corpus", "build", "--input", "text"]);
    command
        .args(["--output", "data/tiny", "--vocab-size", "300", "--validation-fraction", "0.3"])
        .env_clear();
    command.env("PATH", "/usr/bin:/bin").current_dir(workplace.path());
    if fs::metadata(workplace.path()).unwrap().uid() == 0 {
        command.uid(NOBODY);
    }
    command
}

#[test]
fn what_cannot_be_read_is_left_out_counted_and_listed() {
    let workplace = Workplace::with_text();
    let at = |name: &str| workplace.path().join(name);
    workplace.write("text/larch/secret.rs", "fn hidden() {}");
    workplace.write("text/larch/closed/inside.rs", "fn inside() {}");
    symlink("nowhere.rs", at("text/larch/dangling.rs")).unwrap();
    symlink("round.rs", at("text/larch/round.rs")).unwrap();
    let _socket = UnixListener::bind(at("text/larch/socket.rs")).unwrap();
    // Whoever opens it waits for somebody who writes.
    succeed(Command::new("mkfifo").arg(at("text/larch/pipe.rs")));
    // Metadata is looked for beside every file.
    succeed(Command::new("mkfifo").arg(at("text/birch/Cargo.toml")));
    fs::create_dir(at("data")).unwrap();
    mode(workplace.path(), 0o755);
    mode(&at("data"), 0o777);
    mode(&at("text/larch/secret.rs"), 0o000);
    mode(&at("text/larch/closed"), 0o000);

    let output = build(&workplace).output().unwrap();
    mode(&at("text/larch/closed"), 0o755);
    let text = shown(&output, None);
    assert!(text.starts_with("exit 0\n"), "{text}");
    let summary = "Left out 2 unreadable, 5 not a regular file; see data/tiny/skipped.jsonl";
    assert!(text.contains(summary), "{text}");
    let list = fs::read_to_string(at("data/tiny/skipped.jsonl")).unwrap();
    let mut listed: Vec<(String, String)> = list
        .lines()
        .map(|line| {
            let skipped: Value = serde_json::from_str(line).unwrap();
            let part = |key: &str| skipped[key].as_str().unwrap_or_default().to_owned();
            (part("path"), part("reason"))
        })
        .collect();
    listed.sort();
    let expected = [
        ("birch/Cargo.toml", "not_a_file"),
        ("larch/closed", "unreadable"),
        ("larch/dangling.rs", "not_a_file"),
        ("larch/pipe.rs", "not_a_file"),
        ("larch/round.rs", "not_a_file"),
        ("larch/secret.rs", "unreadable"),
        ("larch/socket.rs", "not_a_file"),
    ];
    let expected = expected.map(|(path, reason)| (path.to_owned(), reason.to_owned()));
    assert_eq!(listed, expected);
    assert!(list.contains("Permission denied"), "{list}");
}

#[test]
fn an_input_that_is_a_pipe_is_refused_and_not_waited_for() {
    let workplace = Workplace::with_text();
    let pipe = workplace.path().join("pipe.jsonl");
    succeed(Command::new("mkfifo").arg(&pipe));
    let mut command = Command::new("timeout");
    command.arg("60").arg(env!("CARGO_BIN_EXE_cairn")).args(["corpus", "build", "--input"]);
    command.arg(&pipe).args(["--output", "x"]).env_clear().env("PATH", "/usr/bin:/bin");
    let text = shown(&command.current_dir(workplace.path()).output().unwrap(), None);
    assert!(text.starts_with("exit 1\n"), "{text}");
    assert!(text.contains("no document to take (1 not a regular file)"), "{text}");
}

#[test]
fn what_cannot_be_written_is_said_before_any_work() {
    let workplace = Workplace::with_text();
    workplace.write("file", "");
    for arguments in [
        &["corpus", "build", "--input", "text", "--output", "file/data"][..],
        &["tokenizer", "train", "--input", "text", "--output", "file/t.json"],
    ] {
        let text = workplace.failure(arguments);
        assert!(
            text.starts_with("exit 1\n") && text.contains("error: cannot create file/"),
            "{text}"
        );
        assert!(!text.contains("Reading"), "{text}");
    }
    for name in ["../up", "", "a/b"] {
        let quickstart = ["quickstart", "--input", "text", "--minutes", "0.2", "--name", name];
        let text = workplace.failure(&quickstart);
        assert!(text.starts_with("exit 1\n") && text.contains("'run.name' must be"), "{text}");
    }
    assert!(!workplace.path().join("data").exists() && !workplace.path().join("runs").exists());
}

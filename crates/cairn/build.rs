//! Tells the program which commit it is built from, for run records.

use std::path::Path;
use std::process::Command;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(&root).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let mut lines = vec!["cargo::rerun-if-changed=../../crates".to_owned()];
    if let Some(log) = git(&["rev-parse", "--path-format=absolute", "--git-path", "logs/HEAD"]) {
        lines.push(format!("cargo::rerun-if-changed={log}"));
    }
    if let Some(revision) = git(&["rev-parse", "HEAD"]) {
        lines.push(format!("cargo::rustc-env=CAIRN_REVISION={revision}"));
    }
    if let Some(changes) = git(&["status", "--porcelain"]) {
        lines.push(format!("cargo::rustc-env=CAIRN_MODIFIED={}", !changes.is_empty()));
    }
    for line in lines {
        println!("{line}");
    }
}

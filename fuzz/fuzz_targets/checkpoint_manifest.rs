//! The `cairn.json` of a checkpoint.

#![no_main]

use cairn_artifacts::checkpoint::{MANIFEST_FILE, read_manifest};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

/// One folder for the whole run.
static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a folder for temporary files"));

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    std::fs::write(folder.join(MANIFEST_FILE), data).expect("room for a file");
    let _ = read_manifest(folder);
});

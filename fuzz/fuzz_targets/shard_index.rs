//! The index of a sharded model, in a folder without the shards.

#![no_main]

use cairn_artifacts::safetensors::{INDEX_FILE, WeightFolder};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

/// One folder for the whole run.
static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a folder for temporary files"));

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    std::fs::write(folder.join(INDEX_FILE), data).expect("room for a file");
    let _ = WeightFolder::open(folder);
});

//! The manifest of a corpus, in a folder without its files.

#![no_main]

use cairn_data::corpus::Corpus;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

/// One folder for the whole run.
static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a folder for temporary files"));

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    std::fs::write(folder.join("manifest.json"), data).expect("room for a file");
    let _ = Corpus::open(folder);
});

//! The description of the model in a GGUF file.

#![no_main]

use cairn_artifacts::gguf::GgufFile;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

/// One folder for the whole run.
static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a folder for temporary files"));

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    std::fs::write(folder.join("model.gguf"), data).expect("room for a file");
    let Ok(file) = GgufFile::open(&folder.join("model.gguf")) else { return };
    let _ = cairn_model::gguf::spec(&file);
});

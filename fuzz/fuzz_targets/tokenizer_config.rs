//! What lies beside a `tokenizer.json`.

#![no_main]

use cairn_data::tokenizer::{GenerationConfig, TokenizerConfig};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

/// One folder for the whole run.
static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a folder for temporary files"));

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    for name in ["tokenizer_config.json", "generation_config.json"] {
        std::fs::write(folder.join(name), data).expect("room for a file");
    }
    let _ = TokenizerConfig::read(folder);
    let _ = GenerationConfig::read(folder);
});

//! The tokenizer of a GGUF file, text through it, and what it says about chats.

#![no_main]

use cairn_artifacts::gguf::GgufFile;
use cairn_data::tokenizer::{SpelledSpecials, Tokenizer, TokenizerConfig};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

/// One folder for the whole run.
static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a folder for temporary files"));

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    std::fs::write(folder.join("model.gguf"), data).expect("room for a file");
    let Ok(file) = GgufFile::open(&folder.join("model.gguf")) else { return };
    let _ = TokenizerConfig::from_gguf(&file);
    let Ok(Some(tokenizer)) = Tokenizer::from_gguf(&file) else { return };
    if let Ok(ids) = tokenizer.encode_for_model("a cairn, 2 stones: ⛰ <s>", SpelledSpecials::Text)
    {
        let _ = tokenizer.decode(&ids);
    }
});

//! The model and the tokenizer of a GGUF file, and its tensors decoded.

#![no_main]

use cairn_artifacts::gguf::GgufFile;
use cairn_data::tokenizer::Tokenizer;
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
    let _ = Tokenizer::from_gguf(&file);
    for tensor in file.tensors().take(16) {
        let mut out = vec![0.0; tensor.elements().min(4096)];
        let _ = file.read_f32(&tensor.name, 0..out.len(), &mut out);
    }
});

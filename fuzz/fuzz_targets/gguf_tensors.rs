//! The tensors of a GGUF file, decoded: whole, in part, and beyond their ends.

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
    for tensor in file.tensors().take(16) {
        let count = tensor.elements().min(4096);
        let mut out = vec![0.0; count];
        let whole = file.read_f32(&tensor.name, 0..count, &mut out);
        assert_eq!(whole.is_ok(), tensor.tensor_type.format().is_some());
        let part = count / 3..count / 2;
        let _ = file.read_f32(&tensor.name, part.clone(), &mut out[part]);
        let beyond = tensor.elements()..tensor.elements() + 1;
        assert!(file.read_f32(&tensor.name, beyond, &mut [0.0]).is_err());
    }
});

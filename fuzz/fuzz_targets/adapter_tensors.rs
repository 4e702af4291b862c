//! The tensors of an adapter, merged into a small model.

#![no_main]

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_model::{AdapterMap, Merge, MergedSource};
use cairn_spec::{LoraSpec, ModelSpec};
use libfuzzer_sys::fuzz_target;
use std::path::Path;
use std::sync::LazyLock;

/// A small model, where the adapter goes, and its tensors.
static MODEL: LazyLock<(ModelSpec, AdapterMap, WeightFolder)> = LazyLock::new(|| {
    let config = include_str!("../../tests/goldens/llama/config.json");
    let spec = ModelSpec::from_hf_json(config).expect("the golden is sound");
    let lora = include_str!("../../tests/goldens/lora_llama/adapter_config.json");
    let lora = LoraSpec::from_peft_json(lora).expect("the golden is sound");
    let adapters = AdapterMap::new(&spec, &lora).expect("it is made for the model");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama");
    (spec, adapters, WeightFolder::open(&folder).expect("the golden is sound"))
});

/// One folder for the whole run.
static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a folder for temporary files"));

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    std::fs::write(folder.join("adapter_model.safetensors"), data).expect("room for a file");
    let path = folder.join("adapter_model.safetensors");
    let Ok(tensors) = SafetensorsFile::open(&path) else { return };
    let (spec, adapters, base) = &*MODEL;
    let _ = MergedSource::new(spec, adapters, (base, &tensors), Merge::Merge).map(|_| ());
});

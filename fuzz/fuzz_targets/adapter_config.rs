//! An `adapter_config.json`, what is written back of it, and where it goes in a model.

#![no_main]

use cairn_model::AdapterMap;
use cairn_spec::{LoraSpec, ModelSpec};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

/// A small model.
static SPEC: LazyLock<ModelSpec> = LazyLock::new(|| {
    let config = include_str!("../../tests/goldens/llama/config.json");
    ModelSpec::from_hf_json(config).expect("the golden is sound")
});

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(lora) = LoraSpec::from_peft_json(text) else { return };
    let again = LoraSpec::from_peft_json(&lora.to_peft_json().to_string());
    assert_eq!(again.expect("what is written is read"), lora);
    let _ = AdapterMap::new(&SPEC, &lora);
});

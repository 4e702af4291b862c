//! A `config.json`, and what is written back of it.

#![no_main]

use cairn_spec::ModelSpec;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    if let Ok(spec) = ModelSpec::from_hf_json(text) {
        let _ = spec.to_hf_config();
    }
});

//! The header of a safetensors file.

#![no_main]

use cairn_artifacts::safetensors::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Header::parse(data);
});

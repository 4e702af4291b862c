//! Everything in a GGUF file up to the tensors' bytes.

#![no_main]

use cairn_artifacts::gguf::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Header::parse(data);
});

//! Preamble and header of a leanpack.

#![no_main]

use cairn_artifacts::leanpack::{Header, Preamble};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Preamble::parse(data);
    // Hashes that fit are no hurdle here: the header is parsed as it is.
    for data_bytes in [0, 1 << 20, u64::MAX] {
        let _ = Header::parse(data, data_bytes);
    }
});

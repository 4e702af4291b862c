//! The document index of a corpus.

#![no_main]

use cairn_data::corpus::check_index;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = check_index(data, 4, 4);
});

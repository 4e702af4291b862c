//! A `tokenizer.json`, and text through it.
//!
//! The library that reads it may panic; that is caught, and must not end the fuzzing.

#![no_main]

use cairn_data::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;
use std::path::Path;
use std::sync::Once;

/// Takes away the hook that ends the process at any panic, even one that is caught.
static QUIET: Once = Once::new();

fuzz_target!(|data: &[u8]| {
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let Ok(tokenizer) = Tokenizer::parse(data.to_vec(), Path::new("tokenizer.json")) else {
        return;
    };
    if let Ok(ids) = tokenizer.encode("a cairn, 2 stones: ⛰ <s>") {
        let _ = tokenizer.decode(&ids);
    }
});

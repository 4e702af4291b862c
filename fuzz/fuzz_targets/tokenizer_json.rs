//! A `tokenizer.json`, and text through it.

#![no_main]

use cairn_data::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let Ok(tokenizer) = Tokenizer::parse(data.to_vec(), Path::new("tokenizer.json")) else {
        return;
    };
    if let Ok(ids) = tokenizer.encode("a cairn, 2 stones: ⛰ <s>") {
        let _ = tokenizer.decode(&ids);
    }
});

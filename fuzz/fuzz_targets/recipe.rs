//! A recipe in each of its formats.

#![no_main]

use cairn_spec::recipe::{Format, RecipeFile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    for format in [Format::Toml, Format::Yaml, Format::Json] {
        let _ = RecipeFile::parse(text, format);
    }
});

//! A chat template, run on a short conversation. The engine is never what fails.

#![no_main]

use cairn_data::chat::{ChatInput, ChatTemplate};
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let Ok(source) = str::from_utf8(data) else { return };
    let Ok(template) = ChatTemplate::parse(source, Path::new("template.jinja")) else { return };
    let messages = [
        json!({ "role": "user", "content": "a stack of stones" }),
        json!({ "role": "assistant", "content": "that shows the way" }),
    ];
    let specials = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
    if let Err(error) = template.render(&ChatInput::new(&messages, &specials)) {
        assert!(!error.to_string().contains("the template engine failed"), "{error}");
    }
});

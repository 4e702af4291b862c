//! Tokenizer files that contradict themselves or their model.

use std::fs::File;

use serde_json::{Value, json};

use super::super::*;
use super::TOKENIZER;

fn bpe(vocab: Value, merges: Value, added: Value) -> Result<Tokenizer, TokenizerError> {
    let model = json!({"type": "BPE", "vocab": vocab, "merges": merges});
    let json = json!({"version": "1.0", "added_tokens": added, "model": model});
    Tokenizer::parse(json.to_string().into_bytes(), Path::new("damaged.json"))
}

fn added(id: u32, content: &str) -> Value {
    json!([{"id": id, "content": content, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}])
}

fn refusal(tokenizer: Result<Tokenizer, TokenizerError>) -> String {
    tokenizer.unwrap_err().to_string()
}

#[test]
fn empty_tokens_are_refused() {
    let message = refusal(bpe(json!({"a": 0}), json!([]), added(1, "")));
    assert_eq!(message, "tokenizer damaged.json: token 1 is empty");
    let message = refusal(bpe(json!({"a": 0, "": 1}), json!([]), json!([])));
    assert_eq!(message, "tokenizer damaged.json: token 1 is empty");
}

#[test]
fn ids_are_unique_and_as_stated() {
    let message = refusal(bpe(json!({"a": 0, "b": 0}), json!([]), json!([])));
    assert_eq!(message, "tokenizer damaged.json: token id 0 is both \"a\" and \"b\"");
    for stated in [0, 5, u32::MAX] {
        let error = bpe(json!({"a": 0}), json!([]), added(stated, "<s>")).unwrap_err();
        let TokenizerError::AddedTokenId { stated: found, actual: 1, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(found, stated);
    }
    let negative = json!([{"id": -1, "content": "<s>"}]);
    let error = bpe(json!({"a": 0}), json!([]), negative).unwrap_err();
    assert!(matches!(error, TokenizerError::Parse { .. }), "{error}");
}

#[test]
fn merges_end_whatever_they_say() {
    // Each merge's result is part of another, in a ring; ids go down again.
    let vocab = json!({"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4, "bab": 5, "abab": 6});
    let merges = json!([
        ["a", "b"],
        ["b", "a"],
        ["ab", "a"],
        ["a", "ba"],
        ["ba", "b"],
        ["b", "ab"],
        ["aba", "b"],
        ["a", "bab"],
        ["ab", "ab"]
    ]);
    let tokenizer = bpe(vocab, merges, json!([])).unwrap();
    let text = "ab".repeat(5000);
    let ids = tokenizer.encode(&text).unwrap();
    let spelled: String = ids.iter().map(|id| tokenizer.token(*id).unwrap()).collect();
    assert_eq!(spelled, text);
    // A merge of nothing, or into nothing that is there.
    for merges in [json!([["a", ""]]), json!([["a", "b"]]), json!([["x", "y"]]), json!(["a"])] {
        let error = bpe(json!({"a": 0, "b": 1}), merges, json!([])).unwrap_err();
        assert!(matches!(error, TokenizerError::Parse { .. }), "{error}");
    }
}

#[test]
fn a_gigabyte_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    // A file with a hole: its length is all it has.
    File::create(&path).unwrap().set_len(1 << 30).unwrap();
    let message = refusal(Tokenizer::load(&path));
    assert!(
        message.ends_with("has 1073741824 bytes, more than the limit of 134217728"),
        "{message}"
    );
    if cfg!(target_os = "linux") {
        // No length, no end.
        let message = refusal(Tokenizer::load(Path::new("/dev/zero")));
        assert!(message.ends_with("more than the limit of 134217728"), "{message}");
    }
}

#[test]
fn a_model_has_a_row_for_every_token() {
    TOKENIZER.check_model(320).unwrap();
    TOKENIZER.check_model(1 << 20).unwrap();
    let message = TOKENIZER.check_model(319).unwrap_err().to_string();
    assert_eq!(message, "the tokenizer has 320 token ids, the model's vocab_size is 319");
}

fn config(name: &str, content: &Value) -> Result<TokenizerConfig, TokenizerError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(name), content.to_string()).unwrap();
    let config = TokenizerConfig::read(folder.path())?;
    config.check(&TOKENIZER, folder.path()).map(|()| config)
}

#[test]
fn configurations_of_every_style_are_read() {
    let found = config(
        "tokenizer_config.json",
        &json!({
            "bos_token": {"content": END_OF_TEXT, "special": true}, "eos_token": END_OF_TEXT,
            "pad_token": null, "model_max_length": 1e30, "add_bos_token": false,
            "added_tokens_decoder": {"0": {"content": END_OF_TEXT}},
            "chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
        }),
    )
    .unwrap();
    assert_eq!(found.special("bos_token"), Some(END_OF_TEXT));
    assert_eq!((found.special("pad_token"), found.model_max_length), (None, None));
    assert_eq!(found.chat_template(None).unwrap().source, "D");
    assert_eq!(found.chat_template(Some("tool_use")).unwrap().source, "T");
    assert_eq!(found.chat_template(Some("rag")), None);
    let found = config("special_tokens_map.json", &json!({"eos_token": END_OF_TEXT})).unwrap();
    assert_eq!(found.special("eos_token"), Some(END_OF_TEXT));
}

#[test]
fn template_files_win_over_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("tokenizer_config.json", r#"{"chat_template": "old"}"#);
    write("chat_template.jinja", "new");
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    write("additional_chat_templates/rag.jinja", "more");
    let found = TokenizerConfig::read(folder.path()).unwrap();
    assert_eq!(found.chat_template(None).unwrap().source, "new");
    assert_eq!(found.chat_template(Some("rag")).unwrap().source, "more");
}

#[test]
fn wrong_configurations_are_refused() {
    for content in [
        json!([]),
        json!({"bos_token": 3}),
        json!({"bos_token": "<nowhere>"}),
        json!({"add_bos_token": "yes"}),
        json!({"chat_template": 3}),
        json!({"chat_template": [{"name": "default"}]}),
        json!({"added_tokens_decoder": {"x": {"content": "a"}}}),
        json!({"added_tokens_decoder": {"0": {"content": "<other>"}}}),
    ] {
        let error = config("tokenizer_config.json", &content).unwrap_err();
        assert!(matches!(error, TokenizerError::Config { .. }), "{content}: {error}");
    }
    let moved = json!({"added_tokens_decoder": {"7": {"content": END_OF_TEXT}}});
    let error = config("tokenizer_config.json", &moved).unwrap_err();
    assert!(matches!(error, TokenizerError::AddedTokenId { stated: 7, actual: 0, .. }), "{error}");
}

fn generation(content: &Value) -> Result<Option<GenerationConfig>, TokenizerError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("generation_config.json"), content.to_string()).unwrap();
    GenerationConfig::read(folder.path())
}

#[test]
fn generation_settings_are_taken_or_listed() {
    let found = generation(&json!({
        "eos_token_id": [1, 2], "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
        "repetition_penalty": 1.05, "transformers_version": "5", "bos_token_id": 0, "num_beams": 1,
        "penalty_alpha": 0.6, "max_length": 2048, "early_stopping": false,
    }));
    let found = found.unwrap().unwrap();
    assert_eq!(found.eos_token_ids, [1, 2]);
    assert_eq!(
        (found.do_sample, found.temperature, found.top_k),
        (Some(true), Some(0.6), Some(20))
    );
    assert_eq!(found.ignored, ["penalty_alpha", "max_length"]);
    let one = generation(&json!({"eos_token_id": 7, "top_k": 0})).unwrap().unwrap();
    assert_eq!((one.eos_token_ids, one.top_k), (vec![7], None));
    for wrong in [json!({"top_k": -1}), json!({"eos_token_id": "x"}), json!({"temperature": []})] {
        let error = generation(&wrong).unwrap_err();
        assert!(matches!(error, TokenizerError::Config { .. }), "{wrong}: {error}");
    }
    assert_eq!(GenerationConfig::read(Path::new("/nonexistent")).unwrap(), None);
}

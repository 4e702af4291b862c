//! Every kind of tokenizer against what transformers says of it.

use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::Value;

use super::super::*;
use super::streamed;

const KINDS: [&str; 5] =
    ["byte_level", "metaspace_legacy", "metaspace_first", "word_piece", "unigram"];

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tokenizers").join(kind)
}

fn load(kind: &str) -> Tokenizer {
    Tokenizer::load(&folder(kind).join("tokenizer.json")).unwrap()
}

fn expected(kind: &str) -> Value {
    let text = std::fs::read_to_string(folder(kind).join("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn ids_and_texts_are_those_of_transformers() {
    for kind in KINDS {
        let tokenizer = load(kind);
        let expected = expected(kind);
        assert_eq!(expected["vocab_size"], tokenizer.vocab_size(), "{kind}");
        let cases = expected["cases"].as_array().unwrap();
        assert!(12 <= cases.len(), "{kind}");
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let parsed = ids(&case["parsed"]);
            // With Unigram, transformers makes a token of a spelled special token even so.
            if kind != "unigram" || case["plain"] == case["parsed"] && !text.contains("</s>") {
                assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["plain"]), "{kind} {text:?}");
            }
            assert_eq!(tokenizer.encode_with_specials(text).unwrap(), parsed, "{kind} {text:?}");
            let model = tokenizer.encode_for_model(text, SpelledSpecials::Tokens).unwrap();
            assert_eq!(model, ids(&case["model"]), "{kind} {text:?}");
            assert_eq!(case["decoded"], tokenizer.decode(&parsed).unwrap(), "{kind} {text:?}");
            assert_eq!(case["decoded"], streamed(&tokenizer, &parsed), "{kind} {text:?}");
        }
    }
}

#[test]
fn special_tokens_that_a_user_types_are_text() {
    for kind in KINDS {
        let tokenizer = load(kind);
        for (id, special) in tokenizer.specials() {
            // What no piece of the vocabulary can spell is the unknown token itself.
            let unknown = special.to_lowercase().contains("unk");
            let text = format!("a {special} b");
            assert!(unknown || !tokenizer.encode(&text).unwrap().contains(id), "{kind} {special}");
            assert!(tokenizer.encode_with_specials(&text).unwrap().contains(id), "{kind}");
        }
    }
}

#[test]
fn files_beside_a_tokenizer_fit_it() {
    for kind in KINDS {
        let config = TokenizerConfig::read(&folder(kind)).unwrap();
        assert!(!config.special_tokens.is_empty(), "{kind}");
        config.check(&load(kind), &folder(kind)).unwrap();
    }
    let config = TokenizerConfig::read(&folder("metaspace_first")).unwrap();
    assert_eq!(config.special("bos_token"), Some("<s>"));
    assert_eq!(config.add_bos_token, Some(true));
}

#[test]
fn byte_runs_come_whole() {
    let tokenizer = load("metaspace_legacy");
    let byte = |byte: u8| tokenizer.token_id(&format!("<0x{byte:02X}>")).unwrap();
    let a = tokenizer.token_id("a").unwrap();
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = [a, byte(0xF0), byte(0x9F), byte(0x8E), byte(0x89), a]
        .iter()
        .map(|id| stream.push(*id).unwrap())
        .collect();
    assert_eq!(pieces, ["a", "", "", "", "", "🎉a"]);
    // Broken by another token, every byte of the run is one U+FFFD, as in the whole text.
    let broken = [a, byte(0xF0), byte(0x9F), a, byte(0x8E), byte(0x89), a];
    assert_eq!(streamed(&tokenizer, &broken), "a\u{fffd}\u{fffd}a\u{fffd}\u{fffd}a");
    assert_eq!(tokenizer.decode(&broken).unwrap(), "a\u{fffd}\u{fffd}a\u{fffd}\u{fffd}a");
}

#[test]
fn leading_space_goes_at_the_beginning_only() {
    for kind in ["metaspace_legacy", "metaspace_first", "unigram"] {
        let tokenizer = load(kind);
        let again = tokenizer.encode("a a").unwrap();
        let mut stream = tokenizer.stream();
        let text: String = again.iter().map(|id| stream.push(*id).unwrap()).collect();
        assert_eq!(text + &stream.finish().unwrap(), "a a", "{kind}");
    }
}

/// Pieces of a stream, the rest last.
fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream();
    let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    pieces
}

static ALL: std::sync::LazyLock<Vec<Tokenizer>> =
    std::sync::LazyLock::new(|| KINDS.iter().map(|kind| load(kind)).collect());

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any ids at all: what has been emitted never changes, and in the end it is the text.
    #[test]
    fn any_ids_stream_to_their_text(
        kind in 0..KINDS.len(),
        raw in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let tokenizer = &ALL[kind];
        let ids: Vec<u32> = raw
            .iter()
            .map(|at| u32::try_from(at.index(tokenizer.vocab_size() as usize)).unwrap())
            .filter(|id| tokenizer.token(*id).is_some())
            .collect();
        let text = tokenizer.decode(&ids).unwrap();
        let pieces = pieces(tokenizer, &ids);
        prop_assert_eq!(pieces.concat(), text, "{}: {:?}", KINDS[kind], ids);
    }

    /// Byte tokens among few others: runs that are broken, valid, invalid and at the end.
    #[test]
    fn any_byte_runs_stream_to_their_text(
        bytes in prop::collection::vec(
            prop_oneof![3 => any::<u8>().prop_map(Some), 2 => (0x80u8..0xF5).prop_map(Some), 1 => Just(None)],
            0..30,
        ),
        legacy: bool,
    ) {
        let tokenizer = &ALL[if legacy { 1 } else { 2 }];
        let ids: Vec<u32> = bytes
            .iter()
            .map(|byte| byte.map_or(513, |byte| tokenizer.token_id(&format!("<0x{byte:02X}>")).unwrap()))
            .collect();
        let pieces = pieces(tokenizer, &ids);
        prop_assert_eq!(pieces.concat(), tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn any_text_keeps_its_ids_in_a_stream(kind in 0..KINDS.len(), text in "\\PC{0,40}|[ a漢🎉\n▁]{0,20}") {
        let tokenizer = &ALL[kind];
        for ids in [tokenizer.encode(&text).unwrap(), tokenizer.encode_with_specials(&text).unwrap()] {
            prop_assert_eq!(streamed(tokenizer, &ids), tokenizer.decode(&ids).unwrap());
        }
    }
}

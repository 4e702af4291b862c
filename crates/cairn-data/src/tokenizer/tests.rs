//! Training, round trips, streams, and files that are no tokenizers.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::json;

use super::*;

mod damaged;
mod kinds;

const TEXT: &str = "A cairn is a stack of stones. Cairns mark the way; a cairn's stones are laid one at \
                    a time.\n\tlet stones = vec![1, 2, 3]; // naïve, 漢字\n";

fn trained(vocab_size: u32) -> Tokenizer {
    let settings = BpeSettings { vocab_size, ..BpeSettings::default() };
    train_bpe(&settings, (0..20).map(|_| Ok(TEXT.to_owned()))).unwrap()
}

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| trained(320));

/// A tokenizer of the `SentencePiece` kind: metaspace, bytes for what the vocabulary lacks.
fn byte_fallback() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    for token in ["<unk>", "<s>", "</s>"] {
        vocab.insert(token.to_owned(), json!(vocab.len()));
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
    }
    for token in ["▁", "a", "b", "▁a", "ab", "é"] {
        vocab.insert(token.to_owned(), json!(vocab.len()));
    }
    let json = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [{"id": 2, "content": "</s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": 0.5, "unk_token": "<unk>", "fuse_unk": true,
            "byte_fallback": true, "vocab": vocab, "merges": [["▁", "a"], ["a", "b"]]},
    });
    Tokenizer::parse(json.to_string().into_bytes(), Path::new("fallback")).unwrap()
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    for id in ids {
        text += &stream.push(*id).unwrap();
    }
    text + &stream.finish().unwrap()
}

#[test]
fn training_is_deterministic_and_complete() {
    let tokenizer = trained(320);
    assert_eq!(tokenizer.vocab_size(), 320);
    assert_eq!(tokenizer.end_of_document(), Some(0));
    assert_eq!(tokenizer.token_bytes(0), Some(END_OF_TEXT.as_bytes()));
    assert_eq!(tokenizer.json(), TOKENIZER.json());
    let bytes: BTreeSet<Vec<u8>> =
        (1..257).map(|id| tokenizer.token_bytes(id).unwrap().to_vec()).collect();
    assert!(bytes.into_iter().eq((0..=255u8).map(|byte| vec![byte])));
    assert!(tokenizer.encode(" stones").unwrap().len() == 1, "the training found no word");
}

#[test]
fn small_text_gives_a_small_vocabulary() {
    let settings = BpeSettings { vocab_size: 1000, ..BpeSettings::default() };
    let tokenizer = train_bpe(&settings, [Ok("ab ab".to_owned())]).unwrap();
    assert_eq!(tokenizer.vocab_size(), 258);
}

#[test]
fn impossible_trainings_are_refused() {
    let small = BpeSettings { vocab_size: 256, ..BpeSettings::default() };
    let error = train_bpe(&small, [Ok("text".to_owned())]).unwrap_err();
    assert!(matches!(error, TokenizerError::VocabTooSmall { min: 257, .. }), "{error}");
    for texts in [vec![], vec![Ok(String::new())]] {
        let error = train_bpe(&BpeSettings::default(), texts).unwrap_err();
        assert!(matches!(error, TokenizerError::NoText), "{error}");
    }
    let failing = [Ok("text".to_owned()), Err(TokenizerError::NoText)];
    assert!(train_bpe(&BpeSettings::default(), failing).is_err());
}

#[test]
fn special_token_in_a_text_is_text() {
    let text = format!("one{END_OF_TEXT}two");
    for tokenizer in [&*TOKENIZER, &byte_fallback()] {
        let special = tokenizer.end_of_document().unwrap();
        let text = if special == 0 { text.clone() } else { "a</s>b".to_owned() };
        let ids = tokenizer.encode(&text).unwrap();
        assert!(!ids.contains(&special), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert!(tokenizer.encode_with_specials(&text).unwrap().contains(&special));
    }
}

#[test]
fn truncation_and_dropout_of_the_file_are_off() {
    let tokenizer = byte_fallback();
    let text = "ab ab ab ab ab ab ab ab";
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    for _ in 0..20 {
        assert_eq!(tokenizer.encode(text).unwrap(), ids);
    }
}

#[test]
fn files_round_trip_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    TOKENIZER.save(&path).unwrap();
    let loaded = Tokenizer::load(&path).unwrap();
    assert_eq!(loaded.hash(), TOKENIZER.hash());
    assert_eq!(loaded.encode(TEXT).unwrap(), TOKENIZER.encode(TEXT).unwrap());
    let missing = folder.path().join("no such folder").join("tokenizer.json");
    for error in [Tokenizer::load(&missing).unwrap_err(), TOKENIZER.save(&missing).unwrap_err()] {
        assert!(error.to_string().contains("no such folder"), "{error}");
    }
    let config: serde_json::Value = serde_json::from_str(&TOKENIZER.hf_config()).unwrap();
    assert_eq!(config["eos_token"], END_OF_TEXT);
}

#[test]
fn huge_file_and_huge_vocabulary_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let file = File::create(&path).unwrap();
    file.set_len(TOKENIZER_BYTES_MAX + 1).unwrap();
    let error = Tokenizer::load(&path).unwrap_err();
    assert!(matches!(error, TokenizerError::FileTooLarge { .. }), "{error}");
    for vocab in [json!({}), json!({"a": u32::MAX}), json!({"a": VOCAB_SIZE_MAX})] {
        let model = json!({"type": "BPE", "vocab": vocab, "merges": []});
        let json = json!({"version": "1.0", "added_tokens": [], "model": model});
        let parsed = Tokenizer::parse(json.to_string().into_bytes(), Path::new("huge"));
        let error = parsed.unwrap_err();
        assert!(matches!(error, TokenizerError::Vocab { .. }), "{error}");
    }
}

#[test]
fn unknown_id_is_refused() {
    for tokenizer in [&*TOKENIZER, &byte_fallback()] {
        let id = tokenizer.vocab_size();
        let mut stream = tokenizer.stream();
        for error in [tokenizer.decode(&[id]).unwrap_err(), stream.push(id).unwrap_err()] {
            assert!(matches!(error, TokenizerError::UnknownId { .. }), "{error}");
        }
        let a = tokenizer.encode("a").unwrap();
        assert_eq!(stream.push(a[0]).unwrap() + &stream.finish().unwrap(), "a");
    }
}

#[test]
fn stream_holds_incomplete_characters_back() {
    for tokenizer in [&*TOKENIZER, &byte_fallback()] {
        let ids = tokenizer.encode("ab🎉b").unwrap();
        let mut stream = tokenizer.stream();
        let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        assert_eq!(pieces.concat(), "ab🎉b");
        // Cut inside the character, its bytes become U+FFFD, but only at the end.
        let cut = ids.len() - 2;
        assert_eq!(streamed(tokenizer, &ids[..cut]), tokenizer.decode(&ids[..cut]).unwrap());
        assert!(tokenizer.decode(&ids[..cut]).unwrap().ends_with('\u{fffd}'));
    }
}

#[test]
fn long_texts_and_words_encode_like_short_ones() {
    let mut encoder = TOKENIZER.encoder();
    // More different words than the encoder remembers.
    let text: String = (0..100_000).map(|number| format!("w{number} ")).collect();
    let ids = encoder.encode(&text).unwrap();
    assert_eq!(TOKENIZER.decode(&ids).unwrap(), text);
    assert_eq!(
        encode(&TOKENIZER.literal, &text[..9999], false).unwrap(),
        encoder.encode(&text[..9999]).unwrap()
    );
    let word = "stone".repeat(20_000);
    assert_eq!(TOKENIZER.decode(&encoder.encode(&word).unwrap()).unwrap(), word);
}

proptest! {
    #[test]
    fn any_text_round_trips(text in "\\PC{0,60}|[ a'stone\n\t漢🎉]{0,60}") {
        let ids = TOKENIZER.encode(&text).unwrap();
        prop_assert_eq!(TOKENIZER.decode(&ids).unwrap(), text.clone());
        prop_assert_eq!(streamed(&TOKENIZER, &ids), text.clone());
        prop_assert_eq!(ids, encode(&TOKENIZER.literal, &text, false).unwrap());
    }

    #[test]
    fn any_bytes_round_trip_through_their_lossy_text(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let text = String::from_utf8_lossy(&bytes);
        let ids = TOKENIZER.encode(&text).unwrap();
        prop_assert_eq!(TOKENIZER.decode(&ids).unwrap(), text);
    }

    /// Ids of single bytes: any byte string, valid or not.
    #[test]
    fn streaming_is_decoding(ids in prop::collection::vec(0u32..320, 0..60)) {
        let text = TOKENIZER.decode(&ids).unwrap();
        prop_assert_eq!(streamed(&TOKENIZER, &ids), text.clone());
        prop_assert_eq!(TOKENIZER.literal.decode(&ids, false).unwrap(), text);
    }

    /// A flipped or cut file is a tokenizer or an error, never a panic.
    #[test]
    fn altered_file_never_panics(at: prop::sample::Index, value: u8, cut: prop::sample::Index, cuts: bool) {
        let mut json = TOKENIZER.json().to_vec();
        let at = at.index(json.len());
        json[at] = value;
        if cuts {
            json.truncate(cut.index(json.len()));
        }
        if let Ok(tokenizer) = Tokenizer::parse(json, Path::new("altered")) {
            let _ = tokenizer.encode("a cairn").map(|ids| tokenizer.decode(&ids));
        }
    }
}

#[test]
fn files_that_the_crate_panics_on_are_refused() {
    let with = |field: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_slice(TOKENIZER.json()).unwrap();
        json[field] = value;
        Tokenizer::parse(json.to_string().into_bytes(), Path::new("broken"))
    };
    let precompiled = json!({"type": "Precompiled", "precompiled_charsmap": "not base64!"});
    for (field, value) in
        [("normalizer", precompiled), ("decoder", json!(3)), ("model", json!({"type": "Oracle"}))]
    {
        let error = with(field, value).unwrap_err();
        assert!(matches!(error, TokenizerError::Parse { .. }), "{field}: {error}");
    }
    for json in [&b""[..], b"{", b"[]", b"\xFF", b"{\"decoder\": }"] {
        assert!(Tokenizer::parse(json.to_vec(), Path::new("broken")).is_err());
    }
}

//! Files that make much of little: refused by name, or measured before a text is encoded.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::{Tokenizer, TokenizerError};
use super::*;

/// A tokenizer of the letters a and b with these parts.
fn tokenizer(parts: Value) -> Result<Tokenizer, TokenizerError> {
    let model = json!({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []});
    let mut json = json!({"version": "1.0", "added_tokens": [], "model": model});
    for (name, part) in parts.as_object().unwrap() {
        json[name] = part.clone();
    }
    Tokenizer::parse(json.to_string().into_bytes(), Path::new("bomb.json"))
}

fn replace(pattern: &str, content: &str) -> Value {
    json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
}

fn refusal(parts: Value) -> String {
    tokenizer(parts).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn chains_that_multiply_are_refused_by_the_part_that_does() {
    let doubles = vec![replace("a", "aa"); 40];
    let chain = json!({"type": "Sequence", "normalizers": doubles});
    let nested = json!({"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": [chain.clone(), {"type": "NFC"}]}, chain.clone()]});
    let limit = "more than the limit of";
    for (normalizer, growth) in [
        (chain.clone(), "1e12"),
        (nested, "4e24"),
        (replace("a", &"a".repeat(5000)), "5000"),
        (json!({"type": "Prepend", "prepend": "b".repeat(9999)}), "10000"),
        (
            json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "b".repeat(8000)}),
            "16001",
        ),
        (replace("", &"b".repeat(8000)), "16001"),
        (
            json!({"type": "Sequence", "normalizers": vec![json!({"type": "ByteLevel"}); 20]}),
            "1048576",
        ),
        // The names of older files, which say no type.
        (json!({"pattern": {"String": "a"}, "content": "a".repeat(5000)}), "5000"),
        (json!({"normalizers": vec![json!({"prepend": "b".repeat(99)}); 3]}), "1000000"),
    ] {
        let expected = format!(
            "tokenizer bomb.json: bytes that its normalizer may make of one: {growth}, {limit} 4096"
        );
        assert_eq!(refusal(json!({"normalizer": normalizer})), expected);
    }
    let spaces = vec![
        json!({"type": "BertNormalizer", "clean_text": false,
        "handle_chinese_chars": true, "strip_accents": false, "lowercase": false});
        4
    ];
    let text = refusal(json!({"normalizer": {"type": "Sequence", "normalizers": spaces}}));
    assert!(text.contains("its normalizer may make of one: 83521"), "{text}");
    let forms = vec![json!({"type": "NFKC"}); 65];
    let text = refusal(json!({"normalizer": {"type": "Sequence", "normalizers": forms}}));
    assert!(text.ends_with("steps of its normalizer: 65, more than the limit of 64"), "{text}");
    // What a converter of SentencePiece files writes.
    let converted = json!([{"type": "Strip", "strip_left": true, "strip_right": true},
        {"type": "Nmt"}, {"type": "NFKC"}, replace("  ", "\u{2581}"), {"type": "Lowercase"}, replace(" ", "\u{2581}")]);
    tokenizer(json!({"normalizer": {"type": "Sequence", "normalizers": converted}})).unwrap();
    // A step that only writes characters otherwise has nothing to do a second time.
    let forms: Vec<Value> =
        (0..20).flat_map(|_| [json!({"type": "NFKC"}), json!({"type": "Lowercase"})]).collect();
    tokenizer(json!({"normalizer": {"type": "Sequence", "normalizers": forms}})).unwrap();
    // An added token goes through the normalizer as the file is read.
    let added = json!([{"id": 2, "content": "aaaa", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": true, "special": false}]);
    let text = refusal(json!({"normalizer": chain, "added_tokens": added}));
    assert!(text.contains("its normalizer may make of one"), "{text}");
}

proptest! {
    /// No text becomes longer than the bound says.
    #[test]
    fn the_bound_holds(
        steps in prop::collection::vec((0..12usize, "[ab\u{fdfa}]{0,2}", "[abİ\u{fdfa} ]{0,3}"), 1..4),
        text in "[ab 中İΐ\u{fdfa}\u{1d160}\u{390}]{1,30}",
    ) {
        let steps: Vec<Value> = steps
            .iter()
            .map(|(kind, pattern, content)| match kind {
                0 | 1 => replace(pattern, content),
                2 => json!({"type": "Replace", "pattern": {"Regex": "a+|b"}, "content": content}),
                3 => json!({"type": "Replace", "pattern": {"Regex": "a*"}, "content": content}),
                4 => json!({"type": "Prepend", "prepend": content}),
                5 => json!({"type": "NFKD"}),
                6 => json!({"type": "Lowercase"}),
                7 => json!({"type": "NFC"}),
                8 => json!({"type": "NFD"}),
                9 => json!({"type": "StripAccents"}),
                10 => json!({"type": "BertNormalizer", "clean_text": true,
                    "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}),
                _ => json!({"type": "ByteLevel"}),
            })
            .collect();
        let chain = json!({"type": "Sequence", "normalizers": steps});
        let normalizer: NormalizerWrapper = serde_json::from_value(chain.clone()).unwrap();
        let normalized = std::panic::catch_unwind(|| {
            let mut grown = NormalizedString::from(text.as_str());
            normalizer.normalize(&mut grown).unwrap();
            grown
        });
        // The library itself gives up on some chains (0.23.2: ByteLevel after others).
        let Ok(grown) = normalized else { return Ok(()) };
        let bound = normalizer_growth(&serde_json::to_value(&normalizer).unwrap());
        let (grown, bytes) = (grown.get().len() as f64, text.len() as f64);
        prop_assert!(grown <= bound * bytes, "{grown} of {bytes}, not {bound} of one: {chain}");
    }
}

#[test]
fn splitting_decoding_and_what_comes_around_are_bounded_too() {
    let bytes = vec![
        json!({"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": false});
        30
    ];
    let text = refusal(json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": bytes}}));
    assert!(text.contains("its pre_tokenizer may make of one: 1073741824"), "{text}");
    let decoders = vec![replace("a", "aa"); 20];
    let text = refusal(json!({"decoder": {"type": "Sequence", "decoders": decoders}}));
    assert!(text.contains("its decoder may make of one: 1048576"), "{text}");

    let a = json!({"Sequence": {"id": "A", "type_id": 0}});
    let b = json!({"Sequence": {"id": "B", "type_id": 0}});
    let special = json!({"SpecialToken": {"id": "x", "type_id": 0}});
    let template = |single: Vec<Value>, ids: usize| {
        json!({"type": "TemplateProcessing", "single": single, "pair": [a, b], "special_tokens":
            {"x": {"id": "x", "ids": vec![0; ids], "tokens": vec!["x"; ids]}}})
    };
    let text = refusal(json!({"post_processor": template(vec![a.clone(); 1000], 1)}));
    assert!(text.contains("copies of the text that its post_processor may make: 1000"), "{text}");
    let many = template(vec![special.clone(); 1000], 1000);
    let text = refusal(json!({"post_processor": many}));
    assert!(text.contains("its post_processor may put around a text: 2000000"), "{text}");
    let doubled = template(vec![a.clone(), a.clone()], 1);
    let nested = json!({"type": "Sequence", "processors": vec![doubled; 30]});
    let text = refusal(json!({"post_processor": nested}));
    assert!(text.contains("copies of the text"), "{text}");
    tokenizer(json!({"post_processor": template(vec![special.clone(), a.clone(), special], 1)}))
        .unwrap();

    let unknown = json!({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [],
        "unk_token": "a".repeat(65)});
    let text = refusal(json!({"model": unknown}));
    assert!(text.contains("bytes of its unknown token: 65"), "{text}");
    let long = json!({"type": "BPE", "vocab": {"a": 0, "b".repeat(20_000): 1}, "merges": []});
    let text = refusal(json!({"model": long}));
    assert!(text.contains("bytes of its longest token: 20000"), "{text}");
}

#[test]
fn what_is_possible_is_measured_before_it_happens() {
    // Below the limit for files: 2048 bytes of one, if it is an a.
    let chain = json!({"type": "Sequence", "normalizers": vec![replace("a", "aa"); 11]});
    let tokenizer = tokenizer(json!({"normalizer": chain})).unwrap();
    assert_eq!(tokenizer.encode("ab").unwrap().len(), 2049);
    let text = "a".repeat(1 << 20);
    let error = tokenizer.encode(&text).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot encode the text: the normalizer makes ")
            && error.contains("bytes or more of its 1048576; the limit is 16 for each and 16 MiB"),
        "{error}"
    );
    // A long text that does not grow is encoded as ever.
    assert_eq!(tokenizer.encode(&"b".repeat(1 << 20)).unwrap().len(), 1 << 20);
}

#[test]
fn a_file_of_too_many_values_is_refused_before_it_is_parsed() {
    let many = |value: &str| {
        let list = value.repeat((1 << 24) / value.len());
        let json = format!("{{\"decoder\": [{list}0]}}");
        Tokenizer::parse(json.into_bytes(), Path::new("many.json")).unwrap_err().to_string()
    };
    assert_eq!(
        many("0,"),
        "tokenizer many.json: values in it: 8388611, more than the limit of 8388608"
    );
    // Signs in texts are no values.
    let text = many("\"[,:{\\\",,,,,\\\\\",");
    assert!(text.starts_with("many.json is not a tokenizer.json: "), "{text}");
}

#[test]
fn a_table_of_sentence_piece_says_how_long_its_texts_are() {
    // An index of eight bytes without a zero, then the texts "ab", "c" and "defghi".
    let table = b"\x08\0\0\0IIIIIIIIab\0c\0defghi\0";
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let text: String = table
        .chunks(3)
        .flat_map(|chunk| {
            let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte));
            (0..4).map(move |at| alphabet[(bits >> (18 - 6 * at) & 63) as usize] as char)
        })
        .collect();
    assert_eq!(table.len() % 3, 0);
    assert_eq!(decoded(&text), table);
    assert!((longest_run(&text) - 6.0).abs() < 0.1);
    assert!((longest_run("") - 1.0).abs() < 0.1);
}

//! Answers of the forms that templates write, in pieces of every length.

use std::path::Path;

use cairn_data::chat::ChatTemplate;
use proptest::prelude::*;

use super::*;

fn tokenizer() -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tokenizers");
    Tokenizer::load(&folder.join("byte_level/tokenizer.json")).unwrap()
}

fn form(name: &str) -> CallForm {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/chat");
    let path = folder.join(format!("{name}.jinja"));
    let source = std::fs::read_to_string(&path).unwrap();
    let specials =
        ["bos_token", "eos_token"].map(|name| (name.to_owned(), format!("<{name}>"))).into();
    ChatTemplate::parse(&source, &path).unwrap().call_form(&specials).unwrap()
}

fn thinking() -> ReasoningMarkers {
    let [open, close] = ["<think>", "</think>"].map(ToOwned::to_owned);
    ReasoningMarkers { open, close, field: None }
}

fn outline(name: &str, is_open: Option<bool>) -> Arc<Outline> {
    let tokenizer = tokenizer();
    let mut outline = Outline::default().with_calls(&form(name), &tokenizer, blake3::hash(b"ids"));
    if let Some(is_open) = is_open {
        outline = outline.with_reasoning(&thinking(), &tokenizer, is_open);
    }
    Arc::new(outline)
}

/// What is thought, said and called: names and arguments.
type Told = (String, String, Vec<(String, String)>);

/// Reads an answer in pieces of so many characters.
fn read(outline: &Arc<Outline>, answer: &str, width: usize) -> Told {
    let mut splitter = Splitter::new(Arc::clone(outline), 0);
    let symbols = symbols(answer, Some(tokenizer().specials()));
    let mut told = Told::default();
    let mut ids = Vec::new();
    let mut parts: Vec<Parts> = symbols.chunks(width).map(|part| splitter.push(part)).collect();
    parts.push(splitter.finish());
    for part in parts {
        told.0 += &part.reasoning;
        told.1 += &part.text;
        for call in part.calls {
            if let Some((id, name)) = call.head {
                assert_eq!((id.len(), call.index), (CALL_ID_CHARS, told.2.len()));
                assert!(!ids.contains(&id), "{ids:?}");
                ids.push(id);
                told.2.push((name, String::new()));
            }
            assert_eq!(call.index + 1, told.2.len());
            told.2.last_mut().unwrap().1 += &call.arguments;
        }
    }
    told
}

fn check(outline: &Arc<Outline>, answer: &str, expected: (&str, &str, &[(&str, &str)])) {
    let (thought, said, calls) = expected;
    let calls = calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned()));
    let expected = (thought.to_owned(), said.to_owned(), calls.collect::<Vec<_>>());
    for width in [1, 2, 3, 7, 1000] {
        assert_eq!(read(outline, answer, width), expected, "{width}: {answer}");
    }
}

const ARGUMENTS: &str = r#"{"where": "}\"]</tool_call>", "hours": [1, {"a": 2}]}"#;

#[test]
fn calls_are_read_in_the_forms_of_templates() {
    let hermes = outline("calls_hermes", None);
    let call = |name: &str| {
        format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {ARGUMENTS}}}\n</tool_call>")
    };
    check(&hermes, &call("rain"), ("", "", &[("rain", ARGUMENTS)]));
    let both = format!("Let me see.\n\n{}\n{}", call("rain"), call("wind"));
    check(&hermes, &both, ("", "Let me see.", &[("rain", ARGUMENTS), ("wind", ARGUMENTS)]));
    check(&hermes, "a <tool", ("", "a <tool", &[]));
    check(&hermes, "a <tool_call> is a tag \n", ("", "a <tool_call> is a tag \n", &[]));
    // An answer that was cut off.
    let cut = "<tool_call>\n{\"name\": \"rain\", \"arguments\": {\"wher";
    check(&hermes, cut, ("", "", &[("rain", "{\"wher")]));
    check(&hermes, "<tool_call>\n{\"na", ("", "", &[]));

    let mistral = outline("calls_mistral", None);
    let two = "[TOOL_CALLS] [{\"name\": \"rain\", \"arguments\": {}, \"id\": \"abcABC123\"}, \
               {\"name\": \"wind\", \"arguments\": {\"a\": 1}, \"id\": \"abcABC124\"}]";
    check(&mistral, two, ("", "", &[("rain", "{}"), ("wind", "{\"a\": 1}")]));
    let tekken = outline("calls_tekken", None);
    let two = "Well[TOOL_CALLS]rain[CALL_ID]abcABC123[ARGS]{}[TOOL_CALLS]wind[CALL_ID]abcABC124[ARGS]{\"a\": [1]}";
    check(&tekken, two, ("", "Well", &[("rain", "{}"), ("wind", "{\"a\": [1]}")]));

    let llama = outline("llama3", None);
    let call = "{\"name\": \"rain\", \"parameters\": {\"where\": \"here\"}}";
    check(&llama, call, ("", "", &[("rain", "{\"where\": \"here\"}")]));
    check(&llama, &format!("Well: {call}"), ("", &format!("Well: {call}"), &[]));
    check(&llama, "{\"nam", ("", "{\"nam", &[]));
    check(&llama, " hi", ("", " hi", &[]));
}

#[test]
fn what_is_thought_is_told_apart() {
    let plain =
        |is_open| Arc::new(Outline::default().with_reasoning(&thinking(), &tokenizer(), is_open));
    let closed = plain(false);
    check(&closed, "<think>\nhm <b>\n</think>\n\nYes.\n", ("hm <b>", "\n\nYes.\n", &[]));
    check(&closed, "\n<think> hm", ("hm", "", &[]));
    check(&closed, "No.<think>a</think>", ("", "No.<think>a</think>", &[]));
    check(&closed, "<thi", ("", "<thi", &[]));
    let open = plain(true);
    check(&open, "hm\n\n</think>Yes.", ("hm", "Yes.", &[]));
    check(&open, "hm</thin", ("hm</thin", "", &[]));
    let both = outline("calls_hermes", Some(false));
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    let answer = format!("<think>{call}</think>\n\nSo:\n{call}");
    check(&both, &answer, (call, "\n\nSo:", &[("f", "{}")]));
}

#[test]
fn special_tokens_are_not_the_texts_that_spell_them() {
    let tokenizer = tokenizer();
    let [open, close] = ["<|im_start|>", "<|im_end|>"].map(ToOwned::to_owned);
    let markers = ReasoningMarkers { open, close, field: None };
    let outline = Arc::new(Outline::default().with_reasoning(&markers, &tokenizer, true));
    let spelled = symbols("a<|im_end|>b", None);
    let meant = symbols("a<|im_end|>b", Some(tokenizer.specials()));
    assert_eq!(meant.len(), 3);
    let read = |symbols: &[Symbol]| {
        let mut splitter = Splitter::new(Arc::clone(&outline), 0);
        let first = splitter.push(symbols);
        let last = splitter.finish();
        (first.reasoning + &last.reasoning, first.text + &last.text)
    };
    assert_eq!(read(&spelled), ("a<|im_end|>b".to_owned(), String::new()));
    assert_eq!(read(&meant), ("a".to_owned(), "b".to_owned()));
}

#[test]
fn spaces_are_not_held_without_end() {
    let anchored = outline("llama3", Some(true));
    let (begins, calls) = (outline("llama3", Some(false)), outline("calls_hermes", None));
    let spaces = " ".repeat(20 * SPACES_MAX);
    for (outline, begin, thought) in [
        (&anchored, "hm", true),
        (&anchored, "hm</think>", false),
        (&begins, "", false),
        (&calls, "", false),
        (&calls, "well", false),
    ] {
        let mut splitter = Splitter::new(Arc::clone(outline), 0);
        let mut told = splitter.push(&symbols(begin, None)).text.len();
        for space in symbols(&spaces, None) {
            told += splitter.push(&[space]).text.len();
            assert!(splitter.held.len() <= SPACES_MAX + 1, "{begin}");
        }
        if !thought {
            assert!(spaces.len() - SPACES_MAX <= told, "{begin}: {told}");
        }
        let answer = format!("{begin}{spaces}<tool_call>");
        assert_eq!(read(outline, &answer, 1), read(outline, &answer, 100_000), "{begin}");
    }
}

proptest! {
    /// Any answer is told to its end, in any pieces, and nothing of a text without markers is lost.
    #[test]
    fn pieces_do_not_matter(
        answer in "([a-c \n{}\"<>]|<think>|</think>|<tool_call>|\n\\{\"name\": \"|f|\", \"arguments\": |\\}\n</tool_call>){0,12}",
        width in 1_usize..9,
        is_open in any::<bool>(),
    ) {
        let outline = outline("calls_hermes", Some(is_open));
        let whole = read(&outline, &answer, 1000);
        prop_assert_eq!(&read(&outline, &answer, width), &whole);
        if !is_open && !answer.contains("<t") {
            prop_assert_eq!(whole.1.trim_end(), answer.trim_end());
        }
    }
}

//! The markers around what a model thinks before it answers: those of its template, or of its tokenizer.

use std::collections::BTreeMap;

use jiff::civil::DateTime;
use serde_json::json;

use super::{ChatInput, ChatTemplate};
use crate::tokenizer::Tokenizer;

/// Under which names templates read what was thought.
const NAMES: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];
/// Markers that are looked for where the template does not write any itself.
const KNOWN: [&str; 6] =
    ["<think>", "<thinking>", "<reasoning>", "[THINK]", "<seed:think>", "\u{25c1}think\u{25b7}"];
/// What is thought.
const THOUGHT: &str = "zq thought";
/// What is said.
const WORDS: &str = "Zqwords";
/// What a marker may begin and end with.
const BRACKETS: [(char, char); 3] = [('<', '>'), ('[', ']'), ('\u{25c1}', '\u{25b7}')];

/// What stands around the words that a model thinks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReasoningMarkers {
    /// In front of them.
    pub open: String,
    /// Behind them.
    pub close: String,
    /// The name under which the template reads what was thought in earlier turns; `None` if it does not.
    pub field: Option<&'static str>,
}

impl ChatTemplate {
    /// Finds the markers: the template writes them around what it is told was thought, or a known pair is in it or
    /// among the tokenizer's tokens.
    pub fn reasoning_markers(
        &self,
        tokenizer: &Tokenizer,
        special_tokens: &BTreeMap<String, String>,
    ) -> Option<ReasoningMarkers> {
        let written = NAMES.iter().find_map(|field| {
            let message = json!({ "role": "assistant", "content": WORDS, *field: THOUGHT });
            let messages = [json!({ "role": "user", "content": "Zq?" }), message];
            let now = Some(DateTime::default());
            let input = ChatInput { now, ..ChatInput::new(&messages, special_tokens) };
            let text = self.render(&input).ok()?;
            let (before, after) = text.split_once(THOUGHT)?;
            let open = last_tag(before.trim_end())?;
            let close = closing(open);
            after.trim_start().starts_with(&close).then(|| ReasoningMarkers {
                open: open.to_owned(),
                close,
                field: Some(field),
            })
        });
        let is_there = |open: &&&str| {
            let close = closing(open);
            let are_tokens = [open, close.as_str()].iter().all(|t| tokenizer.token_id(t).is_some());
            are_tokens || self.source.contains(&close)
        };
        written.or_else(|| {
            let open = *KNOWN.iter().find(is_there)?;
            let close = closing(open);
            Some(ReasoningMarkers { open: open.to_owned(), close, field: None })
        })
    }
}

/// The markers that are looked for where the template does not write any itself.
pub(super) fn known() -> impl Iterator<Item = String> {
    KNOWN.into_iter().flat_map(|open| [open.to_owned(), closing(open)])
}

/// The tag that a text ends with.
fn last_tag(text: &str) -> Option<&str> {
    let (open, _) = BRACKETS.iter().find(|(_, close)| text.ends_with(*close))?;
    text.rfind(*open).map(|at| &text[at..])
}

/// The end that belongs to a beginning.
fn closing(open: &str) -> String {
    let mut close = open.to_owned();
    close.insert(open.chars().next().map_or(0, char::len_utf8), '/');
    close
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn find(source: &str, kind: &str) -> Option<ReasoningMarkers> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tokenizers");
        let tokenizer = Tokenizer::load(&folder.join(kind).join("tokenizer.json")).unwrap();
        let template = ChatTemplate::parse(source, Path::new("t")).unwrap();
        template.reasoning_markers(&tokenizer, &BTreeMap::new())
    }

    #[test]
    fn markers_are_those_of_the_template() {
        let markers = |open: &str, close: &str, field| {
            let (open, close) = (open.to_owned(), close.to_owned());
            Some(ReasoningMarkers { open, close, field })
        };
        let written = "{% for m in messages %}{% if m.thinking is defined %}[muse]\n{{ m.thinking }}\n[/muse]\
                       {% endif %}{{ m.content }}{% endfor %}";
        assert_eq!(find(written, "word_piece"), markers("[muse]", "[/muse]", Some("thinking")));
        let cut = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}";
        assert_eq!(find(cut, "word_piece"), markers("<think>", "</think>", None));
        let none = "{% for m in messages %}{{ m.content }}{{ m.reasoning }}{% endfor %}";
        assert_eq!(find(none, "word_piece"), None);
        assert_eq!(find(none, "byte_level"), markers("<think>", "</think>", None), "its tokens");
    }

    #[test]
    fn a_template_tells_what_it_reads() {
        let source = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if think is defined and think %}\
                      <think>\n{% endif %}";
        let template = ChatTemplate::parse(source, Path::new("t")).unwrap();
        assert!(template.reads("think") && template.reads("messages"));
        assert!(!template.reads("enable_thinking"));
    }
}

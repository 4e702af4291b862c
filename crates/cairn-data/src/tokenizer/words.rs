//! GPT-2's words: the pieces of a text that BPE merges within, found without a regex engine.
//!
//! GPT-2 splits by
//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
//! (<https://github.com/openai/gpt-2/blob/master/src/encoder.py>). Through the `tokenizers` crate
//! that costs about 0.3 s a megabyte and 50 bytes of bookkeeping a byte, since every piece keeps
//! its offsets through every change; here it is one pass that allocates nothing. The classes come
//! from the tables that the crate's regex engine uses, so both agree on every character.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// What the pattern distinguishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Letter,
    Number,
    Space,
    Other,
}

/// Kinds of characters, by table below U+0080 and by search above.
struct Kinds {
    ascii: [Kind; 128],
    /// Sorted ranges of all that is not [`Kind::Other`].
    ranges: Vec<(char, char, Kind)>,
}

static KINDS: LazyLock<Kinds> = LazyLock::new(Kinds::new);

impl Kinds {
    fn new() -> Self {
        let classes = [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number), (r"\s", Kind::Space)];
        let mut ranges = Vec::new();
        for (pattern, kind) in classes {
            let class = regex_syntax::parse(pattern).expect("a class that every version has");
            if let HirKind::Class(Class::Unicode(class)) = class.kind() {
                ranges.extend(class.iter().map(|range| (range.start(), range.end(), kind)));
            }
        }
        ranges.sort_unstable_by_key(|(start, ..)| *start);
        let mut kinds = Self { ascii: [Kind::Other; 128], ranges };
        for code in 0..128u8 {
            kinds.ascii[usize::from(code)] = kinds.search(char::from(code));
        }
        kinds
    }

    fn of(&self, c: char) -> Kind {
        match u8::try_from(c) {
            Ok(code) if code < 128 => self.ascii[usize::from(code)],
            _ => self.search(c),
        }
    }

    fn search(&self, c: char) -> Kind {
        let after = self.ranges.partition_point(|(start, ..)| *start <= c);
        match after.checked_sub(1).map(|at| self.ranges[at]) {
            Some((_, end, kind)) if c <= end => kind,
            _ => Kind::Other,
        }
    }
}

/// The words of a text, in order; end to end they are the text.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    let kinds = &*KINDS;
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (word, after) = rest.split_at(first_word(kinds, rest));
        rest = after;
        Some(word)
    })
}

/// Length of the first word of a text that is not empty.
fn first_word(kinds: &Kinds, text: &str) -> usize {
    if let Some(after) = text.strip_prefix('\'') {
        let endings = ["s", "t", "re", "ve", "m", "ll", "d"];
        if let Some(ending) = endings.iter().find(|ending| after.starts_with(**ending)) {
            return 1 + ending.len();
        }
    }
    // One space (U+0020 only) belongs to the word after it.
    let skip = usize::from(text.starts_with(' '));
    let kind_of_first = text[skip..].chars().next().map(|c| kinds.of(c));
    if let Some(kind @ (Kind::Letter | Kind::Number | Kind::Other)) = kind_of_first {
        return skip + run(kinds, &text[skip..], kind).0;
    }
    let (spaces, last) = run(kinds, text, Kind::Space);
    // Before a word, the last space of several is left to it: `\s+(?!\S)`.
    if spaces == text.len() || spaces == last { spaces } else { spaces - last }
}

/// Length of the run of one kind that a text starts with, and of its last character.
fn run(kinds: &Kinds, text: &str, kind: Kind) -> (usize, usize) {
    let mut last = 0;
    for (at, c) in text.char_indices() {
        if kinds.of(c) != kind {
            return (at, last);
        }
        last = c.len_utf8();
    }
    (text.len(), last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    /// The words as the `tokenizers` crate finds them, by their places in the text.
    fn reference(text: &str) -> Vec<&str> {
        let mut split = PreTokenizedString::from(text);
        let byte_level = ByteLevel::default().add_prefix_space(false);
        byte_level.pre_tokenize(&mut split).unwrap();
        split
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| &text[start..end])
            .collect()
    }

    fn check(text: &str) {
        assert_eq!(words(text).collect::<Vec<_>>(), reference(text), "{text:?}");
    }

    #[test]
    fn words_are_gpt2s() {
        for text in [
            "Hello world",
            " it's we'll they've I'M 'tis rock'n'roll ''s",
            "a  b   c\n\n  d \t\u{3000} e\u{a0}\u{a0}f   ",
            "x1y2 123 ½Ⅷ² _a-b-- ,, ...'",
            "naïve Ünïcödé 漢字かな العربية हिन्दी 🎉🎉 é e\u{301}",
            "   ",
            "",
            "\r\n\r\nfn main() {\r\n    println!(\"hi\");\r\n}\r\n",
        ] {
            check(text);
        }
    }

    #[test]
    fn every_character_has_its_kind() {
        // Each between letters, so that its kind decides where the text is cut; in blocks, so that
        // the reference takes its time only once a block.
        let all: Vec<char> = (0..=0x10FFFF).filter_map(char::from_u32).collect();
        for block in all.chunks(4096).step_by(3).chain(all.chunks(4096).take(20)) {
            let text: String = block.iter().flat_map(|c| ['a', *c, '1']).collect();
            check(&text);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_cut_as_the_reference_cuts_it(text in "\\PC{0,40}") {
            check(&text);
        }

        #[test]
        fn any_mixture_of_critical_characters_too(
            text in "[ a1'stremvld\n\t\u{a0}é_漢\u{301}½🎉.]{0,30}",
        ) {
            check(&text);
        }
    }
}

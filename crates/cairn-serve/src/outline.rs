//! What an answer is made of: what the model thinks, what it says, and the calls of functions that it ends with.
//! An [`Outline`] knows the markers between these, a [`Splitter`] finds them in an answer while it grows.
//!
//! The markers are those of the model's template and tokenizer. A marker that is a special token is found as that
//! token and never as a text that spells it.

use std::collections::BTreeMap;
use std::sync::Arc;

use cairn_data::chat::{CallForm, FormPart, ReasoningMarkers};
use cairn_data::tokenizer::Tokenizer;

/// Special tokens stand behind all characters.
const SPECIAL: u32 = 0x11_0000;
/// Letters and digits of a call's id, which templates may want.
pub(crate) const CALL_ID_CHARS: usize = 9;
/// Spaces that are held back because a marker may follow, or that may stand in front of a first one, at most.
const SPACES_MAX: usize = 1024;

/// A character, or a special token: `SPECIAL` and its id.
pub(crate) type Symbol = u32;

/// A text as symbols; where special tokens are meant they are found.
pub(crate) fn symbols(text: &str, specials: Option<&BTreeMap<u32, String>>) -> Vec<Symbol> {
    let mut found = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let starting = specials.into_iter().flatten();
        let starting = starting.filter(|(_, token)| rest.starts_with(token.as_str()));
        match starting.max_by_key(|(_, token)| token.len()) {
            Some((id, token)) => {
                found.push(SPECIAL + id);
                rest = &rest[token.len()..];
            }
            None => {
                found.push(c.into());
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    found
}

/// A special token as a symbol.
pub(crate) fn special(id: u32) -> Symbol {
    SPECIAL.saturating_add(id)
}

/// The text of symbols, without special tokens.
fn text(symbols: &[Symbol]) -> String {
    symbols.iter().copied().filter_map(char::from_u32).collect()
}

fn is_space(symbol: Symbol) -> bool {
    char::from_u32(symbol).is_some_and(char::is_whitespace)
}

/// What is expected of an answer at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Symbol(Symbol),
    /// A character of a call's id.
    OfId,
}

/// How the beginning of a text compares with what is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compared {
    /// It is there.
    Whole,
    /// The text ends before it differs.
    Begun,
    Other,
}

fn compare(found: &[Symbol], expected: &[Expected]) -> Compared {
    let is_right = |(symbol, expected): (&Symbol, &Expected)| match expected {
        Expected::Symbol(expected) => symbol == expected,
        Expected::OfId => char::from_u32(*symbol).is_some_and(|c| c.is_ascii_alphanumeric()),
    };
    match found.iter().zip(expected).all(is_right) {
        false => Compared::Other,
        true if found.len() < expected.len() => Compared::Begun,
        true => Compared::Whole,
    }
}

/// Where a marker begins in symbols, or how many of the last symbols may be its beginning.
fn find(found: &[Symbol], marker: &[Symbol]) -> Result<usize, usize> {
    if marker.is_empty() {
        return Err(0);
    }
    if let Some(at) = found.windows(marker.len()).position(|window| window == marker) {
        return Ok(at);
    }
    let longest = found.len().min(marker.len().saturating_sub(1));
    let begins = |&length: &usize| marker.starts_with(&found[found.len() - length..]);
    Err((1..=longest).rev().find(begins).unwrap_or(0))
}

/// Spaces at the end, as far as they are held back: the same in any pieces, since there are never more.
fn num_spaces_held(found: &[Symbol]) -> usize {
    found.iter().rev().take(SPACES_MAX).take_while(|symbol| is_space(**symbol)).count()
}

/// The marker that a call begins with, and how the rest of it is written.
#[derive(Clone, Debug)]
struct Calls {
    marker: Vec<Symbol>,
    /// Whether an answer is a call only from its beginning on: the marker is no more than the beginning of the
    /// call's JSON.
    is_anchored: bool,
    begin: Vec<Expected>,
    middle: Vec<Expected>,
    between: Option<Vec<Expected>>,
    end: Vec<Expected>,
    /// Different for each answer.
    ids: blake3::Hash,
}

/// What an answer is made of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outline {
    reasoning: Option<Reasoning>,
    calls: Option<Calls>,
}

#[derive(Clone, Debug)]
struct Reasoning {
    open: Vec<Symbol>,
    close: Vec<Symbol>,
    /// Whether the prompt ends with `open`.
    is_open: bool,
}

impl Outline {
    /// Tells what is thought apart; `is_open` says that the prompt has begun it.
    pub(crate) fn with_reasoning(
        mut self,
        markers: &ReasoningMarkers,
        tokenizer: &Tokenizer,
        is_open: bool,
    ) -> Self {
        let of = |text: &str| symbols(text, Some(tokenizer.specials()));
        let (open, close) = (of(&markers.open), of(&markers.close));
        self.reasoning = Some(Reasoning { open, close, is_open });
        self
    }

    /// Tells calls apart, whose ids are made of `ids`.
    pub(crate) fn with_calls(
        mut self,
        form: &CallForm,
        tokenizer: &Tokenizer,
        ids: blake3::Hash,
    ) -> Self {
        let of = |parts: &[FormPart]| expected(parts, tokenizer);
        let Marker { text, is_anchored } = Marker::of(form, tokenizer);
        let marker = symbols(&text, Some(tokenizer.specials()));
        let begin = of(&form.begin);
        // Spaces in front of the marker are no part of it.
        let space = |part: &&Expected| matches!(part, Expected::Symbol(s) if is_space(*s));
        let skipped = begin.iter().take_while(space).count() + marker.len();
        self.calls = Some(Calls {
            begin: begin[skipped..].to_vec(),
            middle: of(&form.middle),
            between: form.between.as_deref().map(of),
            end: of(&form.end),
            marker,
            is_anchored,
            ids,
        });
        self
    }
}

fn expected(parts: &[FormPart], tokenizer: &Tokenizer) -> Vec<Expected> {
    let one = |part: &FormPart| match part {
        FormPart::Text(text) => {
            let symbols = symbols(text, Some(tokenizer.specials()));
            symbols.into_iter().map(Expected::Symbol).collect()
        }
        FormPart::CallId => vec![Expected::OfId; CALL_ID_CHARS],
    };
    parts.iter().flat_map(one).collect()
}

/// What the beginning of a call is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marker {
    pub(crate) text: String,
    /// Whether it means a call at the beginning of an answer only.
    pub(crate) is_anchored: bool,
}

impl Marker {
    /// A special token or a tag, if the form begins with one; else all that stands in front of a name.
    pub(crate) fn of(form: &CallForm, tokenizer: &Tokenizer) -> Self {
        let Some(FormPart::Text(begin)) = form.begin.first() else {
            return Self { text: String::new(), is_anchored: true };
        };
        let begin = begin.trim_start();
        let starting = tokenizer.specials().values().filter(|token| begin.starts_with(*token));
        let special = starting.map(|token| token.len()).max();
        let tag = [('<', '>'), ('[', ']')].iter().find_map(|(open, close)| {
            let inside = begin.strip_prefix(*open)?;
            let end = inside.find(*close)?;
            // A list or an object of JSON is no tag.
            let is_word = inside[..end].chars().all(|c| !c.is_whitespace() && c != '"' && c != '{');
            (is_word && 0 < end).then_some(end + 2)
        });
        match special.or(tag) {
            Some(length) => Self { text: begin[..length].to_owned(), is_anchored: false },
            None => Self { text: begin.to_owned(), is_anchored: true },
        }
    }
}

/// What comes next of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CallDelta {
    /// Its place among the answer's calls.
    pub(crate) index: usize,
    /// Its id and the name of what is called, in its first piece.
    pub(crate) head: Option<(String, String)>,
    /// The next piece of its arguments.
    pub(crate) arguments: String,
}

/// What comes next of an answer, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) reasoning: String,
    pub(crate) text: String,
    pub(crate) calls: Vec<CallDelta>,
}

/// Where JSON has come to.
#[derive(Clone, Copy, Debug, Default)]
struct Nesting {
    depth: usize,
    is_in_string: bool,
    is_escaped: bool,
}

impl Nesting {
    /// Goes past a character; whether the value is complete.
    fn take(&mut self, symbol: Symbol) -> bool {
        let c = char::from_u32(symbol).unwrap_or_default();
        if self.is_in_string {
            match c {
                _ if self.is_escaped => self.is_escaped = false,
                '\\' => self.is_escaped = true,
                '"' => self.is_in_string = false,
                _ => {}
            }
            return false;
        }
        match c {
            '"' => self.is_in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.depth == 0
    }
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Nothing has come: the answer may begin with what is thought.
    Begin,
    Thinking {
        has_begun: bool,
    },
    /// Something is said; whether anything has been.
    Saying {
        has_begun: bool,
    },
    /// The marker has come.
    Calling,
    Name,
    Arguments(Nesting),
    /// Arguments are complete.
    Called,
    /// All calls are.
    Done,
}

/// Finds the parts of an answer.
#[derive(Clone, Debug)]
pub(crate) struct Splitter {
    outline: Arc<Outline>,
    /// Which of a request's answers.
    choice: usize,
    stage: Stage,
    held: Vec<Symbol>,
    /// Spaces in front of the marker, which are said if no call comes.
    spaces: String,
    num_calls: usize,
}

impl Splitter {
    /// At the beginning of answer `choice`.
    pub(crate) fn new(outline: Arc<Outline>, choice: usize) -> Self {
        let stage = match &outline.reasoning {
            Some(Reasoning { is_open: true, .. }) => Stage::Thinking { has_begun: false },
            Some(_) => Stage::Begin,
            None => Stage::Saying { has_begun: false },
        };
        Self { outline, choice, stage, held: Vec::new(), spaces: String::new(), num_calls: 0 }
    }

    /// Whether what comes is thought.
    pub(crate) fn is_thinking(&self) -> bool {
        matches!(self.stage, Stage::Thinking { .. })
    }

    /// Takes what comes; what is certain then.
    pub(crate) fn push(&mut self, symbols: &[Symbol]) -> Parts {
        self.held.extend_from_slice(symbols);
        let mut parts = Parts::default();
        let outline = Arc::clone(&self.outline);
        while self.advance(&outline, &mut parts) {}
        parts
    }

    /// Ends the answer: what was held back.
    pub(crate) fn finish(&mut self) -> Parts {
        let mut parts = Parts::default();
        let rest = text(&std::mem::take(&mut self.held));
        match self.stage {
            Stage::Thinking { .. } => rest.trim_end().clone_into(&mut parts.reasoning),
            Stage::Begin | Stage::Saying { .. } => parts.text = rest,
            // The beginning of a call that did not come.
            Stage::Calling | Stage::Name | Stage::Arguments(_) | Stage::Called | Stage::Done => {}
        }
        self.stage = Stage::Done;
        parts
    }

    /// Takes from what is held; whether more can be.
    fn advance(&mut self, outline: &Outline, parts: &mut Parts) -> bool {
        match (self.stage, &outline.reasoning, &outline.calls) {
            (Stage::Begin, Some(reasoning), _) => self.begin(reasoning),
            (Stage::Thinking { has_begun }, Some(reasoning), _) => {
                self.think(reasoning, has_begun, parts)
            }
            (Stage::Saying { has_begun }, _, Some(calls)) => self.say(calls, has_begun, parts),
            (Stage::Begin | Stage::Thinking { .. } | Stage::Saying { .. }, ..) => {
                parts.text += &text(&self.held);
                self.held.clear();
                false
            }
            (Stage::Calling, _, Some(calls)) => self.call(calls, parts),
            (Stage::Name, _, Some(calls)) => self.name(calls, parts),
            (Stage::Arguments(nesting), ..) => self.arguments(nesting, parts),
            (Stage::Called, _, Some(calls)) => self.next_call(calls),
            (Stage::Calling | Stage::Name | Stage::Called | Stage::Done, ..) => {
                self.held.clear();
                false
            }
        }
    }

    /// Goes to a stage, past `count` symbols.
    fn pass(&mut self, count: usize, stage: Stage) -> bool {
        self.held.drain(..count);
        self.stage = stage;
        true
    }

    fn num_spaces(&self) -> usize {
        self.held.iter().take_while(|symbol| is_space(**symbol)).count()
    }

    fn begin(&mut self, reasoning: &Reasoning) -> bool {
        let spaces = self.num_spaces();
        let found = &self.held[spaces..];
        if spaces <= SPACES_MAX && found.starts_with(&reasoning.open) {
            return self.pass(spaces + reasoning.open.len(), Stage::Thinking { has_begun: false });
        }
        if spaces <= SPACES_MAX && reasoning.open.starts_with(found) {
            return false;
        }
        self.pass(0, Stage::Saying { has_begun: false })
    }

    fn think(&mut self, reasoning: &Reasoning, has_begun: bool, parts: &mut Parts) -> bool {
        let found = find(&self.held, &reasoning.close);
        let end = found.unwrap_or_else(|overlap| self.held.len() - overlap);
        let skipped = if has_begun { 0 } else { self.num_spaces().min(end) };
        // Spaces in front of the end are no part of it, and the end may come.
        let spaces = num_spaces_held(&self.held[skipped..end]);
        let thought = &self.held[skipped..end - spaces];
        let has_begun = has_begun || !thought.is_empty();
        parts.reasoning += &text(thought);
        if found.is_ok() {
            self.pass(end + reasoning.close.len(), Stage::Saying { has_begun: false });
            // What is said after it begins where it begins.
            return true;
        }
        self.pass(if has_begun { end - spaces } else { skipped }, Stage::Thinking { has_begun });
        false
    }

    fn say(&mut self, calls: &Calls, has_begun: bool, parts: &mut Parts) -> bool {
        let spaces = self.num_spaces();
        if calls.is_anchored {
            let found = &self.held[spaces..];
            let may_call = found.starts_with(&calls.marker) || calls.marker.starts_with(found);
            if has_begun || SPACES_MAX < spaces || !may_call {
                parts.text += &text(&std::mem::take(&mut self.held));
                self.stage = Stage::Saying { has_begun: true };
                return false;
            }
            let is_there = found.starts_with(&calls.marker);
            self.spaces = text(&self.held[..spaces]);
            return is_there && self.pass(spaces + calls.marker.len(), Stage::Calling);
        }
        let found = find(&self.held, &calls.marker);
        let end = found.unwrap_or_else(|overlap| self.held.len() - overlap);
        let spaces = num_spaces_held(&self.held[..end]);
        let said = text(&self.held[..end - spaces]);
        let has_begun = has_begun || !said.is_empty();
        parts.text += &said;
        self.spaces = text(&self.held[end - spaces..end]);
        match found {
            Ok(_) => self.pass(end + calls.marker.len(), Stage::Calling),
            Err(_) => {
                self.pass(end - spaces, Stage::Saying { has_begun });
                false
            }
        }
    }

    fn call(&mut self, calls: &Calls, parts: &mut Parts) -> bool {
        match compare(&self.held, &calls.begin) {
            Compared::Whole => self.pass(calls.begin.len(), Stage::Name),
            Compared::Begun => false,
            // What follows the marker is no call: it was said.
            Compared::Other => {
                parts.text += &self.spaces;
                parts.text += &text(&calls.marker);
                self.pass(0, Stage::Saying { has_begun: true })
            }
        }
    }

    fn name(&mut self, calls: &Calls, parts: &mut Parts) -> bool {
        let is_end = |at: &usize| compare(&self.held[*at..], &calls.middle) == Compared::Whole;
        let Some(end) = (1..self.held.len()).find(is_end) else { return false };
        let name = text(&self.held[..end]);
        let head = Some((self.call_id(calls), name));
        parts.calls.push(CallDelta { index: self.num_calls, head, arguments: String::new() });
        self.pass(end + calls.middle.len(), Stage::Arguments(Nesting::default()))
    }

    /// Nine letters and digits that no other call has.
    fn call_id(&self, calls: &Calls) -> String {
        const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        let mut hasher = blake3::Hasher::new_keyed(calls.ids.as_bytes());
        for number in [self.choice, self.num_calls] {
            hasher.update(&(number as u64).to_le_bytes());
        }
        let digit = |byte: &u8| char::from(DIGITS[usize::from(*byte) % DIGITS.len()]);
        hasher.finalize().as_bytes()[..CALL_ID_CHARS].iter().map(digit).collect()
    }

    fn arguments(&mut self, mut nesting: Nesting, parts: &mut Parts) -> bool {
        let end = self.held.iter().position(|&symbol| nesting.take(symbol));
        let count = end.map_or(self.held.len(), |end| end + 1);
        let arguments = text(&self.held[..count]);
        if !arguments.is_empty() {
            match parts.calls.last_mut() {
                Some(call) if call.index == self.num_calls => call.arguments += &arguments,
                _ => parts.calls.push(CallDelta { index: self.num_calls, head: None, arguments }),
            }
        }
        self.num_calls += usize::from(end.is_some());
        let stage = if end.is_some() { Stage::Called } else { Stage::Arguments(nesting) };
        self.pass(count, stage) && end.is_some()
    }

    fn next_call(&mut self, calls: &Calls) -> bool {
        let between = calls.between.as_deref();
        match between.map_or(Compared::Other, |between| compare(&self.held, between)) {
            Compared::Whole => {
                let count = between.map_or(0, <[Expected]>::len);
                return self.pass(count, Stage::Name);
            }
            // It may be the end as well, after which nothing comes.
            Compared::Begun => return false,
            Compared::Other => {}
        }
        match compare(&self.held, &calls.end) {
            Compared::Begun => false,
            Compared::Whole | Compared::Other => self.pass(0, Stage::Done),
        }
    }
}

#[cfg(test)]
mod tests;

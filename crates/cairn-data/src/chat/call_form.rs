//! How a template writes calls of functions, learned by having it write some: what stands in front of a call's
//! name, between name and arguments, between two calls, and behind the last.
//!
//! Nothing is known of a family: the name, the id and the arguments of the calls are words that no template has,
//! and what is around them is what the model was taught. Arguments have to be a JSON object; a template that writes
//! them otherwise has no form here.

use std::collections::BTreeMap;

use jiff::civil::DateTime;
use serde_json::{Value, json};

use super::{ChatInput, ChatTemplate};

/// Names of the functions that are called.
const NAMES: [&str; 3] = ["zq_first_tool", "zq_second_tool", "zq_third_tool"];
/// Ids of the calls: templates that check them want nine letters and digits. None begins as another or [`WORDS`] do,
/// or what they have in common would be taken for the template's.
const IDS: [&str; 3] = ["Kd7Zq2Xw9", "Yv4Jm8Rt3", "Xw6Hn5Sp1"];
/// What the assistant says where it calls nothing.
const WORDS: &str = "Zqwords";

/// A piece of what a template writes around calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FormPart {
    /// This text; special tokens in it are meant.
    Text(String),
    /// The id of a call: nine letters and digits.
    CallId,
}

/// How a template wants the arguments of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgumentsAs {
    /// An object.
    Object,
    /// The JSON of it, as a text.
    Text,
}

/// How a template writes calls: `begin` name `middle` arguments, then `between` name `middle` arguments for each
/// further call, then `end`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallForm {
    /// In front of the first name.
    pub begin: Vec<FormPart>,
    /// Between a name and its arguments.
    pub middle: Vec<FormPart>,
    /// Between the arguments of a call and the name of the next; `None` if there is never a second.
    pub between: Option<Vec<FormPart>>,
    /// Behind the last arguments.
    pub end: Vec<FormPart>,
    /// Whether arguments have spaces behind colons and commas.
    pub has_spaces: bool,
    /// What the template takes.
    pub arguments: ArgumentsAs,
    /// Whether an assistant that only calls says nothing (`null`) rather than an empty text.
    pub wants_null_content: bool,
}

impl ChatTemplate {
    /// Learns how calls are written; `None` if the template has no form for them that could be read.
    pub fn call_form(&self, special_tokens: &BTreeMap<String, String>) -> Option<CallForm> {
        let probe = |arguments, wants_null_content| Probe {
            template: self,
            special_tokens,
            arguments,
            wants_null_content,
        };
        let objects = [false, true].map(|is_null| probe(ArgumentsAs::Object, is_null));
        // What a template makes of an object is its form; only one that takes none is given a text.
        let texts = objects.iter().filter(|probe| probe.render(probe.calls(1)).is_none());
        let texts = texts.map(|found| probe(ArgumentsAs::Text, found.wants_null_content));
        objects
            .iter()
            .find_map(Probe::learn)
            .or_else(|| texts.into_iter().find_map(|text| text.learn()))
    }

    /// Whether the template looks at a variable.
    pub fn reads(&self, name: &str) -> bool {
        let Ok(syntax) = super::environment::syntax() else { return false };
        let mut tokens = minijinja::machinery::tokenize(&self.source, false, syntax);
        tokens.any(|token| {
            use minijinja::machinery::Token::{Ident, Str};
            matches!(token, Ok((Ident(found) | Str(found), _)) if found == name)
        })
    }
}

/// Arguments of the calls.
fn arguments() -> [Value; 3] {
    [
        json!({ "zq_key": "zq value", "zq_other": 7 }),
        json!({ "zq_third": [true, "zq"] }),
        json!({ "zq_fourth": null }),
    ]
}

struct Probe<'a> {
    template: &'a ChatTemplate,
    special_tokens: &'a BTreeMap<String, String>,
    arguments: ArgumentsAs,
    wants_null_content: bool,
}

impl Probe<'_> {
    fn learn(&self) -> Option<CallForm> {
        let said = self.render(json!({ "role": "assistant", "content": WORDS }))?;
        let one = self.render(self.calls(1))?;
        let start = outside_tag(&one[..num_common(&said, &one)]);
        let first = Call::find(&one, start, 0)?;
        // What comes after the assistant's turn comes after its words as well.
        let (_, after) = said.rsplit_once(WORDS)?;
        let rest = &one[first.end..];
        let common = num_common_at_end(rest, after);
        let end = &rest[..rest.len() - common + num_of_tag(&rest[rest.len() - common..])];
        let (begin, middle) = (&one[start..first.name], &one[first.name_end..first.arguments]);
        let begun = parts(begin);
        // A call is known by what it begins with, and an id is none of that.
        let is_known =
            matches!(begun.first(), Some(FormPart::Text(text)) if !text.trim().is_empty());
        if !is_known || middle.is_empty() {
            return None;
        }
        let spelled: String = one[first.arguments..first.end].to_owned();
        Some(CallForm {
            between: self.between((begin, middle, end), start),
            begin: begun,
            middle: parts(middle),
            end: parts(end),
            has_spaces: spelled.contains("\": "),
            arguments: self.arguments,
            wants_null_content: self.wants_null_content,
        })
    }

    /// What is between two calls, if there may be several, with the same between each two and all else as with one.
    fn between(&self, one: (&str, &str, &str), start: usize) -> Option<Vec<FormPart>> {
        let all = self.render(self.calls(3))?;
        let first = Call::find(&all, start, 0)?;
        let second = Call::find(&all, first.end, 1)?;
        let third = Call::find(&all, second.end, 2)?;
        let (begin, middle, end) = one;
        let has_middle = |call: &Call| parts(&all[call.name_end..call.arguments]) == parts(middle);
        let between = parts(&all[first.end..second.name]);
        // The id of a call may be behind its arguments.
        let rest = all[third.end..].replace(IDS[2], IDS[0]);
        let agrees = all[start..].starts_with(begin)
            && [&first, &second, &third].into_iter().all(has_middle)
            && between == parts(&all[second.end..third.name])
            && rest.starts_with(end);
        agrees.then_some(between)
    }

    /// An assistant's message with this many calls.
    fn calls(&self, count: usize) -> Value {
        let call = |index: usize| {
            let arguments = arguments()[index].clone();
            let arguments = match self.arguments {
                ArgumentsAs::Object => arguments,
                ArgumentsAs::Text => arguments.to_string().into(),
            };
            json!({
                "type": "function", "id": IDS[index],
                "function": { "name": NAMES[index], "arguments": arguments },
            })
        };
        let calls: Vec<Value> = (0..count).map(call).collect();
        let content = if self.wants_null_content { Value::Null } else { "".into() };
        json!({ "role": "assistant", "content": content, "tool_calls": calls })
    }

    fn render(&self, answer: Value) -> Option<String> {
        let tool = |name: &&str| {
            let parameters = json!({ "type": "object", "properties": {} });
            json!({
                "type": "function",
                "function": { "name": name, "description": "Zq.", "parameters": parameters },
            })
        };
        let tools: Vec<Value> = NAMES.iter().map(tool).collect();
        let messages = [json!({ "role": "user", "content": "Zq?" }), answer];
        let input = ChatInput {
            tools: Some(&tools),
            now: Some(DateTime::default()),
            ..ChatInput::new(&messages, self.special_tokens)
        };
        self.template.render(&input).ok()
    }
}

/// Where a call stands in a text.
struct Call {
    name: usize,
    name_end: usize,
    arguments: usize,
    end: usize,
}

impl Call {
    fn find(text: &str, from: usize, index: usize) -> Option<Self> {
        let name = from + text[from..].find(NAMES[index])?;
        let name_end = name + NAMES[index].len();
        let wanted = &arguments()[index];
        let braces = text[name_end..].match_indices('{').map(|(at, _)| name_end + at);
        let read = |at: usize| {
            let mut found = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Value>();
            let value = found.next()?.ok()?;
            (value == *wanted).then(|| (at, at + found.byte_offset()))
        };
        let (arguments, end) = braces.into_iter().find_map(read)?;
        Some(Self { name, name_end, arguments, end })
    }
}

/// A text with the ids of calls left open.
fn parts(text: &str) -> Vec<FormPart> {
    let mut parts = Vec::new();
    let text = text.replace(IDS[1], IDS[0]).replace(IDS[2], IDS[0]);
    for (index, piece) in text.split(IDS[0]).enumerate() {
        if 0 < index {
            parts.push(FormPart::CallId);
        }
        if !piece.is_empty() {
            parts.push(FormPart::Text(piece.to_owned()));
        }
    }
    parts
}

/// Bytes of a text without the tag that has begun at its end.
fn outside_tag(text: &str) -> usize {
    let begun =
        text.rfind('<').filter(|&at| !text[at..].contains(|c: char| c == '>' || c.is_whitespace()));
    begun.unwrap_or(text.len())
}

/// Bytes at the beginning of a text that end a tag.
fn num_of_tag(text: &str) -> usize {
    let end =
        text.find('>').filter(|&at| !text[..at].contains(|c: char| c == '<' || c.is_whitespace()));
    end.map_or(0, |at| at + 1)
}

/// Bytes of the common beginning, in whole characters.
fn num_common(a: &str, b: &str) -> usize {
    let pairs = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    pairs.map(|(c, _)| c.len_utf8()).sum()
}

/// Bytes of the common end, in whole characters.
fn num_common_at_end(a: &str, b: &str) -> usize {
    let pairs = a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b);
    pairs.map(|(c, _)| c.len_utf8()).sum()
}

#[cfg(test)]
mod tests;

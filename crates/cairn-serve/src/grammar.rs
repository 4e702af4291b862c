//! Answers that follow a grammar: a JSON schema, a regular expression, a list of choices, or a grammar in Lark's
//! notation, by [llguidance](https://docs.rs/llguidance). Compiling one and following one are bounded in time and
//! memory; nothing is fetched, and nothing is kept between requests.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use cairn_engine::Constraint;
use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::token_bytes_from_tokenizer_json;
use llguidance::toktrie::{
    ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv,
};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::ServedParts;

/// States of a grammar's words, at most: each takes up to two kilobytes.
const LEXER_STATES_MAX: usize = 20_000;
/// Symbols of a grammar, at most.
const GRAMMAR_SIZE_MAX: usize = 200_000;
/// Work for the words of a grammar when it is compiled: some ten milliseconds.
const COMPILE_FUEL: u64 = 500_000;
/// Work for the words at a token: some four milliseconds.
const STEP_FUEL: u64 = 60_000;
/// Ways in which a sentence may go on at a byte, at most: optional properties of an object, for one.
const ROW_ITEMS_MAX: usize = 2000;
/// Work for the sentences at a token: some two milliseconds.
const STEP_ITEMS_MAX: usize = 40_000;

/// What the library's own options are called within a grammar.
const OPTIONS: &str = "x-guidance";

/// What an answer follows.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Grammar {
    /// The field that said so, which is blamed for a wrong one.
    field: &'static str,
    form: Form,
}

#[derive(Clone, Debug, PartialEq)]
enum Form {
    /// JSON of this schema.
    Json(Value),
    /// A regular expression.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's notation.
    Lark(String),
    /// The same, written here.
    Own(String),
}

impl Grammar {
    /// A grammar in Lark's notation that was written here; `field` is blamed if it is too large.
    pub(crate) fn own(field: &'static str, lark: String) -> Self {
        Self { field, form: Form::Own(lark) }
    }

    /// Takes `OpenAI`'s `response_format`, or vLLM's `structured_outputs`.
    pub(crate) fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        const FORMAT: &str = "response_format";
        const OUTPUTS: &str = "structured_outputs";
        let format: Option<Map<String, Value>> = fields.take(FORMAT)?;
        let outputs: Option<Map<String, Value>> = fields.take(OUTPUTS)?;
        match (format, outputs) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(ApiError::field(
                OUTPUTS,
                "response_format and structured_outputs are both there",
            )),
            (Some(format), None) => Self::of_format(FORMAT, format, "json_schema"),
            (None, Some(outputs)) => {
                let form = of_outputs(OUTPUTS, outputs)?;
                Ok(Some(Self { field: OUTPUTS, form }))
            }
        }
    }

    /// Reads a format: `text`, `json_object`, or `json_schema` with the schema in the object `within`, if that is
    /// not the format itself.
    pub(crate) fn of_format(
        field: &'static str,
        mut format: Map<String, Value>,
        within: &str,
    ) -> Result<Option<Self>, ApiError> {
        let refuse = |what: String| Err(ApiError::field(field, format!("{field}{what}")));
        let kind = format.remove("type").unwrap_or_default();
        let form = match kind.as_str() {
            Some("text") => None,
            Some("json_object") => Some(Form::Json(json!({ "type": "object" }))),
            Some("json_schema") => {
                let mut described = match format.remove(within) {
                    Some(Value::Object(described)) => described,
                    None if within.is_empty() => std::mem::take(&mut format),
                    _ => return refuse(format!(".{within} is missing")),
                };
                // They name and describe the schema for a reader; every schema is followed strictly here.
                for name in ["name", "description", "strict"] {
                    described.remove(name);
                }
                let Some(schema) = described.remove("schema") else {
                    return refuse(" has no schema".to_owned());
                };
                if let Some(other) = described.keys().next() {
                    return refuse(format!(" has '{other}', which is not supported here"));
                }
                Some(Form::Json(schema))
            }
            _ => {
                return refuse(format!(
                    ".type is {kind}, which is none of text, json_object, json_schema"
                ));
            }
        };
        match format.keys().next() {
            Some(other) => refuse(format!(".{other} is not supported here")),
            None => Ok(form.map(|form| Self { field, form })),
        }
    }
}

/// Reads vLLM's way to say it.
fn of_outputs(field: &'static str, outputs: Map<String, Value>) -> Result<Form, ApiError> {
    let refuse = |what: String| ApiError::field(field, format!("{field}{what}"));
    let mut stated = outputs.into_iter().filter(|(_, value)| !value.is_null());
    let (Some((kind, value)), None) = (stated.next(), stated.next()) else {
        return Err(refuse(" has to have one of json, regex, choice, grammar".to_owned()));
    };
    match (kind.as_str(), value) {
        // A schema may be given as a text.
        ("json", Value::String(text)) => {
            let schema = cairn_spec::unique_json::parse(&text);
            schema.map(Form::Json).map_err(|error| refuse(format!(".json: {error}")))
        }
        ("json", schema) => Ok(Form::Json(schema)),
        ("json_object", Value::Bool(true)) => Ok(Form::Json(json!({ "type": "object" }))),
        ("regex", Value::String(regex)) => Ok(Form::Regex(regex)),
        ("grammar", Value::String(grammar)) => Ok(Form::Lark(grammar)),
        ("choice", Value::Array(list)) => {
            let text = |choice: Value| match choice {
                Value::String(text) if !text.is_empty() => Ok(text),
                other => Err(refuse(format!(".choice has {other}, which is no text"))),
            };
            let list: Vec<String> = list.into_iter().map(text).collect::<Result<_, _>>()?;
            if list.is_empty() {
                return Err(refuse(".choice is empty".to_owned()));
            }
            Ok(Form::Choice(list))
        }
        (kind, value) => Err(refuse(format!(".{kind} = {value} is not supported here"))),
    }
}

impl Form {
    /// The grammar in the library's form.
    fn compiled(&self) -> Result<TopLevelGrammar, String> {
        Ok(match self {
            Self::Json(schema) => TopLevelGrammar::from_json_schema(spaced(schema, true)?),
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Choice(list) => {
                let texts: Vec<String> =
                    list.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | ")))
            }
            Self::Lark(text) if text.contains(OPTIONS) => {
                return Err(format!("'{OPTIONS}' is not supported here"));
            }
            // JSON could spell them so, and needs no letter's number otherwise.
            Self::Lark(text) if text.contains("%json") && spells_a_letter(text) => {
                return Err("a letter is spelled by its number (\\u) beside %json".to_owned());
            }
            Self::Lark(text) | Self::Own(text) => TopLevelGrammar::from_lark(text.clone()),
        })
    }
}

/// Whether a hyphen or a letter of ASCII is spelled as JSON may, by its number.
fn spells_a_letter(text: &str) -> bool {
    let numbers = text.split("\\u").skip(1);
    let mut numbers = numbers.filter_map(|rest| u8::from_str_radix(rest.get(..4)?, 16).ok());
    numbers.any(|number| number == b'-' || number.is_ascii_alphabetic())
}

/// The schema, with spaces only where Python's `json.dumps` writes them, or with none: where any were allowed,
/// small models write nothing else.
pub(crate) fn spaced(schema: &Value, has_spaces: bool) -> Result<Value, String> {
    let [item, key] = if has_spaces { [", ", ": "] } else { [",", ":"] };
    let options = json!({
        "whitespace_flexible": false, "item_separator": item, "key_separator": key,
    });
    match schema {
        // What would make the library lenient is not the client's to say.
        Value::Object(fields) if fields.contains_key(OPTIONS) => {
            Err(format!("'{OPTIONS}' is not supported here"))
        }
        Value::Object(fields) => {
            let mut fields = fields.clone();
            fields.insert(OPTIONS.to_owned(), options);
            Ok(fields.into())
        }
        Value::Bool(true) => Ok(json!({ OPTIONS: options })),
        other => Err(format!("{other} is no schema")),
    }
}

/// What grammars of a model have in common: its tokens' bytes as a tree. Made when it is first needed.
#[derive(Default)]
pub(crate) struct Grammars {
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("is_made", &self.factory.get().is_some()).finish()
    }
}

impl Grammars {
    fn factory(
        &self,
        parts: &ServedParts,
        field: &'static str,
    ) -> Result<&ParserFactory, ApiError> {
        let factory = self.factory.get_or_init(|| factory(parts)).as_ref();
        factory.map_err(|reason| {
            ApiError::field(field, format!("this model's tokens cannot follow a grammar: {reason}"))
        })
    }

    /// The bytes of the model's tokens; `field` is blamed if they are not known.
    pub(crate) fn words(
        &self,
        parts: &ServedParts,
        field: &'static str,
    ) -> Result<TokEnv, ApiError> {
        Ok(self.factory(parts, field)?.tok_env().clone())
    }

    /// Compiles a grammar.
    pub(crate) fn compile(
        &self,
        parts: &ServedParts,
        grammar: &Grammar,
    ) -> Result<Following, ApiError> {
        let field = grammar.field;
        let factory = self.factory(parts, field)?;
        let refuse = |reason: String| ApiError::field(field, format!("{field}: {reason}"));
        let grammar = grammar.form.compiled().map_err(refuse)?;
        let parser = catch_unwind(AssertUnwindSafe(|| factory.create_parser(grammar)));
        let parser = parser.map_err(|_| refuse("it cannot be compiled".to_owned()))?;
        let parser = parser.map_err(|error| refuse(said(&error)))?;
        let mut matcher = Matcher::new(Ok(parser));
        // What allows nothing at all is noticed now.
        matcher.compute_mask_or_eos().map_err(|error| refuse(said(&error)))?;
        Ok(Following { matcher })
    }
}

fn factory(parts: &ServedParts) -> Result<ParserFactory, String> {
    let tokenizer = &parts.tokenizer;
    let mut words = if tokenizer.is_byte_level() {
        let of = |id| match tokenizer.specials().get(&id) {
            Some(name) => special(name),
            None => tokenizer.token_bytes(id).unwrap_or_default().to_vec(),
        };
        (0..tokenizer.vocab_size()).map(of).collect()
    } else {
        let json: Value = serde_json::from_slice(tokenizer.json()).map_err(|e| e.to_string())?;
        let words = catch_unwind(AssertUnwindSafe(|| token_bytes_from_tokenizer_json(&json)));
        words.map_err(|_| "unknown bytes".to_owned())?.map_err(|error| error.to_string())?
    };
    // A model without an end of its own ends where the grammar does: an end that no token is.
    words.push(special("end"));
    let end = u32::try_from(words.len() - 1).map_err(|error| error.to_string())?;
    let ends: Vec<u32> = match parts.stop_tokens.as_slice() {
        [] => vec![end],
        stops => stops.to_vec(),
    };
    let trie = catch_unwind(|| {
        TokTrie::from(&TokRxInfo::new(end + 1, ends[0]), &words).with_eos_tokens(&ends)
    });
    let trie = trie.map_err(|_| "no tree can be made of them".to_owned())?;
    let environment: TokEnv =
        Arc::new(ApproximateTokEnv::new(trie)) as Arc<dyn TokenizerEnv + Sync>;
    let slices = SlicedBiasComputer::general_slices();
    let made = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices);
    let mut factory = made.map_err(|error| error.to_string())?;
    factory.quiet();
    let limits = factory.limits_mut();
    limits.initial_lexer_fuel = COMPILE_FUEL;
    limits.step_lexer_fuel = STEP_FUEL;
    limits.step_max_items = STEP_ITEMS_MAX;
    limits.max_items_in_row = ROW_ITEMS_MAX;
    limits.max_lexer_states = LEXER_STATES_MAX;
    limits.max_grammar_size = GRAMMAR_SIZE_MAX;
    // What is said of an error is for the client, and not of all that was generated.
    limits.verbose_errors = false;
    Ok(factory)
}

/// What the library says, in one line; where it has panicked, which it catches itself, not how.
fn said(error: &impl ToString) -> String {
    let text = error.to_string().replace("<non-verbose/>", "");
    let line = text.trim().lines().next().unwrap_or_default();
    match line.starts_with("panic") {
        true => "the library that follows it failed".to_owned(),
        false => line.to_owned(),
    }
}

/// Bytes that no text spells.
fn special(name: &str) -> Vec<u8> {
    let mut bytes = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    bytes.extend_from_slice(name.as_bytes());
    bytes
}

/// An answer on its way through a grammar.
pub(crate) struct Following {
    matcher: Matcher,
}

impl fmt::Debug for Following {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Following").finish_non_exhaustive()
    }
}

impl Clone for Following {
    fn clone(&self) -> Self {
        // Answers that shared what is kept for speed would share its limits too.
        Self { matcher: self.matcher.deep_clone() }
    }
}

impl Following {
    /// Follows a grammar over other words than a model's.
    #[cfg(test)]
    pub(crate) fn of_lark(lark: &str, words: &TokEnv) -> Self {
        let slices = SlicedBiasComputer::general_slices();
        let made = ParserFactory::new(words, InferenceCapabilities::default(), &slices);
        let parser = made.unwrap().create_parser(TopLevelGrammar::from_lark(lark.to_owned()));
        Self { matcher: Matcher::new(Ok(parser.unwrap())) }
    }

    /// Goes on past tokens that nobody has asked about; whether that can be. If not, nothing has changed.
    pub(crate) fn try_accept(&mut self, tokens: &[u32]) -> Result<bool, String> {
        let count = self.matcher.try_consume_tokens(tokens).map_err(|error| said(&error))?;
        if count < tokens.len() {
            self.matcher.rollback(count).map_err(|error| said(&error))?;
        }
        Ok(count == tokens.len())
    }
}

impl Constraint for Following {
    fn allow(&mut self, allowed: &mut [u32]) -> Result<(), String> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| said(&error))?;
        for (index, word) in allowed.iter_mut().enumerate() {
            *word = mask.as_slice().get(index).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        self.matcher.consume_token(token).map_err(|error| said(&error))
    }

    fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_librarys_options_are_not_the_clients() {
        let refused = |text: &str| Form::Lark(text.to_owned()).compiled().is_err();
        for options in ["x-guidance", r"x-guid\u0061nce", r"x\u002dguidance", r"\u0078-guidance"] {
            let text = format!("start: %json {{\"{options}\": {{\"lenient\": true}}}}");
            assert!(refused(&text), "{text}");
        }
        for text in [
            r#"start: %json {"enum": ["\u00e9", "\u0022", "a"]}"#,
            r"start: /[\u0061-\u007a]/",
            r"start: %json {} /\u/ /\u00/",
        ] {
            assert!(!refused(text), "{text}");
        }
    }
}

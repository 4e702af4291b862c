//! Chat templates: a conversation becomes the text that a model was taught to continue.
//!
//! A template is a program in Jinja2, written by whoever made the model, so it is run as foreign
//! code: [`ChatTemplate`] bounds its steps, its work and its memory (`bounds`, `rewrite`), gives it
//! neither files nor other templates, and hands it the time instead of a clock. What it sees and how
//! values are printed follows transformers (`python`, `operations`): `trim_blocks`, `lstrip_blocks`,
//! loop controls, `tojson` as Python writes it, Python's string methods, `{% generation %}`.

mod bounds;
mod call_form;
mod constants;
mod conversation;
mod environment;
mod error;
mod operations;
mod python;
mod reasoning;
mod rewrite;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::civil::DateTime;
use minijinja::machinery::{self, CodeGenerator, Instructions};
use minijinja::{AutoEscape, Environment, Value};
use serde_json::Map;

pub use self::bounds::{CHAT_STEPS_MAX, CHAT_WORK_MAX};
pub use self::call_form::{ArgumentsAs, CallForm, FormPart};
pub use self::conversation::ConversationError;
pub use self::error::ChatError;
pub use self::reasoning::ReasoningMarkers;

use self::bounds::Budget;

/// Longest template, in bytes. The largest known ones are below 32 KiB.
pub const TEMPLATE_BYTES_MAX: usize = 1 << 20;

/// Stack of the thread that a template runs on: macros may call each other to the engine's limit.
const STACK_BYTES: usize = 64 << 20;

/// A chat template that has been read.
///
/// ```
/// use std::collections::BTreeMap;
/// use std::path::Path;
/// use cairn_data::chat::{ChatInput, ChatTemplate};
/// use serde_json::json;
///
/// let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}";
/// let template = ChatTemplate::parse(source, Path::new("template.jinja"))?;
/// let messages = [json!({"role": "user", "content": "Hi"})];
/// let specials = BTreeMap::new();
/// let text = template.render(&ChatInput::new(&messages, &specials))?;
/// assert_eq!(text, "<|user|>Hi\n");
/// # Ok::<(), cairn_data::chat::ChatError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplate {
    source: String,
    path: PathBuf,
}

/// What a template is given.
#[derive(Clone, Copy, Debug)]
pub struct ChatInput<'a> {
    /// The conversation: objects with a `role` and whatever else the template reads.
    pub messages: &'a [serde_json::Value],
    /// Whether what the assistant said came from the model; otherwise a client wrote it, and special tokens in
    /// it are text as in everybody else's words.
    pub trusts_assistant: bool,
    /// Whether the text ends where the model's answer begins.
    pub add_generation_prompt: bool,
    /// Descriptions of functions the model may call.
    pub tools: Option<&'a [serde_json::Value]>,
    /// Special tokens by name, such as `bos_token`.
    pub special_tokens: &'a BTreeMap<String, String>,
    /// Further variables, such as `enable_thinking`.
    pub variables: Option<&'a Map<String, serde_json::Value>>,
    /// What `strftime_now` tells; without it templates that ask for the time fail.
    pub now: Option<DateTime>,
}

impl<'a> ChatInput<'a> {
    /// A conversation that ends, without tools or time.
    pub fn new(
        messages: &'a [serde_json::Value],
        special_tokens: &'a BTreeMap<String, String>,
    ) -> Self {
        Self {
            messages,
            trusts_assistant: true,
            add_generation_prompt: false,
            tools: None,
            special_tokens,
            variables: None,
            now: None,
        }
    }
}

impl ChatTemplate {
    /// Reads a template; `path` is used in errors only.
    ///
    /// # Errors
    ///
    /// [`ChatError::TooLong`] above [`TEMPLATE_BYTES_MAX`], [`ChatError::Template`] naming the line
    /// of a mistake, [`ChatError::TooMuch`] for constants of unreasonable size.
    pub fn parse(source: &str, path: &Path) -> Result<Self, ChatError> {
        if TEMPLATE_BYTES_MAX < source.len() {
            return Err(ChatError::TooLong {
                path: path.to_owned(),
                bytes: source.len(),
                limit: TEMPLATE_BYTES_MAX,
            });
        }
        // Marks for training only; their place is a scope of its own in transformers, too.
        let source = replace_tag(source, "generation", "with");
        let source = replace_tag(&source, "endgeneration", "endwith");
        let template = Self { source, path: path.to_owned() };
        let compile = || template.compile().map(|_| ());
        template.on_large_stack(compile)?.map_err(|error| template.error(&error, None))?;
        Ok(template)
    }

    /// The text of a conversation.
    ///
    /// The result depends on the input only. It takes at most [`CHAT_STEPS_MAX`] steps and
    /// [`CHAT_WORK_MAX`] units of work, which bounds its time and memory.
    ///
    /// # Errors
    ///
    /// [`ChatError::Raised`] if the template refuses the conversation, [`ChatError::Template`] if it
    /// fails, [`ChatError::TooMuch`] if it reaches a bound. All name the template's line.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, ChatError> {
        let budget = Arc::new(Budget::new());
        let root = root(input);
        let result = self.on_large_stack(|| self.evaluate(root, input.now, &budget))?;
        result.map_err(|error| self.error(&error, Some(&budget)))
    }

    /// Where the template came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn compile(&self) -> Result<Instructions<'_>, minijinja::Error> {
        let syntax = environment::syntax()?;
        constants::check(&self.source, &syntax)?;
        let ast = machinery::parse(&self.source, "template", syntax)?;
        let mut generator = CodeGenerator::new("template", &self.source);
        generator.compile_stmt(&ast);
        let (instructions, _) = generator.finish();
        rewrite::bounded(&instructions)
    }

    fn evaluate(
        &self,
        root: Value,
        now: Option<DateTime>,
        budget: &Arc<Budget>,
    ) -> Result<String, minijinja::Error> {
        let mut environment = Environment::empty();
        environment::fill(&mut environment, now, budget);
        let instructions = self.compile()?;
        let blocks = BTreeMap::new();
        let mut text = String::new();
        let mut output = machinery::make_string_output(&mut text);
        let none = AutoEscape::None;
        machinery::eval(&environment, &instructions, root, &blocks, &mut output, none)?;
        Ok(text)
    }

    fn on_large_stack<T: Send>(&self, run: impl FnOnce() -> T + Send) -> Result<T, ChatError> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
            let spawned = thread.spawn_scoped(scope, run).map_err(|error| ChatError::Template {
                path: self.path.clone(),
                line: None,
                reason: format!("there is no thread to run it: {error}"),
            })?;
            spawned.join().map_err(|_| ChatError::Template {
                path: self.path.clone(),
                line: None,
                reason: "the template engine failed".to_owned(),
            })
        })
    }

    fn error(&self, error: &minijinja::Error, budget: Option<&Budget>) -> ChatError {
        let (path, line) = (self.path.clone(), error.line());
        if let Some(message) = budget.and_then(Budget::raised) {
            return ChatError::Raised { path, line, message };
        }
        let reason = error.detail().map_or_else(|| error.kind().to_string(), ToOwned::to_owned);
        match error.kind() {
            minijinja::ErrorKind::OutOfFuel => ChatError::TooMuch { path, line, reason },
            _ => ChatError::Template { path, line, reason },
        }
    }
}

/// A time as templates are told it, in UTC; `None` beyond the year 9999.
pub fn utc(unix_seconds: u64) -> Option<DateTime> {
    let seconds = i64::try_from(unix_seconds).ok()?;
    let time = jiff::Timestamp::from_second(seconds).ok()?;
    Some(time.to_zoned(jiff::tz::TimeZone::UTC).datetime())
}

/// The variables that transformers gives a template.
fn root(input: &ChatInput<'_>) -> Value {
    let mut root: BTreeMap<&str, Value> = BTreeMap::new();
    for (name, token) in input.special_tokens {
        root.insert(name, Value::from(token.as_str()));
    }
    for (name, value) in input.variables.into_iter().flatten() {
        root.insert(name, python::value(value));
    }
    // A key without a value is no key: many templates only ask whether it is there. What is said has always one.
    let messages = input.messages.iter().map(|message| match message {
        serde_json::Value::Object(message) => {
            let stated =
                message.iter().filter(|(key, value)| !value.is_null() || *key == "content");
            Value::from_pairs(stated.map(|(key, value)| (key.as_str(), python::value(value))))
        }
        other => python::value(other),
    });
    root.insert("messages", Value::from(messages.collect::<Vec<Value>>()));
    root.insert("tools", input.tools.map_or_else(|| Value::from(()), values));
    root.insert("documents", Value::from(()));
    root.insert("add_generation_prompt", Value::from(input.add_generation_prompt));
    Value::from_pairs(root)
}

fn values(list: &[serde_json::Value]) -> Value {
    Value::from(list.iter().map(python::value).collect::<Vec<Value>>())
}

/// Renames a tag without arguments, keeping its whitespace control.
fn replace_tag(source: &str, from: &str, to: &str) -> String {
    let mut replaced = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        replaced.push_str(before);
        let inside = tag.trim_start_matches(['{', '%', '-', '+']).trim_start();
        let after = inside
            .strip_prefix(from)
            .filter(|after| after.trim_start().trim_start_matches(['-', '+']).starts_with("%}"));
        match after {
            Some(after) => {
                replaced.push_str(&tag[..tag.len() - inside.len()]);
                replaced.push_str(to);
                rest = after;
            }
            None => {
                replaced.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    replaced + rest
}

#[cfg(test)]
mod tests;

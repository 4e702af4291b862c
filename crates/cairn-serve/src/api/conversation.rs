//! A conversation as templates read it: what was said, what was thought, what was called and what came of it, in
//! an order that is one.

use cairn_data::chat::{ArgumentsAs, CallForm};
use serde_json::{Map, Value, json};

use super::Preparing;
use super::prompt;
use crate::error::ApiError;
use crate::outline::CALL_ID_CHARS;

/// Calls of a message, at most.
const CALLS_MAX: usize = 128;

/// A call that a client says was made.
#[derive(Clone, Debug)]
pub(super) struct Called {
    pub(super) id: String,
    pub(super) name: String,
    /// An object.
    pub(super) arguments: Value,
}

/// What an assistant is said to have answered.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    pub(super) text: Option<String>,
    pub(super) reasoning: Option<String>,
    pub(super) calls: Vec<Called>,
}

/// A call that waits for its result.
#[derive(Debug)]
struct Open {
    id: String,
    name: String,
}

/// A conversation that is being read.
#[derive(Debug)]
pub(super) struct Conversation<'a> {
    field: &'static str,
    /// How calls are written, if the template has a form for them.
    form: Option<&'a CallForm>,
    /// The name under which the template reads what was thought.
    reasoning: Option<&'static str>,
    messages: Vec<Value>,
    open: Vec<Open>,
}

impl<'a> Conversation<'a> {
    /// An empty one, in the field `field`.
    pub(super) fn new(preparing: Preparing<'a>, field: &'static str) -> Self {
        let shape = preparing.shape();
        let reasoning = shape.reasoning.as_ref().and_then(|markers| markers.field);
        let form = shape.calls.as_ref();
        Self { field, form, reasoning, messages: Vec::new(), open: Vec::new() }
    }

    /// An error in the part `path` of the field.
    pub(super) fn refuse(&self, path: &str, what: &str) -> ApiError {
        ApiError::field(self.field, format!("{}{path}{what}", self.field))
    }

    /// Somebody other than the assistant speaks.
    pub(super) fn say(&mut self, path: &str, role: &str, text: String) -> Result<(), ApiError> {
        self.check_closed(path)?;
        self.messages.push(prompt::message(role, text));
        Ok(())
    }

    /// The assistant has answered.
    pub(super) fn answer(&mut self, path: &str, answer: Answer) -> Result<(), ApiError> {
        self.check_closed(path)?;
        let Answer { text, reasoning, calls } = answer;
        let mut message = Map::new();
        message.insert("role".to_owned(), "assistant".into());
        let wants_null = self.form.is_some_and(|form| form.wants_null_content);
        let content = match text.filter(|text| calls.is_empty() || !text.is_empty()) {
            Some(text) => text.into(),
            None if wants_null => Value::Null,
            None => "".into(),
        };
        message.insert("content".to_owned(), content);
        if let (Some(name), Some(thought)) = (self.reasoning, reasoning) {
            message.insert(name.to_owned(), thought.into());
        }
        if !calls.is_empty() {
            let calls = self.calls(path, calls)?;
            message.insert("tool_calls".to_owned(), calls);
        }
        self.messages.push(message.into());
        Ok(())
    }

    fn calls(&mut self, path: &str, calls: Vec<Called>) -> Result<Value, ApiError> {
        let Some(form) = self.form else { return Err(no_form(self.field)) };
        if CALLS_MAX < calls.len() {
            let what = format!(" has {} calls, at most {CALLS_MAX}", calls.len());
            return Err(self.refuse(path, &what));
        }
        let mut written = Vec::with_capacity(calls.len());
        for Called { id, name, arguments } in calls {
            if self.open.iter().any(|open| open.id == id) {
                return Err(self.refuse(path, &format!(" has two calls with the id '{id}'")));
            }
            let arguments = match form.arguments {
                ArgumentsAs::Object => arguments,
                ArgumentsAs::Text => arguments.to_string().into(),
            };
            written.push(json!({
                "type": "function", "id": of_template(&id),
                "function": { "name": name, "arguments": arguments },
            }));
            self.open.push(Open { id, name });
        }
        Ok(written.into())
    }

    /// What came of a call.
    pub(super) fn result(&mut self, path: &str, id: &str, text: &str) -> Result<(), ApiError> {
        let Some(at) = self.open.iter().position(|open| open.id == id) else {
            let what =
                format!(" is for the call '{id}', which is none of those that wait for a result");
            return Err(self.refuse(path, &what));
        };
        let Open { name, .. } = self.open.remove(at);
        self.messages.push(json!({
            "role": "tool", "content": text, "tool_call_id": of_template(id), "name": name,
        }));
        Ok(())
    }

    fn check_closed(&self, path: &str) -> Result<(), ApiError> {
        match self.open.first() {
            Some(Open { id, .. }) => {
                Err(self.refuse(path, &format!(" comes before the result of the call '{id}'")))
            }
            None => Ok(()),
        }
    }

    /// The messages, the last of which is not the assistant's call.
    pub(super) fn finish(self) -> Result<Vec<Value>, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::field(self.field, format!("{} is empty", self.field)));
        }
        match self.open.first() {
            Some(Open { id, .. }) => {
                Err(self.refuse("", &format!(" ends before the result of the call '{id}'")))
            }
            None => Ok(self.messages),
        }
    }
}

/// Why nothing can be called.
pub(super) fn no_form(field: &'static str) -> ApiError {
    let message = "this model's chat template has no form of calls whose arguments are JSON: \
                   ask without tools, or serve it with --chat-template and one that has";
    ApiError::field(field, message)
}

/// An id as templates want it: nine letters and digits, those that were given out here if it is one of ours.
fn of_template(id: &str) -> String {
    let is_short = |id: &&str| {
        id.len() == CALL_ID_CHARS && id.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    let own =
        ["call_", "toolu_", ""].iter().find_map(|prefix| id.strip_prefix(prefix).filter(is_short));
    own.map_or_else(
        || blake3::hash(id.as_bytes()).to_hex()[..CALL_ID_CHARS].to_owned(),
        ToOwned::to_owned,
    )
}

/// The arguments of a call: the JSON of an object.
pub(super) fn arguments(text: &str) -> Result<Value, String> {
    match cairn_spec::unique_json::parse(text) {
        Ok(object @ Value::Object(_)) => Ok(object),
        Ok(_) => Err(" is not the JSON of an object".to_owned()),
        Err(error) => Err(format!(" is no JSON: {error}")),
    }
}

/// Reads the messages of a chat.
pub(super) fn of_chat(
    preparing: Preparing<'_>,
    messages: Vec<Map<String, Value>>,
) -> Result<Vec<Value>, ApiError> {
    let mut conversation = Conversation::new(preparing, "messages");
    for (index, mut found) in messages.into_iter().enumerate() {
        let path = format!("[{index}]");
        let role = take_role(&mut found);
        let content = found.remove("content").unwrap_or_default();
        let refuse = |what: &str| conversation.refuse(&path, what);
        match role.as_str() {
            "assistant" => {
                let answer = answer_of_chat(&mut found, content).map_err(|what| refuse(&what))?;
                check_left(&found).map_err(|what| refuse(&what))?;
                conversation.answer(&path, answer)?;
            }
            "tool" => {
                let id = take_text(&mut found, "tool_call_id");
                let id = id.and_then(|id| id.ok_or_else(|| ".tool_call_id is missing".to_owned()));
                let id = id.map_err(|what| refuse(&what))?;
                // It says again what the call says.
                take_text(&mut found, "name").map_err(|what| refuse(&what))?;
                let text = prompt::text(content, &["text"]);
                let text = text.map_err(|what| refuse(&format!(".content{what}")))?;
                check_left(&found).map_err(|what| refuse(&what))?;
                conversation.result(&path, &id, &text)?;
            }
            "system" | "developer" | "user" => {
                let text = prompt::text(content, &["text"]);
                let text = text.map_err(|what| refuse(&format!(".content{what}")))?;
                check_left(&found).map_err(|what| refuse(&what))?;
                conversation.say(&path, &role, text)?;
            }
            other => {
                return Err(refuse(&format!(
                    ".role is '{other}', which is none of system, developer, user, assistant, tool"
                )));
            }
        }
    }
    conversation.finish()
}

pub(super) fn take_role(found: &mut Map<String, Value>) -> String {
    match found.remove("role") {
        Some(Value::String(role)) => role,
        _ => String::new(),
    }
}

/// Takes a text that may be missing.
pub(super) fn take_text(
    found: &mut Map<String, Value>,
    name: &str,
) -> Result<Option<String>, String> {
    match found.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!(".{name} is no text")),
    }
}

/// Refuses what nobody took, unless it says nothing.
pub(super) fn check_left(found: &Map<String, Value>) -> Result<(), String> {
    let says_nothing =
        |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    match found.iter().find(|(_, value)| !says_nothing(value)) {
        Some((other, _)) => Err(format!(".{other} is not supported here")),
        None => Ok(()),
    }
}

fn answer_of_chat(found: &mut Map<String, Value>, content: Value) -> Result<Answer, String> {
    let calls = match found.remove("tool_calls") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(calls)) => calls,
        Some(_) => return Err(".tool_calls is no list".to_owned()),
    };
    let text = match content {
        Value::Null if !calls.is_empty() => None,
        content => {
            let text = prompt::text(content, &["text"]);
            Some(text.map_err(|what| format!(".content{what}"))?)
        }
    };
    let [older, newer] = [take_text(found, "reasoning_content")?, take_text(found, "reasoning")?];
    let called = |(at, call): (usize, Value)| {
        call_of_chat(call).map_err(|what| format!(".tool_calls[{at}]{what}"))
    };
    let calls = calls.into_iter().enumerate().map(called).collect::<Result<_, _>>()?;
    Ok(Answer { text, reasoning: older.or(newer), calls })
}

fn call_of_chat(call: Value) -> Result<Called, String> {
    let Value::Object(mut call) = call else { return Err(" is no object".to_owned()) };
    if let Some(kind) = call.remove("type").filter(|kind| kind != "function") {
        return Err(format!(".type is {kind}; only functions are called here"));
    }
    let Some(Value::Object(mut function)) = call.remove("function") else {
        return Err(".function is no object".to_owned());
    };
    // Streams have it, and clients give it back.
    call.remove("index");
    let id = take_text(&mut call, "id")?.ok_or(".id is missing")?;
    check_left(&call)?;
    let within = |what: String| format!(".function{what}");
    let name = take_text(&mut function, "name").map_err(within)?;
    let name = name.ok_or(".function.name is missing")?;
    let text = take_text(&mut function, "arguments").map_err(within)?;
    let text = text.ok_or(".function.arguments is missing")?;
    check_left(&function).map_err(within)?;
    let arguments = arguments(&text).map_err(|what| format!(".function.arguments{what}"))?;
    Ok(Called { id, name, arguments })
}

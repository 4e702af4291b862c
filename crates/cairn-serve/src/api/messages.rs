//! `/v1/messages`: conversations answered as Anthropic's API does (version 2023-06-01), with its errors.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::asked::{Asked, Wanted};
use super::conversation::{Answer, Called, Conversation, check_left, take_role, take_text};
use super::format::{Format, Message};
use super::head::Counts;
use super::prompt::Variables;
use super::tools::Tools;
use super::{Job, Preparing, generate, prepared, prompt};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::intake::Body;
use crate::model::ServedParts;
use crate::outline::CallDelta;
use crate::reply::{End, Piece};
use crate::server::Shared;

/// A refusal, as Anthropic writes it.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) ApiError);

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        self.0.respond(self.0.messages_body())
    }
}

/// Answers a conversation.
pub(crate) async fn messages(
    State(shared): State<Arc<Shared>>,
    body: Result<Body, ApiError>,
) -> Result<Response, Refused> {
    Ok(generate(shared, body?, job).await?)
}

/// Counts the tokens of a conversation.
pub(crate) async fn count_tokens(
    State(shared): State<Arc<Shared>>,
    body: Result<Body, ApiError>,
) -> Result<Json<Value>, Refused> {
    let count = |preparing: Preparing<'_>, mut fields: Fields| {
        preparing.take_model(&mut fields)?;
        let prompt = Prompt::take(preparing, fields)?.ids;
        Ok(json!({ "input_tokens": prompt.len() }))
    };
    Ok(Json(prepared(&shared, body?, count).await?.0))
}

/// What a message is answered from.
struct Prompt {
    ids: Vec<u32>,
    tools: Tools,
    /// Tokens of what is thought, at most.
    thinking_budget: Option<(&'static str, usize)>,
}

impl Prompt {
    /// Takes the conversation, and refuses what is left.
    fn take(preparing: Preparing<'_>, mut fields: Fields) -> Result<Self, ApiError> {
        let found: Vec<Map<String, Value>> = fields.need("messages")?;
        let system: Option<Value> = fields.take("system")?;
        let tools = Tools::take_of_message(&mut fields)?;
        let mut variables = Variables::new();
        let thinking_budget = take_thinking(preparing, &mut fields, &mut variables)?;
        for name in ["container", "context_management", "mcp_servers", "service_tier"] {
            fields.lacking(name, &[])?;
        }
        fields.finish()?;
        let messages = conversation(preparing, system, found)?;
        let ids = prompt::encode(preparing, "messages", &messages, (&tools, &variables))?;
        Ok(Self { ids, tools, thinking_budget })
    }
}

/// Takes whether anything is to be thought, and how much.
fn take_thinking(
    preparing: Preparing<'_>,
    fields: &mut Fields,
    variables: &mut Variables,
) -> Result<Option<(&'static str, usize)>, ApiError> {
    const NAME: &str = "thinking";
    let Some(mut thinking) = fields.take::<Map<String, Value>>(NAME)? else { return Ok(None) };
    let refuse = |what: String| Err(ApiError::field(NAME, format!("{NAME}{what}")));
    let kind = thinking.remove("type").unwrap_or_default();
    let budget = thinking.remove("budget_tokens");
    if let Err(what) = check_left(&thinking) {
        return refuse(what);
    }
    let has_markers = preparing.shape().reasoning.is_some();
    match (kind.as_str(), budget) {
        (Some("enabled" | "adaptive"), _) if !has_markers => {
            refuse(": this model does not tell what it thinks from what it says".to_owned())
        }
        (Some("enabled"), Some(budget)) => {
            let Some(budget) = budget.as_u64().and_then(|budget| usize::try_from(budget).ok())
            else {
                return refuse(format!(".budget_tokens is {budget}, which is no number of tokens"));
            };
            prompt::set_thinking(preparing, true, variables);
            Ok(Some((NAME, budget)))
        }
        (Some("enabled"), None) => refuse(".budget_tokens is missing".to_owned()),
        (Some("adaptive"), None) => Ok(None),
        // A model that cannot be told is stopped when it begins to.
        (Some("disabled"), None) if prompt::set_thinking(preparing, false, variables) => Ok(None),
        (Some("disabled"), None) => Ok(has_markers.then_some((NAME, 0))),
        (Some("adaptive" | "disabled"), Some(_)) => {
            refuse(".budget_tokens is only for type = enabled".to_owned())
        }
        _ => refuse(format!(".type is {kind}, none of enabled, adaptive, disabled")),
    }
}

/// The conversation as templates read it.
fn conversation(
    preparing: Preparing<'_>,
    system: Option<Value>,
    found: Vec<Map<String, Value>>,
) -> Result<Vec<Value>, ApiError> {
    let mut conversation = Conversation::new(preparing, "messages");
    if found.is_empty() {
        return conversation.finish();
    }
    if let Some(system) = system {
        let text = prompt::text(system, &["text"]);
        let text = text.map_err(|what| ApiError::field("system", format!("system{what}")))?;
        conversation.say("", "system", text)?;
    }
    let mut begun = None;
    for (index, mut message) in found.into_iter().enumerate() {
        let path = format!("[{index}]");
        let role = take_role(&mut message);
        begun = (role == "assistant").then(|| path.clone());
        let content = message.remove("content").unwrap_or_default();
        let refuse = |what: String| conversation.refuse(&path, &what);
        check_left(&message).map_err(refuse)?;
        let blocks = match (content, role.as_str()) {
            (Value::Array(blocks), "user" | "assistant") => blocks,
            (content, "user" | "assistant" | "system") => {
                let text = prompt::text(content, &["text"]);
                let text = text.map_err(|what| refuse(format!(".content{what}")))?;
                match role.as_str() {
                    "assistant" => {
                        let answer = Answer { text: Some(text), ..Answer::default() };
                        conversation.answer(&path, answer)?;
                    }
                    role => conversation.say(&path, role, text)?,
                }
                continue;
            }
            _ => {
                let what = format!(".role is '{role}', which is none of user, assistant, system");
                return Err(refuse(what));
            }
        };
        match role.as_str() {
            "assistant" => {
                let answer = answer_of(blocks).map_err(refuse)?;
                conversation.answer(&path, answer)?;
            }
            _ => user_says(&mut conversation, &path, blocks)?,
        }
    }
    let messages = conversation.finish()?;
    match begun {
        Some(path) => {
            let what = ".role is 'assistant', and it is the last one: an answer that was begun is \
                        not continued here";
            Err(ApiError::field("messages", format!("messages{path}{what}")))
        }
        None => Ok(messages),
    }
}

/// Reads what a user says: first what came of calls, then text.
fn user_says(
    conversation: &mut Conversation<'_>,
    path: &str,
    blocks: Vec<Value>,
) -> Result<(), ApiError> {
    let is_empty = blocks.is_empty();
    let mut text: Option<String> = None;
    let mut has_results = false;
    for (at, block) in blocks.into_iter().enumerate() {
        let path = format!("{path}.content[{at}]");
        if block.get("type").and_then(Value::as_str) != Some("tool_result") {
            let part = prompt::part(block, &["text"]);
            let part = part.map_err(|what| conversation.refuse(&path, &what))?;
            text.get_or_insert_default().push_str(&part);
            continue;
        }
        if text.is_some() {
            return Err(
                conversation.refuse(&path, " is a result behind a text: results come first")
            );
        }
        let (id, result) = result_of(block).map_err(|what| conversation.refuse(&path, &what))?;
        conversation.result(&path, &id, &result)?;
        has_results = true;
    }
    match text {
        Some(text) => conversation.say(path, "user", text),
        None if has_results => Ok(()),
        None if is_empty => Err(conversation.refuse(path, ".content is empty")),
        None => Ok(()),
    }
}

/// Reads what came of a call: its id and a text.
fn result_of(block: Value) -> Result<(String, String), String> {
    let Value::Object(mut block) = block else { return Err(" is no object".to_owned()) };
    block.remove("type");
    block.remove("cache_control");
    let id = take_text(&mut block, "tool_use_id")?.ok_or(".tool_use_id is missing")?;
    let is_error = match block.remove("is_error") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(is_error)) => is_error,
        Some(_) => return Err(".is_error is neither true nor false".to_owned()),
    };
    let content = block.remove("content").filter(|content| !content.is_null());
    check_left(&block)?;
    let text = prompt::text(content.unwrap_or_else(|| "".into()), &["text"]);
    let text = text.map_err(|what| format!(".content{what}"))?;
    // Templates know no other way to say so.
    Ok((id, if is_error { format!("Error: {text}") } else { text }))
}

/// Reads what an assistant is said to have answered.
fn answer_of(blocks: Vec<Value>) -> Result<Answer, String> {
    let mut answer = Answer::default();
    for (at, block) in blocks.into_iter().enumerate() {
        let refuse = |what: &str| format!(".content[{at}]{what}");
        let Value::Object(mut block) = block else { return Err(refuse(" is no object")) };
        let kind = take_text(&mut block, "type").map_err(|what| refuse(&what))?;
        block.remove("cache_control");
        let mut text = |name: &str| {
            let text = take_text(&mut block, name).map_err(|what| refuse(&what))?;
            text.ok_or_else(|| refuse(&format!(".{name} is missing")))
        };
        match kind.as_deref() {
            Some("text") if answer.calls.is_empty() => {
                answer.text.get_or_insert_default().push_str(&text("text")?);
            }
            Some("text") => return Err(refuse(" is a text behind a call")),
            Some("thinking") => {
                answer.reasoning.get_or_insert_default().push_str(&text("thinking")?);
                // It says who has thought it, and all of it came from the client here.
                text("signature").ok();
            }
            Some("tool_use") => {
                let (id, name) = (text("id")?, text("name")?);
                let arguments = block.remove("input").filter(Value::is_object);
                let arguments = arguments.ok_or_else(|| refuse(".input is no object"))?;
                answer.calls.push(Called { id, name, arguments });
            }
            kind => {
                let kind = kind.unwrap_or("nothing");
                return Err(refuse(&format!(".type is {kind}, not text, thinking or tool_use")));
            }
        }
        check_left(&block).map_err(|what| refuse(&what))?;
    }
    Ok(answer)
}

fn job(preparing: Preparing<'_>, mut fields: Fields) -> Result<Job, ApiError> {
    let mut asked = Asked::take(&mut fields, preparing, "stop_sequences")?;
    asked.max_tokens = Some(fields.need("max_tokens")?);
    // Names the end user to the provider; nothing here depends on it, nor is it kept.
    let _metadata: Option<Map<String, Value>> = fields.take("metadata")?;
    let Prompt { ids, tools, thinking_budget } = Prompt::take(preparing, fields)?;
    asked
        .plan(preparing, Wanted { grammar: None, tools: &tools, prompt: &ids, thinking_budget })?;
    let requests = vec![asked.request(preparing, &ids, 0, 0)?];
    let format = Messages {
        id: preparing.id("msg"),
        model: preparing.parts().name.clone(),
        num_prompt: ids.len(),
        counts: Counts::default(),
        open: None,
        num_blocks: 0,
        has_called: false,
    };
    asked.job(requests, format.num_prompt, format)
}

/// What a block of an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    /// Which of the calls.
    ToolUse(usize),
}

struct Messages {
    id: String,
    model: String,
    num_prompt: usize,
    counts: Counts,
    /// The block that is being streamed.
    open: Option<Block>,
    num_blocks: usize,
    has_called: bool,
}

impl Messages {
    /// The message, with what is known of it.
    fn message(&self, content: &Value, end: Option<&End>) -> Value {
        let (reason, sequence) = self.stop_reason(end);
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self.usage(),
        })
    }

    /// The numbers of tokens, as Anthropic counts them: what was in the cache apart.
    fn usage(&self) -> Value {
        json!({
            "input_tokens": self.num_prompt - self.counts.num_cached,
            "cache_read_input_tokens": self.counts.num_cached,
            "output_tokens": self.counts.num_new,
        })
    }

    /// Why the answer ended, and at which stop string.
    fn stop_reason<'e>(&self, end: Option<&'e End>) -> (Option<&'static str>, Option<&'e str>) {
        match end {
            None => (None, None),
            Some(End::Stop) if self.has_called => (Some("tool_use"), None),
            Some(End::Stop) => (Some("end_turn"), None),
            Some(End::StopString(found)) => (Some("stop_sequence"), Some(found)),
            Some(End::Length) => (Some("max_tokens"), None),
        }
    }

    /// Begins a block, unless it is open already; what was open before ends.
    fn open(&mut self, block: Block, content: &Value, messages: &mut Vec<Message>) {
        if self.open == Some(block) {
            return;
        }
        self.close(messages);
        let start = json!({ "index": self.num_blocks, "content_block": content });
        messages.push(event("content_block_start", start));
        self.open = Some(block);
        self.num_blocks += 1;
    }

    fn close(&mut self, messages: &mut Vec<Message>) {
        if self.open.take().is_some() {
            let index = self.num_blocks - 1;
            messages.push(event("content_block_stop", json!({ "index": index })));
        }
    }

    fn delta(&self, delta: &Value) -> Message {
        event("content_block_delta", json!({ "index": self.num_blocks - 1, "delta": delta }))
    }

    /// The blocks of a whole answer. A call that was cut off is none.
    fn content(answer: &Piece) -> Value {
        let mut content = Vec::new();
        if !answer.reasoning.is_empty() {
            content.push(thinking_block(&answer.reasoning));
        }
        if !answer.text.is_empty() || (content.is_empty() && answer.calls.is_empty()) {
            content.push(json!({ "type": "text", "text": answer.text }));
        }
        for call in &answer.calls {
            let input = serde_json::from_str::<Value>(&call.arguments);
            content.extend(input.ok().map(|input| tool_block(call, input)));
        }
        content.into()
    }
}

fn thinking_block(thought: &str) -> Value {
    json!({ "type": "thinking", "thinking": thought, "signature": "" })
}

fn tool_block(call: &CallDelta, input: Value) -> Value {
    let (id, name) = call.head.clone().unwrap_or_default();
    json!({ "type": "tool_use", "id": format!("toolu_{id}"), "name": name, "input": input })
}

/// An event, named as its type.
fn event(name: &'static str, mut data: Value) -> Message {
    data["type"] = name.into();
    Message { event: Some(name), data: data.to_string() }
}

impl Format for Messages {
    fn whole(mut self: Box<Self>, _: &ServedParts, answers: Vec<Piece>) -> Value {
        let answer = answers.into_iter().next().unwrap_or_default();
        self.counts.note(&answer, true);
        self.has_called = !answer.calls.is_empty();
        self.message(&Self::content(&answer), answer.end.as_ref())
    }

    fn begin(&mut self) -> Vec<Message> {
        vec![event("message_start", json!({ "message": self.message(&json!([]), None) }))]
    }

    fn piece(&mut self, _: &ServedParts, _: usize, piece: Piece) -> Vec<Message> {
        self.counts.note(&piece, true);
        let mut messages = Vec::with_capacity(3);
        if !piece.reasoning.is_empty() {
            self.open(Block::Thinking, &thinking_block(""), &mut messages);
            let delta = json!({ "type": "thinking_delta", "thinking": piece.reasoning });
            messages.push(self.delta(&delta));
        }
        let is_empty = self.num_blocks == 0 && piece.end.is_some() && piece.calls.is_empty();
        if !piece.text.is_empty() || is_empty {
            self.open(Block::Text, &json!({ "type": "text", "text": "" }), &mut messages);
        }
        if !piece.text.is_empty() {
            messages.push(self.delta(&json!({ "type": "text_delta", "text": piece.text })));
        }
        for call in &piece.calls {
            self.has_called = true;
            let block = Block::ToolUse(call.index);
            self.open(block, &tool_block(call, json!({})), &mut messages);
            if !call.arguments.is_empty() {
                let delta = json!({ "type": "input_json_delta", "partial_json": call.arguments });
                messages.push(self.delta(&delta));
            }
        }
        if let Some(end) = &piece.end {
            self.close(&mut messages);
            let (reason, sequence) = self.stop_reason(Some(end));
            let delta = json!({ "stop_reason": reason, "stop_sequence": sequence });
            let usage = self.usage();
            messages.push(event("message_delta", json!({ "delta": delta, "usage": usage })));
        }
        messages
    }

    fn end(&mut self) -> Vec<Message> {
        vec![event("message_stop", json!({}))]
    }

    fn failed(&mut self, error: &ApiError) -> Vec<Message> {
        vec![event("error", error.messages_body())]
    }
}

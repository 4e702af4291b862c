//! `/v1/responses`: `OpenAI`'s newer form of a conversation. Nothing is stored: a request says all of its
//! conversation, and one that refers to an earlier answer is refused.

use serde_json::{Map, Value, json};

use super::asked::{Asked, Wanted, take_user};
use super::conversation::{
    Answer, Called, Conversation, arguments, check_left, take_role, take_text,
};
use super::format::{Format, Message};
use super::prompt::Variables;
use super::tools::Tools;
use super::{Job, Preparing, prompt};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::model::ServedParts;
use crate::outline::CallDelta;
use crate::reply::{End, Piece};

/// Fields that are not there yet and have no value that asks for nothing.
const LACKING: [&str; 7] = [
    "conversation",
    "max_tool_calls",
    "previous_response_id",
    "prompt",
    "safety_identifier",
    "service_tier",
    "stream_options",
];

/// Answers a conversation.
pub(crate) fn job(preparing: Preparing<'_>, mut fields: Fields) -> Result<Job, ApiError> {
    let mut asked = Asked::take(&mut fields, preparing, "stop")?;
    take_user(&mut fields)?;
    asked.max_tokens = fields.take("max_output_tokens")?;
    let input: Value = fields.need("input")?;
    let instructions: Option<String> = fields.take("instructions")?;
    let metadata: Option<Map<String, Value>> = fields.take("metadata")?;
    fields.lacking("background", &[json!(false)])?;
    fields.lacking("include", &[json!([])])?;
    let tools = Tools::take_of_response(&mut fields)?;
    let mut variables = Variables::new();
    take_reasoning(preparing, &mut fields, &mut variables)?;
    // What is asked to be stored is not, and the answer says so.
    let _store: Option<bool> = fields.take("store")?;
    let text: Option<Map<String, Value>> = fields.take("text")?;
    fields.lacking("top_logprobs", &[json!(0)])?;
    fields.lacking("truncation", &[json!("disabled")])?;
    LACKING.iter().try_for_each(|name| fields.lacking(name, &[]))?;
    fields.finish()?;
    let text = text.unwrap_or_default();
    let messages = conversation(preparing, instructions.clone(), input)?;
    let grammar = format(text.clone())?;
    let thinking_budget = None;
    let prompt = prompt::encode(preparing, "input", &messages, (&tools, &variables))?;
    let wanted = Wanted { grammar, tools: &tools, prompt: &prompt, thinking_budget };
    asked.plan(preparing, wanted)?;
    let requests = vec![asked.request(preparing, &prompt, 0, usize::MAX)?];
    let (tool_choice, described) = tools.of_response();
    let about = json!({
        "id": preparing.id("resp"),
        "object": "response",
        "created_at": (preparing.shared.now)(),
        "model": preparing.parts().name,
        "instructions": instructions,
        "max_output_tokens": asked.max_tokens,
        "metadata": metadata.unwrap_or_default(),
        "parallel_tool_calls": tools.is_parallel,
        "previous_response_id": null,
        "store": false,
        "temperature": plain(asked.sampling.temperature),
        "text": text_of(text),
        "tool_choice": tool_choice,
        "tools": described,
        "top_p": plain(asked.sampling.top_p.unwrap_or(1.0)),
        "truncation": "disabled",
    });
    let format = Responses {
        about,
        id: preparing.id(""),
        num_prompt: prompt.len(),
        so_far: Piece::default(),
        open: Vec::new(),
        num_events: 0,
    };
    asked.job(requests, format.num_prompt, format)
}

/// A number as it was written, not as the double next to its float.
fn plain(number: f32) -> Value {
    number.to_string().parse::<f64>().unwrap_or_default().into()
}

/// What the answer's text follows.
fn format(mut text: Map<String, Value>) -> Result<Option<Grammar>, ApiError> {
    let format = text.remove("format");
    if let Some((name, value)) = text.iter().find(|(_, value)| !value.is_null()) {
        let message = format!("text.{name} = {value} is not supported here");
        return Err(ApiError::field("text", message));
    }
    match format {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(format)) => Grammar::of_format("text", format, ""),
        Some(other) => Err(ApiError::field("text", format!("text.format is {other}"))),
    }
}

/// What is said of the text's format.
fn text_of(text: Map<String, Value>) -> Value {
    match text.get("format") {
        Some(Value::Object(_)) => text.into(),
        _ => json!({ "format": { "type": "text" } }),
    }
}

/// Takes how much is to be thought.
fn take_reasoning(
    preparing: Preparing<'_>,
    fields: &mut Fields,
    variables: &mut Variables,
) -> Result<(), ApiError> {
    const NAME: &str = "reasoning";
    let mut reasoning: Map<String, Value> = fields.take(NAME)?.unwrap_or_default();
    let effort = take_text(&mut reasoning, "effort");
    let effort = effort.and_then(|effort| check_left(&reasoning).map(|()| effort));
    let effort = effort.map_err(|what| ApiError::field(NAME, format!("{NAME}{what}")))?;
    prompt::set_effort(preparing, NAME, effort, variables)
}

/// The conversation: a text, or items. What was thought, said and called one after the other is one answer.
fn conversation(
    preparing: Preparing<'_>,
    instructions: Option<String>,
    input: Value,
) -> Result<Vec<Value>, ApiError> {
    const NAME: &str = "input";
    let mut conversation = Conversation::new(preparing, NAME);
    let list = match input {
        Value::String(text) => {
            let message = json!({ "role": "user", "content": text });
            vec![message]
        }
        Value::Array(list) => list,
        _ => return Err(ApiError::field(NAME, "input is neither a text nor a list of items")),
    };
    if list.is_empty() {
        return conversation.finish();
    }
    if let Some(instructions) = instructions {
        conversation.say("", "system", instructions)?;
    }
    let mut answer = None;
    for (index, item) in list.into_iter().enumerate() {
        let path = format!("[{index}]");
        match read_item(item).map_err(|what| conversation.refuse(&path, &what))? {
            Item::Part(part) => {
                let before: Answer = answer.take().unwrap_or_default();
                let (before, now) = joined(before, part);
                if let Some(before) = before {
                    conversation.answer(&path, before)?;
                }
                answer = Some(now);
            }
            other => {
                if let Some(answer) = answer.take() {
                    conversation.answer(&path, answer)?;
                }
                match other {
                    Item::Said(role, text) => conversation.say(&path, &role, text)?,
                    Item::Result(id, text) => conversation.result(&path, &id, &text)?,
                    Item::Part(_) => {}
                }
            }
        }
    }
    if let Some(answer) = answer {
        conversation.answer("", answer)?;
    }
    conversation.finish()
}

/// An item of the conversation.
enum Item {
    /// Somebody other than the assistant has spoken.
    Said(String, String),
    /// A part of an answer.
    Part(Answer),
    /// What came of a call.
    Result(String, String),
}

/// An answer with a part that comes next, after an answer that had ended before.
fn joined(before: Answer, part: Answer) -> (Option<Answer>, Answer) {
    let has_called = !before.calls.is_empty();
    let begins = (part.reasoning.is_some()
        && (before.reasoning.is_some() || before.text.is_some() || has_called))
        || (part.text.is_some() && (before.text.is_some() || has_called));
    if begins {
        return (Some(before), part);
    }
    let mut calls = before.calls;
    calls.extend(part.calls);
    let reasoning = before.reasoning.or(part.reasoning);
    (None, Answer { text: before.text.or(part.text), reasoning, calls })
}

fn read_item(item: Value) -> Result<Item, String> {
    let Value::Object(mut item) = item else { return Err(" is no item".to_owned()) };
    // An answer given back has these.
    item.remove("id");
    item.remove("status");
    let kind = take_text(&mut item, "type")?.unwrap_or_else(|| "message".to_owned());
    let mut need = |name: &str| take_text(&mut item, name)?.ok_or(format!(".{name} is missing"));
    let read = match kind.as_str() {
        "message" => {
            let role = take_role(&mut item);
            let content = item.remove("content").unwrap_or_default();
            let text = prompt::text(content, &["input_text", "output_text"]);
            let text = text.map_err(|what| format!(".content{what}"))?;
            match role.as_str() {
                "assistant" => Item::Part(Answer { text: Some(text), ..Answer::default() }),
                "system" | "developer" | "user" => Item::Said(role, text),
                _ => {
                    return Err(format!(
                        ".role is '{role}', which is none of system, developer, user, assistant"
                    ));
                }
            }
        }
        "function_call" => {
            let (id, name, text) = (need("call_id")?, need("name")?, need("arguments")?);
            let arguments = arguments(&text).map_err(|what| format!(".arguments{what}"))?;
            let calls = vec![Called { id, name, arguments }];
            Item::Part(Answer { calls, ..Answer::default() })
        }
        "function_call_output" => {
            let id = need("call_id")?;
            let text = prompt::text(item.remove("output").unwrap_or_default(), &["input_text"]);
            Item::Result(id, text.map_err(|what| format!(".output{what}"))?)
        }
        "reasoning" => {
            let content = item.remove("content").filter(|content| !content.is_null());
            let text = prompt::text(content.unwrap_or_else(|| json!([])), &["reasoning_text"]);
            let text = text.map_err(|what| format!(".content{what}"))?;
            Item::Part(Answer { reasoning: Some(text), ..Answer::default() })
        }
        _ => {
            return Err(format!(
                ".type is {kind}; messages, function calls, their outputs and reasoning are read"
            ));
        }
    };
    check_left(&item)?;
    Ok(read)
}

/// An item of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    Reasoning,
    Message,
    /// Which of the calls.
    Call(usize),
}

struct Responses {
    /// What is said of the response whatever its answer is.
    about: Value,
    /// What the names of its items end with.
    id: String,
    num_prompt: usize,
    so_far: Piece,
    /// The items that have been begun; only the last may be open.
    open: Vec<Output>,
    num_events: usize,
}

impl Responses {
    fn item_id(&self, output: Output) -> String {
        match output {
            Output::Reasoning => format!("rs{}", self.id),
            Output::Message => format!("msg{}", self.id),
            Output::Call(index) => format!("fc{}-{index}", self.id),
        }
    }

    /// The part of an item with its text.
    fn part(&self, output: Output) -> Value {
        match output {
            Output::Reasoning => json!({ "type": "reasoning_text", "text": self.so_far.reasoning }),
            Output::Message | Output::Call(_) => json!({
                "type": "output_text", "text": self.so_far.text, "annotations": [], "logprobs": [],
            }),
        }
    }

    /// An item, as far as it is known; empty where it begins.
    fn item(&self, output: Output, status: &str) -> Value {
        let is_begun = status != "in_progress";
        let parts = if is_begun { vec![self.part(output)] } else { Vec::new() };
        let id = self.item_id(output);
        match output {
            Output::Reasoning => json!({
                "id": id, "type": "reasoning", "status": status, "summary": [], "content": parts,
            }),
            Output::Message => json!({
                "id": id, "type": "message", "status": status, "role": "assistant",
                "content": parts,
            }),
            Output::Call(index) => {
                let call = self.so_far.calls.get(index).cloned().unwrap_or_default();
                let (call_id, name) = call.head.unwrap_or_default();
                let arguments = if is_begun { call.arguments } else { String::new() };
                json!({
                    "id": id, "type": "function_call", "status": status,
                    "call_id": format!("call_{call_id}"), "name": name, "arguments": arguments,
                })
            }
        }
    }

    /// The items of the answer, as far as it is known.
    fn outputs(&self) -> Vec<Output> {
        let Piece { reasoning, text, calls, .. } = &self.so_far;
        let mut outputs = Vec::new();
        if !reasoning.is_empty() {
            outputs.push(Output::Reasoning);
        }
        if !text.is_empty() || (reasoning.is_empty() && calls.is_empty()) {
            outputs.push(Output::Message);
        }
        outputs.extend((0..calls.len()).map(Output::Call));
        outputs
    }

    fn status(&self) -> &'static str {
        match self.so_far.end {
            None => "in_progress",
            Some(End::Length) => "incomplete",
            Some(End::Stop | End::StopString(_)) => "completed",
        }
    }

    /// The response as far as it is known.
    fn response(&self) -> Value {
        let status = self.status();
        let has_ended = self.so_far.end.is_some();
        let mut found = self.about.clone();
        found["status"] = status.into();
        found["error"] = Value::Null;
        found["incomplete_details"] = match status {
            "incomplete" => json!({ "reason": "max_output_tokens" }),
            _ => Value::Null,
        };
        found["output"] = match has_ended {
            true => {
                let outputs = self.outputs();
                let last = outputs.len() - 1;
                // What is not the last was not cut off.
                let status = |at: usize| if at == last { status } else { "completed" };
                let items = outputs.iter().enumerate();
                items.map(|(at, output)| self.item(*output, status(at))).collect()
            }
            false => json!([]),
        };
        let num_new = self.so_far.num_tokens;
        found["usage"] = match has_ended {
            true => json!({
                "input_tokens": self.num_prompt,
                "input_tokens_details": { "cached_tokens": self.so_far.num_cached },
                "output_tokens": num_new,
                "output_tokens_details": { "reasoning_tokens": self.so_far.num_reasoning },
                "total_tokens": self.num_prompt + num_new,
            }),
            false => Value::Null,
        };
        found
    }

    /// An event, named as its type and numbered.
    fn event(&mut self, name: &'static str, mut data: Value) -> Message {
        data["type"] = name.into();
        data["sequence_number"] = self.num_events.into();
        self.num_events += 1;
        Message { event: Some(name), data: data.to_string() }
    }

    /// An event about the item that is open.
    fn item_event(&mut self, name: &'static str, mut data: Value) -> Message {
        let at = self.open.len() - 1;
        let output = self.open[at];
        data["item_id"] = self.item_id(output).into();
        data["output_index"] = at.into();
        if !matches!(output, Output::Call(_)) {
            data["content_index"] = 0.into();
        }
        self.event(name, data)
    }

    /// Begins an item, unless it is open already; what was open before ends.
    fn open(&mut self, output: Output, messages: &mut Vec<Message>) {
        if self.open.last() == Some(&output) {
            return;
        }
        self.close("completed", messages);
        self.open.push(output);
        let item = self.item(output, "in_progress");
        let added = json!({ "output_index": self.open.len() - 1, "item": item });
        messages.push(self.event("response.output_item.added", added));
        let part = match output {
            Output::Call(_) => return,
            Output::Reasoning => json!({ "type": "reasoning_text", "text": "" }),
            Output::Message => {
                json!({ "type": "output_text", "text": "", "annotations": [], "logprobs": [] })
            }
        };
        messages.push(self.item_event("response.content_part.added", json!({ "part": part })));
    }

    /// Ends the item that is open.
    fn close(&mut self, status: &str, messages: &mut Vec<Message>) {
        let Some(&output) = self.open.last() else { return };
        let item = self.item(output, status);
        let part = self.part(output);
        match output {
            Output::Call(_) => {
                let done = json!({ "arguments": item["arguments"], "name": item["name"] });
                messages.push(self.item_event("response.function_call_arguments.done", done));
            }
            Output::Reasoning => {
                let done = json!({ "text": part["text"] });
                messages.push(self.item_event("response.reasoning_text.done", done));
            }
            Output::Message => {
                let done = json!({ "text": part["text"], "logprobs": [] });
                messages.push(self.item_event("response.output_text.done", done));
            }
        }
        if !matches!(output, Output::Call(_)) {
            messages.push(self.item_event("response.content_part.done", json!({ "part": part })));
        }
        let done = json!({ "output_index": self.open.len() - 1, "item": item });
        messages.push(self.event("response.output_item.done", done));
    }

    /// Adds what comes next of a call.
    fn call(&mut self, call: CallDelta, messages: &mut Vec<Message>) {
        let CallDelta { index, head, arguments } = call;
        if head.is_some() {
            self.so_far.calls.push(CallDelta { index, head, arguments: String::new() });
        }
        self.open(Output::Call(index), messages);
        if arguments.is_empty() {
            return;
        }
        if let Some(call) = self.so_far.calls.last_mut() {
            call.arguments += &arguments;
        }
        let delta = json!({ "delta": arguments });
        messages.push(self.item_event("response.function_call_arguments.delta", delta));
    }
}

impl Format for Responses {
    fn whole(mut self: Box<Self>, _: &ServedParts, answers: Vec<Piece>) -> Value {
        self.so_far = answers.into_iter().next().unwrap_or_default();
        self.response()
    }

    fn begin(&mut self) -> Vec<Message> {
        let response = json!({ "response": self.response() });
        vec![
            self.event("response.created", response.clone()),
            self.event("response.in_progress", response),
        ]
    }

    fn piece(&mut self, _: &ServedParts, _: usize, mut piece: Piece) -> Vec<Message> {
        let mut messages = Vec::with_capacity(1);
        let reasoning = std::mem::take(&mut piece.reasoning);
        let text = std::mem::take(&mut piece.text);
        let calls = std::mem::take(&mut piece.calls);
        self.so_far.extend(piece);
        if !reasoning.is_empty() {
            self.open(Output::Reasoning, &mut messages);
            self.so_far.reasoning += &reasoning;
            let delta = json!({ "delta": reasoning });
            messages.push(self.item_event("response.reasoning_text.delta", delta));
        }
        if !text.is_empty() {
            self.open(Output::Message, &mut messages);
            self.so_far.text += &text;
            let delta = json!({ "delta": text, "logprobs": [] });
            messages.push(self.item_event("response.output_text.delta", delta));
        }
        for call in calls {
            self.call(call, &mut messages);
        }
        messages
    }

    fn end(&mut self) -> Vec<Message> {
        let mut messages = Vec::with_capacity(5);
        if self.open.is_empty() {
            self.open(Output::Message, &mut messages);
        }
        self.close(self.status(), &mut messages);
        let response = json!({ "response": self.response() });
        let name = match self.so_far.end {
            Some(End::Length) => "response.incomplete",
            _ => "response.completed",
        };
        messages.push(self.event(name, response));
        messages
    }

    fn failed(&mut self, error: &ApiError) -> Vec<Message> {
        let error = error.body()["error"].clone();
        vec![self.event("error", error)]
    }
}

//! `/v1/responses`: `OpenAI`'s newer form of a conversation. Nothing is stored: a request says all of its
//! conversation, and one that refers to an earlier answer is refused.

use serde_json::{Map, Value, json};

use super::asked::{Asked, take_user};
use super::format::{Format, Message};
use super::{Job, Preparing, prompt};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::model::ServedParts;
use crate::reply::{End, Piece};

/// Fields that are not there yet and have no value that asks for nothing.
const LACKING: [&str; 8] = [
    "conversation",
    "max_tool_calls",
    "previous_response_id",
    "prompt",
    "reasoning",
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
    fields.lacking("parallel_tool_calls", &[json!(true), json!(false)])?;
    // What is asked to be stored is not, and the answer says so.
    let _store: Option<bool> = fields.take("store")?;
    let text: Option<Map<String, Value>> = fields.take("text")?;
    fields.lacking("tool_choice", &[json!("none"), json!("auto")])?;
    fields.lacking("tools", &[json!([])])?;
    fields.lacking("top_logprobs", &[json!(0)])?;
    fields.lacking("truncation", &[json!("disabled")])?;
    LACKING.iter().try_for_each(|name| fields.lacking(name, &[]))?;
    fields.finish()?;
    let text = text.unwrap_or_default();
    asked.follow(preparing, format(text.clone())?)?;
    let system = instructions.iter().map(|text| prompt::message("system", text.clone()));
    let messages: Vec<Value> = system.chain(conversation(input)?).collect();
    let prompt = prompt::encode(preparing, "input", &messages, None)?;
    let requests = vec![asked.request(preparing, &prompt, 0, usize::MAX)?];
    let about = json!({
        "id": preparing.id("resp"),
        "object": "response",
        "created_at": (preparing.shared.now)(),
        "model": preparing.parts().name,
        "instructions": instructions,
        "max_output_tokens": asked.max_tokens,
        "metadata": metadata.unwrap_or_default(),
        "parallel_tool_calls": false,
        "previous_response_id": null,
        "store": false,
        "temperature": plain(asked.sampling.temperature),
        "text": text_of(text),
        "tool_choice": "none",
        "tools": [],
        "top_p": plain(asked.sampling.top_p.unwrap_or(1.0)),
        "truncation": "disabled",
    });
    let format = Responses {
        about,
        item: preparing.id("msg"),
        num_prompt: prompt.len(),
        so_far: Piece::default(),
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

/// The conversation: a text, or messages.
fn conversation(input: Value) -> Result<Vec<Value>, ApiError> {
    const NAME: &str = "input";
    let list = match input {
        Value::String(text) => return Ok(vec![prompt::message("user", text)]),
        Value::Array(list) => list,
        _ => return Err(ApiError::field(NAME, "input is neither a text nor a list of messages")),
    };
    let mut messages = Vec::with_capacity(list.len());
    for (index, item) in list.into_iter().enumerate() {
        let refuse = |what: String| ApiError::field(NAME, format!("input[{index}]{what}"));
        let Value::Object(mut item) = item else {
            return Err(refuse(" is no message".to_owned()));
        };
        match item.remove("type") {
            None => {}
            Some(Value::String(kind)) if kind == "message" => {}
            Some(kind) => return Err(refuse(format!(".type is {kind}, only messages are read"))),
        }
        // An answer given back has these.
        item.remove("id");
        item.remove("status");
        messages.push(item);
    }
    prompt::checked(NAME, messages, &["input_text", "output_text"])
}

struct Responses {
    /// What is said of the response whatever its answer is.
    about: Value,
    /// The answer's name.
    item: String,
    num_prompt: usize,
    so_far: Piece,
    num_events: usize,
}

impl Responses {
    /// The answer's part with text.
    fn part(&self) -> Value {
        json!({
            "type": "output_text", "text": self.so_far.text, "annotations": [], "logprobs": [],
        })
    }

    /// The answer, its parts `parts`.
    fn answer(&self, status: &str, parts: &[Value]) -> Value {
        json!({
            "id": self.item, "type": "message", "status": status, "role": "assistant",
            "content": parts,
        })
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
            true => json!([self.answer(status, &[self.part()])]),
            false => json!([]),
        };
        let num_new = self.so_far.num_tokens;
        found["usage"] = match has_ended {
            true => json!({
                "input_tokens": self.num_prompt,
                "input_tokens_details": { "cached_tokens": self.so_far.num_cached },
                "output_tokens": num_new,
                "output_tokens_details": { "reasoning_tokens": 0 },
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

    /// An event about the text.
    fn text_event(&mut self, name: &'static str, mut data: Value) -> Message {
        data["item_id"] = self.item.clone().into();
        data["output_index"] = 0.into();
        data["content_index"] = 0.into();
        self.event(name, data)
    }
}

impl Format for Responses {
    fn whole(mut self: Box<Self>, _: &ServedParts, answers: Vec<Piece>) -> Value {
        self.so_far = answers.into_iter().next().unwrap_or_default();
        self.response()
    }

    fn begin(&mut self) -> Vec<Message> {
        let response = json!({ "response": self.response() });
        let item = json!({ "output_index": 0, "item": self.answer("in_progress", &[]) });
        let part = json!({ "part": self.part() });
        vec![
            self.event("response.created", response.clone()),
            self.event("response.in_progress", response),
            self.event("response.output_item.added", item),
            self.text_event("response.content_part.added", part),
        ]
    }

    fn piece(&mut self, _: &ServedParts, _: usize, piece: Piece) -> Vec<Message> {
        let mut messages = Vec::with_capacity(1);
        if !piece.text.is_empty() {
            let delta = json!({ "delta": piece.text, "logprobs": [] });
            messages.push(self.text_event("response.output_text.delta", delta));
        }
        self.so_far.extend(piece);
        messages
    }

    fn end(&mut self) -> Vec<Message> {
        let text = json!({ "text": self.so_far.text, "logprobs": [] });
        let part = self.part();
        let item = self.answer(self.status(), std::slice::from_ref(&part));
        let response = json!({ "response": self.response() });
        let name = match self.so_far.end {
            Some(End::Length) => "response.incomplete",
            _ => "response.completed",
        };
        vec![
            self.text_event("response.output_text.done", text),
            self.text_event("response.content_part.done", json!({ "part": part })),
            self.event("response.output_item.done", json!({ "output_index": 0, "item": item })),
            self.event(name, response),
        ]
    }

    fn failed(&mut self, error: &ApiError) -> Vec<Message> {
        let error = error.body()["error"].clone();
        vec![self.event("error", error)]
    }
}

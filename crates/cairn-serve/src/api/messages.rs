//! `/v1/messages`: conversations answered as Anthropic's API does (version 2023-06-01), with its errors.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::asked::Asked;
use super::format::{Format, Message};
use super::{Job, Preparing, generate, prepared, prompt};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::intake::Body;
use crate::model::ServedParts;
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
        let prompt = conversation(preparing, fields)?;
        Ok(json!({ "input_tokens": prompt.len() }))
    };
    Ok(Json(prepared(&shared, body?, count).await?))
}

/// Takes the conversation, and refuses what is left.
fn conversation(preparing: Preparing<'_>, mut fields: Fields) -> Result<Vec<u32>, ApiError> {
    let found: Vec<Map<String, Value>> = fields.need("messages")?;
    let system: Option<Value> = fields.take("system")?;
    fields.lacking("tools", &[json!([])])?;
    fields.lacking("tool_choice", &[json!({ "type": "auto" }), json!({ "type": "none" })])?;
    fields.lacking("thinking", &[json!({ "type": "disabled" })])?;
    for name in ["container", "context_management", "mcp_servers", "service_tier"] {
        fields.lacking(name, &[])?;
    }
    fields.finish()?;
    let mut messages = Vec::with_capacity(found.len() + 1);
    if let Some(system) = system {
        let text = prompt::text(system, &["text"]);
        let text = text.map_err(|what| ApiError::field("system", format!("system{what}")))?;
        messages.push(prompt::message("system", text));
    }
    messages.extend(prompt::checked("messages", found, &["text"])?);
    prompt::encode(preparing, "messages", &messages, None)
}

fn job(preparing: Preparing<'_>, mut fields: Fields) -> Result<Job, ApiError> {
    let mut asked = Asked::take(&mut fields, preparing, "stop_sequences")?;
    asked.max_tokens = Some(fields.need("max_tokens")?);
    // Names the end user to the provider; nothing here depends on it, nor is it kept.
    let _metadata: Option<Map<String, Value>> = fields.take("metadata")?;
    let prompt = conversation(preparing, fields)?;
    let requests = vec![asked.request(preparing, &prompt, 0, 0)?];
    let format = Messages {
        id: preparing.id("msg"),
        model: preparing.parts().name.clone(),
        num_prompt: prompt.len(),
        num_new: 0,
        num_cached: 0,
    };
    asked.job(requests, format.num_prompt, format)
}

struct Messages {
    id: String,
    model: String,
    num_prompt: usize,
    num_new: usize,
    num_cached: usize,
}

impl Messages {
    /// The message, with what is known of it.
    fn message(&self, content: &Value, end: Option<&End>) -> Value {
        let (reason, sequence) = stop_reason(end);
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
            "input_tokens": self.num_prompt - self.num_cached,
            "cache_read_input_tokens": self.num_cached,
            "output_tokens": self.num_new,
        })
    }
}

/// Why the answer ended, and at which stop string.
fn stop_reason(end: Option<&End>) -> (Option<&'static str>, Option<&str>) {
    match end {
        None => (None, None),
        Some(End::Stop) => (Some("end_turn"), None),
        Some(End::StopString(found)) => (Some("stop_sequence"), Some(found)),
        Some(End::Length) => (Some("max_tokens"), None),
    }
}

/// An event, named as its type.
fn event(name: &'static str, mut data: Value) -> Message {
    data["type"] = name.into();
    Message { event: Some(name), data: data.to_string() }
}

impl Format for Messages {
    fn whole(mut self: Box<Self>, _: &ServedParts, answers: Vec<Piece>) -> Value {
        let answer = answers.into_iter().next().unwrap_or_default();
        (self.num_new, self.num_cached) = (answer.num_tokens, answer.num_cached);
        let content = json!([{ "type": "text", "text": answer.text }]);
        self.message(&content, answer.end.as_ref())
    }

    fn begin(&mut self) -> Vec<Message> {
        let block = json!({ "type": "text", "text": "" });
        vec![
            event("message_start", json!({ "message": self.message(&json!([]), None) })),
            event("content_block_start", json!({ "index": 0, "content_block": block })),
        ]
    }

    fn piece(&mut self, _: &ServedParts, _: usize, piece: Piece) -> Vec<Message> {
        self.num_new += piece.num_tokens;
        self.num_cached += piece.num_cached;
        let mut messages = Vec::with_capacity(3);
        if !piece.text.is_empty() {
            let delta = json!({ "type": "text_delta", "text": piece.text });
            messages.push(event("content_block_delta", json!({ "index": 0, "delta": delta })));
        }
        if let Some(end) = &piece.end {
            let (reason, sequence) = stop_reason(Some(end));
            let delta = json!({ "stop_reason": reason, "stop_sequence": sequence });
            let usage = self.usage();
            messages.push(event("content_block_stop", json!({ "index": 0 })));
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

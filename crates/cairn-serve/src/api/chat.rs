//! `/v1/chat/completions`: conversations answered.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use cairn_data::chat::ChatInput;
use serde_json::{Map, Value, json};

use super::{Asked, all_whole, own_seed, stream, usage};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::ServedModel;
use crate::server::{Body, Shared};

/// Who may speak.
const ROLES: [&str; 3] = ["system", "user", "assistant"];
/// Fields that are not there yet and have no value that asks for nothing.
const LACKING: [&str; 7] = [
    "audio",
    "function_call",
    "functions",
    "prediction",
    "reasoning_effort",
    "service_tier",
    "web_search_options",
];

/// Answers a conversation.
pub(crate) async fn chat_completions(
    State(shared): State<Arc<Shared>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let number = shared.numbers.next();
    let mut fields = Fields::parse(&body)?;
    let model = &shared.model;
    let mut asked = Asked::take(&mut fields, model, own_seed(&shared, number))?;
    // The older name of the same limit; both at once have to agree.
    let limits = [fields.take("max_completion_tokens")?, fields.take("max_tokens")?];
    if let [Some(newer), Some(older)] = limits
        && newer != older
    {
        let message = format!("max_tokens is {older} and max_completion_tokens is {newer}");
        return Err(ApiError::field("max_tokens", message));
    }
    asked.max_tokens = limits[0].or(limits[1]);
    let messages: Vec<Map<String, Value>> = fields.need("messages")?;
    let variables = variables(&mut fields)?;
    fields.lacking("tools", &[json!([])])?;
    fields.lacking("logprobs", &[json!(false)])?;
    fields.lacking("response_format", &[json!({ "type": "text" })])?;
    fields.lacking("parallel_tool_calls", &[json!(true), json!(false)])?;
    fields.lacking("store", &[json!(false)])?;
    fields.lacking("tool_choice", &[json!("none"), json!("auto")])?;
    fields.lacking("top_logprobs", &[json!(0)])?;
    fields.lacking("modalities", &[json!(["text"])])?;
    LACKING.iter().try_for_each(|name| fields.lacking(name, &[]))?;
    fields.finish()?;
    let prompt = prompt(messages, variables.as_ref(), model)?;
    let room = model.room(prompt.len())?;
    let mut updates = Vec::with_capacity(asked.n);
    for choice in 0..asked.n {
        let request = asked.request(model, &prompt, choice, room)?;
        updates.push(shared.driver()?.add(request).await?);
    }
    let head = |object| stream::Head {
        id: format!("chatcmpl-{number}"),
        object,
        name: model.parts.name.clone(),
        created: (shared.now)(),
    };
    let num_prompt = prompt.len();
    if asked.stream {
        let form = stream::Form {
            first: Some(json!({ "delta": { "role": "assistant", "content": "" } })),
            piece: |text| json!({ "delta": { "content": text } }),
            end: || json!({ "delta": {} }),
            num_prompt,
            include_usage: asked.include_usage,
        };
        let answer = (updates, asked.stops);
        return Ok(stream::answer(&shared, head("chat.completion.chunk"), form, answer));
    }
    let (mut choices, mut num_new) = (Vec::new(), 0);
    for (index, answer) in all_whole(&shared, asked.stops, updates).await?.into_iter().enumerate() {
        num_new += answer.num_tokens;
        choices.push(json!({
            "index": index,
            "message": { "role": "assistant", "content": answer.text },
            "logprobs": null,
            "finish_reason": answer.finish,
        }));
    }
    let mut found = head("chat.completion").object();
    found["choices"] = choices.into();
    found["usage"] = usage(num_prompt, num_new);
    Ok(axum::Json(found).into_response())
}

/// Variables of the template. Only what is no text: a text could spell control tokens.
fn variables(fields: &mut Fields) -> Result<Option<Map<String, Value>>, ApiError> {
    const NAME: &str = "chat_template_kwargs";
    let found: Option<Map<String, Value>> = fields.take(NAME)?;
    let is_plain = |value: &Value| value.is_boolean() || value.is_number();
    match found.iter().flatten().find(|(_, value)| !is_plain(value)) {
        Some((name, _)) => {
            Err(ApiError::field(NAME, format!("{NAME}.{name} is neither true, false nor a number")))
        }
        None => Ok(found),
    }
}

/// The conversation as token ids. Special tokens that a user spells out stay text.
fn prompt(
    messages: Vec<Map<String, Value>>,
    variables: Option<&Map<String, Value>>,
    model: &ServedModel,
) -> Result<Vec<u32>, ApiError> {
    let parts = &model.parts;
    let Some(template) = &parts.template else {
        let message = format!("'{}' has no chat template: it only continues text", parts.name);
        return Err(ApiError::invalid(message));
    };
    if messages.is_empty() {
        return Err(ApiError::field("messages", "messages is empty"));
    }
    let messages: Vec<Value> = messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| checked(index, message))
        .collect::<Result<_, _>>()?;
    let input = ChatInput {
        // All of it came from the client, what the assistant is said to have said too.
        trusts_assistant: false,
        add_generation_prompt: true,
        variables,
        ..ChatInput::new(&messages, &parts.special_tokens)
    };
    template.encode(&parts.tokenizer, &input).map_err(|error| ApiError::field("messages", error))
}

/// A message with its text in one piece.
fn checked(index: usize, mut message: Map<String, Value>) -> Result<Value, ApiError> {
    let refuse = |what: String| ApiError::field("messages", format!("messages[{index}]{what}"));
    let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
    if !ROLES.contains(&role) {
        return Err(refuse(format!(".role is '{role}', which is none of {}", ROLES.join(", "))));
    }
    if let Some(other) = message.keys().find(|key| !["role", "content"].contains(&key.as_str())) {
        return Err(refuse(format!(".{other} is not supported here")));
    }
    let content = match message.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(list)) => {
            let mut text = String::new();
            for part in list {
                match (part.get("type").and_then(Value::as_str), part.get("text")) {
                    (Some("text"), Some(Value::String(part))) => text += part,
                    (kind, _) => {
                        let kind = kind.unwrap_or("nothing");
                        return Err(refuse(format!(
                            ".content has a part of type {kind}, not text"
                        )));
                    }
                }
            }
            text
        }
        _ => return Err(refuse(".content is no text".to_owned())),
    };
    message.insert("content".to_owned(), content.into());
    Ok(Value::Object(message))
}

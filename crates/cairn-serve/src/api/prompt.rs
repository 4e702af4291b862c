//! Conversations on their way to token ids. Special tokens that a client spells out stay text.

use cairn_data::chat::ChatInput;
use serde_json::{Map, Value, json};

use super::Preparing;
use crate::error::ApiError;
use crate::fields::Fields;

/// Who may speak.
const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// Variables that say what the conversation is, and are not the client's to set.
const OWN_VARIABLES: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// Takes the template's variables. Only what is no text: a text could spell control tokens.
pub(super) fn take_variables(fields: &mut Fields) -> Result<Option<Map<String, Value>>, ApiError> {
    const NAME: &str = "chat_template_kwargs";
    let found: Option<Map<String, Value>> = fields.take(NAME)?;
    let is_plain = |value: &Value| value.is_boolean() || value.is_number();
    match found.iter().flatten().find(|(_, value)| !is_plain(value)) {
        Some((name, _)) => {
            Err(ApiError::field(NAME, format!("{NAME}.{name} is neither true, false nor a number")))
        }
        None => match found.iter().flatten().find(|(name, _)| is_own(name)) {
            Some((name, _)) => {
                Err(ApiError::field(NAME, format!("{NAME}.{name} is not the client's to set")))
            }
            None => Ok(found),
        },
    }
}

/// Whether a variable is the server's to set.
fn is_own(name: &str) -> bool {
    OWN_VARIABLES.contains(&name) || name.ends_with("_token")
}

/// A message of one piece of text. A developer's word is the system's.
pub(super) fn message(role: &str, text: String) -> Value {
    let role = if role == "developer" { "system" } else { role };
    json!({ "role": role, "content": text })
}

/// Checks the messages of a field: objects with a role and text, in one piece or in parts of the types `texts`.
pub(super) fn checked(
    field: &'static str,
    messages: Vec<Map<String, Value>>,
    texts: &[&str],
) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field(field, format!("{field} is empty")));
    }
    let one = |(index, mut found): (usize, Map<String, Value>)| {
        let refuse = |what: String| ApiError::field(field, format!("{field}[{index}]{what}"));
        let role = match found.remove("role") {
            Some(Value::String(role)) => role,
            _ => String::new(),
        };
        if !ROLES.contains(&role.as_str()) {
            return Err(refuse(format!(
                ".role is '{role}', which is none of {}",
                ROLES.join(", ")
            )));
        }
        let content = found.remove("content").unwrap_or_default();
        let content = text(content, texts).map_err(|what| refuse(format!(".content{what}")))?;
        match found.iter().find(|(_, value)| !value.is_null()) {
            Some((other, _)) => Err(refuse(format!(".{other} is not supported here"))),
            None => Ok(message(&role, content)),
        }
    };
    messages.into_iter().enumerate().map(one).collect()
}

/// A text in one piece, or in parts of the types `texts`; else what is wrong with it.
pub(super) fn text(content: Value, texts: &[&str]) -> Result<String, String> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(list) => {
            let mut text = String::new();
            for part in list {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("nothing");
                match part.get("text") {
                    Some(Value::String(part)) if texts.contains(&kind) => text += part,
                    _ => {
                        return Err(format!(
                            " has a part of type {kind}, not {}",
                            texts.join(", ")
                        ));
                    }
                }
            }
            Ok(text)
        }
        _ => Err(" is no text".to_owned()),
    }
}

/// The conversation as token ids, up to where the answer begins.
pub(super) fn encode(
    preparing: Preparing<'_>,
    field: &'static str,
    messages: &[Value],
    variables: Option<&Map<String, Value>>,
) -> Result<Vec<u32>, ApiError> {
    let parts = preparing.parts();
    let Some(template) = &parts.template else {
        let message = format!("'{}' has no chat template: it only continues text", parts.name);
        return Err(ApiError::invalid(message));
    };
    let input = ChatInput {
        // All of it came from the client, what the assistant is said to have said too.
        trusts_assistant: false,
        add_generation_prompt: true,
        variables,
        ..ChatInput::new(messages, &parts.special_tokens)
    };
    template.encode(&parts.tokenizer, &input).map_err(|error| ApiError::field(field, error))
}

//! Conversations on their way to token ids. Special tokens that a client spells out stay text.

use cairn_data::chat::{ChatInput, utc};
use serde_json::{Map, Value, json};

use super::Preparing;
use super::conversation::{check_left, take_text};
use super::tools::Tools;
use crate::error::ApiError;
use crate::fields::Fields;

/// How much is to be thought, in `OpenAI`'s words.
const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];
/// Under which name templates read it.
const EFFORT: &str = "reasoning_effort";
/// Under which name templates read whether anything is thought.
const ENABLE_THINKING: &str = "enable_thinking";
/// Variables that say what the conversation is, and are not the client's to set.
const OWN_VARIABLES: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// What the template is told beside the conversation.
pub(super) type Variables = Map<String, Value>;

/// Takes the template's variables. Only what is no text: a text could spell control tokens. One that the template
/// does not read is refused.
pub(super) fn take_variables(
    preparing: Preparing<'_>,
    fields: &mut Fields,
) -> Result<Variables, ApiError> {
    const NAME: &str = "chat_template_kwargs";
    let found: Variables = fields.take(NAME)?.unwrap_or_default();
    let reads = |name: &str| preparing.parts().template.as_ref().is_none_or(|t| t.reads(name));
    for (name, value) in &found {
        let what = if !(value.is_boolean() || value.is_number()) {
            "is neither true, false nor a number"
        } else if is_own(name) {
            "is not the client's to set"
        } else if !reads(name) {
            "is nothing that this model's template reads"
        } else {
            continue;
        };
        return Err(ApiError::field(NAME, format!("{NAME}.{name} {what}")));
    }
    Ok(found)
}

/// Tells the template how much is to be thought, in the words that it reads.
pub(super) fn set_effort(
    preparing: Preparing<'_>,
    field: &'static str,
    effort: Option<String>,
    variables: &mut Variables,
) -> Result<(), ApiError> {
    let Some(effort) = effort else { return Ok(()) };
    if !EFFORTS.contains(&effort.as_str()) {
        let message = format!("{field} is '{effort}', none of {}", EFFORTS.join(", "));
        return Err(ApiError::field(field, message));
    }
    let reads = |name: &str| preparing.parts().template.as_ref().is_some_and(|t| t.reads(name));
    if reads(EFFORT) {
        variables.insert(EFFORT.to_owned(), effort.into());
    } else if effort == "none" && reads(ENABLE_THINKING) {
        variables.insert(ENABLE_THINKING.to_owned(), false.into());
    } else {
        let message =
            format!("{field}: this model's template does not read how much is to be thought");
        return Err(ApiError::field(field, message));
    }
    Ok(())
}

/// Tells the template whether anything is to be thought; whether it reads that.
pub(super) fn set_thinking(
    preparing: Preparing<'_>,
    is_enabled: bool,
    variables: &mut Variables,
) -> bool {
    let template = preparing.parts().template.as_ref();
    let reads = template.is_some_and(|template| template.reads(ENABLE_THINKING));
    if reads {
        variables.insert(ENABLE_THINKING.to_owned(), is_enabled.into());
    }
    reads
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

/// A text in one piece, or in parts of the types `texts`; else what is wrong with it.
pub(super) fn text(content: Value, texts: &[&str]) -> Result<String, String> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(list) => {
            let one = |(at, part)| self::part(part, texts).map_err(|what| format!("[{at}]{what}"));
            list.into_iter().enumerate().map(one).collect()
        }
        _ => Err(" is no text".to_owned()),
    }
}

/// The text of a part of one of the types `texts`; else what is wrong with it.
pub(super) fn part(part: Value, texts: &[&str]) -> Result<String, String> {
    let Value::Object(mut part) = part else { return Err(" is no object".to_owned()) };
    let kind = take_text(&mut part, "type")?;
    if !kind.as_deref().is_some_and(|kind| texts.contains(&kind)) {
        let kind = kind.as_deref().unwrap_or("nothing");
        return Err(format!(" is a part of type {kind}, not {}", texts.join(", ")));
    }
    let text = take_text(&mut part, "text")?.ok_or(".text is missing")?;
    // How long it may be kept, and what answers say beside their text: none of it is part of the text.
    for name in ["cache_control", "annotations", "logprobs"] {
        part.remove(name);
    }
    check_left(&part)?;
    Ok(text)
}

/// The conversation as token ids, up to where the answer begins.
pub(super) fn encode(
    preparing: Preparing<'_>,
    field: &'static str,
    messages: &[Value],
    (tools, variables): (&Tools, &Variables),
) -> Result<Vec<u32>, ApiError> {
    let parts = preparing.parts();
    let Some(template) = &parts.template else {
        let message = format!("'{}' has no chat template: it only continues text", parts.name);
        return Err(ApiError::invalid(message));
    };
    let tools = tools.of_template();
    let input = ChatInput {
        // All of it came from the client, what the assistant is said to have said too.
        trusts_assistant: false,
        add_generation_prompt: true,
        tools: tools.as_deref(),
        variables: Some(variables),
        now: utc((preparing.shared.now)()),
        ..ChatInput::new(messages, &parts.special_tokens)
    };
    template.encode(&parts.tokenizer, &input).map_err(|error| ApiError::field(field, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_text_are_read_strictly() {
        let refused = |part: Value| text(json!([part]), &["text"]).unwrap_err();
        assert_eq!(refused(json!({ "type": "text" })), "[0].text is missing");
        assert_eq!(refused(json!({ "type": "text", "text": 1 })), "[0].text is no text");
        assert_eq!(refused(json!({ "text": "a" })), "[0] is a part of type nothing, not text");
        assert_eq!(
            refused(json!({ "type": "image_url", "image_url": {} })),
            "[0] is a part of type image_url, not text"
        );
        assert_eq!(refused(json!("a")), "[0] is no object");
        let more = json!({ "type": "text", "text": "a", "citations": { "enabled": true } });
        assert_eq!(refused(more), "[0].citations is not supported here");
        let parts = json!([
            { "type": "text", "text": "a", "cache_control": { "type": "ephemeral" } },
            { "type": "text", "text": "b", "annotations": [{}], "logprobs": [], "citations": null },
        ]);
        assert_eq!(text(parts, &["text"]).unwrap(), "ab");
    }
}

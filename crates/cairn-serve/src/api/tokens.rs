//! `/tokenize`, `/detokenize` and `/tokenizer_info`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use cairn_data::tokenizer::SpelledSpecials;
use serde_json::{Map, Value, json};

use super::tools::Tools;
use super::{Preparing, conversation, prepared, prompt};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::intake::Body;
use crate::server::Shared;

/// A text or a conversation as ids.
pub(crate) async fn tokenize(
    State(shared): State<Arc<Shared>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(prepared(&shared, body, tokenized).await?.0))
}

fn tokenized(preparing: Preparing<'_>, mut fields: Fields) -> Result<Value, ApiError> {
    let parts = preparing.parts();
    preparing.take_model(&mut fields)?;
    let messages: Option<Vec<Map<String, Value>>> = fields.take("messages")?;
    let ids = if let Some(messages) = messages {
        let variables = prompt::take_variables(preparing, &mut fields)?;
        let tools = Tools::take_of_chat(&mut fields)?;
        fields.finish()?;
        let messages = conversation::of_chat(preparing, messages)?;
        prompt::encode(preparing, "messages", &messages, (&tools, &variables))?
    } else {
        let text: String = fields.need("prompt")?;
        let around = fields.take("add_special_tokens")?.unwrap_or(true);
        fields.finish()?;
        let ids = match around {
            true => parts.tokenizer.encode_for_model(&text, SpelledSpecials::Text),
            false => parts.tokenizer.encode(&text),
        };
        ids.map_err(|error| ApiError::field("prompt", error))?
    };
    Ok(json!({ "count": ids.len(), "max_model_len": parts.max_context, "tokens": ids }))
}

/// Ids as a text.
pub(crate) async fn detokenize(
    State(shared): State<Arc<Shared>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(prepared(&shared, body, detokenized).await?.0))
}

fn detokenized(preparing: Preparing<'_>, mut fields: Fields) -> Result<Value, ApiError> {
    preparing.take_model(&mut fields)?;
    let ids: Vec<u32> = fields.need("tokens")?;
    fields.finish()?;
    let parts = preparing.parts();
    if parts.max_context < ids.len() {
        let message = format!("tokens has {} ids, at most {}", ids.len(), parts.max_context);
        return Err(ApiError::field("tokens", message));
    }
    let text = parts.tokenizer.decode(&ids).map_err(|error| ApiError::field("tokens", error))?;
    Ok(json!({ "prompt": text }))
}

/// What the first model's tokenizer is.
pub(crate) async fn tokenizer_info(
    State(shared): State<Arc<Shared>>,
) -> Result<Json<Value>, ApiError> {
    let model = shared.models.serving()?.find(None)?;
    let parts = &model.parts;
    let stops = parts.stop_tokens.iter().filter_map(|&id| parts.tokenizer.token(id));
    Ok(Json(json!({
        "tokenizer_class": parts.tokenizer.model_name(),
        "vocab_size": parts.tokenizer.vocab_size(),
        "max_model_len": parts.max_context,
        "has_chat_template": parts.template.is_some(),
        "special_tokens": parts.special_tokens,
        "stop_tokens": stops.collect::<Vec<_>>(),
        "hash": parts.tokenizer.hash().to_string(),
    })))
}

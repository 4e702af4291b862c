//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use cairn_data::tokenizer::SpelledSpecials;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::server::{Body, Shared};

/// A text as ids.
pub(crate) async fn tokenize(
    State(shared): State<Arc<Shared>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let parts = &shared.model.parts;
    let mut fields = Fields::parse(&body)?;
    let asked: Option<String> = fields.take("model")?;
    shared.model.check_name(asked.as_deref())?;
    let text: String = fields.need("prompt")?;
    let around = fields.take("add_special_tokens")?.unwrap_or(true);
    fields.finish()?;
    let ids = match around {
        true => parts.tokenizer.encode_for_model(&text, SpelledSpecials::Text),
        false => parts.tokenizer.encode(&text),
    };
    let ids = ids.map_err(|error| ApiError::field("prompt", error))?;
    Ok(Json(json!({
        "count": ids.len(), "max_model_len": parts.max_context, "tokens": ids,
    })))
}

/// Ids as a text.
pub(crate) async fn detokenize(
    State(shared): State<Arc<Shared>>,
    Body(body): Body,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let asked: Option<String> = fields.take("model")?;
    shared.model.check_name(asked.as_deref())?;
    let ids: Vec<u32> = fields.need("tokens")?;
    fields.finish()?;
    let most = shared.model.parts.max_context;
    if most < ids.len() {
        let message = format!("tokens has {} ids, at most {most}", ids.len());
        return Err(ApiError::field("tokens", message));
    }
    let text = shared.model.parts.tokenizer.decode(&ids);
    let text = text.map_err(|error| ApiError::field("tokens", error))?;
    Ok(Json(json!({ "prompt": text })))
}

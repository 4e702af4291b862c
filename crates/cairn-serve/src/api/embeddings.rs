//! `/v1/embeddings`: texts as vectors.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cairn_data::tokenizer::SpelledSpecials;
use serde_json::{Value, json};

use super::asked::take_user;
use super::{Preparing, prepared};
use crate::embedder::{EmbedForm, Embedder};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::intake::Body;
use crate::server::Shared;

/// Texts of a request, at most: `OpenAI`'s.
const TEXTS_MAX: usize = 2048;

/// What is asked for.
struct Asked {
    texts: Vec<Vec<u32>>,
    is_base64: bool,
    embedder: Embedder,
}

/// Turns texts into vectors.
pub(crate) async fn embeddings(
    State(shared): State<Arc<Shared>>,
    body: Body,
) -> Result<Response, ApiError> {
    let holder = body.holder.clone();
    let (Asked { texts, is_base64, embedder }, model) = prepared(&shared, body, take).await?;
    let num_tokens: usize = texts.iter().map(Vec::len).sum();
    holder.spend(num_tokens)?;
    let vectors = embedder.embed(texts).await?;
    let write = move || {
        let one = |(index, vector): (usize, &Vec<f32>)| json!({ "object": "embedding", "index": index, "embedding": written(vector, is_base64) });
        let found: Value = vectors.iter().enumerate().map(one).collect();
        Json(json!({
            "object": "list", "data": found, "model": model.parts.name,
            "usage": { "prompt_tokens": num_tokens, "total_tokens": num_tokens },
        }))
        .into_response()
    };
    let written = tokio::task::spawn_blocking(write).await;
    written.map_err(|_| ApiError::failed("writing the answer failed here"))
}

/// A vector as numbers, or as the base64 of their bytes.
fn written(vector: &[f32], is_base64: bool) -> Value {
    if !is_base64 {
        return vector.iter().map(|&number| Value::from(f64::from(number))).collect();
    }
    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
    STANDARD.encode(bytes).into()
}

fn take(preparing: Preparing<'_>, mut fields: Fields) -> Result<Asked, ApiError> {
    const FORMAT: &str = "encoding_format";
    const DIMENSIONS: &str = "dimensions";
    preparing.take_model(&mut fields)?;
    take_user(&mut fields)?;
    let is_base64 = match fields.take::<String>(FORMAT)?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let message = format!("{FORMAT} is '{other}', none of float, base64");
            return Err(ApiError::field(FORMAT, message));
        }
    };
    let dimensions: Option<usize> = fields.take(DIMENSIONS)?;
    let input: Value = fields.need("input")?;
    fields.finish()?;
    let embedder = preparing.model.embedder()?.clone();
    let width = embedder.form.width;
    match dimensions {
        Some(other) if other != width => {
            let message =
                format!("{DIMENSIONS} is {other}; this model's vectors have {width} numbers");
            return Err(ApiError::field(DIMENSIONS, message));
        }
        _ => {}
    }
    let texts = texts(preparing, &embedder.form, input)?;
    Ok(Asked { texts, is_base64, embedder })
}

/// The texts: one, its ids, or several of either.
fn texts(
    preparing: Preparing<'_>,
    form: &EmbedForm,
    input: Value,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let refuse = |message: String| ApiError::field("input", message);
    let encode = |text: &str| {
        let mut text = format!("{}{text}", form.prompt);
        if form.lower_case {
            text = text.to_lowercase();
        }
        let ids = preparing.parts().tokenizer.encode_for_model(&text, SpelledSpecials::Text);
        ids.map_err(|error| ApiError::field("input", error))
    };
    let of_ids = |list: &[Value]| -> Result<Vec<u32>, ApiError> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.filter(|&id| (id as usize) < form.vocab_size)
                .ok_or_else(|| refuse(format!("input has {value}, which is no token id")))
        };
        list.iter().map(id).collect()
    };
    let texts = match &input {
        Value::String(text) => vec![encode(text)?],
        Value::Array(list) if list.is_empty() => return Err(refuse("input is empty".to_owned())),
        Value::Array(list) if list.iter().all(Value::is_number) => vec![of_ids(list)?],
        Value::Array(list) if TEXTS_MAX < list.len() => {
            return Err(refuse(format!("input has {} texts, at most {TEXTS_MAX}", list.len())));
        }
        Value::Array(list) => {
            let one = |value: &Value| match value {
                Value::String(text) => encode(text),
                Value::Array(list) => of_ids(list),
                _ => Err(refuse(
                    "input has an entry that is neither a text nor a list of ids".to_owned(),
                )),
            };
            list.iter().map(one).collect::<Result<_, _>>()?
        }
        _ => return Err(refuse("input is neither a text nor a list".to_owned())),
    };
    let limit = preparing.parts().max_context;
    for (index, text) in texts.iter().enumerate() {
        if text.is_empty() {
            return Err(refuse(format!("text {index} has no tokens")));
        }
        if limit < text.len() {
            return Err(ApiError::text_too_long(index, text.len(), limit));
        }
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_numbers_or_their_bytes() {
        assert_eq!(written(&[0.5, -2.0], false), json!([0.5, -2.0]));
        // 0.5 is 00 00 00 3f in memory.
        assert_eq!(written(&[0.5], true), "AAAAPw==");
    }
}

//! `/v1/completions`: texts continued.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::{Asked, CHOICES_MAX, all_whole, own_seed, stream, usage};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::ServedModel;
use crate::server::{Body, Shared};

/// New tokens where nothing is asked for: `OpenAI`'s.
const MAX_TOKENS: usize = 16;
/// Prompts of a request, at most.
const PROMPTS_MAX: usize = CHOICES_MAX;

/// Continues texts.
pub(crate) async fn completions(
    State(shared): State<Arc<Shared>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let number = shared.numbers.next();
    let mut fields = Fields::parse(&body)?;
    let model = &shared.model;
    let mut asked = Asked::take(&mut fields, model, own_seed(&shared, number))?;
    asked.max_tokens = fields.take("max_tokens")?;
    let prompts = prompts(fields.need("prompt")?, model)?;
    fields.lacking("best_of", &[json!(1)])?;
    fields.lacking("echo", &[json!(false)])?;
    fields.lacking("logprobs", &[])?;
    fields.lacking("suffix", &[json!("")])?;
    fields.finish()?;
    if CHOICES_MAX < prompts.len() * asked.n {
        let count = prompts.len();
        let message = format!("{count} prompts times n = {} is more than {CHOICES_MAX}", asked.n);
        return Err(ApiError::field("n", message));
    }
    let head = stream::Head {
        id: format!("cmpl-{number}"),
        object: "text_completion",
        name: model.parts.name.clone(),
        created: (shared.now)(),
    };
    let mut updates = Vec::with_capacity(prompts.len() * asked.n);
    for prompt in &prompts {
        for choice in 0..asked.n {
            let request = asked.request(model, prompt, choice, MAX_TOKENS)?;
            updates.push(shared.driver()?.add(request).await?);
        }
    }
    let num_prompt: usize = prompts.iter().map(Vec::len).sum();
    if asked.stream {
        let form = stream::Form {
            first: None,
            piece: |text| json!({ "text": text }),
            end: || json!({ "text": "" }),
            num_prompt,
            include_usage: asked.include_usage,
        };
        return Ok(stream::answer(&shared, head, form, (updates, asked.stops)));
    }
    let (mut choices, mut num_new) = (Vec::new(), 0);
    for (index, answer) in all_whole(&shared, asked.stops, updates).await?.into_iter().enumerate() {
        num_new += answer.num_tokens;
        choices.push(json!({
            "index": index, "text": answer.text, "logprobs": null, "finish_reason": answer.finish,
        }));
    }
    let mut found = head.object();
    found["choices"] = choices.into();
    found["usage"] = usage(num_prompt, num_new);
    Ok(axum::Json(found).into_response())
}

/// The prompts of a request: a text, its ids, or several of either.
fn prompts(value: Value, model: &ServedModel) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = |message: &str| ApiError::field("prompt", message);
    let encode = |text: &str| {
        let spelled = cairn_data::tokenizer::SpelledSpecials::Text;
        let encoded = model.parts.tokenizer.encode_for_model(text, spelled);
        encoded.map_err(|error| ApiError::field("prompt", error))
    };
    let prompts = match value {
        Value::String(text) => vec![encode(&text)?],
        Value::Array(list) if list.iter().all(Value::is_number) => vec![ids(&list)?],
        Value::Array(list) => {
            let one = |value: &Value| match value {
                Value::String(text) => encode(text),
                Value::Array(list) => ids(list),
                _ => Err(wrong("prompt has an entry that is neither a text nor a list of ids")),
            };
            list.iter().map(one).collect::<Result<_, _>>()?
        }
        _ => return Err(wrong("prompt is neither a text nor a list")),
    };
    match prompts.iter().position(Vec::is_empty) {
        _ if prompts.is_empty() || PROMPTS_MAX < prompts.len() => {
            let count = prompts.len();
            Err(wrong(&format!("prompt has {count} entries, which is not in 1..={PROMPTS_MAX}")))
        }
        Some(index) => Err(wrong(&format!("prompt {index} has no tokens"))),
        None => Ok(prompts),
    }
}

fn ids(list: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| {
            ApiError::field("prompt", format!("prompt has {value}, which is no token id"))
        })
    };
    list.iter().map(id).collect()
}

//! Which address is which endpoint, and what stands in front of all of them: keys, and a net for panics.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::FutureExt;
use serde_json::{Value, json};

use crate::api::{
    Refused, chat_completions, completions, count_tokens, detokenize, generating, messages,
    responses, tokenize, tokenizer_info,
};
use crate::error::ApiError;
use crate::intake::Came;
use crate::server::Shared;

/// Where answers and errors are written as Anthropic does.
const MESSAGES: &str = "/v1/messages";

/// Says which line of the log is about an answer.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// All endpoints.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let open = Router::new().route("/health", get(health)).route("/ready", get(ready));
    let guarded = Router::new()
        .route("/v1/completions", generating(completions))
        .route("/v1/chat/completions", generating(chat_completions))
        .route("/v1/responses", generating(responses))
        .route(MESSAGES, post(messages))
        .route("/v1/messages/count_tokens", post(count_tokens))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/tokenizer_info", get(tokenizer_info))
        .route("/metrics", get(metrics))
        .fallback(nowhere)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(Arc::clone(&shared), guard));
    let watched = from_fn_with_state(Arc::clone(&shared), watched);
    let open = open.method_not_allowed_fallback(no_method);
    open.merge(guarded).layer(watched).with_state(shared)
}

/// Numbers a request, writes a line of the log about it, and has a panic end it alone.
async fn watched(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let came = Came::now(&shared);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    request.extensions_mut().insert(came);
    let answered = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let mut response = answered
        .unwrap_or_else(|_| ApiError::failed("answering the request failed here").into_response());
    response.headers_mut().insert(REQUEST_ID, came.number.into());
    let (status, seconds) = (response.status().as_u16(), came.begin.elapsed().as_secs_f64());
    let request = came.number;
    if status < 500 {
        tracing::info!(request, %method, path, status, seconds, "request");
    } else {
        tracing::error!(request, %method, path, status, seconds, "request");
    }
    response
}

/// Lets those through who may ask.
async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    match shared.keys.check(headers).and_then(|()| shared.keys.check_place(headers)) {
        Ok(()) => next.run(request).await,
        Err(error) if request.uri().path().starts_with(MESSAGES) => Refused(error).into_response(),
        Err(error) => error.into_response(),
    }
}

/// The process lives.
async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// Requests are taken.
async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    match shared.driver() {
        Ok(_) => Json(json!({ "status": "ready" })).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn models(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [shared.model.entry(shared.started)] }))
}

async fn model(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    shared.model.check_name(Some(&id))?;
    Ok(Json(shared.model.entry(shared.started)))
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    (StatusCode::OK, kind, shared.metrics.text()).into_response()
}

async fn nowhere(method: Method, uri: Uri) -> ApiError {
    ApiError::no_route(method.as_str(), uri.path())
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::no_method(method.as_str(), uri.path())
}

//! Which address is which endpoint, and what stands in front of all of them: keys, and a net for panics. One table
//! says of each what it needs and what it is, so that none is open or undescribed by oversight.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::header::{
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderName, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn, from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use futures_util::FutureExt;
use serde_json::{Value, json};

use crate::admin;
use crate::api::{
    Refused, chat_completions, completions, count_tokens, detokenize, embeddings, generating,
    messages, responses, tokenize, tokenizer_info,
};
use crate::error::ApiError;
use crate::intake::Came;
use crate::keys::{Holder, Needs, Scope};
use crate::openapi::{self, Form};
use crate::page;
use crate::server::Shared;
use crate::unread;

/// Where answers and errors are written as Anthropic does.
const MESSAGES: &str = "/v1/messages";

/// Says which line of the log is about an answer.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// An endpoint.
pub(crate) struct Route {
    /// Its method.
    pub(crate) method: Method,
    /// Its address.
    pub(crate) path: &'static str,
    /// What it needs.
    pub(crate) needs: Needs,
    /// What it is.
    pub(crate) about: &'static str,
    /// What its body holds and its answer is.
    pub(crate) form: Form,
    answer: MethodRouter<Arc<Shared>>,
}

impl Route {
    /// An endpoint that is looked at.
    fn get(
        path: &'static str,
        needs: Needs,
        about: &'static str,
        (form, answer): (Form, MethodRouter<Arc<Shared>>),
    ) -> Self {
        Self { method: Method::GET, path, needs, about, form, answer }
    }

    /// An endpoint that takes a body.
    fn post(
        path: &'static str,
        needs: Needs,
        about: &'static str,
        (form, answer): (Form, MethodRouter<Arc<Shared>>),
    ) -> Self {
        Self { method: Method::POST, path, needs, about, form, answer }
    }
}

/// All endpoints.
pub(crate) fn table() -> Vec<Route> {
    [looking(), asking(), ruling()].into_iter().flatten().collect()
}

/// Endpoints that are looked at.
fn looking() -> Vec<Route> {
    let open = |path, about, form, answer| Route::get(path, Needs::Nothing, about, (form, answer));
    let look = |path, about, answer| Route::get(path, Needs::Key, about, (Form::OBJECT, answer));
    let metrics = (Form::TEXT, get(metrics));
    vec![
        open("/", "A page to try a prompt", Form::PAGE, get(page::page)),
        open("/health", "The process lives", Form::OBJECT, get(health)),
        open("/ready", "A model takes requests", Form::OBJECT, get(ready)),
        open("/openapi.json", "What is described here", Form::OBJECT, get(openapi::document)),
        Route::get(
            "/metrics",
            Needs::Scope(Scope::Metrics),
            "What was done, for Prometheus",
            metrics,
        ),
        look("/v1/models", "The models", get(models)),
        look("/v1/models/{id}", "A model", get(model)),
        look("/tokenizer_info", "What the first model's tokenizer is", get(tokenizer_info)),
    ]
}

/// Endpoints that ask a model, or its tokenizer.
fn asking() -> Vec<Route> {
    const GENERATE: Needs = Needs::Scope(Scope::Generate);
    const EMBED: Needs = Needs::Scope(Scope::Embed);
    const CHAT: &str = "/v1/chat/completions";
    const COUNT_TOKENS: &str = "/v1/messages/count_tokens";
    let ask = |path, about, form, answer| Route::post(path, GENERATE, about, (form, answer));
    let count = |path, about, form, answer| Route::post(path, Needs::Key, about, (form, answer));
    let as_openai = "Conversations answered, as OpenAI's responses";
    let as_anthropic = "Conversations answered, as Anthropic's messages";
    vec![
        ask("/v1/completions", "Texts continued", Form::COMPLETIONS, generating(completions)),
        ask(CHAT, "Conversations answered", Form::CHAT, generating(chat_completions)),
        ask("/v1/responses", as_openai, Form::RESPONSES, generating(responses)),
        ask(MESSAGES, as_anthropic, Form::MESSAGES, post(messages)),
        Route::post(
            "/v1/embeddings",
            EMBED,
            "Texts as vectors",
            (Form::EMBEDDINGS, post(embeddings)),
        ),
        count(COUNT_TOKENS, "Tokens of a conversation", Form::COUNT_TOKENS, post(count_tokens)),
        count("/tokenize", "A text or a conversation as ids", Form::TOKENIZE, post(tokenize)),
        count("/detokenize", "Ids as a text", Form::DETOKENIZE, post(detokenize)),
    ]
}

/// Endpoints that say which models there are.
fn ruling() -> Vec<Route> {
    const ADMIN: Needs = Needs::Scope(Scope::Admin);
    let rule = |path, about, form, answer| Route::post(path, ADMIN, about, (form, answer));
    let again = "Loads a model again, which serves as it was until then";
    let beside = "Loads an adapter beside a model, as vLLM does";
    let (load, load_adapter) = (post(admin::load), post(admin::load_adapter));
    let unload_adapter = post(admin::unload_adapter);
    vec![
        rule("/v1/models/load", "Loads a model", Form::LOAD, load),
        rule("/v1/models/unload", "Forgets a model", Form::UNLOAD, post(admin::unload)),
        rule("/v1/models/reload", again, Form::UNLOAD, post(admin::reload)),
        rule("/v1/load_lora_adapter", beside, Form::LOAD_ADAPTER, load_adapter),
        rule("/v1/unload_lora_adapter", "Forgets an adapter", Form::UNLOAD_ADAPTER, unload_adapter),
    ]
}

/// What addresses need.
type Guards = Arc<HashMap<&'static str, Needs>>;

/// All endpoints, behind what stands in front of them.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let table = table();
    let guards: Guards = Arc::new(table.iter().map(|route| (route.path, route.needs)).collect());
    let all =
        table.into_iter().fold(Router::new(), |all, route| all.route(route.path, route.answer));
    all.fallback(nowhere)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state((Arc::clone(&shared), guards), guard))
        .layer(from_fn_with_state(Arc::clone(&shared), watched))
        .layer(from_fn(sealed))
        .layer(map_response(unread::noted))
        .with_state(shared)
}

/// Has browsers take answers for what they say they are, and run nothing in them.
async fn sealed(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let nothing = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    headers.entry(CONTENT_SECURITY_POLICY).or_insert(nothing);
    response
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
    let (request, holder) = (came.number, response.extensions().get::<Holder>());
    let key = holder.and_then(Holder::name);
    if status < 500 {
        tracing::info!(request, %method, path, status, seconds, key, "request");
    } else {
        tracing::error!(request, %method, path, status, seconds, key, "request");
    }
    response
}

/// Lets those through who may ask.
async fn guard(
    State((shared, guards)): State<(Arc<Shared>, Guards)>,
    mut request: Request,
    next: Next,
) -> Response {
    let matched = request.extensions().get::<MatchedPath>();
    let needs = matched.and_then(|path| guards.get(path.as_str())).copied();
    // Who has no key is not told what is here.
    match shared.keys.check(request.headers(), needs.unwrap_or(Needs::Key)) {
        Ok(holder) => {
            request.extensions_mut().insert(holder.clone());
            let mut response = next.run(request).await;
            response.extensions_mut().insert(holder);
            response
        }
        Err(error) if request.uri().path().starts_with(MESSAGES) => Refused(error).into_response(),
        Err(error) => error.into_response(),
    }
}

/// The process lives.
async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// A model takes requests.
async fn ready(State(shared): State<Arc<Shared>>) -> Result<Json<Value>, ApiError> {
    shared.models.serving()?.find(None)?;
    Ok(Json(json!({ "status": "ready" })))
}

async fn models(State(shared): State<Arc<Shared>>) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!({ "object": "list", "data": shared.models.serving()?.entries() })))
}

async fn model(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    shared.models.serving()?.entry(&id).map(Json)
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (StatusCode::OK, [(CONTENT_TYPE, kind)], shared.metrics.text()).into_response()
}

async fn nowhere(method: Method, uri: Uri) -> ApiError {
    ApiError::no_route(method.as_str(), uri.path())
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::no_method(method.as_str(), uri.path())
}

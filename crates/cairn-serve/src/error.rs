//! What a request is refused with: a status, and `OpenAI`'s error object.

use std::fmt;
use std::time::Duration;

use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use cairn_engine::{RequestError, SampleError};
use serde_json::{Value, json};

/// Bytes of an error's text, at most.
const MESSAGE_BYTES_MAX: usize = 400;
/// Seconds after which a busy server is asked again.
const RETRY_AFTER_SECONDS: u64 = 1;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    /// `OpenAI`'s `type`.
    kind: &'static str,
    /// The field that is wrong.
    param: Option<String>,
    code: Option<&'static str>,
    message: String,
    /// Seconds after which the request may be made again.
    retry_after: u64,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl fmt::Display) -> Self {
        // What is quoted may be as long as the body was.
        let mut message = message.to_string();
        if MESSAGE_BYTES_MAX < message.len() {
            message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
            message += "…";
        }
        let retry_after = RETRY_AFTER_SECONDS;
        Self { status, kind, param: None, code: None, message, retry_after }
    }

    /// Something is wrong with the request as a whole.
    pub(crate) fn invalid(message: impl fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// Something is wrong with a field.
    pub(crate) fn field(name: &str, message: impl fmt::Display) -> Self {
        let name = &name[..name.floor_char_boundary(MESSAGE_BYTES_MAX)];
        Self { param: Some(name.to_owned()), ..Self::invalid(message) }
    }

    /// The body is too large.
    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the body has more than {limit} bytes (max_body_bytes)");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// The body did not come in time.
    pub(crate) fn too_slow(seconds: u64) -> Self {
        let message = format!("the body took more than {seconds} s (body_timeout)");
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    /// There is no such address.
    pub(crate) fn no_route(method: &str, path: &str) -> Self {
        let message = format!("there is no {method} {path} here");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// The address takes other methods.
    pub(crate) fn no_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// The model does something else.
    pub(crate) fn other_kind(name: &str, what: &str) -> Self {
        Self::field("model", format!("'{name}' {what}"))
    }

    /// A text is longer than the model reads.
    pub(crate) fn text_too_long(index: usize, num_tokens: usize, limit: usize) -> Self {
        let message = format!("text {index} has {num_tokens} tokens; the model reads {limit}");
        Self { code: Some("context_length_exceeded"), ..Self::field("input", message) }
    }

    /// There is no such model.
    pub(crate) fn no_model(asked: &str, served: &[&str]) -> Self {
        let message = match served {
            [] => format!("there is no model '{asked}' here, nor any other"),
            [one] => format!("there is no model '{asked}' here; '{one}' is served"),
            several => {
                format!("there is no model '{asked}' here; '{}' are served", several.join("', '"))
            }
        };
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        Self { param: Some("model".to_owned()), code: Some("model_not_found"), ..error }
    }

    /// No model is loaded.
    pub(crate) fn nothing_served() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "no model is loaded")
    }

    /// The prompt leaves no room for a token.
    pub(crate) fn context(num_prompt: usize, max_context: usize) -> Self {
        let message =
            format!("the prompt has {num_prompt} tokens; with an answer at most {max_context} fit");
        Self { code: Some("context_length_exceeded"), ..Self::invalid(message) }
    }

    /// Nobody known asks.
    pub(crate) fn unauthorized() -> Self {
        let message = "no valid key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'";
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    /// The key is not for this.
    pub(crate) fn beyond_scope(scope: &str) -> Self {
        let message = format!("the key is not for this: it has no scope '{scope}'");
        let error = Self::new(StatusCode::FORBIDDEN, "permission_error", message);
        Self { code: Some("insufficient_scope"), ..error }
    }

    /// The key's tokens of this minute are spent.
    pub(crate) fn rate(tokens: usize, per_minute: u32, wait: Duration) -> Self {
        let message = format!(
            "the request counts {tokens} tokens, prompt and answers together, more than is left of the \
             {per_minute} a minute that the key has"
        );
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        let retry_after = wait.as_secs() + 1;
        Self { code: Some("rate_limit_exceeded"), retry_after, ..error }
    }

    /// The request is never within what the key has.
    pub(crate) fn too_many_tokens(tokens: usize, per_minute: u32) -> Self {
        let message = format!(
            "the request counts {tokens} tokens, prompt and answers together, and the key has {per_minute} a \
             minute: ask for fewer new tokens"
        );
        Self { code: Some("tokens_per_minute"), ..Self::invalid(message) }
    }

    /// It cannot be done beside what is there.
    pub(crate) fn conflict(code: &'static str, message: impl fmt::Display) -> Self {
        let error = Self::new(StatusCode::CONFLICT, "invalid_request_error", message);
        Self { code: Some(code), ..error }
    }

    /// Too many wait.
    pub(crate) fn busy(limit: usize) -> Self {
        let message = format!("{limit} requests wait already");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("queue_full"), ..error }
    }

    /// The bodies of other requests take all the room there is for them.
    pub(crate) fn crowded() -> Self {
        let message = "too many large requests at a time (max_bodies_bytes)";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("bodies_full"), ..error }
    }

    /// More answers at once than ever wait.
    pub(crate) fn too_many(count: usize, limit: usize) -> Self {
        Self::field("n", format!("{count} answers at once, and at most {limit} may wait"))
    }

    /// The request comes from a page of another site, or by another name.
    pub(crate) fn foreign(what: &str) -> Self {
        let message = format!("{what} is not this machine, and no key is asked for");
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// The server ends.
    pub(crate) fn draining() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "the server is being stopped")
    }

    /// The engine is gone: the process ends with a report.
    pub(crate) fn engine_gone() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "the engine has failed")
    }

    /// The request could not be computed.
    pub(crate) fn failed(message: impl fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// Why no token could be chosen: what was asked for leaves none, or the model computes no numbers.
    pub(crate) fn from_choice(error: &SampleError) -> Self {
        match error {
            SampleError::NotANumber { .. } => Self::failed(error),
            other => Self::invalid(other),
        }
    }

    /// What the engine says of a request.
    pub(crate) fn from_engine(error: &RequestError) -> Self {
        match error {
            RequestError::QueueFull { limit } => Self::busy(*limit),
            RequestError::Context { .. } => {
                Self { code: Some("context_length_exceeded"), ..Self::invalid(error) }
            }
            other => Self::invalid(other),
        }
    }

    /// The error object, which a stream that has begun ends with.
    pub(crate) fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }

    /// The error object as Anthropic writes it.
    pub(crate) fn messages_body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 | 405 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        };
        json!({ "type": "error", "error": { "type": kind, "message": self.message } })
    }

    /// The response with this body.
    pub(crate) fn respond(&self, body: Value) -> Response {
        let mut response = (self.status, axum::Json(body)).into_response();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(RETRY_AFTER, self.retry_after.into());
        }
        response
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.respond(self.body())
    }
}

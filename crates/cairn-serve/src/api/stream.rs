//! Answers that come piece by piece, as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc::{Sender, channel};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use super::usage;
use crate::driver::Updates;
use crate::error::ApiError;
use crate::reply::{Piece, Reply};
use crate::server::Shared;

/// Events that may wait for a client that reads slowly. Its tokens wait in the request's own channel, which
/// `max_tokens` bounds.
const EVENTS_AHEAD: usize = 16;

/// What every object of an answer says.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) name: String,
    pub(super) created: u64,
}

impl Head {
    /// An object without choices.
    pub(super) fn object(&self) -> Value {
        json!({ "id": self.id, "object": self.object, "created": self.created, "model": self.name })
    }

    fn chunk(&self, index: usize, mut choice: Value, finish: Option<&str>) -> Value {
        choice["index"] = index.into();
        choice["finish_reason"] = finish.into();
        let mut chunk = self.object();
        chunk["choices"] = json!([choice]);
        chunk
    }
}

/// How an endpoint writes its chunks.
#[derive(Clone, Debug)]
pub(super) struct Form {
    /// What comes before the first text.
    pub(super) first: Option<Value>,
    /// A piece of text.
    pub(super) piece: fn(&str) -> Value,
    /// The end.
    pub(super) end: fn() -> Value,
    pub(super) num_prompt: usize,
    pub(super) include_usage: bool,
}

/// Answers with a stream. Each choice has a task; a client that leaves ends them, and so the requests.
pub(super) fn answer(
    shared: &Arc<Shared>,
    head: Head,
    form: Form,
    (updates, stops): (Vec<Updates>, Vec<String>),
) -> Response {
    let (events, stream) = channel::<Result<Event, Infallible>>(EVENTS_AHEAD);
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let mut choices = JoinSet::new();
        for (index, updates) in updates.into_iter().enumerate() {
            let (head, form, events) = (head.clone(), form.clone(), events.clone());
            let writer = Writer { head, form, events, index };
            let (shared, stops) = (Arc::clone(&shared), stops.clone());
            choices.spawn(async move {
                writer.run(Reply::new(&shared.model.parts.tokenizer, stops, updates)).await
            });
        }
        let mut num_new = 0;
        while let Some(choice) = choices.join_next().await {
            match choice {
                Ok(Some(num_tokens)) => num_new += num_tokens,
                // It has failed and said so, or its client has left; the others end with the set.
                Ok(None) => return,
                Err(_) => {
                    let error = ApiError::failed("the request broke off").body().to_string();
                    let _ = events.send(Ok(Event::default().data(error))).await;
                    return;
                }
            }
        }
        if form.include_usage {
            let mut last = head.object();
            last["choices"] = json!([]);
            last["usage"] = usage(form.num_prompt, num_new);
            let _ = events.send(Ok(Event::default().data(last.to_string()))).await;
        }
        let _ = events.send(Ok(Event::default().data("[DONE]"))).await;
    });
    Sse::new(ReceiverStream::new(stream)).keep_alive(KeepAlive::default()).into_response()
}

/// Writes one choice.
struct Writer {
    head: Head,
    form: Form,
    events: Sender<Result<Event, Infallible>>,
    index: usize,
}

impl Writer {
    /// Writes the choice to its end; its tokens, or `None` if it failed or nobody reads.
    async fn run(&self, mut reply: Reply<'_>) -> Option<usize> {
        if let Some(first) = &self.form.first {
            self.send(first.clone(), None).await?;
        }
        loop {
            let next = tokio::select! {
                next = reply.next() => next,
                // The client has left; what is asked for it ends with this task.
                () = self.events.closed() => return None,
            };
            match next {
                Ok(Piece::Text(text)) => self.send((self.form.piece)(&text), None).await?,
                Ok(Piece::End(finish)) => {
                    self.send((self.form.end)(), Some(finish)).await?;
                    return Some(reply.num_tokens());
                }
                Err(error) => {
                    self.fail(&error).await;
                    return None;
                }
            }
        }
    }

    async fn send(&self, choice: Value, finish: Option<&str>) -> Option<()> {
        let chunk = self.head.chunk(self.index, choice, finish);
        self.events.send(Ok(Event::default().data(chunk.to_string()))).await.ok()
    }

    async fn fail(&self, error: &ApiError) {
        let _ = self.events.send(Ok(Event::default().data(error.body().to_string()))).await;
    }
}

//! How answers are written, whole or piece by piece: one [`Format`] for each endpoint.

use std::convert::Infallible;
use std::sync::Arc;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::wrappers::ReceiverStream;

use crate::account::Account;
use crate::driver::Updates;
use crate::error::ApiError;
use crate::model::ServedParts;
use crate::reply::{Piece, Reading, Reply};
use crate::server::Shared;

/// Events that may wait for a client that reads slowly. Its tokens wait in the request's own channel, which
/// `max_tokens` bounds.
const EVENTS_AHEAD: usize = 16;

/// An event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Message {
    /// Its name, in streams that name them.
    pub(super) event: Option<&'static str>,
    pub(super) data: String,
}

impl Message {
    /// An event without a name.
    pub(super) fn data(data: &Value) -> Self {
        Self { event: None, data: data.to_string() }
    }
}

/// How an endpoint writes its answers.
pub(super) trait Format: Send + Sync {
    /// All answers at once.
    fn whole(self: Box<Self>, parts: &ServedParts, answers: Vec<Piece>) -> Value;

    /// What a stream begins with.
    fn begin(&mut self) -> Vec<Message> {
        Vec::new()
    }

    /// The next piece of an answer.
    fn piece(&mut self, parts: &ServedParts, choice: usize, piece: Piece) -> Vec<Message>;

    /// What a stream ends with, all answers being complete.
    fn end(&mut self) -> Vec<Message>;

    /// The end of a stream that has failed.
    fn failed(&mut self, error: &ApiError) -> Vec<Message> {
        vec![Message::data(&error.body())]
    }
}

/// Answers with a stream. A client that leaves ends it, and so what is computed for it.
pub(super) fn stream(
    shared: Arc<Shared>,
    format: Box<dyn Format>,
    (reading, updates): (Reading, Updates),
    account: Account,
) -> Response {
    let (events, stream) = channel(EVENTS_AHEAD);
    tokio::spawn(async move {
        let parts = &shared.model.parts;
        let reply = Reply::new(&parts.tokenizer, &reading, updates);
        // Nobody reads any more where this is `None`: there is nobody to tell.
        let _ = Writer { format, events, parts, account }.run(reply).await;
    });
    Sse::new(ReceiverStream::new(stream)).keep_alive(KeepAlive::default()).into_response()
}

/// Writes a stream.
struct Writer<'a> {
    format: Box<dyn Format>,
    events: Sender<Result<Event, Infallible>>,
    parts: &'a ServedParts,
    account: Account,
}

impl Writer<'_> {
    /// Writes all answers to their end; `None` if nobody reads them.
    async fn run(mut self, mut reply: Reply<'_>) -> Option<()> {
        let begin = self.format.begin();
        self.send(begin).await?;
        loop {
            let next = tokio::select! {
                next = reply.next() => next,
                // The client has left; what is asked for it ends with this task.
                () = self.events.closed() => return None,
            };
            let messages = match next {
                Ok(Some((choice, piece))) => {
                    self.account.note(&piece);
                    self.format.piece(self.parts, choice, piece)
                }
                Ok(None) => {
                    let end = self.format.end();
                    return self.send(end).await;
                }
                Err(error) => {
                    self.account.fail(error.to_string());
                    let end = self.format.failed(&error);
                    return self.send(end).await;
                }
            };
            self.send(messages).await?;
        }
    }

    async fn send(&self, messages: Vec<Message>) -> Option<()> {
        for Message { event, data } in messages {
            let written = Event::default().data(data);
            let written = match event {
                Some(name) => written.event(name),
                None => written,
            };
            self.events.send(Ok(written)).await.ok()?;
        }
        Some(())
    }
}

//! How answers are written, whole or piece by piece: one [`Format`] for each endpoint.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Sender, channel};
use tokio::time::{interval, timeout};
use tokio_stream::wrappers::ReceiverStream;

use crate::account::Account;
use crate::driver::Updates;
use crate::error::ApiError;
use crate::model::{ServedModel, ServedParts};
use crate::reply::{Piece, Reading, Reply};

/// Frames that may wait for a client that reads slowly. Its tokens wait in the request's own channel, which
/// `max_tokens` bounds.
const FRAMES_AHEAD: usize = 4;
/// Bytes after which a frame is sent, whatever else is there.
const FRAME_BYTES: usize = 8 << 10;
/// Within this time and as much again something is sent, so that nobody on the way takes the stream for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

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
    model: Arc<ServedModel>,
    format: Box<dyn Format>,
    (reading, updates): (Reading, Updates),
    (account, write_timeout): (Account, Duration),
) -> Response {
    let (frames, stream) = channel(FRAMES_AHEAD);
    tokio::spawn(async move {
        let parts = &model.parts;
        let reply = Reply::new(&parts.tokenizer, &reading, updates);
        let text = Vec::with_capacity(FRAME_BYTES);
        let writer = Writer { format, frames, text, parts, account, write_timeout };
        // Nobody reads any more where this is `None`: there is nobody to tell.
        let _ = writer.run(reply).await;
    });
    let head = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    (head, Body::from_stream(ReceiverStream::new(stream))).into_response()
}

/// Writes a stream.
struct Writer<'a> {
    format: Box<dyn Format>,
    frames: Sender<Result<Bytes, Infallible>>,
    /// Events that are written and not sent.
    text: Vec<u8>,
    parts: &'a ServedParts,
    account: Account,
    /// How long the client may leave what was sent unread.
    write_timeout: Duration,
}

impl Writer<'_> {
    /// Writes all answers to their end; `None` if nobody reads them.
    ///
    /// What has come by the time that it can be sent is sent together, an event for each piece.
    async fn run(mut self, mut reply: Reply<'_>) -> Option<()> {
        let begin = self.format.begin();
        self.write(&begin);
        self.send().await?;
        let mut keep_alive = interval(KEEP_ALIVE);
        keep_alive.reset();
        let mut is_idle = false;
        loop {
            let mut next = tokio::select! {
                biased;
                next = reply.next() => next,
                // The client has left; what is asked for it ends with this task.
                () = self.frames.closed() => return None,
                _ = keep_alive.tick() => {
                    if is_idle {
                        self.text.extend_from_slice(b": alive\n\n");
                        self.send().await?;
                    }
                    is_idle = true;
                    continue;
                }
            };
            is_idle = false;
            loop {
                match next {
                    Ok(Some((choice, piece))) => {
                        self.account.note(&piece);
                        let messages = self.format.piece(self.parts, choice, piece);
                        self.write(&messages);
                    }
                    // Nothing is there, or nothing will be: the wait for the next says.
                    Ok(None) if reply.is_open() => break,
                    Ok(None) => {
                        let end = self.format.end();
                        self.write(&end);
                        return self.send().await;
                    }
                    Err(error) => {
                        self.account.fail(error.to_string());
                        let end = self.format.failed(&error);
                        self.write(&end);
                        return self.send().await;
                    }
                }
                if FRAME_BYTES <= self.text.len() {
                    break;
                }
                next = reply.ready();
            }
            self.send().await?;
        }
    }

    fn write(&mut self, messages: &[Message]) {
        for Message { event, data } in messages {
            if let Some(name) = event {
                self.text.extend_from_slice(b"event: ");
                self.text.extend_from_slice(name.as_bytes());
                self.text.push(b'\n');
            }
            // JSON has no line ends.
            self.text.extend_from_slice(b"data: ");
            self.text.extend_from_slice(data.as_bytes());
            self.text.extend_from_slice(b"\n\n");
        }
    }

    /// Sends what is written.
    async fn send(&mut self) -> Option<()> {
        if self.text.is_empty() {
            return Some(());
        }
        let frame = Ok(Bytes::copy_from_slice(&self.text));
        self.text.clear();
        match self.frames.try_send(frame) {
            Ok(()) => Some(()),
            Err(TrySendError::Closed(_)) => None,
            // A client of HTTP/2 that answers pings and reads nothing is noticed here alone.
            Err(TrySendError::Full(frame)) => {
                timeout(self.write_timeout, self.frames.send(frame)).await.ok()?.ok()
            }
        }
    }
}

//! Answers of HTTP/2 that nobody takes. A client that answers pings and never makes room for an answer would keep it
//! for ever: the answer ends alone, its connection goes on.

use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::response::Response;
use hyper::body::{Body as Pieces, Frame, SizeHint};
use hyper::rt::Executor;
use tokio::time::interval;

/// Bytes of an answer that are handed out at a time; so many may stay with a client that takes no more, and the
/// next ones tell whether it does.
const PIECE_BYTES: usize = 16 << 10;
/// Between two looks at an answer, at least.
const LOOK_MIN: Duration = Duration::from_millis(1);

tokio::task_local! {
    /// The answer that the stream of this task writes.
    static UNREAD: Arc<Unread>;
}

/// Since when a piece of an answer waits to be taken, if one does.
#[derive(Debug, Default)]
struct Unread(Mutex<Option<Instant>>);

impl Unread {
    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    fn since(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs what answers the streams of HTTP/2, each as long as its answer is taken.
#[derive(Clone, Debug)]
pub(crate) struct Answering {
    patience: Duration,
}

impl Answering {
    /// Ends answers of which nothing is taken for so long, or up to twice that.
    pub(crate) fn new(patience: Duration) -> Self {
        Self { patience: patience.max(LOOK_MIN) }
    }
}

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Answering {
    fn execute(&self, stream: F) {
        let patience = self.patience;
        tokio::spawn(async move {
            let unread = Arc::new(Unread::default());
            let mut stream = pin!(UNREAD.scope(Arc::clone(&unread), stream));
            let mut looks = interval(patience);
            looks.reset();
            loop {
                tokio::select! {
                    biased;
                    _ = &mut stream => return,
                    // The stream that is dropped is reset.
                    _ = looks.tick() => {
                        if unread.since().is_some_and(|since| patience <= since.elapsed()) {
                            return;
                        }
                    }
                }
            }
        });
    }
}

/// Has it noted when an answer is taken, where its stream looks at that.
pub(crate) async fn noted(response: Response) -> Response {
    match UNREAD.try_with(Arc::clone) {
        Ok(unread) if !response.body().is_end_stream() => {
            unread.set(Some(Instant::now()));
            response.map(|body| Body::new(Noted { body, rest: Bytes::new(), unread }))
        }
        _ => response,
    }
}

/// An answer in pieces of some size, that notes when they are taken.
struct Noted {
    body: Body,
    /// Of the last piece, what was not handed out.
    rest: Bytes,
    unread: Arc<Unread>,
}

impl Noted {
    fn piece(&mut self) -> Frame<Bytes> {
        self.unread.set(Some(Instant::now()));
        Frame::data(self.rest.split_to(self.rest.len().min(PIECE_BYTES)))
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        self.unread.set(None);
    }
}

impl Pieces for Noted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(self.piece())));
        }
        let next = Pin::new(&mut self.body).poll_frame(context);
        let Poll::Ready(Some(Ok(frame))) = next else {
            // It waits for what is computed, or for nothing.
            self.unread.set(None);
            return next;
        };
        match frame.into_data() {
            Ok(data) => {
                self.rest = data;
                Poll::Ready(Some(Ok(self.piece())))
            }
            Err(other) => Poll::Ready(Some(Ok(other))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, of_body) = (self.rest.len() as u64, self.body.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(of_body.lower() + rest);
        if let Some(upper) = of_body.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

//! Bodies on their way in: whole, within limits of their own and of all of them together, and read away from
//! the threads that serve connections, so that a long prompt does not hold up other answers.

use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body as Incoming;
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_LENGTH;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_stream::StreamExt;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::keys::Holder;
use crate::server::{ServeOptions, Shared};

/// What the bytes of all bodies are counted in.
const UNIT: usize = 1 << 10;

/// Takes bodies in.
#[derive(Debug)]
pub(crate) struct Intake {
    /// Room for the bytes of all bodies, in units.
    room: Arc<Semaphore>,
    /// Threads that may read bodies at a time.
    readers: Arc<Semaphore>,
    max_body_bytes: usize,
    body_timeout: Duration,
}

/// That a request came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Came {
    /// The number of the request.
    pub(crate) number: u64,
    /// When.
    pub(crate) begin: Instant,
}

impl Came {
    /// The next request comes now.
    pub(crate) fn now(shared: &Shared) -> Self {
        Self { number: shared.number(), begin: Instant::now() }
    }
}

/// A body, and the room that it takes.
#[derive(Debug)]
pub(crate) struct Body {
    /// Numbers the request: names its answer, and keys its randomness where no seed is given.
    pub(crate) number: u64,
    /// When the request came.
    pub(crate) begin: Instant,
    /// Who asks.
    pub(crate) holder: Holder,
    bytes: Vec<u8>,
    _room: Option<OwnedSemaphorePermit>,
}

impl Intake {
    /// Takes bodies within the limits of these options.
    pub(crate) fn new(options: &ServeOptions) -> Self {
        let max_body_bytes = options.max_body_bytes;
        let units = options.max_bodies_bytes.max(max_body_bytes).div_ceil(UNIT) + 1;
        let readers = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self {
            room: Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS))),
            readers: Arc::new(Semaphore::new(readers)),
            max_body_bytes,
            body_timeout: options.body_timeout,
        }
    }

    async fn take(&self, came: Came, holder: Holder, body: Incoming) -> Result<Body, ApiError> {
        let Came { number, begin } = came;
        let mut taken = Body { number, begin, holder, bytes: Vec::new(), _room: None };
        let mut pieces = body.into_data_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|_| ApiError::invalid("the body broke off"))?;
            let length = taken.bytes.len() + piece.len();
            if self.max_body_bytes < length {
                return Err(ApiError::too_large(self.max_body_bytes));
            }
            let more = length.div_ceil(UNIT) - taken.bytes.len().div_ceil(UNIT);
            let more = u32::try_from(more).unwrap_or(u32::MAX);
            // Who waited here would keep the room that others wait for.
            let room = Arc::clone(&self.room).try_acquire_many_owned(more);
            let room = room.map_err(|_| ApiError::crowded())?;
            match &mut taken._room {
                Some(all) => all.merge(room),
                none => *none = Some(room),
            }
            taken.bytes.extend_from_slice(&piece);
        }
        Ok(taken)
    }

    /// Reads a body on a thread where that may take its time. A panic there is this request's alone.
    pub(crate) async fn prepare<T: Send + 'static>(
        &self,
        body: Body,
        read: impl FnOnce(Fields) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let reader = Arc::clone(&self.readers).acquire_owned().await.expect("never closed");
        let reading = tokio::task::spawn_blocking(move || {
            let _reader = reader;
            let fields = Fields::parse(&body.bytes)?;
            drop(body);
            read(fields)
        });
        reading.await.map_err(|_| ApiError::failed("reading the request failed here"))?
    }
}

impl FromRequest<Arc<Shared>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, shared: &Arc<Shared>) -> Result<Self, ApiError> {
        let intake = &shared.intake;
        let came = request.extensions().get().copied().unwrap_or_else(|| Came::now(shared));
        let holder = request.extensions().get::<Holder>().cloned().unwrap_or_default();
        let stated = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        let stated = stated.and_then(|value| value.parse().ok()).unwrap_or(0_u64);
        if u64::try_from(intake.max_body_bytes).is_ok_and(|limit| limit < stated) {
            return Err(ApiError::too_large(intake.max_body_bytes));
        }
        match timeout(intake.body_timeout, intake.take(came, holder, request.into_body())).await {
            Err(_) => Err(ApiError::too_slow(intake.body_timeout.as_secs())),
            Ok(taken) => taken,
        }
    }
}

//! Routes, the listener, and ending in good order: first nothing new is taken and readiness says so, then what
//! runs comes to its end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use cairn_engine::Engine;
use cairn_spec::Hint;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::api::{Numbers, chat_completions, completions, detokenize, tokenize};
use crate::driver::{Driver, DriverError, DriverThread};
use crate::error::ApiError;
use crate::keys::ApiKeys;
use crate::metrics::Metrics;
use crate::model::ServedModel;

/// Between two looks whether somebody asked to stop.
const STOP_POLL: Duration = Duration::from_millis(20);
/// After a connection could not be accepted, for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of a request's head, at most.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// How a model is served.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Where to listen; port 0 takes a free one.
    pub address: SocketAddr,
    /// Who may ask.
    pub keys: ApiKeys,
    /// Bytes of a body, at most.
    pub max_body_bytes: usize,
    /// Connections at a time, at most; further ones wait to be accepted.
    pub max_connections: usize,
    /// How long a client may take for a request's head.
    pub header_timeout: Duration,
    /// How long a client may take for a body.
    pub body_timeout: Duration,
    /// How long what runs may take once the server is to end.
    pub drain_timeout: Duration,
    /// Keys the randomness of requests without a seed.
    pub seed: u64,
    /// The time, in seconds since 1970, for the answers' `created`.
    pub now: fn() -> u64,
}

impl ServeOptions {
    /// Refuses an address that everybody could use.
    ///
    /// # Errors
    ///
    /// [`ServeError::Open`].
    pub fn check(&self) -> Result<(), ServeError> {
        let address = self.address;
        if address.ip().is_loopback() || !self.keys.is_empty() {
            return Ok(());
        }
        Err(ServeError::Open { address })
    }
}

/// Why a server does not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Everybody could ask.
    #[error("{address} can be reached from other machines, and no key is asked for")]
    Open {
        /// Where it was to listen.
        address: SocketAddr,
    },
    /// The address cannot be had.
    #[error("cannot listen at {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// There are no threads for it.
    #[error("cannot start the server's threads")]
    Runtime(#[source] io::Error),
    /// The engine ended.
    #[error("the engine ended")]
    Driver(#[from] DriverError),
    /// What ran did not end in time.
    #[error("requests still ran {} s after the server was to end; they were broken off", seconds)]
    Drain {
        /// How long they had.
        seconds: u64,
    },
}

impl Hint for ServeError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Open { address } => vec![
                "ask for keys: --api-keys FILE, one a line".to_owned(),
                format!(
                    "or listen on this machine only: --host 127.0.0.1 --port {}",
                    address.port()
                ),
            ],
            Self::Listen { error, .. } if error.kind() == io::ErrorKind::AddrInUse => {
                vec![
                    "something else listens there: choose another --port, or 0 for a free one"
                        .to_owned(),
                ]
            }
            Self::Listen { .. } | Self::Runtime(_) | Self::Driver(_) | Self::Drain { .. } => {
                Vec::new()
            }
        }
    }
}

/// What all requests share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) model: ServedModel,
    pub(crate) numbers: Numbers,
    pub(crate) seed: u64,
    pub(crate) now: fn() -> u64,
    driver: Driver,
    metrics: Arc<Metrics>,
    keys: ApiKeys,
    max_body_bytes: usize,
    body_timeout: Duration,
    is_draining: AtomicBool,
}

impl Shared {
    /// The way to the engine, while the server takes requests.
    pub(crate) fn driver(&self) -> Result<&Driver, ApiError> {
        if self.is_draining.load(Ordering::Relaxed) {
            return Err(ApiError::draining());
        }
        Ok(&self.driver)
    }
}

/// Serves a model until `stop` says so, and then ends in good order. `listening` is told where.
///
/// # Errors
///
/// [`ServeError`]: an address that everybody could use, or that cannot be had; an engine that failed.
pub fn serve(
    engine: Engine,
    model: ServedModel,
    options: &ServeOptions,
    stop: impl Fn() -> bool,
    listening: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    options.check()?;
    let address = options.address;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_io().enable_time().build();
    runtime.map_err(ServeError::Runtime)?.block_on(async {
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|error| ServeError::Listen { address, error })?;
        listening(listener.local_addr().unwrap_or(address));
        let metrics = Arc::new(Metrics::default());
        let (driver, thread) = Driver::start(engine, Arc::clone(&metrics))?;
        let shared = Arc::new(Shared {
            model,
            numbers: Numbers::default(),
            seed: options.seed,
            now: options.now,
            driver,
            metrics,
            keys: options.keys.clone(),
            max_body_bytes: options.max_body_bytes,
            body_timeout: options.body_timeout,
            is_draining: AtomicBool::new(false),
        });
        Server { options, shared }.run(listener, thread, stop).await
    })
}

struct Server<'a> {
    options: &'a ServeOptions,
    shared: Arc<Shared>,
}

impl Server<'_> {
    async fn run(
        self,
        listener: TcpListener,
        mut thread: DriverThread,
        stop: impl Fn() -> bool,
    ) -> Result<(), ServeError> {
        let router = router(Arc::clone(&self.shared));
        let connections = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(self.options.max_connections));
        let stopped = pin!(async {
            while !stop() {
                sleep(STOP_POLL).await;
            }
        });
        let is_gone = {
            let accepting = pin!(self.accept(&listener, &router, &connections, &places));
            tokio::select! {
                () = stopped => false,
                () = thread.ended() => true,
                never = accepting => match never {},
            }
        };
        if is_gone {
            return Ok(thread.join()?);
        }
        self.shared.is_draining.store(true, Ordering::Relaxed);
        drop(listener);
        let limit = self.options.drain_timeout;
        let drained = timeout(limit, async {
            connections.shutdown().await;
            // The thread ends with the last way to it, which requests on their way may hold still.
            drop((router, self.shared));
            thread.ended().await;
        });
        if drained.await.is_err() {
            return Err(ServeError::Drain { seconds: limit.as_secs() });
        }
        Ok(thread.join()?)
    }

    async fn accept(
        &self,
        listener: &TcpListener,
        router: &Router,
        connections: &GracefulShutdown,
        places: &Arc<Semaphore>,
    ) -> Infallible {
        loop {
            let place = Arc::clone(places).acquire_owned().await.expect("never closed");
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                // Its client has left already, or there are no descriptors: others may be luckier.
                Err(_) => {
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let connection = connections.watch(self.connection(stream, router.clone()));
            tokio::spawn(async move {
                // What can go wrong here is the client's doing, who is not there to be told.
                let _ = connection.await;
                drop(place);
            });
        }
    }

    fn connection(
        &self,
        stream: TcpStream,
        router: Router,
    ) -> http1::Connection<TokioIo<TcpStream>, TowerToHyperService<Router>> {
        // Tokens are small and awaited. Without it they come later, not otherwise.
        let _ = stream.set_nodelay(true);
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.options.header_timeout)
            .max_buf_size(HEAD_BYTES_MAX);
        builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
    }
}

fn router(shared: Arc<Shared>) -> Router {
    let open = Router::new().route("/health", get(health)).route("/ready", get(ready));
    let guarded = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/metrics", get(metrics))
        .fallback(nowhere)
        .method_not_allowed_fallback(nowhere)
        .layer(from_fn_with_state(Arc::clone(&shared), guard));
    open.merge(guarded).with_state(shared)
}

async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    match shared.keys.check(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// The process lives.
async fn health() -> Json<serde_json::Value> {
    Json(json!({ "status": "ok" }))
}

/// Requests are taken.
async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    match shared.driver() {
        Ok(_) => Json(json!({ "status": "ready" })).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn models(State(shared): State<Arc<Shared>>) -> Json<serde_json::Value> {
    Json(json!({ "object": "list", "data": [shared.model.entry((shared.now)())] }))
}

async fn model(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
) -> Result<Json<serde_json::Value>, ApiError> {
    shared.model.check_name(Some(&id))?;
    Ok(Json(shared.model.entry((shared.now)())))
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = [("content-type", "text/plain; version=0.0.4")];
    (StatusCode::OK, kind, shared.metrics.text()).into_response()
}

async fn nowhere(method: Method, uri: Uri) -> ApiError {
    ApiError::no_route(method.as_str(), uri.path())
}

/// The body of a request, whole, within its limits.
#[derive(Debug)]
pub(crate) struct Body(pub(crate) Bytes);

impl FromRequest<Arc<Shared>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, shared: &Arc<Shared>) -> Result<Self, ApiError> {
        let limit = shared.max_body_bytes;
        match timeout(shared.body_timeout, to_bytes(request.into_body(), limit)).await {
            Err(_) => Err(ApiError::too_slow(shared.body_timeout.as_secs())),
            Ok(Ok(bytes)) => Ok(Self(bytes)),
            Ok(Err(_)) => Err(ApiError::too_large(limit)),
        }
    }
}

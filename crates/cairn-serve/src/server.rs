//! The listener, and ending in good order: first nothing new is taken and readiness says so, then what runs comes
//! to its end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use cairn_engine::Engine;
use cairn_spec::Hint;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;

use crate::driver::{Driver, DriverError, DriverThread};
use crate::error::ApiError;
use crate::intake::Intake;
use crate::keys::ApiKeys;
use crate::metrics::Metrics;
use crate::model::ServedModel;
use crate::routes::router;

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
    /// Bytes of all bodies together that are being taken, at most.
    pub max_bodies_bytes: usize,
    /// Connections at a time, at most; further ones wait to be accepted.
    pub max_connections: usize,
    /// How long a client may take for a request's head.
    pub header_timeout: Duration,
    /// How long a client may take for a body.
    pub body_timeout: Duration,
    /// How long a client may leave an answer unread.
    pub write_timeout: Duration,
    /// How long what runs may take once the server is to end.
    pub drain_timeout: Duration,
    /// Whether metrics are told under vLLM's names as well.
    pub has_vllm_metrics: bool,
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
    pub(crate) intake: Intake,
    pub(crate) keys: ApiKeys,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) seed: u64,
    pub(crate) now: fn() -> u64,
    /// When the server started, in seconds since 1970.
    pub(crate) started: u64,
    /// The number of the next request.
    next_number: AtomicU64,
    /// The way to the engine; none once the server is to end.
    driver: RwLock<Option<Driver>>,
}

impl Shared {
    /// The way to the engine, while the server takes requests. Whoever has it is served to the end.
    pub(crate) fn driver(&self) -> Result<Driver, ApiError> {
        // Nothing panics with the lock held.
        let driver = self.driver.read().unwrap_or_else(PoisonError::into_inner);
        driver.clone().ok_or_else(ApiError::draining)
    }

    /// The number of a request.
    pub(crate) fn number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes no more requests.
    fn drain(&self) {
        self.driver.write().unwrap_or_else(PoisonError::into_inner).take();
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
        let metrics = Arc::new(Metrics::new(options.has_vllm_metrics));
        let (driver, thread) = Driver::start(engine, Arc::clone(&metrics))?;
        let shared = Arc::new(Shared {
            model,
            intake: Intake::new(options),
            keys: options.keys.clone(),
            metrics,
            seed: options.seed,
            now: options.now,
            started: (options.now)(),
            next_number: AtomicU64::new(0),
            driver: RwLock::new(Some(driver)),
        });
        Server { options, shared }.run(listener, thread, stop).await
    })
}

/// A client's side of a connection, which ends if it does not read.
type Client = TokioIo<Pin<Box<TimeoutStream<TcpStream>>>>;

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
            let accepting = pin!(self.accept(&listener, &router, Some(&connections), &places));
            tokio::select! {
                () = stopped => false,
                () = thread.ended() => true,
                never = accepting => match never {},
            }
        };
        if is_gone {
            return Ok(thread.join()?);
        }
        self.shared.drain();
        let limit = self.options.drain_timeout;
        let drained = timeout(limit, async {
            connections.shutdown().await;
            // The thread ends with the last way to it, which requests on their way may hold still.
            thread.ended().await;
        });
        // Who comes meanwhile is told that the server ends, and whoever watches over it that it is not ready.
        let drained = tokio::select! {
            drained = drained => drained,
            never = self.accept(&listener, &router, None, &places) => match never {},
        };
        if drained.is_err() {
            return Err(ServeError::Drain { seconds: limit.as_secs() });
        }
        Ok(thread.join()?)
    }

    /// Accepts connections; `watching` are those that have a time to end well.
    async fn accept(
        &self,
        listener: &TcpListener,
        router: &Router,
        watching: Option<&GracefulShutdown>,
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
            let connection = self.connection(stream, router.clone());
            // What can go wrong there is the client's doing, who is not there to be told.
            match watching {
                Some(watching) => {
                    let connection = watching.watch(connection);
                    tokio::spawn(async move { (_, _) = (connection.await, place) });
                }
                None => {
                    tokio::spawn(async move { (_, _) = (connection.await, place) });
                }
            }
        }
    }

    fn connection(
        &self,
        stream: TcpStream,
        router: Router,
    ) -> http1::Connection<Client, TowerToHyperService<Router>> {
        // Tokens are small and awaited. Without it they come later, not otherwise.
        let _ = stream.set_nodelay(true);
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.options.header_timeout)
            .max_buf_size(HEAD_BYTES_MAX);
        let mut client = TimeoutStream::new(stream);
        client.set_write_timeout(Some(self.options.write_timeout));
        builder.serve_connection(TokioIo::new(Box::pin(client)), TowerToHyperService::new(router))
    }
}

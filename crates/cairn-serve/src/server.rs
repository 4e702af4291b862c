//! The listener, and ending in good order: first nothing new is taken and readiness says so, then what runs comes
//! to its end.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cairn_spec::Hint;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{sleep, timeout};

use crate::admin::Loader;
use crate::connection::{Connections, Patience, Tls};
use crate::driver::DriverError;
use crate::intake::Intake;
use crate::keys::ApiKeys;
use crate::metrics::Metrics;
use crate::model::LoadedModel;
use crate::models::{Ends, Memory, Models};
use crate::routes::router;

/// Between two looks whether somebody asked to stop.
const STOP_POLL: Duration = Duration::from_millis(20);
/// After a connection could not be accepted, for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How a model is served.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Where to listen; port 0 takes a free one.
    pub address: SocketAddr,
    /// Who may ask.
    pub keys: ApiKeys,
    /// The certificate, if connections are to be encrypted.
    pub tls: Option<Tls>,
    /// Where models are that may be loaded while the server runs.
    pub models_folder: Option<PathBuf>,
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
    /// What version this is.
    pub version: &'static str,
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

    /// Whether others on the way can read keys and answers.
    pub fn is_readable(&self) -> bool {
        !self.address.ip().is_loopback() && self.tls.is_none()
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
pub(crate) struct Shared {
    pub(crate) models: Models,
    pub(crate) loader: Box<Loader>,
    pub(crate) models_folder: Option<PathBuf>,
    /// Had by whoever loads a model: one at a time.
    pub(crate) loading: Arc<Mutex<()>>,
    pub(crate) intake: Intake,
    pub(crate) keys: ApiKeys,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) write_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) seed: u64,
    pub(crate) now: fn() -> u64,
    pub(crate) version: &'static str,
    /// When the server started, in seconds since 1970.
    pub(crate) started: u64,
    /// The number of the next request.
    next_number: AtomicU64,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("models", &self.models).finish_non_exhaustive()
    }
}

impl Shared {
    /// The number of a request.
    pub(crate) fn number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }
}

/// Models, their memory, and what loads more of them.
pub struct Stock {
    /// Memory for all of them.
    pub memory: Memory,
    /// Those that are served from the beginning, the first of which answers requests that name none.
    pub models: Vec<LoadedModel>,
    /// Loads more.
    pub loader: Box<Loader>,
}

impl fmt::Debug for Stock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stock").field("models", &self.models).finish_non_exhaustive()
    }
}

/// Serves models until `stop` says so, and then ends in good order. `listening` is told where.
///
/// # Errors
///
/// [`ServeError`]: an address that everybody could use, or that cannot be had; an engine that failed.
pub fn serve(
    stock: Stock,
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
        let metrics = Arc::new(Metrics::new(options.has_vllm_metrics));
        let Stock { memory, models: loaded, loader } = stock;
        let (models, ends) = Models::new(memory, Arc::clone(&metrics));
        let started = (options.now)();
        for model in loaded {
            models.add(model, started)?.expect("the server is not to end yet");
        }
        let shared = Arc::new(Shared {
            models,
            loader,
            models_folder: options.models_folder.clone(),
            loading: Arc::default(),
            intake: Intake::new(options),
            keys: options.keys.clone(),
            metrics,
            write_timeout: options.write_timeout,
            drain_timeout: options.drain_timeout,
            seed: options.seed,
            now: options.now,
            version: options.version,
            started,
            next_number: AtomicU64::new(0),
        });
        listening(listener.local_addr().unwrap_or(address));
        Server { options, shared }.run(listener, ends, stop).await
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
        mut ends: Ends,
        stop: impl Fn() -> bool,
    ) -> Result<(), ServeError> {
        let connections = Connections {
            router: router(Arc::clone(&self.shared)),
            patience: Patience {
                header: self.options.header_timeout,
                write: self.options.write_timeout,
            },
            tls: self.options.tls.clone(),
        };
        let watching = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(self.options.max_connections));
        let stopped = pin!(async {
            while !stop() {
                sleep(STOP_POLL).await;
            }
        });
        {
            let accepting = pin!(accept(&listener, &connections, Some(&watching), &places));
            tokio::select! {
                () = stopped => {}
                // An engine that was not asked to end, or not so: nothing of its model can be trusted.
                error = failure(&mut ends) => return Err(error.into()),
                never = accepting => match never {},
            }
        }
        self.shared.models.drain();
        let limit = self.options.drain_timeout;
        let drained = timeout(limit, async {
            watching.shutdown().await;
            // The threads end with the last way to them, which requests on their way may hold still.
            while let Some(end) = ends.recv().await {
                end?;
            }
            Ok(())
        });
        // Who comes meanwhile is told that the server ends, and whoever watches over it that it is not ready.
        let drained: Result<Result<(), DriverError>, _> = tokio::select! {
            drained = drained => drained,
            never = accept(&listener, &connections, None, &places) => match never {},
        };
        match drained {
            Ok(end) => Ok(end?),
            Err(_) => Err(ServeError::Drain { seconds: limit.as_secs() }),
        }
    }
}

/// Waits for an engine that fails; those that end because their models are forgotten do not.
async fn failure(ends: &mut Ends) -> DriverError {
    loop {
        match ends.recv().await {
            Some(Ok(())) => {}
            Some(Err(error)) => return error,
            None => std::future::pending().await,
        }
    }
}

/// Accepts connections; `watching` are those that have a time to end well.
async fn accept(
    listener: &TcpListener,
    connections: &Connections,
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
        let connection = connections.clone().serve(stream, watching.map(GracefulShutdown::watcher));
        tokio::spawn(async move { (_, _) = (connection.await, place) });
    }
}

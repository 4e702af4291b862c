//! A connection: TLS where the server has a certificate, HTTP/1.1, or HTTP/2 where both sides agree on it over TLS.
//! All of it within limits: of time for each step, of a head's bytes, of streams that are begun and broken off.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use cairn_spec::Hint;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::Watcher;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

use crate::unread::Answering;

/// Bytes of a request's head, at most.
const HEAD_BYTES_MAX: u32 = 64 << 10;
/// Requests of one HTTP/2 connection at a time.
const STREAMS_MAX: u32 = 32;
/// Requests that a client of HTTP/2 may begin and break off before they are looked at; one more ends the
/// connection.
const PENDING_RESETS_MAX: usize = 20;
/// Requests of one HTTP/2 connection that are ended for what is wrong with them; one more ends the connection.
const LOCAL_RESETS_MAX: usize = 64;
/// HTTP/2, as it is called when a connection begins.
const H2: &[u8] = b"h2";

/// A certificate with its key.
#[derive(Clone, Debug)]
pub struct Tls(Arc<ServerConfig>);

/// Why a certificate with a key is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file holds none.
    #[error("{} holds no {what}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wanted of it.
        what: &'static str,
        /// What was found.
        #[source]
        source: PemError,
    },
    /// They do not go together, or are of no kind that is known.
    #[error("{} and {} are not a certificate and its key", cert.display(), key.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's.
        key: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

impl Hint for TlsError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Pem { what, .. } => {
                vec![format!("a {what} in PEM begins with -----BEGIN")]
            }
            Self::Pair { .. } => {
                vec![
                    "the certificate comes first in its file, and was made from this key"
                        .to_owned(),
                ]
            }
        }
    }
}

impl Tls {
    /// Reads a chain of certificates and the first one's key, both in PEM. The paths are used in errors.
    ///
    /// # Errors
    ///
    /// [`TlsError`] names the file that holds none, or says why they do not go together.
    pub fn from_pem(
        (cert, cert_path): (&[u8], &Path),
        (key, key_path): (&[u8], &Path),
    ) -> Result<Self, TlsError> {
        let pem = |path: &Path, what| {
            let path = path.to_owned();
            move |source| TlsError::Pem { path, what, source }
        };
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(cert).collect();
        let mut chain = chain.map_err(pem(cert_path, "certificate"))?;
        if chain.is_empty() {
            return Err(pem(cert_path, "certificate")(PemError::NoItemsFound));
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(pem(key_path, "private key"))?;
        let pair = |source| {
            let (cert, key) = (cert_path.to_owned(), key_path.to_owned());
            TlsError::Pair { cert, key, source }
        };
        chain.shrink_to_fit();
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(pair)?;
        // Refuses a key that is not the certificate's.
        let config = config.with_no_client_auth().with_single_cert(chain, key);
        let mut config = config.map_err(|source| {
            let (cert, key) = (cert_path.to_owned(), key_path.to_owned());
            TlsError::Pair { cert, key, source }
        })?;
        config.alpn_protocols = vec![H2.to_vec(), b"http/1.1".to_vec()];
        Ok(Self(Arc::new(config)))
    }
}

/// How long a client may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For a request's head, for what comes before the first one, and to answer a ping.
    pub(crate) header: Duration,
    /// To read what was sent.
    pub(crate) write: Duration,
}

/// How connections are served.
#[derive(Clone, Debug)]
pub(crate) struct Connections {
    pub(crate) router: Router,
    pub(crate) patience: Patience,
    pub(crate) tls: Option<Tls>,
}

impl Connections {
    /// Serves a connection to its end, or to that of the requests under way where `watcher` says that the server
    /// ends. What can go wrong there is the client's doing, who is not there to be told.
    pub(crate) async fn serve(self, stream: TcpStream, watcher: Option<Watcher>) {
        // Tokens are small and awaited. Without it they come later, not otherwise.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.patience.write));
        let stream = Box::pin(stream);
        let Some(Tls(config)) = &self.tls else {
            return self.http1(stream, watcher).await;
        };
        let accepting = TlsAcceptor::from(Arc::clone(config)).accept(stream);
        let Ok(Ok(mut stream)) = timeout(self.patience.header, accepting).await else { return };
        if stream.get_ref().1.alpn_protocol() != Some(H2) {
            return self.http1(Box::new(stream), watcher).await;
        }
        // A ping is sent when nothing has come for a while, and a client that lives answers it.
        let silent = 3 * self.patience.header;
        stream.get_mut().0.as_mut().set_read_timeout_pinned(Some(silent));
        self.http2(Box::new(stream), watcher).await;
    }

    async fn http1(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        watcher: Option<Watcher>,
    ) {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.patience.header)
            .max_buf_size(HEAD_BYTES_MAX as usize);
        let service = TowerToHyperService::new(self.router);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        let _ = match watcher {
            Some(watcher) => watcher.watch(connection).await,
            None => connection.await,
        };
    }

    async fn http2(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        watcher: Option<Watcher>,
    ) {
        let mut builder = http2::Builder::new(Answering::new(self.patience.write));
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_MAX)
            .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
            .max_local_error_reset_streams(LOCAL_RESETS_MAX)
            .max_header_list_size(HEAD_BYTES_MAX)
            .keep_alive_interval(self.patience.header)
            .keep_alive_timeout(self.patience.header);
        let service = TowerToHyperService::new(self.router);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        let _ = match watcher {
            Some(watcher) => watcher.watch(connection).await,
            None => connection.await,
        };
    }
}

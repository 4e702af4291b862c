//! Serving a model over HTTP.
//!
//! **Invariants:** one thread owns each engine and never sees a socket, nor text but through a request's grammar;
//! what belongs to a request can only fail that request; a field of a request is honored or refused by name, never ignored; nothing here reads
//! the environment or the time of day.
//!
//! | file | noun |
//! |---|---|
//! | `driver` | the thread that owns an engine |
//! | `embedder` | a model that turns texts into vectors, on a thread of its own |
//! | `model` | a model that is served: its name, tokenizer and template |
//! | `models` | the models that are served, and the memory they may take |
//! | `admin` | models that come and go while the server runs |
//! | `intake` | bodies on their way in, within limits of all of them together |
//! | `reply` | token ids on their way to text |
//! | `outline` | what an answer is made of: what is thought, said and called |
//! | `guide` | which tokens may come at each of its parts |
//! | `calls` | the grammar of calls |
//! | `fields` | the body of a request, read strictly |
//! | `grammar` | what answers follow: schemas, regular expressions, choices |
//! | `sampling` | how a request wants its tokens chosen |
//! | `api` | the endpoints |
//! | `routes` | which address is which endpoint, and what stands in front of all of them |
//! | `account` | what is written down of a request when it ends |
//! | `openapi` | what the endpoints take and answer, described |
//! | `page` | a page to try a prompt |
//! | `keys` | who may ask what, and how much |
//! | `metrics` | what was done, for Prometheus |
//! | `error` | what a request is refused with |
//! | `connection` | TLS, HTTP/1.1 and HTTP/2, within limits |
//! | `server` | the listener, and ending in good order |
#![forbid(unsafe_code)]

mod account;
mod admin;
mod api;
mod calls;
mod connection;
mod driver;
mod embedder;
mod error;
mod fields;
mod grammar;
mod guide;
mod intake;
mod keys;
mod metrics;
mod model;
mod models;
mod openapi;
mod outline;
mod page;
mod reply;
mod routes;
mod sampling;
mod server;
mod unread;

pub use admin::Loader;
pub use connection::{Tls, TlsError};
pub use driver::DriverError;
pub use embedder::{Embed, EmbedForm};
pub use keys::{ApiKeys, KeysError, Scope};
pub use model::{LoadedModel, ModelSource, ReasoningSplit, ServedParts};
pub use models::{Memory, NoRoom, Room};
pub use server::{ServeError, ServeOptions, Stock, serve};

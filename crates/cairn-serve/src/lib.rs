//! Serving a model over HTTP.
//!
//! **Invariants:** one thread owns the engine and never sees a socket, nor text but through a request's grammar;
//! what belongs to a request can only fail that request; a field of a request is honored or refused by name, never ignored; nothing here reads
//! the environment or the time of day.
//!
//! | file | noun |
//! |---|---|
//! | `driver` | the thread that owns the engine |
//! | `model` | the model that is served: its name, tokenizer and template |
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
//! | `keys` | who may ask |
//! | `metrics` | what was done, for Prometheus |
//! | `error` | what a request is refused with |
//! | `server` | the listener, and ending in good order |
#![forbid(unsafe_code)]

mod account;
mod api;
mod calls;
mod driver;
mod error;
mod fields;
mod grammar;
mod guide;
mod intake;
mod keys;
mod metrics;
mod model;
mod outline;
mod reply;
mod routes;
mod sampling;
mod server;

pub use driver::DriverError;
pub use keys::{ApiKeys, KeysError};
pub use model::{ReasoningSplit, ServedModel, ServedParts};
pub use server::{ServeError, ServeOptions, serve};

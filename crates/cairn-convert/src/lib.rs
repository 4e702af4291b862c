//! Models from one form into another: a folder into a leanpack, a leanpack back into a folder.
//!
//! - [`pack`]: a model folder → one file that kernels read as it is.
//! - [`unpack`]: a pack → a folder that transformers loads.
//! - [`license`]: what a model's folder says about the terms of its use.
//! - [`error`]: why a conversion fails.
//!
//! **Invariants:** the same input gives the same bytes; no more than one tensor is in memory at a
//! time; what is written appears complete or not at all.

#![forbid(unsafe_code)]

pub mod error;
pub mod license;
pub mod pack;
pub mod unpack;

pub use error::ConvertError;
pub use pack::{PackJob, PackSettings, ProfileChoice, pack};
pub use unpack::{UnpackReport, unpack};

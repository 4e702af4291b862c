//! Models from one form into another: a folder into a leanpack, a leanpack back into a folder, either
//! into a GGUF file.
//!
//! - [`pack()`]: a model folder → one file that kernels read as it is.
//! - [`choose_encodings()`]: encodings for single weights under a limit of bytes.
//! - [`sensitivity()`]: what rounding each class of weights costs.
//! - [`unpack()`]: a pack → a folder that transformers loads.
//! - [`gguf`]: a model → a file that llama.cpp runs.
//! - [`license`]: what a model's folder says about the terms of its use.
//! - [`error`]: why a conversion fails.
//!
//! **Invariants:** the same input gives the same bytes; no more than one tensor is in memory at a
//! time; what is written appears complete or not at all.

#![forbid(unsafe_code)]

pub mod assign;
pub mod error;
pub mod gguf;
pub mod license;
pub mod pack;
pub mod sensitivity;
pub mod unpack;

pub use assign::{ByteLimit, Chosen, choose_encodings};
pub use error::ConvertError;
pub use gguf::{GgufJob, GgufReport, export_gguf};
pub use pack::{PackJob, PackSettings, ProfileChoice, other_bytes, pack};
pub use sensitivity::{ClassCost, Cost, Sensitivity, SensitivityJob, sensitivity};
pub use unpack::{UnpackReport, unpack};

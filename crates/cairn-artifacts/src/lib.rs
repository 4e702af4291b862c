//! Files: safetensors, GGUF, checkpoints, hashes, atomic writes and run records.
//!
//! - [`atomic`]: a file or a folder appears under its name complete or not at all.
//! - [`hash`]: blake3 of bytes, files and whatever is being written.
//! - [`mmap`]: read-only mappings of files; the only unsafe code here.
//! - [`lease`]: a mapping under which nobody changes the file.
//! - [`safetensors`]: tensor files, single or sharded.
//! - [`leanpack`]: one model in one file, in the order in which kernels read it.
//! - [`gguf`]: model files of llama.cpp: metadata, tensors, quantized blocks.
//! - [`checkpoint`]: a training state as a folder that transformers loads, and the series of them.
//! - [`run`]: the folder of a run, its record and its metrics.
//! - [`machine`]: what this machine is, and how much memory this process has.
//! - [`bounded`]: files that somebody else wrote, read up to a limit that the error names.
//! - [`file_error`]: an operating system's error with the path it is about.
//!
//! **Invariants:** nothing here knows what a tensor means; nothing is ever changed in place, so a
//! mapped file keeps its contents; every reader of foreign bytes has limits with names.

#![deny(unsafe_code)]

pub mod atomic;
pub mod bounded;
pub mod checkpoint;
pub mod file_error;
pub mod gguf;
pub mod hash;
pub mod leanpack;
pub mod lease;
pub mod machine;
pub mod mmap;
pub mod run;
pub mod safetensors;

pub use checkpoint::{Checkpoint, CheckpointError, CheckpointSeries};
pub use file_error::FileError;
pub use hash::Hash;
pub use lease::{LeaseError, LeasedFile};
pub use mmap::MappedFile;

//! The models against what transformers and PyTorch compute for them.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod adapter_training;
mod adapters;
mod compute;
mod detect;
mod detect_any;
mod dropout;
mod encodings;
mod experts;
mod families;
mod gguf;
mod goldens;
mod masks;
mod training;

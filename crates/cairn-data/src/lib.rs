//! Text to batches: tokenizers, corpora, shards and the resumable loader.
//!
//! - [`chat`]: a conversation becomes text, by a model's template, in bounded time and memory;
//! - [`tokenizer`]: a `tokenizer.json`: trained, loaded, encoding, decoding, streaming;
//! - [`corpus`]: folders, files and JSON Lines become a corpus folder: documents with license and
//!   group, a split without leaks, shards of tokens and a manifest of hashes;
//! - [`json`]: how much a JSON text says, before it is parsed;
//! - [`loader`]: any step of a shuffled, packed, masked epoch directly; validation in order;
//! - [`permutation`]: a shuffle that is a formula;
//! - [`stop_strings`]: a text that ends where a string begins, while it grows.
//!
//! **Invariants:** nothing here knows a tensor, reads the environment or the clock, or prints. What
//! is written depends on the inputs and the settings only, never on threads. A bad file is skipped,
//! counted and listed; it never ends a build.
#![forbid(unsafe_code)]

pub mod chat;
pub mod corpus;
pub mod json;
pub mod loader;
pub mod permutation;
pub mod stop_strings;
pub mod tokenizer;

mod ordered;

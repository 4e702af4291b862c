//! Model specs, recipes, dtypes and schema versions: what a run is, as data.
//!
//! - [`model`]: [`ModelSpec`], what a model computes, and its mapping from and to Hugging Face's
//!   `config.json`.
//! - [`recipe`]: [`TrainRecipe`], what a training run does, with overrides, sweeps and migrations.
//! - [`dtype`], [`activation`]: names of storage types and activation functions.
//! - [`lora`]: [`LoraSpec`], which projections of a model have a low-rank adapter.
//! - `unique_json`: JSON whose objects have each key once.
//! - [`units`]: bytes, durations and counts as people write them.
//! - [`hint`]: the trait by which an error says what to do about it.
//!
//! **Invariant:** this crate reads no file, no clock and no environment; text comes in, data comes
//! out. A value of [`ModelSpec`] or of a resolved recipe that exists is valid.

#![forbid(unsafe_code)]

pub mod activation;
pub mod dtype;
pub mod hint;
pub mod lora;
pub mod model;
pub mod recipe;
pub mod unique_json;
pub mod units;

pub use activation::Activation;
pub use dtype::DType;
pub use hint::Hint;
pub use lora::{LoraError, LoraSpec, TargetModules};
pub use model::{ModelFields, ModelSpec, SpecError};
pub use recipe::{RecipeError, RecipeFile, TrainRecipe};

//! From a model spec to its program, its tensor names and its initial weights.
//!
//! | file | noun |
//! |---|---|
//! | `build` | spec → forward program: the only forward pass there is |
//! | `weights` | the weights of a spec's program, by name and size |
//! | `names` | the program's weights ↔ a family's tensors; one file of names for each layout |
//! | `detect` | a configuration and tensors → the spec they agree on |
//! | `gguf` | a GGUF file → spec and tensors |
//! | `load` | tensors → the weights of a session, and back |
//! | `pack` | a leanpack → the weights of a session, as they are stored |
//! | `save` | the weights of a session → tensors to write |
//! | `init` | fresh weights from a seed |
//! | `adapter` | low-rank adapters beside projections, and merged into them |
//!
//! This crate never opens a file: tensors come through [`TensorSource`].
#![forbid(unsafe_code)]

mod adapter;
mod build;
mod detect;
pub mod gguf;
mod init;
mod load;
mod names;
mod pack;
mod save;
mod weights;

pub use adapter::{Adapted, AdapterError, AdapterMap, Merge, MergedSource, is_adapter_weight};
pub use build::{
    BuildError, BuildOptions, Head, build_adapted_program, build_program, build_stored_program,
};
pub use detect::{DetectError, assumed_fields, detect_model_spec};
pub use init::{init_adapter, init_weights};
pub use load::{
    FolderSource, LoadError, Naming, StoredError, StoredWeights, TensorSource, WeightReader,
    Widening, load_adapter, load_weights, stored_weights, tensor_f32, tensors,
};
pub use names::{Placement, Role, TensorMap, TensorSlice};
pub use pack::{PackCheck, PackSource};
pub use save::{gather_bytes_max, gather_bytes_max_of, out_tensors, out_tensors_of, widened_bf16};
pub use weights::head_weight;

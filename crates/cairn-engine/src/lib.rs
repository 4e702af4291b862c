//! Running one model: the KV cache, the sampler and generation.
//!
//! **Invariant by absence:** this crate never sees text or a socket: token ids come in, token ids go
//! out.
//!
//! | file | noun |
//! |---|---|
//! | `folder` | a model folder → an engine |
//! | `options` | what an engine is made for, and its bytes before it exists |
//! | `engine` | requests in, events out, a step at a time |
//! | `scheduler` | who runs how much in a step, and in which blocks |
//! | `request` | what is asked and answered |
//! | `sequence` | a request on its way |
//! | `speculation` | tokens guessed ahead and checked together |
//! | `model` | what is run: pieces of sequences in, choices out |
//! | `executor` | a model as a program with weights and a cache |
//! | `mock` | a model that computes nothing |
//! | `block_pool`, `block_queue`, `block_table` | where keys and values of a sequence lie |
//! | `prefix_tree` | which tokens' keys and values are there |
//! | `sampling`, `sampler`, `random`, `float` | logits to a token |
//! | `mirostat` | how surprising tokens may be, steered |
//! | `beam` | beam search |
//! | `logprob` | logits to log-probabilities |
//! | `constraint` | what an output follows |
//! | `clock` | where the time comes from |
//! | `error` | what can be wrong |
#![forbid(unsafe_code)]

mod beam;
mod block_pool;
mod block_queue;
mod block_table;
mod clock;
mod constraint;
mod engine;
mod error;
mod executor;
mod float;
mod folder;
mod logprob;
mod mirostat;
mod mock;
mod model;
mod options;
mod prefix_tree;
mod random;
mod request;
mod sampler;
mod sampling;
mod scheduler;
mod sequence;
#[cfg(test)]
mod simulator;
mod speculation;

pub use beam::{BeamError, BeamParams, BeamRequest, BeamSearch, EarlyStopping, Hypothesis};
pub use block_pool::{BLOCK_TOKENS, BlockPool, OutOfBlocks, blocks_for};
pub use block_table::{BlockCopy, BlockTable};
pub use clock::{Clock, MonotonicClock};
pub use constraint::Constraint;
pub use engine::{Engine, StepReport};
pub use error::{EngineError, GenerateError, RequestError};
pub use executor::Executor;
pub use folder::{FolderError, load_model_from_safetensors};
pub use mirostat::{MirostatParams, MirostatState, MirostatVersion};
pub use mock::MockModel;
pub use model::{Depth, Model, Piece};
pub use options::{EngineOptions, EnginePlan, MAX_NUM_BATCHED_TOKENS, MAX_NUM_WAITING};
pub use request::{
    Event, Finish, Output, PositionLogprobs, PrefixEnd, PrefixOutcome, Request, RequestId,
};
pub use sampler::{SampleContext, SampleError, Sampler};
pub use sampling::{
    LOGIT_BIAS_MAX, PENALTY_MAX, REPETITION_PENALTY_MAX, SamplingError, SamplingFields,
    SamplingParams, TOP_LOGPROBS_MAX,
};
pub use speculation::{
    DraftMethod, NUM_SPECULATIVE_TOKENS_MAX, SpeculationFigures, SpeculativeOptions,
};

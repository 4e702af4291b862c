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
//! | `request` | what is asked and answered |
//! | `sequence` | a request on its way |
//! | `speculation` | tokens guessed ahead and checked together |
//! | `executor` | one run of the model over pieces of sequences |
//! | `block_pool`, `block_table` | where keys and values of a sequence lie |
//! | `sampling`, `sampler`, `random`, `float` | logits to a token |
//! | `beam` | beam search |
//! | `logprob` | logits to log-probabilities |
//! | `error` | what can be wrong |
#![forbid(unsafe_code)]

mod beam;
mod block_pool;
mod block_table;
mod engine;
mod error;
mod executor;
mod float;
mod folder;
mod logprob;
mod options;
mod random;
mod request;
mod sampler;
mod sampling;
mod sequence;
mod speculation;

pub use beam::{BeamError, BeamParams, BeamRequest, EarlyStopping, Hypothesis};
pub use block_pool::{BLOCK_TOKENS, BlockPool, OutOfBlocks, blocks_for};
pub use block_table::{BlockCopy, BlockTable};
pub use engine::{Engine, StepReport};
pub use error::{EngineError, GenerateError, RequestError};
pub use folder::{FolderError, load_model_from_safetensors};
pub use options::{EngineOptions, EnginePlan, MAX_NUM_BATCHED_TOKENS, MAX_NUM_WAITING};
pub use request::{Event, Finish, Output, PositionLogprobs, Request, RequestId};
pub use sampler::{SampleContext, SampleError, Sampler};
pub use sampling::{
    LOGIT_BIAS_MAX, PENALTY_MAX, REPETITION_PENALTY_MAX, SamplingError, SamplingFields,
    SamplingParams, TOP_LOGPROBS_MAX,
};
pub use speculation::{
    DraftMethod, NUM_SPECULATIVE_TOKENS_MAX, SpeculationFigures, SpeculativeOptions,
};

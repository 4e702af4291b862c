//! Measuring a model: loss, perplexity, bits per byte, what general compressors make of the same
//! text, and how fast it decodes.
//!
//! | file | noun |
//! |---|---|
//! | `scorer` | log-probabilities of given tokens |
//! | `windows` | documents longer than the context |
//! | `documents` | the loss on documents, each its own context |
//! | `compress` | `gzip -9`, `xz -9`, `zstd -19` |
//! | `comparison` | the model beside them, as a record |
//! | [`contract`] | what two engines run when they are compared, and whether they did |
//! | `corpus` | documents of a corpus to compare on |
//! | `decode_bench` | tokens per second, and the share of the memory bandwidth |
//! | `median` | the middle of several measurements |
//! | `error` | what keeps a measurement from being made |
#![forbid(unsafe_code)]

pub mod contract;

mod comparison;
mod compress;
mod corpus;
mod decode_bench;
mod documents;
mod error;
mod median;
mod scorer;
mod windows;

pub use comparison::{
    COMPARISON_SCHEMA, CodeLength, Comparison, CompressorFigures, Document, ModelFigures, Progress,
    ProgressFn, Sample, Stage, compare,
};
pub use compress::Compressor;
pub use corpus::{COMPARED_BYTES_MAX, sample};
pub use decode_bench::{DecodeBench, DecodeFigures, bench_decode};
pub use documents::{DocumentScore, DocumentScorer};
pub use error::EvalError;
pub use median::median;
pub use scorer::{
    ModelScorer, ModelScorerOptions, ModelScorerPlan, ScoreBatch, ScoreLimits, SessionScorer,
    TokenScorer,
};
pub use windows::{Window, Windows};

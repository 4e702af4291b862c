//! What a run reports while it goes on. The trainer never prints; whoever runs it observes.

use std::path::PathBuf;

use cairn_spec::units::RoundedBytes;
use serde::{Deserialize, Serialize};

use crate::host::Measured;

/// Figures of one optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Finished steps, this one included.
    pub step: u64,
    /// Tokens processed since step 0.
    pub tokens: u64,
    /// Mean negative log-likelihood of the step's targets, in nats, before the update.
    pub loss: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Tokens per second of this step.
    pub tokens_per_s: f64,
    /// Arithmetic of the plan per second, as a fraction of this machine's measured peak.
    pub peak_fraction: Option<f64>,
    /// Anonymous memory of the process after the step.
    pub anonymous_bytes: Option<u64>,
    /// Seconds of training so far, over all sessions of the run.
    pub elapsed_s: f64,
    /// Seconds until the last step, at the mean pace of this session.
    pub remaining_s: f64,
}

/// Figures of one validation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationMetrics {
    /// Finished steps.
    pub step: u64,
    /// Mean negative log-likelihood of the targets under the trained weights, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Bits of a code for the documents over bytes of text: first tokens cost log₂ of the
    /// vocabulary, end-of-document tokens cost bits and add no bytes. `None` where the tokenizer's
    /// tokens do not stand for fixed bytes.
    pub bits_per_byte: Option<f64>,
    /// `loss` under the average of the weights, where one is kept.
    #[serde(default)]
    pub average_loss: Option<f64>,
    /// `bits_per_byte` under the average of the weights.
    #[serde(default)]
    pub average_bits_per_byte: Option<f64>,
    /// Targets scored: all tokens but each document's first.
    pub targets: u64,
    /// Bytes of text of the documents, where they are known.
    pub bytes: Option<u64>,
    /// Whether it is the lowest loss so far.
    pub best: bool,
    /// Seconds of training so far.
    pub elapsed_s: f64,
}

/// Something that is not wrong enough to stop.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Warning {
    /// There is nothing to validate on.
    #[error("the corpus has no validation side, so there is no validation and no early stop")]
    NoValidation,
    /// The run's length changed since its checkpoint.
    #[error("the run has {now} steps instead of {before}; learning rates follow the new length")]
    OtherLength {
        /// Steps when the checkpoint was written.
        before: u64,
        /// Steps now.
        now: u64,
    },
    /// A mixture of experts learns with nothing that spreads tokens over the experts.
    #[error("experts are trained without a load-balancing loss: watch that none is left idle")]
    Unbalanced,
    /// Tokens of the model's description mean something else to the tokenizer.
    #[error(
        "the model's {} is no special token of the corpus' tokenizer; checkpoints leave it out",
        tokens.join(", ")
    )]
    ForeignTokens {
        /// Names and ids.
        tokens: Vec<String>,
    },
    /// An old checkpoint could not be removed.
    #[error("an old checkpoint could not be removed: {problem}")]
    Retention {
        /// What went wrong.
        problem: String,
    },
    /// A checkpoint is unfinished, damaged or of another version; an older one is used.
    #[error("{} is not a complete checkpoint and is left out", path.display())]
    Damaged {
        /// Its folder.
        path: PathBuf,
    },
    /// Measured memory left the predicted range.
    #[error(
        "the process holds {} where the plan predicted {}",
        RoundedBytes(*actual),
        RoundedBytes(*predicted)
    )]
    Memory {
        /// Bytes predicted.
        predicted: u64,
        /// Bytes measured.
        actual: u64,
    },
}

/// One report of a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Training begins or goes on.
    Started {
        /// Finished steps; 0 for a new run.
        step: u64,
        /// Steps of the whole run.
        total_steps: u64,
    },
    /// A step is done.
    Step(&'a StepMetrics),
    /// The machine was measured, before the second step.
    Measured {
        /// What was found.
        measured: Measured,
        /// Seconds it took; they count as no step's.
        seconds: f64,
    },
    /// A validation is done.
    Validation(&'a ValidationMetrics),
    /// A checkpoint is complete on disk.
    Saved {
        /// Finished steps it holds.
        step: u64,
        /// Its folder.
        path: &'a std::path::Path,
        /// Seconds it took.
        seconds: f64,
    },
    /// Something to tell the user.
    Warning(&'a Warning),
}

/// Receives the reports of a run, in order.
pub trait Observer {
    /// Takes one report.
    fn observe(&mut self, event: &Event<'_>);
}

/// Ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn observe(&mut self, _event: &Event<'_>) {}
}

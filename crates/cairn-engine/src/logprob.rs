//! Logits to log-probabilities: the bits that scoring the same tokens gives.

use cairn_kernels::{Cpu, log_sum_exp};

/// Appends the log-probabilities of one row.
pub(crate) fn log_softmax(cpu: &Cpu, logits_v: &[f32], logprobs: &mut Vec<f32>) {
    let lse = log_sum_exp(cpu, logits_v);
    logprobs.extend(logits_v.iter().map(|logit| logit - lse));
}

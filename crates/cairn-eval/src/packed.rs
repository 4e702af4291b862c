//! The loss on packed rows, as training sees it: the validation loss of a run.
//!
//! A row holds pieces of several documents; a document cut by a row's end goes on in the next row
//! without what came before. Cheaper than windows, and the figure that a training curve shows.

use cairn_data::loader::{LoaderBatch, LoaderError};
use cairn_kernels::SeqSlot;
use serde::{Deserialize, Serialize};

use crate::error::EvalError;
use crate::scorer::{ScoreBatch, TokenScorer};

/// The loss on packed rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PackedLoss {
    /// Rows.
    pub num_rows: u64,
    /// Targets; filling is none.
    pub num_targets: u64,
    /// Negative log-probability of all targets.
    pub nats: f64,
    /// Mean negative log-probability of a target, in nats.
    pub loss: f64,
    /// `e^loss`.
    pub perplexity: f64,
}

impl PackedLoss {
    /// Bits per byte of the text the rows hold, if they hold all of `num_documents` documents with
    /// `text_bytes` bytes: ends of documents cost bits and add no bytes, and each document's first
    /// token, which is no target, costs log₂ of the vocabulary.
    pub fn bits_per_byte(&self, vocab_size: usize, num_documents: u64, text_bytes: u64) -> f64 {
        let first = num_documents as f64 * (vocab_size as f64).log2();
        (first + self.nats / std::f64::consts::LN_2) / text_bytes as f64
    }
}

/// Measures the loss over batches of packed rows.
///
/// # Errors
///
/// [`EvalError::Loader`] if a batch cannot be made, [`EvalError::Run`] if it exceeds the scorer's
/// limits, [`EvalError::NotANumber`] (with the batch as the document), [`EvalError::NoDocuments`] if
/// there is no target.
pub fn packed_loss(
    scorer: &mut impl TokenScorer,
    batches: impl Iterator<Item = Result<LoaderBatch, LoaderError>>,
) -> Result<PackedLoss, EvalError> {
    let mut total = PackedLoss::default();
    for (number, batch) in (0_u64..).zip(batches) {
        let batch = batch?;
        let pieces: Vec<SeqSlot<'_>> = batch
            .sequences
            .iter()
            .map(|piece| SeqSlot { start: piece.start, len: piece.len, cached: 0, blocks: &[] })
            .collect();
        let logprobs = scorer.logprobs(&ScoreBatch {
            ids: &batch.ids,
            positions: &batch.positions,
            targets: &batch.targets,
            pieces: &pieces,
        })?;
        for (position, (logprob, weight)) in logprobs.iter().zip(&batch.loss_weights).enumerate() {
            if *weight == 0.0 {
                continue;
            }
            if !logprob.is_finite() {
                let logprob = logprob.to_string();
                return Err(EvalError::NotANumber { document: number, position, logprob });
            }
            total.num_targets += 1;
            total.nats -= f64::from(*logprob);
        }
        total.num_rows += batch.num_rows() as u64;
    }
    if total.num_targets == 0 {
        return Err(EvalError::NoDocuments);
    }
    total.loss = total.nats / total.num_targets as f64;
    total.perplexity = total.loss.exp();
    Ok(total)
}

#[cfg(test)]
mod tests {
    use cairn_data::loader::Sequence;

    use super::*;
    use crate::documents::tests::{Formula, LIMITS};

    /// Two rows of four: a document of five tokens and the start of another, which goes on; filling.
    fn batch() -> LoaderBatch {
        LoaderBatch {
            ids: vec![1, 2, 3, 4, 5, 6, 0, 0],
            positions: vec![0, 1, 2, 3, 0, 1, 0, 1],
            targets: vec![2, 3, 4, 0, 6, 0, 0, 0],
            loss_weights: vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
            sequences: vec![
                Sequence { start: 0, len: 4 },
                Sequence { start: 4, len: 2 },
                Sequence { start: 6, len: 2 },
            ],
            row_tokens: 4,
        }
    }

    #[test]
    fn filling_counts_for_nothing() {
        let mut formula = Formula::new(LIMITS, |seen, _| -(seen.len() as f32));
        let found = packed_loss(&mut formula, [Ok(batch()), Ok(batch())].into_iter()).unwrap();
        assert_eq!((found.num_rows, found.num_targets), (4, 12));
        assert!((found.nats - 26.0).abs() < 1e-12);
        assert!((found.perplexity - (26.0_f64 / 12.0).exp()).abs() < 1e-12);
    }

    #[test]
    fn a_uniform_byte_model_takes_eight_bits_a_token() {
        let mut uniform = Formula::new(LIMITS, |_, _| -(256.0_f32.ln()));
        let found = packed_loss(&mut uniform, [Ok(batch())].into_iter()).unwrap();
        // Two documents of five and three tokens; the two ends have no bytes.
        let bits = found.bits_per_byte(256, 2, 6);
        assert!((bits - 8.0 * 8.0 / 6.0).abs() < 1e-5, "{bits}");
    }

    #[test]
    fn nothing_to_measure_is_an_error() {
        let mut formula = Formula::new(LIMITS, |_, _| f32::NAN);
        let none = packed_loss(&mut formula, std::iter::empty());
        assert!(matches!(none, Err(EvalError::NoDocuments)));
        let nan = packed_loss(&mut formula, [Ok(batch())].into_iter());
        assert!(matches!(nan, Err(EvalError::NotANumber { position: 0, .. })));
    }
}

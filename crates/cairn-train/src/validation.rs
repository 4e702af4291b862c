//! Validation: the loss on documents that are never trained on.
//!
//! Documents are packed as in training. A document's first token has no context here and is not
//! scored; its bytes are left out as well, so that bits per byte is over the text that was
//! predicted. `cairn-eval` scores whole documents, first tokens included.

use std::sync::Arc;

use cairn_data::corpus::{Corpus, Split};
use cairn_data::loader::{InOrderBatches, LoaderBatch, LoaderError, Sequence};
use cairn_data::tokenizer::Tokenizer;
use cairn_program::RunError;

use crate::batch::MicroBatch;
use crate::learner::Learner;

/// What was scored and how well.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Sum of the negative log-likelihoods, in nats.
    pub negative_log_likelihood: f64,
    /// Targets scored.
    pub targets: u64,
    /// Bytes of text they stand for; end-of-document tokens have none.
    pub bytes: u64,
    /// Whether the bytes are known: the tokenizer is byte level.
    pub has_bytes: bool,
}

impl Score {
    /// Mean negative log-likelihood of a target, in nats.
    pub fn loss(&self) -> f64 {
        self.negative_log_likelihood / self.targets as f64
    }

    /// Bits for all targets over bytes of text.
    pub fn bits_per_byte(&self) -> Option<f64> {
        let bits = self.negative_log_likelihood / std::f64::consts::LN_2;
        (self.has_bytes && self.bytes > 0).then(|| bits / self.bytes as f64)
    }
}

/// Why a validation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ValidationError {
    /// The validation data cannot be read.
    #[error(transparent)]
    Data(#[from] LoaderError),
    /// A batch does not fit the plan: its tokens are not those of the model.
    #[error("the validation data does not fit the model")]
    Run(#[from] RunError),
}

/// A part of the validation side, always the same one: rows at even distances, so that neighbors in
/// the corpus do not stand for all of it. How many rows are scored at a time changes no figure.
#[derive(Debug)]
pub struct Validation {
    /// One row a batch.
    all_rows: InOrderBatches,
    num_rows: u64,
    rows_at_a_time: usize,
    /// Bytes of text of every token id; `None` unless the tokenizer is byte level.
    bytes_of: Option<Vec<u32>>,
}

impl Validation {
    /// Scores up to `max_tokens` tokens, rounded up to whole rows of `seq_len`, `rows_at_a_time`
    /// rows at a time.
    ///
    /// # Errors
    ///
    /// [`LoaderError::NoTargets`] if the corpus has no validation side.
    pub fn new(
        corpus: &Arc<Corpus>,
        tokenizer: &Tokenizer,
        (rows_at_a_time, seq_len): (usize, usize),
        max_tokens: u64,
    ) -> Result<Self, LoaderError> {
        let all_rows = InOrderBatches::new(Arc::clone(corpus), Split::Validation, seq_len, 1)?;
        let num_rows = all_rows.num_batches().min(max_tokens.div_ceil(seq_len as u64));
        let bytes_of = tokenizer.is_byte_level().then(|| {
            let bytes = |id| {
                let is_text = id != corpus.end_of_document();
                let bytes = tokenizer.token_bytes(id).filter(|_| is_text);
                bytes.map_or(0, |bytes| u32::try_from(bytes.len()).unwrap_or(u32::MAX))
            };
            (0..tokenizer.vocab_size()).map(bytes).collect()
        });
        Ok(Self { all_rows, num_rows, rows_at_a_time, bytes_of })
    }

    /// Scores them.
    ///
    /// # Errors
    ///
    /// [`ValidationError`] if the data cannot be read or does not fit.
    pub fn score(&self, learner: &mut Learner) -> Result<Score, ValidationError> {
        let mut score = Score { has_bytes: self.bytes_of.is_some(), ..Score::default() };
        for first in (0..self.num_rows).step_by(self.rows_at_a_time) {
            let last = self.num_rows.min(first + self.rows_at_a_time as u64);
            let mut batch = LoaderBatch::default();
            for row in first..last {
                append_row(&mut batch, self.row(row)?);
            }
            let micro = MicroBatch::whole(&batch);
            learner.score(&micro, &mut score.negative_log_likelihood)?;
            for (target, _) in micro.targets().filter(|(_, counts)| *counts) {
                score.targets += 1;
                let bytes = self.bytes_of.as_ref().and_then(|bytes| bytes.get(target as usize));
                score.bytes += u64::from(bytes.copied().unwrap_or(0));
            }
        }
        Ok(score)
    }

    /// One of the rows that are scored.
    fn row(&self, number: u64) -> Result<LoaderBatch, LoaderError> {
        // In u128, since the product may exceed 64 bits; the quotient is below the total.
        let total = u128::from(self.all_rows.num_batches());
        let place = u128::from(number) * total / u128::from(self.num_rows);
        self.all_rows.batch(u64::try_from(place).expect("below the number of rows"))
    }
}

fn append_row(batch: &mut LoaderBatch, row: LoaderBatch) {
    let start = batch.ids.len();
    let moved = |piece: Sequence| Sequence { start: start + piece.start, ..piece };
    batch.sequences.extend(row.sequences.into_iter().map(moved));
    batch.ids.extend(row.ids);
    batch.positions.extend(row.positions);
    batch.targets.extend(row.targets);
    batch.loss_weights.extend(row.loss_weights);
    batch.row_tokens = row.row_tokens;
}

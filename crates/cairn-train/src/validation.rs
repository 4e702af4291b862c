//! Validation: the loss on documents that are never trained on.
//!
//! Documents are packed as in training. A document's first token has no context here and is not
//! scored; its bytes are left out as well, so that bits per byte is over the text that was
//! predicted. `cairn-eval` scores whole documents, first tokens included.

use std::sync::Arc;

use cairn_data::corpus::{Corpus, Split};
use cairn_data::loader::{InOrderBatches, LoaderError};
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

/// A part of the validation side, always the same one: batches at even distances, so that neighbors
/// in the corpus do not stand for all of it.
#[derive(Debug)]
pub struct Validation {
    batches: InOrderBatches,
    num_batches: u64,
    /// Bytes of text of every token id; `None` unless the tokenizer is byte level.
    bytes_of: Option<Vec<u32>>,
}

impl Validation {
    /// Scores up to `max_tokens` tokens, rounded up to whole batches, in batches of `rows` rows.
    ///
    /// # Errors
    ///
    /// [`LoaderError::NoTargets`] if the corpus has no validation side.
    pub fn new(
        corpus: &Arc<Corpus>,
        tokenizer: &Tokenizer,
        (rows, seq_len): (usize, usize),
        max_tokens: u64,
    ) -> Result<Self, LoaderError> {
        let batches = InOrderBatches::new(Arc::clone(corpus), Split::Validation, seq_len, rows)?;
        let batch_tokens = (rows * seq_len) as u64;
        let num_batches = batches.num_batches().min(max_tokens.div_ceil(batch_tokens));
        let bytes_of = tokenizer.is_byte_level().then(|| {
            let bytes = |id| {
                let is_text = id != corpus.end_of_document();
                let bytes = tokenizer.token_bytes(id).filter(|_| is_text);
                bytes.map_or(0, |bytes| u32::try_from(bytes.len()).unwrap_or(u32::MAX))
            };
            (0..tokenizer.vocab_size()).map(bytes).collect()
        });
        Ok(Self { batches, num_batches, bytes_of })
    }

    /// Scores them.
    ///
    /// # Errors
    ///
    /// [`ValidationError`] if the data cannot be read or does not fit.
    pub fn score(&self, learner: &mut Learner) -> Result<Score, ValidationError> {
        let mut score = Score { has_bytes: self.bytes_of.is_some(), ..Score::default() };
        for number in 0..self.num_batches {
            // In u128, since the product may exceed 64 bits; the quotient is below the total.
            let place = u128::from(number) * u128::from(self.batches.num_batches())
                / u128::from(self.num_batches);
            let place = u64::try_from(place).expect("below the number of batches");
            let batch = self.batches.batch(place)?;
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
}

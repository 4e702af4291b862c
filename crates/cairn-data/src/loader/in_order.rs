//! A side of the corpus once, in order: what measuring reads.

use std::sync::Arc;

use super::pack::{self, Order, Packing};
use super::{LoaderBatch, LoaderError};
use crate::corpus::{Corpus, ReadError, Split};

/// All documents of a side, once, in the order of the corpus, packed as in training.
///
/// The last batch has only as many rows as are needed, the last row is filled up with weight 0.
#[derive(Debug)]
pub struct InOrderBatches {
    corpus: Arc<Corpus>,
    packing: Packing,
    seq_len: usize,
    batch_rows: usize,
    num_rows: u64,
}

impl InOrderBatches {
    /// Packs a side into rows of `seq_len` inputs, at most `batch_rows` of them a batch.
    ///
    /// # Errors
    ///
    /// [`LoaderError::Setting`] for rows of no token or batches of no row,
    /// [`LoaderError::NoTargets`] if there is nothing to measure on.
    pub fn new(
        corpus: Arc<Corpus>,
        split: Split,
        seq_len: usize,
        batch_rows: usize,
    ) -> Result<Self, LoaderError> {
        let num_rows = pack::rows(&corpus, split, seq_len, batch_rows)?;
        let packing = Packing::new(corpus.documents(split), split, Order::AsTheyLie, seq_len);
        Ok(Self { corpus, packing, seq_len, batch_rows, num_rows })
    }

    /// Number of batches.
    pub fn num_batches(&self) -> u64 {
        self.num_rows.div_ceil(pack::count(self.batch_rows))
    }

    /// Makes one batch.
    ///
    /// # Errors
    ///
    /// [`LoaderError::Setting`] for a batch after the last, [`LoaderError::Read`] if a shard was
    /// altered.
    pub fn batch(&self, number: u64) -> Result<LoaderBatch, LoaderError> {
        if self.num_batches() <= number {
            let (name, expected) = ("batch", "a batch of the pass");
            return Err(LoaderError::Setting { name, value: number, expected });
        }
        let rows = pack::count(self.batch_rows);
        let last = (number * rows + rows).min(self.num_rows);
        let mut batch = pack::empty_batch(self.seq_len, self.batch_rows);
        for row in number * rows..last {
            self.packing.push_row(&self.corpus, row, &mut batch)?;
        }
        Ok(batch)
    }

    /// The batches, in order.
    pub fn iter(&self) -> impl Iterator<Item = Result<LoaderBatch, LoaderError>> {
        (0..self.num_batches()).map(|number| self.batch(number))
    }
}

/// One document with its tokens: what a model reads as one context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentTokens {
    /// Path relative to its input, or `FILE:LINE`.
    pub path: String,
    /// SPDX expression or `unknown`.
    pub license: String,
    /// Package, or top folder.
    pub group: String,
    /// Bytes of its text, for bits per byte; the end of document has none.
    pub text_bytes: u32,
    /// All its tokens, the end of document last.
    pub tokens: Vec<u32>,
}

/// Reads the documents of a side one at a time, in order.
///
/// # Errors
///
/// Every item may be a [`ReadError`] if a shard was altered.
pub fn read_documents(
    corpus: &Corpus,
    split: Split,
) -> impl Iterator<Item = Result<DocumentTokens, ReadError>> {
    let documents = corpus.documents(split);
    (0..documents.len()).map(move |number| {
        let document = documents.document(number);
        let mut tokens = Vec::new();
        let count = usize::try_from(document.num_tokens).expect("a u32 fits");
        documents.read_tokens(number, 0, count, &mut tokens)?;
        Ok(DocumentTokens {
            path: document.path.to_owned(),
            license: corpus.license(&document).to_owned(),
            group: corpus.group(&document).to_owned(),
            text_bytes: document.text_bytes,
            tokens,
        })
    })
}

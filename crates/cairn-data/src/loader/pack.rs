//! Documents in some order, laid end to end and cut into rows. See [`crate::loader`] for the rule.

use super::{LoaderBatch, LoaderError, Sequence};
use crate::corpus::{Corpus, Documents, Split};
use crate::permutation::Permutation;

/// Documents between two entries of the index: what a search walks at most.
const STRIDE: usize = 64;

/// In which order documents are taken.
#[derive(Debug)]
pub(super) enum Order {
    /// As they lie in the corpus.
    AsTheyLie,
    /// Shuffled.
    Shuffled(Permutation),
}

impl Order {
    fn at(&self, place: usize) -> usize {
        match self {
            Self::AsTheyLie => place,
            Self::Shuffled(permutation) => usize::try_from(permutation.at(count(place)))
                .expect("a permutation of documents stays among them"),
        }
    }
}

/// One pass over the documents of a side.
#[derive(Debug)]
pub(super) struct Packing {
    split: Split,
    order: Order,
    seq_len: usize,
    num_targets: u64,
    /// Targets before every [`STRIDE`]th document of the order.
    marks: Vec<u64>,
}

impl Packing {
    pub(super) fn new(documents: &Documents, split: Split, order: Order, seq_len: usize) -> Self {
        let mut marks = Vec::with_capacity(documents.len().div_ceil(STRIDE));
        let mut num_targets = 0;
        for place in 0..documents.len() {
            if place.is_multiple_of(STRIDE) {
                marks.push(num_targets);
            }
            num_targets += targets_of(documents, order.at(place));
        }
        Self { split, order, seq_len, num_targets, marks }
    }

    /// Appends a row to a batch.
    pub(super) fn push_row(
        &self,
        corpus: &Corpus,
        row: u64,
        batch: &mut LoaderBatch,
    ) -> Result<(), LoaderError> {
        let documents = corpus.documents(self.split);
        let first = row.saturating_mul(count(self.seq_len));
        let mut left = self.seq_len;
        let (mut place, mut skip) = self.find(documents, first);
        let mut tokens = Vec::new();
        while 0 < left && place < documents.len() {
            let document = self.order.at(place);
            let in_document = targets_of(documents, document) - skip;
            let len = usize::try_from(in_document).unwrap_or(usize::MAX).min(left);
            if 0 < len {
                tokens.clear();
                let from = u32::try_from(skip).expect("a document's tokens fit");
                documents.read_tokens(document, from, len + 1, &mut tokens)?;
                batch.push(&tokens[..len], &tokens[1..], 1.0);
                left -= len;
            }
            place += 1;
            skip = 0;
        }
        if 0 < left {
            let filling = vec![corpus.end_of_document(); left];
            batch.push(&filling, &filling, 0.0);
        }
        Ok(())
    }

    /// The place in the order of the document that holds a target, and the targets before it there.
    fn find(&self, documents: &Documents, target: u64) -> (usize, u64) {
        if self.num_targets <= target {
            return (documents.len(), 0);
        }
        let mark = self.marks.partition_point(|before| *before <= target) - 1;
        let mut before = self.marks[mark];
        let mut place = mark * STRIDE;
        loop {
            let after = before + targets_of(documents, self.order.at(place));
            if target < after {
                return (place, target - before);
            }
            before = after;
            place += 1;
        }
    }
}

impl LoaderBatch {
    fn push(&mut self, ids: &[u32], targets: &[u32], weight: f32) {
        let (start, len) = (self.ids.len(), ids.len());
        self.ids.extend_from_slice(ids);
        self.targets.extend_from_slice(targets);
        self.positions.extend(0..u32::try_from(len).expect("rows are checked to be shorter"));
        self.loss_weights.resize(start + len, weight);
        self.sequences.push(Sequence { start, len });
    }
}

pub(super) fn empty_batch(seq_len: usize, batch_rows: usize) -> LoaderBatch {
    let tokens = seq_len * batch_rows;
    LoaderBatch {
        ids: Vec::with_capacity(tokens),
        positions: Vec::with_capacity(tokens),
        targets: Vec::with_capacity(tokens),
        loss_weights: Vec::with_capacity(tokens),
        sequences: Vec::with_capacity(batch_rows),
        row_tokens: seq_len,
    }
}

/// Rows of one pass over a side, if rows and batches are of a possible size.
pub(super) fn rows(
    corpus: &Corpus,
    split: Split,
    seq_len: usize,
    batch_rows: usize,
) -> Result<u64, LoaderError> {
    for (name, value) in [("seq_len", seq_len), ("batch_rows", batch_rows)] {
        if value == 0 || u32::try_from(value).is_err() {
            let (value, expected) = (count(value), "at least 1 and below 2^32");
            return Err(LoaderError::Setting { name, value, expected });
        }
    }
    match num_targets(corpus, split) {
        0 => Err(LoaderError::NoTargets { split }),
        targets => Ok(targets.div_ceil(count(seq_len))),
    }
}

/// Tokens but each document's first.
pub(super) fn num_targets(corpus: &Corpus, split: Split) -> u64 {
    let documents = corpus.documents(split);
    documents.num_tokens() - count(documents.len())
}

fn targets_of(documents: &Documents, document: usize) -> u64 {
    u64::from(documents.document(document).num_tokens) - 1
}

pub(super) fn count(len: usize) -> u64 {
    u64::try_from(len).expect("a length fits in 64 bits")
}

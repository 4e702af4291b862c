//! Batches from a corpus; any step's batch directly, so resuming is asking for the next step.
//!
//! **Packing.** A document of `n` tokens, its end included, gives `n - 1` pairs of an input and the
//! token after it. An epoch takes the documents in a random order and lays their pairs end to end; a
//! row is the next `seq_len` of them. A document cut by a row's end continues in the next row, whose
//! first input is the token that was the last target. So **every token after a document's first is a
//! target exactly once an epoch**, and no slot is wasted but in an epoch's last row, which is filled
//! up with end-of-document tokens of loss weight 0.
//!
//! **Order.** The rows of an epoch are shuffled as well. Without that a batch would be a few
//! neighboring pieces of one long document, whose gradients point the same way: on source text the
//! loss then jumped by several nats from one step to the next and fell much more slowly.
//!
//! Each piece of a document in a row is a sequence of its own: positions restart at 0 and attention
//! must not look past its start. The filling is one more sequence. Sequences cover all rows.
//!
//! **State.** There is none: a batch is a pure function of (corpus, settings, step). Documents and
//! rows are shuffled by a formula ([`Permutation`]), and where a row starts is found in an index of every
//! 64th document that is made once an epoch: 8 bytes for 64 documents.
//!
//! Letters: `t` tokens of a batch = `batch_rows` × `seq_len`.

mod in_order;
mod pack;

use std::sync::{Arc, Mutex};

use cairn_artifacts::Hash;
use cairn_spec::Hint;
use serde::{Deserialize, Serialize};

use crate::corpus::{Corpus, ReadError, Split};
use crate::permutation::Permutation;

pub use self::in_order::{DocumentTokens, InOrderBatches, read_documents};

use self::pack::{Order, Packing};

/// Epochs whose index is kept: a batch may span two, and prefetching may run ahead.
const EPOCHS_KEPT: usize = 2;

/// What a batch looks like, and its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoaderSettings {
    /// Inputs a row.
    pub seq_len: usize,
    /// Rows a batch.
    pub batch_rows: usize,
    /// Another seed gives another order of the documents.
    pub seed: u64,
}

/// A run of tokens that see each other and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its first token in the batch.
    pub start: usize,
    /// Its tokens.
    pub len: usize,
}

/// Rows of packed documents, ready for a training step.
///
/// All lists but `sequences` have one entry a token, row after row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoaderBatch {
    /// The inputs, `[t]`.
    pub ids: Vec<u32>,
    /// Place in the sequence, from 0, `[t]`.
    pub positions: Vec<u32>,
    /// The token after each input, `[t]`.
    pub targets: Vec<u32>,
    /// 1 for a target, 0 for filling, `[t]`.
    pub loss_weights: Vec<f32>,
    /// The pieces of documents, in order; they cover the batch and none spans two rows.
    pub sequences: Vec<Sequence>,
    /// Tokens a row.
    pub row_tokens: usize,
}

impl LoaderBatch {
    /// Tokens, filling included.
    pub fn num_tokens(&self) -> usize {
        self.ids.len()
    }

    /// Targets, filling excluded.
    pub fn num_targets(&self) -> usize {
        self.loss_weights.iter().filter(|weight| 0.0 < **weight).count()
    }

    /// Rows.
    pub fn num_rows(&self) -> usize {
        self.ids.len().checked_div(self.row_tokens).unwrap_or(0)
    }
}

/// Where a run is in its data: all that a checkpoint needs to hold of the loader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderState {
    /// The next batch.
    pub step: u64,
    /// Seed of the order.
    pub seed: u64,
    /// The corpus.
    pub data_hash: Hash,
    /// Inputs a row.
    pub seq_len: usize,
    /// Rows a batch.
    pub batch_rows: usize,
}

/// Batches that cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoaderError {
    /// A setting out of range.
    #[error("{name} is {value}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        expected: &'static str,
    },
    /// This side of the corpus has no token to predict.
    #[error("the corpus has no {split} tokens")]
    NoTargets {
        /// The side.
        split: Split,
    },
    /// A checkpoint of other data or settings.
    #[error("the checkpoint was trained with {what} {expected}, this run has {found}")]
    OtherRun {
        /// What differs.
        what: &'static str,
        /// In the checkpoint.
        expected: String,
        /// In this run.
        found: String,
    },
    /// The corpus cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl Hint for LoaderError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::NoTargets { split: Split::Validation } => {
                vec!["build the corpus with a validation fraction above 0".to_owned()]
            }
            Self::NoTargets { split: Split::Train } => {
                vec!["build the corpus with a smaller validation fraction".to_owned()]
            }
            Self::OtherRun { .. } => vec![
                "resume with the corpus and the settings it was started \
                                           with, or start a new run"
                    .to_owned(),
            ],
            Self::Read(error) => error.hints(),
            Self::Setting { .. } => Vec::new(),
        }
    }
}

/// The training batches of a corpus, shuffled anew every epoch, without end.
///
/// ```no_run
/// # use std::sync::Arc;
/// use cairn_data::corpus::Corpus;
/// use cairn_data::loader::{Loader, LoaderSettings};
///
/// let corpus = Arc::new(Corpus::open("corpus".as_ref())?);
/// let settings = LoaderSettings { seq_len: 256, batch_rows: 16, seed: 1 };
/// let loader = Loader::new(corpus, settings)?;
/// let batch = loader.batch(12_345)?; // no need to have made the ones before
/// assert_eq!(batch.ids.len(), 16 * 256);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Loader {
    corpus: Arc<Corpus>,
    settings: LoaderSettings,
    rows_per_epoch: u64,
    /// The epochs used last, newest last.
    epochs: Mutex<Vec<(u64, Arc<Packing>)>>,
}

impl Loader {
    /// Makes a loader for the training side of a corpus.
    ///
    /// # Errors
    ///
    /// [`LoaderError::Setting`] for rows of no token or batches of no row,
    /// [`LoaderError::NoTargets`] for a corpus with nothing to learn.
    pub fn new(corpus: Arc<Corpus>, settings: LoaderSettings) -> Result<Self, LoaderError> {
        let split = Split::Train;
        let rows_per_epoch = pack::rows(&corpus, split, settings.seq_len, settings.batch_rows)?;
        Ok(Self { corpus, settings, rows_per_epoch, epochs: Mutex::new(Vec::new()) })
    }

    /// Makes the batch of a step, counted from 0 over all epochs.
    ///
    /// # Errors
    ///
    /// [`LoaderError::Read`] if a shard was altered under the loader, [`LoaderError::Setting`] for a
    /// step that 64 bits of rows cannot reach.
    pub fn batch(&self, step: u64) -> Result<LoaderBatch, LoaderError> {
        let LoaderSettings { seq_len, batch_rows, .. } = self.settings;
        let rows = pack::count(batch_rows);
        let first_row = step.checked_mul(rows).filter(|first| first.checked_add(rows).is_some());
        let first_row = first_row.ok_or(LoaderError::Setting {
            name: "step",
            value: step,
            expected: "rows that 64 bits can number",
        })?;
        let mut batch = pack::empty_batch(seq_len, batch_rows);
        for row in first_row..first_row + rows {
            let epoch = row / self.rows_per_epoch;
            // Complements keep the stream of the rows apart from that of the documents.
            let order = Permutation::new(self.rows_per_epoch, self.settings.seed, !epoch);
            let packing = self.epoch(epoch);
            packing.push_row(&self.corpus, order.at(row % self.rows_per_epoch), &mut batch)?;
        }
        Ok(batch)
    }

    /// Rows an epoch, the last of which may be filled up.
    pub fn rows_per_epoch(&self) -> u64 {
        self.rows_per_epoch
    }

    /// Targets an epoch: every token but each document's first.
    pub fn targets_per_epoch(&self) -> u64 {
        pack::num_targets(&self.corpus, Split::Train)
    }

    /// Epochs that are complete before a step, with its fraction.
    pub fn epochs_before(&self, step: u64) -> f64 {
        /// Exact below 2^53, which no run reaches.
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        fn real(value: u64) -> f64 {
            value as f64
        }
        real(step) * real(pack::count(self.settings.batch_rows)) / real(self.rows_per_epoch)
    }

    /// What the batches look like.
    pub fn settings(&self) -> LoaderSettings {
        self.settings
    }

    /// The corpus.
    pub fn corpus(&self) -> &Arc<Corpus> {
        &self.corpus
    }

    /// What a checkpoint holds when `step` is the next batch.
    pub fn state(&self, step: u64) -> LoaderState {
        let LoaderSettings { seq_len, batch_rows, seed } = self.settings;
        LoaderState { step, seed, data_hash: self.corpus.data_hash(), seq_len, batch_rows }
    }

    /// The next batch of a checkpoint, if this loader gives the batches it was trained with.
    ///
    /// # Errors
    ///
    /// [`LoaderError::OtherRun`], naming what differs.
    pub fn resume(&self, state: &LoaderState) -> Result<u64, LoaderError> {
        let own = self.state(state.step);
        for (what, expected, found) in [
            ("data", state.data_hash.to_string(), own.data_hash.to_string()),
            ("seed", state.seed.to_string(), own.seed.to_string()),
            ("seq_len", state.seq_len.to_string(), own.seq_len.to_string()),
            ("batch_rows", state.batch_rows.to_string(), own.batch_rows.to_string()),
        ] {
            if expected != found {
                return Err(LoaderError::OtherRun { what, expected, found });
            }
        }
        Ok(state.step)
    }

    /// Hash of everything that decides the batches but the step: what is computed from a batch may
    /// be kept under (this, step).
    pub fn hash(&self) -> Hash {
        let LoaderSettings { seq_len, batch_rows, seed } = self.settings;
        let data = self.corpus.data_hash();
        Hash::of_bytes(format!("loader/2 {data} {seq_len} {batch_rows} {seed}").as_bytes())
    }

    fn epoch(&self, epoch: u64) -> Arc<Packing> {
        let mut epochs = self.epochs.lock().expect("nothing panics while it is held");
        if let Some((_, packing)) = epochs.iter().find(|(number, _)| *number == epoch) {
            return Arc::clone(packing);
        }
        let documents = self.corpus.documents(Split::Train);
        let num_documents = pack::count(documents.len());
        let order = Order::Shuffled(Permutation::new(num_documents, self.settings.seed, epoch));
        let packing = Packing::new(documents, Split::Train, order, self.settings.seq_len);
        let packing = Arc::new(packing);
        if epochs.len() == EPOCHS_KEPT {
            epochs.remove(0);
        }
        epochs.push((epoch, Arc::clone(&packing)));
        packing
    }
}

#[cfg(test)]
mod tests;

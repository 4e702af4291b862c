//! Validation: the loss on documents that are never trained on.
//!
//! The measure is `cairn-eval`'s, so that a run's curve and an evaluation of its checkpoint on the
//! same documents are the same figure: each document is its own context, read in windows of the
//! run's sequence length; its first token, which nothing stands before, is no target and costs log₂
//! of the vocabulary where bits are counted.

use std::sync::Arc;

use cairn_data::corpus::{Corpus, ReadError, Split};
use cairn_data::loader::LoaderError;
use cairn_data::tokenizer::Tokenizer;
use cairn_eval::{
    DocumentScore, DocumentScorer, EvalError, ScoreBatch, ScoreLimits, TokenScorer, Windows,
};
use cairn_kernels::SeqSlot;

use crate::masking::Masking;

/// What was scored and how well.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Sum of the negative log-likelihoods of the targets, in nats.
    pub negative_log_likelihood: f64,
    /// Bits of a code for the documents: of the targets and of the first tokens.
    pub bits: f64,
    /// Targets scored.
    pub targets: u64,
    /// Bytes of text they stand for; end-of-document tokens have none. `None` where the tokenizer's
    /// tokens do not stand for fixed bytes.
    pub bytes: Option<u64>,
}

impl Score {
    /// Mean negative log-likelihood of a target, in nats.
    pub fn loss(&self) -> f64 {
        self.negative_log_likelihood / self.targets as f64
    }

    /// Bits of the code over bytes of text.
    pub fn bits_per_byte(&self) -> Option<f64> {
        self.bytes.filter(|&bytes| bytes > 0).map(|bytes| self.bits / bytes as f64)
    }

    fn add(&mut self, document: DocumentScore, vocab_size: usize) {
        self.negative_log_likelihood += document.nats;
        self.bits += document.bits(vocab_size);
        self.targets += document.num_targets;
    }
}

/// Why a validation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ValidationError {
    /// The validation data cannot be read.
    #[error(transparent)]
    Data(#[from] ReadError),
    /// A document cannot be scored: it is not the model's, or the model computes no number.
    #[error(transparent)]
    Eval(#[from] EvalError),
}

/// A part of the validation side, always the same one: every so many documents, so that neighbors in
/// the corpus do not stand for all of it. How many tokens are scored at a time changes no figure.
#[derive(Debug)]
pub struct Validation {
    corpus: Arc<Corpus>,
    /// Numbers of documents, and how many of their tokens are scored.
    taken: Vec<(usize, usize)>,
    bytes: Option<u64>,
    windows: Windows,
    masking: Option<Masking>,
}

/// Keys the masks of validation, in the place of a run's seed: every validation of every run asks
/// the same.
const MASK_SEED: u64 = 0x7661_6c69_6461_7465;

impl Validation {
    /// Scores up to about `max_tokens` tokens in windows of `seq_len` inputs. A side with more is
    /// thinned out evenly, and the last document taken is cut short.
    ///
    /// # Errors
    ///
    /// [`LoaderError::NoTargets`] if the corpus has no validation side.
    pub fn new(
        corpus: &Arc<Corpus>,
        tokenizer: &Tokenizer,
        seq_len: usize,
        max_tokens: u64,
    ) -> Result<Self, LoaderError> {
        let split = Split::Validation;
        let documents = corpus.documents(split);
        let every = documents.num_tokens().div_ceil(max_tokens.max(1)).max(1);
        let every = usize::try_from(every).unwrap_or(usize::MAX);
        let mut left = max_tokens;
        let mut taken = Vec::new();
        for number in (0..documents.len()).step_by(every) {
            // A lone token has nothing to predict it from.
            let tokens = u64::from(documents.document(number).num_tokens).min(left);
            if tokens < 2 {
                break;
            }
            left -= tokens;
            taken.push((number, usize::try_from(tokens).expect("a document's tokens fit")));
        }
        if taken.is_empty() {
            return Err(LoaderError::NoTargets { split });
        }
        let windows = Windows::new(seq_len, seq_len).expect("recipes have sequences of a token");
        let bytes = bytes_of(corpus, tokenizer, &taken)?;
        Ok(Self { corpus: Arc::clone(corpus), taken, bytes, windows, masking: None })
    }

    /// Asks for tokens that are taken away instead of the next ones. Then no bits are counted: what
    /// stays tells of what is missing, so this is no code for the text.
    #[must_use]
    pub fn with_masking(self, masking: Option<Masking>) -> Self {
        let bytes = self.bytes.filter(|_| masking.is_none());
        Self { masking, bytes, ..self }
    }

    /// How much a scorer must take at once if it has room for `tokens` tokens.
    pub(crate) fn limits(&self, tokens: usize) -> ScoreLimits {
        ScoreLimits { tokens, pieces: tokens, context: self.windows.context() }
    }

    /// Scores the documents.
    ///
    /// # Errors
    ///
    /// [`ValidationError`] if the data cannot be read or does not fit, or a log-probability is no
    /// number.
    pub fn score(&self, scorer: &mut impl TokenScorer) -> Result<Score, ValidationError> {
        if let Some(masking) = &self.masking {
            return self.score_masked(masking, scorer);
        }
        let vocab_size = scorer.vocab_size();
        let mut score = Score { bytes: self.bytes, ..Score::default() };
        let mut documents = DocumentScorer::new(scorer, self.windows)?;
        let mut tokens = Vec::new();
        for &(number, count) in &self.taken {
            tokens.clear();
            self.corpus.documents(Split::Validation).read_tokens(number, 0, count, &mut tokens)?;
            documents.push(&tokens, &mut |document| score.add(document, vocab_size))?;
        }
        documents.finish(&mut |document| score.add(document, vocab_size))?;
        Ok(score)
    }

    /// Scores what is taken away of each document, which is read in pieces of the sequence length.
    fn score_masked(
        &self,
        masking: &Masking,
        scorer: &mut impl TokenScorer,
    ) -> Result<Score, ValidationError> {
        let limits = scorer.limits();
        let (mut score, mut pieces) = (Score::default(), MaskedPieces::default());
        let mut tokens = Vec::new();
        for &(number, count) in &self.taken {
            tokens.clear();
            self.corpus.documents(Split::Validation).read_tokens(number, 0, count, &mut tokens)?;
            for (place, piece) in tokens.chunks(limits.context).enumerate() {
                if limits.tokens < pieces.ids.len() + piece.len() {
                    pieces.score(scorer, &mut score)?;
                }
                pieces.push(masking, piece, (number as u64, place * limits.context));
            }
        }
        pieces.score(scorer, &mut score)?;
        Ok(score)
    }
}

/// Pieces of documents with tokens taken away, scored together.
#[derive(Default)]
struct MaskedPieces {
    ids: Vec<u32>,
    positions: Vec<u32>,
    targets: Vec<u32>,
    /// Tokens that were taken away, with the document and their place in it.
    chosen: Vec<(usize, u64, usize)>,
    /// First token and length of each piece.
    pieces: Vec<(usize, usize)>,
}

impl MaskedPieces {
    fn push(&mut self, masking: &Masking, piece: &[u32], (document, first): (u64, usize)) {
        self.pieces.push((self.ids.len(), piece.len()));
        for (index, &id) in piece.iter().enumerate() {
            let place = first + index;
            let replaced = masking.replaced(id, MASK_SEED, document, place as u64);
            if replaced.is_some() {
                self.chosen.push((self.ids.len(), document, place));
            }
            self.ids.push(replaced.unwrap_or(id));
            self.positions.push(u32::try_from(index).expect("a piece is no longer than a row"));
        }
        self.targets.extend_from_slice(piece);
    }

    /// Adds what the pieces score, and begins anew.
    fn score(
        &mut self,
        scorer: &mut impl TokenScorer,
        score: &mut Score,
    ) -> Result<(), ValidationError> {
        if self.chosen.is_empty() {
            *self = Self::default();
            return Ok(());
        }
        let slot = |&(start, len): &(usize, usize)| SeqSlot { start, len, cached: 0, blocks: &[] };
        let slots: Vec<SeqSlot<'_>> = self.pieces.iter().map(slot).collect();
        let Self { ids, positions, targets, .. } = &*self;
        let batch = ScoreBatch { ids, positions, targets, pieces: &slots };
        let logprobs = scorer.logprobs(&batch)?;
        for &(at, document, position) in &self.chosen {
            let logprob = f64::from(logprobs[at]);
            if !logprob.is_finite() {
                let logprob = logprob.to_string();
                return Err(EvalError::NotANumber { document, position, logprob }.into());
            }
            score.negative_log_likelihood -= logprob;
            score.targets += 1;
        }
        *self = Self::default();
        Ok(())
    }
}

/// Bytes of text that the taken tokens stand for, where tokens stand for bytes.
fn bytes_of(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    taken: &[(usize, usize)],
) -> Result<Option<u64>, ReadError> {
    if !tokenizer.is_byte_level() {
        return Ok(None);
    }
    let documents = corpus.documents(Split::Validation);
    let mut bytes = 0;
    for &(number, count) in taken {
        let document = documents.document(number);
        if u64::from(document.num_tokens) == count as u64 {
            bytes += u64::from(document.text_bytes);
            continue;
        }
        let mut tokens = Vec::new();
        documents.read_tokens(number, 0, count, &mut tokens)?;
        let of_tokens = tokens.iter().filter_map(|&id| tokenizer.token_bytes(id));
        bytes += of_tokens.map(|bytes| bytes.len() as u64).sum::<u64>();
    }
    Ok(Some(bytes))
}

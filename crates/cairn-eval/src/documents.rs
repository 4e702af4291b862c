//! The loss on documents, each the model's whole context.
//!
//! Windows of several documents share a run; a document's score does not depend on which.
//!
//! **First tokens.** Nothing stands before a document's first token, and training never asks for it,
//! so it is no target and has no part in the loss. As a code for the document it must not be free:
//! where bits are counted it costs log₂ of the vocabulary, what saying it plainly takes.

use std::collections::VecDeque;

use cairn_kernels::SeqSlot;

use crate::error::EvalError;
use crate::scorer::{ScoreBatch, TokenScorer, check_limit};
use crate::windows::{Window, Windows};

/// What the model makes of one document.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DocumentScore {
    /// Tokens after the first, the end of the document included.
    pub num_targets: u64,
    /// Negative log-probability of all of them.
    pub nats: f64,
}

impl DocumentScore {
    /// Bits of a code for the whole document over a vocabulary of `vocab_size`: its targets' and
    /// the first token's.
    pub fn bits(&self, vocab_size: usize) -> f64 {
        (vocab_size as f64).log2() + self.nats / std::f64::consts::LN_2
    }
}

/// A document that waits for some of its windows.
#[derive(Debug)]
struct Open {
    score: DocumentScore,
    windows_left: usize,
}

/// A window in the run that is being filled.
#[derive(Debug)]
struct Part {
    /// Number of its document, counted as they came.
    document: u64,
    window: Window,
    /// Its first row.
    start: usize,
}

/// Scores documents as they come, as many at a time as the scorer takes.
///
/// Scores come out in the order of the documents; [`finish`](Self::finish) gives the last ones.
#[derive(Debug)]
pub struct DocumentScorer<'s, S: TokenScorer> {
    scorer: &'s mut S,
    windows: Windows,
    open: VecDeque<Open>,
    /// Number of the first open document.
    first_open: u64,
    ids: Vec<u32>,
    positions: Vec<u32>,
    targets: Vec<u32>,
    parts: Vec<Part>,
}

impl<'s, S: TokenScorer> DocumentScorer<'s, S> {
    /// Scores by windows.
    ///
    /// # Errors
    ///
    /// [`EvalError::Limit`] if a window is longer than the scorer takes.
    pub fn new(scorer: &'s mut S, windows: Windows) -> Result<Self, EvalError> {
        let limits = scorer.limits();
        check_limit("context", windows.context(), limits.context.min(limits.tokens))?;
        let (ids, positions, targets) = (Vec::new(), Vec::new(), Vec::new());
        let open = VecDeque::new();
        Ok(Self {
            scorer,
            windows,
            open,
            first_open: 0,
            ids,
            positions,
            targets,
            parts: Vec::new(),
        })
    }

    /// Takes a document's tokens, its end included, and hands the scores that are complete to
    /// `on_score`, in order.
    ///
    /// # Errors
    ///
    /// [`EvalError::Run`] for a token outside the vocabulary, [`EvalError::NotANumber`] with the
    /// document and the token.
    pub fn push(
        &mut self,
        tokens: &[u32],
        on_score: &mut dyn FnMut(DocumentScore),
    ) -> Result<(), EvalError> {
        let document = self.first_open + self.open.len() as u64;
        let windows_left = self.windows.of(tokens.len()).count();
        self.open.push_back(Open { score: DocumentScore::default(), windows_left });
        for window in self.windows.of(tokens.len()) {
            let limits = self.scorer.limits();
            let tokens_after = self.ids.len() + window.inputs.len();
            if limits.tokens < tokens_after || self.parts.len() == limits.pieces {
                self.run(on_score)?;
            }
            let inputs = window.inputs.clone();
            let start = self.ids.len();
            self.ids.extend_from_slice(&tokens[inputs.clone()]);
            self.targets.extend_from_slice(&tokens[inputs.start + 1..=inputs.end]);
            let length = u32::try_from(inputs.len()).expect("contexts are below 2^24 tokens");
            self.positions.extend(0..length);
            self.parts.push(Part { document, window, start });
        }
        self.hand_out(on_score);
        Ok(())
    }

    /// Scores what is left.
    ///
    /// # Errors
    ///
    /// As [`push`](Self::push).
    pub fn finish(mut self, on_score: &mut dyn FnMut(DocumentScore)) -> Result<(), EvalError> {
        self.run(on_score)?;
        assert!(self.open.is_empty(), "every window was run");
        Ok(())
    }

    fn run(&mut self, on_score: &mut dyn FnMut(DocumentScore)) -> Result<(), EvalError> {
        if self.parts.is_empty() {
            self.hand_out(on_score);
            return Ok(());
        }
        let pieces: Vec<SeqSlot<'_>> = self
            .parts
            .iter()
            .map(|part| SeqSlot {
                start: part.start,
                len: part.window.inputs.len(),
                cached: 0,
                blocks: &[],
            })
            .collect();
        let logprobs = self.scorer.logprobs(&ScoreBatch {
            ids: &self.ids,
            positions: &self.positions,
            targets: &self.targets,
            pieces: &pieces,
        })?;
        for Part { document, window, start } in &self.parts {
            let index = usize::try_from(document - self.first_open).expect("open documents fit");
            let open = &mut self.open[index];
            for offset in window.num_scored_before..window.inputs.len() {
                let logprob = logprobs[start + offset];
                if !logprob.is_finite() {
                    return Err(EvalError::NotANumber {
                        document: *document,
                        position: window.inputs.start + offset + 1,
                        logprob: logprob.to_string(),
                    });
                }
                open.score.num_targets += 1;
                open.score.nats -= f64::from(logprob);
            }
            open.windows_left -= 1;
        }
        [&mut self.ids, &mut self.positions, &mut self.targets].into_iter().for_each(Vec::clear);
        self.parts.clear();
        self.hand_out(on_score);
        Ok(())
    }

    fn hand_out(&mut self, on_score: &mut dyn FnMut(DocumentScore)) {
        while self.open.front().is_some_and(|open| open.windows_left == 0) {
            let open = self.open.pop_front().expect("there is a front");
            self.first_open += 1;
            on_score(open.score);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

//! Beam search, with the semantics of transformers' `_beam_search` (version 5).
//!
//! Every step scores all continuations of all beams, looks at the best `max(2, 1 + stops) · beams` of
//! them, finishes those that end and rank among the first `num_beams`, and goes on with the best
//! that do not end. A finished hypothesis is worth `Σ logprob / length^length_penalty`, its stop
//! token counted. Ties go to the better beam, then to the lower token id.
//!
//! **Invariant:** [`BeamSearch`] never sees a model or a cache: log-probabilities come in, parents go
//! out. The driver in `beam/driver.rs` forks block tables after them.

mod driver;

pub use driver::BeamRequest;

use serde::{Deserialize, Serialize};

use cairn_spec::Hint;

/// When a search with enough finished hypotheses stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EarlyStopping {
    /// When the best beam, if it ended now, would not beat the worst finished one
    /// (`early_stopping=False`).
    #[default]
    WhenUnlikely,
    /// At once (`early_stopping=True`).
    AtOnce,
    /// When no beam can beat the worst finished one any more, at any length (`"never"`).
    WhenImpossible,
}

/// How a beam search goes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BeamParams {
    /// Hypotheses kept at every step.
    pub num_beams: usize,
    /// Exponent of the length that a finished score is divided by; above 0 favors long outputs.
    pub length_penalty: f32,
    /// When to stop.
    pub early_stopping: EarlyStopping,
    /// Hypotheses returned, best first.
    pub num_return_sequences: usize,
}

impl BeamParams {
    /// `num_beams` beams, the best one returned; scores are means.
    pub fn new(num_beams: usize) -> Self {
        Self {
            num_beams,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::default(),
            num_return_sequences: 1,
        }
    }

    /// Checks the settings for an engine that runs so many sequences at once.
    ///
    /// # Errors
    ///
    /// [`BeamError`] says which cannot be used.
    pub fn check(&self, max_num_seqs: usize) -> Result<(), BeamError> {
        let Self { num_beams, num_return_sequences, length_penalty, .. } = *self;
        if num_beams == 0 || max_num_seqs < num_beams {
            return Err(BeamError::Beams { num_beams, max_num_seqs });
        }
        if num_return_sequences == 0 || num_beams < num_return_sequences {
            return Err(BeamError::Returned { num_return_sequences, num_beams });
        }
        if !length_penalty.is_finite() {
            return Err(BeamError::LengthPenalty { length_penalty: length_penalty.to_string() });
        }
        Ok(())
    }
}

/// Beam settings that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BeamError {
    /// No beam, or more than the engine runs at once.
    #[error("num_beams is {num_beams}, which is not between 1 and max_num_seqs, {max_num_seqs}")]
    Beams {
        /// Asked for.
        num_beams: usize,
        /// The engine's limit.
        max_num_seqs: usize,
    },
    /// More results than beams, or none.
    #[error("num_return_sequences is {num_return_sequences}, not between 1 and {num_beams} beams")]
    Returned {
        /// Asked for.
        num_return_sequences: usize,
        /// Beams there are.
        num_beams: usize,
    },
    /// The penalty is infinite or not a number.
    #[error("length_penalty is {length_penalty}")]
    LengthPenalty {
        /// What it was set to.
        length_penalty: String,
    },
}

impl Hint for BeamError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Beams { .. } => vec!["plan the engine for at least num_beams sequences".into()],
            Self::Returned { .. } | Self::LengthPenalty { .. } => Vec::new(),
        }
    }
}

/// A finished output of a beam search.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// New tokens, a stop token included.
    pub tokens: Vec<u32>,
    /// `Σ logprob / length^length_penalty`.
    pub score: f32,
}

/// An output that may go on.
#[derive(Clone, Debug)]
struct Beam {
    tokens: Vec<u32>,
    /// Sum of log-probabilities.
    score: f32,
}

/// One continuation of one beam.
#[derive(Clone, Copy, Debug)]
struct Continuation {
    beam: usize,
    token: u32,
    score: f32,
    ends: bool,
}

/// The state of a search, for whoever runs the model.
///
/// ```
/// use cairn_engine::{BeamParams, BeamSearch};
/// let mut search = BeamSearch::new(BeamParams::new(2), 2, &[]);
/// // Whatever came before, token 0 has probability 1/2 and token 1 has 1/4.
/// let after = [(0, 0.5_f32.ln()), (1, 0.25_f32.ln())];
/// while search.advance_by(|_| after.iter().copied()) {}
/// assert_eq!(search.into_hypotheses()[0].tokens, [0, 0]);
/// ```
#[derive(Debug)]
pub struct BeamSearch<'a> {
    params: BeamParams,
    max_new_tokens: usize,
    stop_tokens: &'a [u32],
    beams: Vec<Beam>,
    /// Best first, at most `num_beams`.
    finished: Vec<Hypothesis>,
    /// Whether a beam can still get among the finished; once false, it stays so.
    improvable: bool,
    /// Beam of the step before that each beam continues.
    parents: Vec<usize>,
}

impl<'a> BeamSearch<'a> {
    /// Starts from one empty output.
    pub fn new(params: BeamParams, max_new_tokens: usize, stop_tokens: &'a [u32]) -> Self {
        Self {
            params,
            max_new_tokens,
            stop_tokens,
            beams: vec![Beam { tokens: Vec::new(), score: 0.0 }],
            finished: Vec::with_capacity(params.num_beams + 1),
            improvable: true,
            parents: Vec::with_capacity(params.num_beams),
        }
    }

    /// Takes the log-probabilities `[v]` after each beam and returns whether the search goes on.
    pub(crate) fn advance<'l>(&mut self, logprobs_v: impl Fn(usize) -> &'l [f32]) -> bool {
        self.advance_by(|beam| (0_u32..).zip(logprobs_v(beam).iter().copied()))
    }

    /// The outputs that are to be continued.
    pub fn beams(&self) -> impl Iterator<Item = &[u32]> {
        self.beams.iter().map(|beam| beam.tokens.as_slice())
    }

    /// How many of the likeliest tokens after a beam are enough to go on.
    pub fn num_wanted(&self) -> usize {
        // Enough that, if all stop tokens of all beams come first, `num_beams` others follow.
        (1 + self.stop_tokens.len()).max(2) * self.params.num_beams
    }

    /// Takes the log-probabilities of tokens after each beam, in order of id, [`num_wanted`](Self::num_wanted) of the
    /// likeliest at least, and returns whether the search goes on.
    pub fn advance_by<I: Iterator<Item = (u32, f32)>>(
        &mut self,
        after: impl Fn(usize) -> I,
    ) -> bool {
        let length = self.beams[0].tokens.len() + 1;
        let best = self.best_continuations(after, length);
        self.finish(&best, length);
        let beams = best.iter().filter(|next| !next.ends).take(self.params.num_beams);
        self.parents.clear();
        self.parents.extend(beams.clone().map(|next| next.beam));
        self.beams = beams
            .map(|next| {
                let tokens = self.beams[next.beam].tokens.iter().copied().chain([next.token]);
                Beam { tokens: tokens.collect(), score: next.score }
            })
            .collect();
        self.improvable = self.improvable && self.can_improve(length);
        let stopped = self.is_full() && self.params.early_stopping == EarlyStopping::AtOnce;
        self.improvable && !stopped && !self.beams.is_empty()
    }

    /// For each beam, the beam of the step before that it continues.
    pub(crate) fn parents(&self) -> &[usize] {
        &self.parents
    }

    /// The token each beam ends in.
    pub(crate) fn last_token(&self, beam: usize) -> u32 {
        *self.beams[beam].tokens.last().expect("after a step every beam has a token")
    }

    /// The best finished hypotheses.
    pub fn into_hypotheses(mut self) -> Vec<Hypothesis> {
        self.finished.truncate(self.params.num_return_sequences);
        self.finished
    }

    /// The best continuations of all beams, best first.
    fn best_continuations<I: Iterator<Item = (u32, f32)>>(
        &self,
        after: impl Fn(usize) -> I,
        length: usize,
    ) -> Vec<Continuation> {
        let keep = self.num_wanted();
        let mut best: Vec<Continuation> = Vec::with_capacity(keep + 1);
        for (beam, Beam { score: so_far, .. }) in self.beams.iter().enumerate() {
            for (token, logprob) in after(beam) {
                let score = so_far + logprob;
                if best.len() == keep && score <= best[keep - 1].score {
                    continue;
                }
                let ends = length == self.max_new_tokens || self.stop_tokens.contains(&token);
                let place = best.partition_point(|other| score <= other.score);
                best.insert(place, Continuation { beam, token, score, ends });
                best.truncate(keep);
            }
        }
        best
    }

    /// Moves what ends among the first `num_beams` to the finished hypotheses.
    fn finish(&mut self, best: &[Continuation], length: usize) {
        let closed = self.is_full() && self.params.early_stopping == EarlyStopping::AtOnce;
        if closed || !self.improvable {
            return;
        }
        for next in best.iter().take(self.params.num_beams).filter(|next| next.ends) {
            let score = self.normalized(next.score, length);
            let tokens = self.beams[next.beam].tokens.iter().copied().chain([next.token]).collect();
            let place = self.finished.partition_point(|other| score <= other.score);
            self.finished.insert(place, Hypothesis { tokens, score });
            self.finished.truncate(self.params.num_beams);
        }
    }

    fn is_full(&self) -> bool {
        self.finished.len() == self.params.num_beams
    }

    /// Whether the best beam might still enter the finished hypotheses.
    fn can_improve(&self, length: usize) -> bool {
        let (Some(best), Some(worst)) = (self.beams.first(), self.finished.last()) else {
            return !self.beams.is_empty();
        };
        let far = self.params.early_stopping == EarlyStopping::WhenImpossible
            && 0.0 < self.params.length_penalty;
        let length = if far { self.max_new_tokens } else { length };
        !self.is_full() || worst.score < self.normalized(best.score, length)
    }

    #[expect(clippy::cast_possible_truncation, reason = "scores are f32, as transformers' are")]
    fn normalized(&self, score: f32, length: usize) -> f32 {
        score / (length as f64).powf(f64::from(self.params.length_penalty)) as f32
    }
}

#[cfg(test)]
mod tests;

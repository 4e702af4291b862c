//! Speculation: tokens are guessed ahead and checked together, in one run of the model.
//!
//! A run over several tokens of one sequence reads the weights once, so checking guesses costs
//! little more than choosing one token. After each guessed token the model's own choice is made, from
//! its own logits, with the randomness of that position; a guess counts exactly when it is that
//! choice. So the output is what it is without speculation, to the last token, greedy or sampled:
//! a bad guess costs time and nothing else. (Leviathan et al. 2023 and Chen et al. 2023 keep only
//! the distribution; a draw keyed by position allows more.)
//!
//! A wrong guess is taken back by shortening the block table. That suits every family: pages keep all
//! positions, windows only hide them, and no layer carries anything else from token to token.
//!
//! | file | noun |
//! |---|---|
//! | `speculation` | what is asked for, and what came of it |
//! | `speculation/lookup` | guesses by repetition of the text (Saxena 2023, "Prompt lookup decoding") |
//! | `speculation/drafter` | who guesses |
//! | `speculation/draft_model` | guesses by a second model |
//! | `speculation/pace` | whether guessing pays |

mod draft_model;
mod drafter;
mod lookup;
mod pace;

use serde::{Deserialize, Serialize};

pub(crate) use draft_model::DraftModel;
pub(crate) use drafter::{DraftFor, Drafter};
pub(crate) use pace::Pace;

/// Most tokens that are guessed ahead at once.
pub const NUM_SPECULATIVE_TOKENS_MAX: usize = 32;

/// Who guesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DraftMethod {
    /// The text itself: what followed when its last tokens occurred before.
    Ngram,
    /// The model's first blocks, so many, with its head. They share weights and cache with the whole.
    Depth(usize),
    /// A second model with the same vocabulary: [`Engine::attach_draft`](crate::Engine::attach_draft).
    Model,
}

/// How tokens are guessed ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpeculativeOptions {
    /// Who guesses.
    pub method: DraftMethod,
    /// Most tokens guessed at once, for one sequence.
    pub num_speculative_tokens: usize,
    /// Whether to go on where measured tokens come faster without.
    #[serde(default)]
    pub always: bool,
}

impl SpeculativeOptions {
    /// Guesses of up to `num_speculative_tokens` tokens, as long as they pay.
    pub fn new(method: DraftMethod, num_speculative_tokens: usize) -> Self {
        Self { method, num_speculative_tokens, always: false }
    }
}

/// What came of speculation, since the engine was loaded. The counts carry vLLM's names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SpeculationFigures {
    /// Times that something was guessed for a sequence.
    pub num_drafts: u64,
    /// Tokens that were guessed.
    pub num_draft_tokens: u64,
    /// Guesses that were the model's choice.
    pub num_accepted_tokens: u64,
    /// Of the first guesses, of the second, …, those that were the model's choice.
    pub num_accepted_tokens_per_pos: Vec<u64>,
    /// Steps with guesses.
    pub num_speculating_steps: u64,
    /// Steps of decoding sequences without.
    pub num_plain_steps: u64,
    /// Times that speculation turned itself off because it lost.
    pub num_stops: u64,
    /// Measured seconds a token of steps with guesses, lately; the guessing counts.
    pub speculating_seconds_per_token: Option<f64>,
    /// Measured seconds a token of steps without.
    pub plain_seconds_per_token: Option<f64>,
}

impl SpeculationFigures {
    pub(crate) fn new(num_speculative_tokens: usize) -> Self {
        Self { num_accepted_tokens_per_pos: vec![0; num_speculative_tokens], ..Self::default() }
    }

    /// Notes one checked draft: how much was guessed, and how much of it was right.
    pub(crate) fn note(&mut self, drafted: usize, accepted: usize) {
        self.num_drafts += 1;
        self.num_draft_tokens += drafted as u64;
        self.num_accepted_tokens += accepted as u64;
        self.num_accepted_tokens_per_pos.iter_mut().take(accepted).for_each(|count| *count += 1);
    }

    /// The share of guesses that were right; `None` before the first.
    pub fn acceptance(&self) -> Option<f64> {
        (self.num_draft_tokens != 0)
            .then(|| self.num_accepted_tokens as f64 / self.num_draft_tokens as f64)
    }
}

//! What is asked of an engine and what it answers: token ids in, token ids out.

use serde::{Deserialize, Serialize};

use crate::error::RequestError;
use crate::sampler::SampleError;
use crate::sampling::{SamplingParams, TOP_LOGPROBS_MAX};

/// A prompt and how to continue it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Token ids to continue; at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens to add at most; at least one.
    pub max_new_tokens: usize,
    /// Any of these ends the output; it is the output's last token.
    pub stop_tokens: Vec<u32>,
    /// `Some(n)` reports each token's log-probability and those of the `n` likeliest.
    pub logprobs: Option<usize>,
}

impl Request {
    /// Continues `prompt` by up to `max_new_tokens` tokens.
    pub fn new(prompt: Vec<u32>, sampling: SamplingParams, max_new_tokens: usize) -> Self {
        Self { prompt, sampling, max_new_tokens, stop_tokens: Vec::new(), logprobs: None }
    }

    /// Checks everything that could make the engine fail later.
    pub(crate) fn check(&self, vocab_size: usize, max_context: usize) -> Result<(), RequestError> {
        if self.prompt.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        if self.max_new_tokens == 0 {
            return Err(RequestError::NothingAsked);
        }
        let (prompt, max_new_tokens) = (self.prompt.len(), self.max_new_tokens);
        if max_context < prompt.saturating_add(max_new_tokens) {
            return Err(RequestError::Context { prompt, max_new_tokens, max_context });
        }
        if let Some(asked) = self.logprobs.filter(|&asked| TOP_LOGPROBS_MAX < asked) {
            return Err(RequestError::TooManyLogprobs { asked });
        }
        let in_range = |field, mut ids: &mut dyn Iterator<Item = u32>| match (&mut ids)
            .enumerate()
            .find(|&(_, token)| vocab_size <= token as usize)
        {
            Some((position, token)) => {
                Err(RequestError::TokenRange { field, position, token, vocab_size })
            }
            None => Ok(()),
        };
        in_range("prompt", &mut self.prompt.iter().copied())?;
        in_range("stop_tokens", &mut self.stop_tokens.iter().copied())?;
        in_range("logit_bias", &mut self.sampling.logit_bias.iter().map(|&(token, _)| token))
    }
}

/// Identity of a request within its engine, in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(crate) u64);

/// Why an output ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// A stop token, which is the last token of the output.
    Stop,
    /// `max_new_tokens` tokens.
    Length,
    /// The caller had enough.
    Cancelled,
}

/// The log-probabilities of one position, of the model's own distribution: before penalties,
/// temperature and filters.
#[derive(Clone, Debug, PartialEq)]
pub struct PositionLogprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The likeliest tokens, likeliest first, ties by id.
    pub top: Vec<(u32, f32)>,
}

/// Something that happened to a request in a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was chosen.
    Token {
        /// Whose.
        request: RequestId,
        /// The token.
        token: u32,
        /// Its log-probabilities, where the request asked for them.
        logprobs: Option<PositionLogprobs>,
    },
    /// The output is complete.
    Finished {
        /// Whose.
        request: RequestId,
        /// Why.
        finish: Finish,
    },
    /// No token could be chosen; the request is gone, the others are not affected.
    Failed {
        /// Whose.
        request: RequestId,
        /// Why.
        error: SampleError,
    },
}

/// A complete output.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// New tokens, a stop token included.
    pub tokens: Vec<u32>,
    /// Log-probabilities of each, where the request asked for them.
    pub logprobs: Vec<PositionLogprobs>,
    /// Why it ended.
    pub finish: Finish,
}

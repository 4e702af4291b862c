//! What is asked of an engine and what it answers: token ids in, token ids out.

use serde::{Deserialize, Serialize};

use crate::constraint::Constraint;
use crate::error::RequestError;
use crate::sampler::SampleError;
use crate::sampling::{SamplingParams, TOP_LOGPROBS_MAX};

/// A prompt and how to continue it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids to continue; at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens to add at most; none only where log-probabilities of the prompt are asked for.
    pub max_new_tokens: usize,
    /// Any of these ends the output; it is the output's last token.
    pub stop_tokens: Vec<u32>,
    /// `Some(n)` reports each token's log-probability and those of the `n` likeliest.
    pub logprobs: Option<usize>,
    /// `Some(n)` reports the same of each token of the prompt after the first. Such a prompt is run as a
    /// whole.
    pub prompt_logprobs: Option<usize>,
    /// Who goes first: lower before higher, and among equals who came first.
    pub priority: i32,
    /// Which of several outputs with one seed and prompt this is; each has its own randomness.
    pub choice: u32,
    /// Whether what earlier requests have left in the cache may serve this one.
    pub reuse_prefix: bool,
    /// Only requests with the same salt serve each other.
    pub cache_salt: u64,
    /// What the output follows, from its beginning on. It ends where nothing can come any more.
    pub constraint: Option<Box<dyn Constraint>>,
}

impl Request {
    /// Continues `prompt` by up to `max_new_tokens` tokens.
    pub fn new(prompt: Vec<u32>, sampling: SamplingParams, max_new_tokens: usize) -> Self {
        Self {
            prompt,
            sampling,
            max_new_tokens,
            stop_tokens: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            priority: 0,
            choice: 0,
            reuse_prefix: true,
            cache_salt: 0,
            constraint: None,
        }
    }

    /// Checks everything that could make the engine fail later.
    pub(crate) fn check(&self, vocab_size: usize, max_context: usize) -> Result<(), RequestError> {
        if self.prompt.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        if self.max_new_tokens == 0 && self.prompt_logprobs.is_none() {
            return Err(RequestError::NothingAsked);
        }
        let (prompt, max_new_tokens) = (self.prompt.len(), self.max_new_tokens);
        if max_context < prompt.saturating_add(max_new_tokens) {
            return Err(RequestError::Context { prompt, max_new_tokens, max_context });
        }
        let most = self.logprobs.max(self.prompt_logprobs);
        if let Some(asked) = most.filter(|&asked| TOP_LOGPROBS_MAX < asked) {
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
    /// Of the token that stands there.
    pub chosen: f32,
    /// Its place among all tokens, likeliest first, ties by id; 1 is the first.
    pub rank: usize,
    /// The likeliest tokens, likeliest first, ties by id.
    pub top: Vec<(u32, f32)>,
}

/// How much of a prompt was in the cache, and why not more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixOutcome {
    /// Tokens at the beginning of the prompt that were not run again.
    pub num_cached_tokens: usize,
    /// Why the others were.
    pub end: PrefixEnd,
}

/// Why a part of a prompt was run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixEnd {
    /// Only the last token was, after which the first choice is made.
    Whole,
    /// No sequence that is known went on like this.
    Cold,
    /// One did, but others needed its blocks.
    Evicted,
    /// Log-probabilities of the prompt were asked for.
    PromptLogprobs,
    /// The request did not want what others have left.
    NotAsked,
    /// The engine keeps nothing.
    TurnedOff,
}

/// Something that happened to a request in a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The first of its tokens are run. Comes once, before everything else.
    Admitted {
        /// Whose.
        request: RequestId,
        /// What was there of its prompt.
        prefix: PrefixOutcome,
    },
    /// Log-probabilities of tokens of the prompt, where the request asked for them: the first event is
    /// about the prompt's second token and those after it, the next goes on from there.
    PromptLogprobs {
        /// Whose.
        request: RequestId,
        /// Of consecutive tokens.
        logprobs: Vec<PositionLogprobs>,
    },
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
    /// Of each token of the prompt, where the request asked for them; the first has none.
    pub prompt_logprobs: Vec<Option<PositionLogprobs>>,
    /// What was in the cache of the prompt.
    pub prefix: PrefixOutcome,
    /// Why it ended.
    pub finish: Finish,
}

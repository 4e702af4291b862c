//! Our side of a contract: one prompt read and continued, timed.

use cairn_engine::{Engine, Request, SamplingParams};
use serde::{Deserialize, Serialize};

use crate::decode_bench::{cache_bytes_per_token, timed, weight_bytes};
use crate::error::EvalError;

/// One turn of one side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// Seconds from the prompt to the first token.
    pub prefill_s: f64,
    /// Seconds from the first token to the last.
    pub decode_s: f64,
    /// The tokens made.
    pub tokens: Vec<u32>,
}

/// Speeds of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TurnRates {
    /// Tokens of the prompt read a second.
    pub prefill_tokens_per_s: f64,
    /// Tokens made a second, the first one not counted: it comes out of the prompt.
    pub decode_tokens_per_s: f64,
}

impl Turn {
    /// Its speeds.
    pub fn rates(&self, prompt_tokens: usize) -> TurnRates {
        TurnRates {
            prefill_tokens_per_s: prompt_tokens as f64 / self.prefill_s,
            decode_tokens_per_s: self.tokens.len().saturating_sub(1) as f64 / self.decode_s,
        }
    }
}

/// What every turn of ours runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnBench {
    /// What is read.
    pub prompt: Vec<u32>,
    /// Tokens that are made; nothing ends them early.
    pub new_tokens: usize,
}

impl TurnBench {
    /// Runs a turn.
    ///
    /// # Errors
    ///
    /// [`EvalError::Request`] if the engine refuses the lengths, [`EvalError::Engine`] if it fails.
    pub fn run(&self, engine: &mut Engine) -> Result<Turn, EvalError> {
        let sampling = SamplingParams::greedy();
        let request = Request::new(self.prompt.clone(), sampling, self.new_tokens);
        // A turn reads its prompt, as the other side's does.
        Ok(timed(engine, Request { reuse_prefix: false, ..request })?.0)
    }

    /// Bytes of weights that a decoded token reads.
    pub fn weight_bytes(engine: &Engine) -> u64 {
        weight_bytes(engine)
    }

    /// Bytes that a decoded token reads, weights and the mean of cached keys and values.
    pub fn bytes_per_token(&self, engine: &Engine) -> f64 {
        // The k-th timed step attends to prompt + k tokens, k from 1 to new_tokens − 1.
        let cached = self.prompt.len() as f64 + self.new_tokens as f64 / 2.0;
        weight_bytes(engine) as f64 + cached * cache_bytes_per_token(engine)
    }
}

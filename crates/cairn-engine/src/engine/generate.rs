//! One request at a time, to its end.

use std::ops::ControlFlow;

use super::Engine;
use crate::error::GenerateError;
use crate::model::Model;
use crate::request::{Event, Finish, Output, PrefixEnd, PrefixOutcome, Request};
use crate::speculation::NUM_SPECULATIVE_TOKENS_MAX;

/// Events of one step of one request, at most: its admission, log-probabilities of its prompt, tokens,
/// and an ending.
const EVENTS_OF_ONE: usize = NUM_SPECULATIVE_TOKENS_MAX + 4;

impl<M: Model> Engine<M> {
    /// Runs one request to its end, handing each token to `on_token` as it comes; `Break` ends the
    /// output there.
    ///
    /// # Errors
    ///
    /// [`GenerateError::Busy`] while other requests run (use [`step`](Self::step) then),
    /// [`GenerateError::Request`] if it is refused, [`GenerateError::Sample`] if no token can be
    /// chosen.
    pub fn generate(
        &mut self,
        request: Request,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Output, GenerateError> {
        self.check_idle()?;
        let num_new = request.max_new_tokens;
        let num_scored = request.prompt_logprobs.map(|_| request.prompt.len());
        // Before there is room made for what may be out of all bounds.
        let id = self.add_request(request)?;
        let mut output = Output {
            tokens: Vec::with_capacity(num_new),
            logprobs: Vec::new(),
            prompt_logprobs: Vec::with_capacity(num_scored.unwrap_or(0)),
            prefix: PrefixOutcome { num_cached_tokens: 0, end: PrefixEnd::Cold },
            finish: Finish::Cancelled,
        };
        // Nothing comes before the first.
        output.prompt_logprobs.extend(num_scored.map(|_| None));
        let mut events = Vec::with_capacity(EVENTS_OF_ONE);
        loop {
            self.step(&mut events)?;
            for event in events.drain(..) {
                match event {
                    Event::Admitted { prefix, .. } => output.prefix = prefix,
                    Event::PromptLogprobs { logprobs, .. } => {
                        output.prompt_logprobs.extend(logprobs.into_iter().map(Some));
                    }
                    Event::Token { token, logprobs, .. } => {
                        output.tokens.push(token);
                        output.logprobs.extend(logprobs);
                        if on_token(token).is_break() {
                            self.cancel(id);
                            return Ok(output);
                        }
                    }
                    Event::Finished { finish, .. } => return Ok(Output { finish, ..output }),
                    Event::Failed { error, .. } => return Err(error.into()),
                }
            }
        }
    }
}

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
        let mut output = Output {
            tokens: Vec::with_capacity(request.max_new_tokens),
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            prefix: PrefixOutcome { num_cached_tokens: 0, end: PrefixEnd::Cold },
            finish: Finish::Cancelled,
        };
        if request.prompt_logprobs.is_some() {
            output.prompt_logprobs = Vec::with_capacity(request.prompt.len());
            output.prompt_logprobs.push(None);
        }
        let id = self.add_request(request)?;
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

//! What is written down of a request when it ends, however it does: one line of the log, its time and its lengths.

use std::sync::Arc;
use std::time::Instant;

use crate::metrics::Metrics;
use crate::reply::{End, Piece};

/// The account of a request that generates. It is closed when it is dropped.
#[derive(Debug)]
pub(crate) struct Account {
    number: u64,
    metrics: Arc<Metrics>,
    begin: Instant,
    num_prompt: usize,
    num_new: usize,
    num_choices: usize,
    /// Answers that have come to an end of their own.
    num_stopped: usize,
    num_cut: usize,
    error: Option<String>,
}

impl Account {
    /// The account of request `number` with `num_choices` answers, which came at `begin`.
    pub(crate) fn new(
        number: u64,
        metrics: Arc<Metrics>,
        begin: Instant,
        num_prompt: usize,
        num_choices: usize,
    ) -> Self {
        Self {
            number,
            metrics,
            begin,
            num_prompt,
            num_new: 0,
            num_choices,
            num_stopped: 0,
            num_cut: 0,
            error: None,
        }
    }

    /// Notes a piece of an answer.
    pub(crate) fn note(&mut self, piece: &Piece) {
        self.num_new += piece.num_tokens;
        match piece.end {
            None => {}
            Some(End::Length) => self.num_cut += 1,
            Some(End::Stop | End::StopString(_)) => self.num_stopped += 1,
        }
    }

    /// Notes that the request has failed.
    pub(crate) fn fail(&mut self, error: String) {
        self.error = Some(error);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let took = self.begin.elapsed();
        self.metrics.note_end(took, self.num_prompt, self.num_new);
        let num_ended = self.num_stopped + self.num_cut;
        let (outcome, error) = match &self.error {
            Some(error) => ("failed", Some(error)),
            None if num_ended < self.num_choices => ("the client left", None),
            None => ("answered", None),
        };
        tracing::info!(
            request = self.number,
            prompt_tokens = self.num_prompt,
            new_tokens = self.num_new,
            choices = self.num_choices,
            stopped = self.num_stopped,
            cut = self.num_cut,
            seconds = took.as_secs_f64(),
            error,
            "{outcome}",
        );
    }
}

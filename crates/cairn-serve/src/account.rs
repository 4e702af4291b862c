//! What is written down of a request when it ends, however it does: one line of the log, and its times and lengths.

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
    /// When each answer's last token came.
    last: Vec<Option<Instant>>,
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
            last: vec![None; num_choices],
            num_stopped: 0,
            num_cut: 0,
            error: None,
        }
    }

    /// Notes a piece of an answer.
    pub(crate) fn note(&mut self, choice: usize, piece: &Piece) {
        match piece.end {
            None => {}
            Some(End::Length) => self.num_cut += 1,
            Some(End::Stop | End::StopString(_)) => self.num_stopped += 1,
        }
        if piece.num_tokens == 0 {
            return;
        }
        self.num_new += piece.num_tokens;
        let now = Instant::now();
        match self.last[choice].replace(now) {
            None => self.metrics.note_first_token(now - self.begin),
            Some(last) => {
                // Tokens that came together share the time.
                let tokens = u32::try_from(piece.num_tokens).unwrap_or(u32::MAX);
                (0..tokens).for_each(|_| self.metrics.note_next_token((now - last) / tokens));
            }
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
        let outcome = match &self.error {
            Some(error) => error,
            None if num_ended < self.last.len() => "the client left",
            None => "answered",
        };
        tracing::info!(
            request = self.number,
            prompt_tokens = self.num_prompt,
            new_tokens = self.num_new,
            choices = self.last.len(),
            stopped = self.num_stopped,
            cut = self.num_cut,
            seconds = took.as_secs_f64(),
            "{outcome}",
        );
    }
}

//! A model that turns texts into vectors, on a thread of its own. It takes turns with the engines, a run each, so
//! a long list of texts holds nobody up for longer than a run.

use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use tokio::sync::oneshot;

use crate::driver::{DriverError, DriverThread, Turns};
use crate::error::ApiError;

/// Requests that wait for a model, at most.
const QUEUE_LENGTH: usize = 256;

/// How texts become vectors, and how many do together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbedForm {
    /// What every text begins with.
    pub prompt: String,
    /// Whether texts are put in lower case first.
    pub lower_case: bool,
    /// Numbers of a vector.
    pub width: usize,
    /// Tokens that the model knows.
    pub vocab_size: usize,
    /// Tokens of a run, at most; no text has more.
    pub max_run_tokens: usize,
    /// Texts of a run, at most.
    pub max_run_texts: usize,
}

/// What turns texts into vectors.
pub trait Embed: Send {
    /// The vectors of texts that make one run.
    ///
    /// # Errors
    ///
    /// Says why there are none; the request fails with it.
    fn embed(&mut self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, String>;
}

struct Ask {
    texts: Vec<Vec<u32>>,
    answer: oneshot::Sender<Result<Vec<Vec<f32>>, ApiError>>,
}

/// The way to a model that embeds. Its thread ends when this is gone and what was asked is done.
#[derive(Clone)]
pub(crate) struct Embedder {
    queue: SyncSender<Ask>,
    pub(crate) form: EmbedForm,
}

impl fmt::Debug for Embedder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedder").field("form", &self.form).finish_non_exhaustive()
    }
}

impl Embedder {
    /// Starts the thread.
    pub(crate) fn start(
        mut model: Box<dyn Embed>,
        form: EmbedForm,
        turns: Turns,
    ) -> Result<(Self, DriverThread), DriverError> {
        let (queue, asked) = sync_channel::<Ask>(QUEUE_LENGTH);
        let bounds = form.clone();
        let thread = DriverThread::spawn("embedder", move || {
            for Ask { texts, answer } in asked {
                let found = embed(model.as_mut(), &texts, &bounds, || {
                    (!answer.is_closed()).then(|| turns.take())
                });
                // Who asked may have left.
                let _ = answer.send(found);
            }
            Ok(())
        })?;
        Ok((Self { queue, form }, thread))
    }

    /// The vectors of texts.
    pub(crate) async fn embed(&self, texts: Vec<Vec<u32>>) -> Result<Vec<Vec<f32>>, ApiError> {
        let (answer, answered) = oneshot::channel();
        match self.queue.try_send(Ask { texts, answer }) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(ApiError::busy(QUEUE_LENGTH)),
            Err(TrySendError::Disconnected(_)) => return Err(ApiError::engine_gone()),
        }
        answered.await.map_err(|_| ApiError::engine_gone())?
    }
}

/// Embeds run by run, each in a turn of its own, as long as `turn` gives one.
fn embed<T>(
    model: &mut dyn Embed,
    texts: &[Vec<u32>],
    bounds: &EmbedForm,
    turn: impl Fn() -> Option<T>,
) -> Result<Vec<Vec<f32>>, ApiError> {
    let mut vectors = Vec::with_capacity(texts.len());
    for run in runs(texts, bounds) {
        let Some(_turn) = turn() else { break };
        vectors.extend(model.embed(&texts[run]).map_err(ApiError::failed)?);
    }
    Ok(vectors)
}

/// Texts that are run together: which ones.
fn runs(texts: &[Vec<u32>], bounds: &EmbedForm) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut begin, mut num_tokens) = (0, 0);
    for (index, text) in texts.iter().enumerate() {
        let is_full = index - begin == bounds.max_run_texts
            || bounds.max_run_tokens < num_tokens + text.len();
        if begin < index && is_full {
            runs.push(begin..index);
            (begin, num_tokens) = (index, 0);
        }
        num_tokens += text.len();
    }
    if begin < texts.len() {
        runs.push(begin..texts.len());
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text's vector is its length.
    struct Lengths(Vec<usize>);

    impl Embed for Lengths {
        fn embed(&mut self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, String> {
            self.0.push(texts.len());
            Ok(texts.iter().map(|text| vec![text.len() as f32]).collect())
        }
    }

    fn form() -> EmbedForm {
        EmbedForm {
            prompt: String::new(),
            lower_case: false,
            width: 1,
            vocab_size: 9,
            max_run_tokens: 10,
            max_run_texts: 3,
        }
    }

    #[test]
    fn texts_run_together_as_far_as_they_fit() {
        let texts = |lengths: &[usize]| -> Vec<Vec<u32>> {
            lengths.iter().map(|&length| vec![0; length]).collect()
        };
        let lengths = [4, 6, 1, 1, 1, 1, 10, 2];
        assert_eq!(runs(&texts(&lengths), &form()), [0..2, 2..5, 5..6, 6..7, 7..8]);
        assert!(runs(&[], &form()).is_empty());
        let mut model = Lengths(Vec::new());
        let vectors = embed(&mut model, &texts(&lengths), &form(), || Some(())).unwrap();
        let expected: Vec<Vec<f32>> = lengths.iter().map(|&length| vec![length as f32]).collect();
        assert_eq!((vectors, model.0), (expected, vec![2, 3, 1, 1, 1]));
        // Nobody waits any more.
        assert!(
            embed(&mut Lengths(Vec::new()), &texts(&[4]), &form(), || None::<()>)
                .unwrap()
                .is_empty()
        );
    }
}

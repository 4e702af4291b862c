//! Who guesses: the text, the model's first blocks, or a second model.

use cairn_program::RunError;

use super::{DraftMethod, DraftModel, lookup};
use crate::model::{Depth, Model, Piece};
use crate::request::RequestId;
use crate::sequence::Sequence;

/// Who guesses.
#[derive(Debug)]
pub(crate) enum Drafter<M> {
    /// The text.
    Ngram,
    /// The model's first blocks.
    Depth,
    /// A second model; nobody until it is attached.
    Model(Option<Box<DraftModel<M>>>),
}

/// For whom, and how many at most.
/// The sequence's table has room for them.
pub(crate) struct DraftFor<'a> {
    pub(crate) sequence: &'a mut Sequence,
    pub(crate) count: usize,
}

impl<M: Model> Drafter<M> {
    pub(crate) fn new(method: DraftMethod) -> Self {
        match method {
            DraftMethod::Ngram => Self::Ngram,
            DraftMethod::Depth(_) => Self::Depth,
            DraftMethod::Model => Self::Model(None),
        }
    }

    /// Brings a second model up to date with a sequence, which can be a whole prompt: work that one
    /// guess should not be charged with.
    pub(crate) fn catch_up(&mut self, sequence: &Sequence) -> Result<(), RunError> {
        match self {
            Self::Model(Some(model)) => model.catch_up(sequence),
            Self::Model(None) | Self::Ngram | Self::Depth => Ok(()),
        }
    }

    /// Appends guesses to a sequence, as drafts.
    pub(crate) fn draft(
        &mut self,
        whole: &mut M,
        DraftFor { sequence, count }: DraftFor<'_>,
    ) -> Result<(), RunError> {
        if count == 0 {
            return Ok(());
        }
        match self {
            Self::Ngram => {
                sequence.num_drafts = lookup::extend(&mut sequence.tokens, count);
                Ok(())
            }
            Self::Depth => draft_by_depth(whole, sequence, count),
            Self::Model(Some(model)) => model.draft(sequence, count),
            Self::Model(None) => Ok(()),
        }
    }

    /// Keeps what others lend to a second model.
    pub(crate) fn keep(&mut self) -> Result<(), RunError> {
        match self {
            Self::Model(Some(model)) => model.keep(),
            Self::Model(None) | Self::Ngram | Self::Depth => Ok(()),
        }
    }

    /// Says that a sequence has ended, or gave way.
    pub(crate) fn forget(&mut self, id: RequestId) {
        if let Self::Model(Some(model)) = self {
            model.forget(id);
        }
    }
}

/// The first blocks write the keys and values that the whole model writes there, so the sequence's
/// own pages serve; the check writes the same numbers again.
fn draft_by_depth<M: Model>(
    model: &mut M,
    sequence: &mut Sequence,
    count: usize,
) -> Result<(), RunError> {
    let cached = sequence.num_computed;
    debug_assert_eq!(cached + 1, sequence.tokens.len(), "a sequence that decodes");
    let mut state = sequence.mirostat;
    for at in cached..cached + count {
        let blocks = sequence.table.blocks();
        let piece = Piece { tokens: &sequence.tokens[at..=at], cached: at, blocks, num_logits: 1 };
        model.run(Depth::Shallow, [piece].into_iter())?;
        // Guesses are drawn as the model's choices are, so that equal distributions choose alike.
        let context = sequence.context_with_drafts();
        let drawn = model.choose(0, context, &sequence.request.sampling, &mut state);
        let Ok(token) = drawn else { break };
        sequence.tokens.push(token);
        sequence.num_drafts += 1;
    }
    Ok(())
}

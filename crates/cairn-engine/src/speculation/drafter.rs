//! Who guesses: the text, the model's first blocks, or a second model.

use cairn_program::RunError;

use super::{DraftMethod, DraftModel, lookup};
use crate::block_pool::BlockPool;
use crate::executor::{Depth, Executor, Piece};
use crate::sampler::Sampler;
use crate::sequence::Sequence;

/// Who guesses.
#[derive(Debug)]
pub(crate) enum Drafter {
    /// The text.
    Ngram,
    /// The model's first blocks.
    Depth,
    /// A second model; nobody until it is attached.
    Model(Option<Box<DraftModel>>),
}

/// What of the engine a drafter may use.
pub(crate) struct Drafting<'a> {
    pub(crate) executor: &'a mut Executor,
    pub(crate) pool: &'a mut BlockPool,
    pub(crate) sampler: &'a mut Sampler,
}

/// For whom, and how many at most.
pub(crate) struct DraftFor<'a> {
    pub(crate) sequence: &'a mut Sequence,
    pub(crate) count: usize,
}

impl Drafter {
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
        drafting: Drafting<'_>,
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
            Self::Depth => draft_by_depth(drafting, sequence, count),
            Self::Model(Some(model)) => model.draft(sequence, count),
            Self::Model(None) => Ok(()),
        }
    }

    /// Says that a sequence is done.
    pub(crate) fn forget(&mut self, sequence: &Sequence) {
        if let Self::Model(Some(model)) = self {
            model.forget(sequence.id);
        }
    }
}

/// The first blocks write the keys and values that the whole model writes there, so the sequence's
/// own pages serve; the check writes the same numbers again.
fn draft_by_depth(
    drafting: Drafting<'_>,
    sequence: &mut Sequence,
    count: usize,
) -> Result<(), RunError> {
    let Drafting { executor, pool, sampler } = drafting;
    let cached = sequence.table.num_tokens();
    debug_assert_eq!(cached + 1, sequence.tokens.len(), "a sequence that decodes");
    for guess in 0..count {
        let copy = sequence.table.append(pool, 1);
        let copy = copy.expect("blocks for the whole context were reserved");
        assert_eq!(copy, None, "sequences of requests share no blocks yet");
        let at = cached + guess;
        let blocks = sequence.table.blocks();
        let piece = Piece { tokens: &sequence.tokens[at..=at], cached: at, blocks, num_logits: 1 };
        executor.run(Depth::Shallow, [piece].into_iter())?;
        // Guesses are drawn as the model's choices are, so that equal distributions choose alike.
        let context = sequence.context_with_drafts();
        let drawn = sampler.sample(executor.logits(0), context, &sequence.request.sampling);
        let Ok(token) = drawn else { break };
        sequence.tokens.push(token);
        sequence.num_drafts += 1;
    }
    sequence.table.truncate(pool, cached);
    Ok(())
}

//! A second model that guesses what the first one will choose.
//!
//! It has a session, a cache and block tables of its own. A *slot* holds what it has read of one
//! sequence; a slot whose sequence has ended serves the next one that begins alike, so a conversation
//! is not read again at every turn.

use cairn_program::RunError;

use crate::block_pool::BlockPool;
use crate::block_table::BlockTable;
use crate::model::{Depth, Model, Piece};
use crate::options::EngineOptions;
use crate::request::RequestId;
use crate::sequence::{Sequence, num_common};
use crate::speculation::NUM_SPECULATIVE_TOKENS_MAX;

/// Tokens that may be unread when guessing begins, if a run holds them: they are read with the first
/// guess.
const LAG_MAX: usize = NUM_SPECULATIVE_TOKENS_MAX + 1;

/// What the draft model has read of one sequence.
#[derive(Debug)]
struct DraftSlot {
    owner: Option<RequestId>,
    /// As many tokens as the table holds.
    tokens: Vec<u32>,
    table: BlockTable,
}

/// A second model with its cache.
#[derive(Debug)]
pub(crate) struct DraftModel<M> {
    model: M,
    pool: BlockPool,
    options: EngineOptions,
    slots: Vec<DraftSlot>,
}

impl<M: Model> DraftModel<M> {
    /// Keeps what others lend to the model.
    pub(super) fn keep(&mut self) -> Result<(), RunError> {
        self.model.keep()
    }

    pub(crate) fn new(model: M, options: EngineOptions) -> Self {
        let slot = |_| DraftSlot {
            owner: None,
            tokens: Vec::with_capacity(options.max_context),
            table: BlockTable::with_capacity(options.max_context),
        };
        let slots = (0..options.max_num_seqs).map(slot).collect();
        // As many as all slots need at their longest, or more: that has been checked.
        Self { model, pool: BlockPool::new(options.num_blocks), options, slots }
    }

    /// The slot of a sequence, or the free one that begins most like it.
    fn slot(&mut self, sequence: &Sequence) -> Option<usize> {
        if let Some(own) = self.slots.iter().position(|slot| slot.owner == Some(sequence.id)) {
            return Some(own);
        }
        let free = self.slots.iter().enumerate().filter(|(_, slot)| slot.owner.is_none());
        let best = free.max_by_key(|(_, slot)| num_common(&slot.tokens, &sequence.tokens))?.0;
        self.slots[best].owner = Some(sequence.id);
        Some(best)
    }

    /// Reads a sequence except for its last token, if much of it has not been read: a prompt.
    pub(crate) fn catch_up(&mut self, sequence: &Sequence) -> Result<(), RunError> {
        let Some(index) = self.slot(sequence) else { return Ok(()) };
        self.roll_back(index, sequence);
        let Self { model, pool, options, slots } = self;
        let DraftSlot { tokens, table, .. } = &mut slots[index];
        let lag_max = LAG_MAX.min(options.max_num_batched_tokens);
        if sequence.tokens.len() <= tokens.len() + lag_max {
            return Ok(());
        }
        let end = (sequence.tokens.len() - 1).min(options.max_context);
        for chunk in sequence.tokens[tokens.len()..end].chunks(options.max_num_batched_tokens) {
            let cached = tokens.len();
            append(table, pool, chunk.len());
            tokens.extend_from_slice(chunk);
            let piece = Piece { tokens: chunk, cached, blocks: table.blocks(), num_logits: 0 };
            model.run(Depth::Whole, [piece].into_iter())?;
        }
        Ok(())
    }

    /// Forgets what the sequence has become otherwise.
    fn roll_back(&mut self, index: usize, sequence: &Sequence) {
        let DraftSlot { tokens, table, .. } = &mut self.slots[index];
        let common = num_common(tokens, &sequence.tokens[..sequence.tokens.len() - 1]);
        tokens.truncate(common);
        table.truncate(&mut self.pool, common);
    }

    /// Appends up to `count` guesses to a sequence.
    pub(crate) fn draft(&mut self, sequence: &mut Sequence, count: usize) -> Result<(), RunError> {
        self.catch_up(sequence)?;
        let Some(index) = self.slot(sequence) else { return Ok(()) };
        let Self { model, pool, options, slots } = self;
        let DraftSlot { tokens, table, .. } = &mut slots[index];
        let mut state = sequence.mirostat;
        for _ in 0..count {
            let cached = tokens.len();
            // What was accepted since the last time is read with the last token.
            let unread = &sequence.tokens[cached..];
            if options.max_context < cached + unread.len() {
                break;
            }
            append(table, pool, unread.len());
            let piece = Piece { tokens: unread, cached, blocks: table.blocks(), num_logits: 1 };
            model.run(Depth::Whole, [piece].into_iter())?;
            tokens.extend_from_slice(unread);
            let context = sequence.context_with_drafts();
            let drawn = model.choose(0, context, &sequence.request.sampling, &mut state);
            // What this model cannot say is no failure of the request.
            let Ok(token) = drawn else { break };
            sequence.tokens.push(token);
            sequence.num_drafts += 1;
        }
        Ok(())
    }

    /// Gives a slot free, with what was read.
    pub(crate) fn forget(&mut self, id: RequestId) {
        self.slots
            .iter_mut()
            .filter(|slot| slot.owner == Some(id))
            .for_each(|slot| slot.owner = None);
    }
}

fn append(table: &mut BlockTable, pool: &mut BlockPool, tokens: usize) {
    let copy = table.append(pool, tokens).expect("every slot has blocks for the whole context");
    assert_eq!(copy, None, "slots share no blocks");
}

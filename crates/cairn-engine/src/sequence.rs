//! A request on its way: its tokens, its blocks, and which of its tokens are only guessed yet.
//!
//! **Invariant:** between steps no token is guessed, and the table holds all tokens but the last, or
//! fewer while the prompt is read.

use crate::block_pool::{BlockPool, blocks_for};
use crate::block_table::BlockTable;
use crate::request::{Finish, Request, RequestId};
use crate::sampler::SampleContext;

/// A request that has a place in the cache or waits for one.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) request: Request,
    /// Prompt and output, then drafts; never reallocated.
    pub(crate) tokens: Vec<u32>,
    /// How many of the last tokens are drafts: guessed, not chosen.
    pub(crate) num_drafts: usize,
    /// How many drafts are worth trying next: more after all were right, fewer after one was not.
    pub(crate) draft_length: usize,
    /// Blocks of the tokens that have been run.
    pub(crate) table: BlockTable,
}

impl Sequence {
    pub(crate) fn new(id: RequestId, request: Request, table: Option<BlockTable>) -> Self {
        let context = request.prompt.len() + request.max_new_tokens;
        let mut tokens = Vec::with_capacity(context);
        tokens.extend_from_slice(&request.prompt);
        let mut table = table.unwrap_or_default();
        table.reserve(context);
        Self { id, request, tokens, num_drafts: 0, draft_length: usize::MAX, table }
    }

    /// Blocks at its longest; the last token is chosen but never run.
    pub(crate) fn num_blocks_max(&self) -> usize {
        blocks_for(self.request.prompt.len() + self.request.max_new_tokens - 1)
    }

    /// Tokens that have not been run.
    pub(crate) fn num_pending(&self) -> usize {
        self.tokens.len() - self.table.num_tokens()
    }

    /// Tokens that were chosen.
    pub(crate) fn num_new(&self) -> usize {
        self.tokens.len() - self.num_drafts - self.request.prompt.len()
    }

    /// Drafts that may still become output: the last token is chosen, never run.
    pub(crate) fn room_for_drafts(&self) -> usize {
        (self.request.max_new_tokens - self.num_new()).saturating_sub(1)
    }

    /// What the next token is chosen by: everything but the drafts.
    pub(crate) fn context(&self) -> SampleContext<'_> {
        let tokens = &self.tokens[..self.tokens.len() - self.num_drafts];
        SampleContext { tokens, prompt_len: self.request.prompt.len(), stream: 0 }
    }

    /// What the next draft is guessed by: everything.
    pub(crate) fn context_with_drafts(&self) -> SampleContext<'_> {
        SampleContext { tokens: &self.tokens, prompt_len: self.request.prompt.len(), stream: 0 }
    }

    /// Appends a chosen token. Whether the first draft was this token; otherwise all drafts are
    /// gone.
    pub(crate) fn push(&mut self, token: u32) -> bool {
        let chosen = self.tokens.len() - self.num_drafts;
        if self.num_drafts != 0 && self.tokens[chosen] == token {
            self.num_drafts -= 1;
            return true;
        }
        self.drop_drafts();
        self.tokens.push(token);
        false
    }

    /// Guesses more after all were right, fewer after one was not.
    pub(crate) fn adapt_draft_length(&mut self, all_right: bool, most: usize) {
        let length = self.draft_length.min(most);
        self.draft_length = if all_right { length + 2 } else { length.max(2) - 1 }.min(most);
    }

    /// Forgets what was guessed.
    pub(crate) fn drop_drafts(&mut self) {
        self.tokens.truncate(self.tokens.len() - self.num_drafts);
        self.num_drafts = 0;
    }

    /// Forgets keys and values of all but the chosen tokens before the last.
    pub(crate) fn roll_back(&mut self, pool: &mut BlockPool) {
        self.drop_drafts();
        self.table.truncate(pool, self.tokens.len() - 1);
    }

    /// Why the output is complete, if it is.
    pub(crate) fn finish(&self) -> Option<Finish> {
        let last = self.context().tokens.last().filter(|_| 0 < self.num_new())?;
        if self.request.stop_tokens.contains(last) {
            return Some(Finish::Stop);
        }
        (self.num_new() == self.request.max_new_tokens).then_some(Finish::Length)
    }
}

/// A sequence that has ended, with what was computed for it.
#[derive(Debug)]
pub(crate) struct Kept {
    /// As many tokens as the table holds.
    pub(crate) tokens: Vec<u32>,
    pub(crate) table: BlockTable,
}

impl Kept {
    /// Tokens of `prompt` whose keys are there. The last one is run in any case: its logits are
    /// what the next token is chosen by.
    pub(crate) fn num_common(&self, prompt: &[u32]) -> usize {
        num_common(&self.tokens, prompt).min(prompt.len().saturating_sub(1))
    }
}

/// Length of the common beginning.
pub(crate) fn num_common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

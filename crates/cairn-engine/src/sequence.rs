//! A request on its way: its tokens, its blocks, and which of its tokens are only guessed yet.
//!
//! **Invariant:** between steps no token is guessed, and the table holds all tokens but the last, or
//! fewer while they are read.
//! **Invariant:** the first `num_remembered` blocks are nodes of the pool's tree, one below the other;
//! none of them is written again.

use crate::block_pool::{BLOCK_TOKENS, BlockPool, blocks_for};
use crate::block_table::BlockTable;
use crate::mirostat::MirostatState;
use crate::prefix_tree::{Grown, PathEnd};
use crate::request::{Finish, PrefixEnd, PrefixOutcome, Request, RequestId};
use crate::sampler::{SampleContext, SampleError};

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
    /// Blocks of the tokens that have been run, and in a step of those that are about to be.
    pub(crate) table: BlockTable,
    /// Tokens whose keys and values are there.
    pub(crate) num_computed: usize,
    /// Tokens after which the log-probability of the next one of the prompt has been reported.
    pub(crate) num_scored: usize,
    /// Why no more of the prompt was in the cache when it was first looked for.
    pub(crate) prefix_end: Option<PrefixEnd>,
    /// Whether the request has been announced to its caller.
    is_announced: bool,
    /// Where the remembered blocks end in the tree; `None` if no more are to be remembered.
    end: Option<PathEnd>,
    num_remembered: usize,
    /// How surprising the next token may be, where that is steered.
    pub(crate) mirostat: MirostatState,
    /// Which tokens may come next, where the request says what its output follows.
    allowed: Vec<u32>,
}

impl Sequence {
    /// A request that arrives; `remembers` says whether its blocks may serve others.
    pub(crate) fn new(id: RequestId, request: Request, remembers: bool) -> Self {
        let context = request.prompt.len() + request.max_new_tokens;
        let mut tokens = Vec::with_capacity(context);
        tokens.extend_from_slice(&request.prompt);
        let end = remembers.then(|| PathEnd::root(request.cache_salt));
        Self {
            id,
            request,
            tokens,
            num_drafts: 0,
            draft_length: usize::MAX,
            table: BlockTable::with_capacity(context),
            num_computed: 0,
            num_scored: 0,
            prefix_end: None,
            is_announced: false,
            end,
            num_remembered: 0,
            mirostat: MirostatState::default(),
            allowed: Vec::new(),
        }
    }

    /// Who goes first: the smaller priority, then who came first.
    pub(crate) fn rank(&self) -> (i32, RequestId) {
        (self.request.priority, self.id)
    }

    /// Blocks at its longest; the last token is chosen but never run.
    pub(crate) fn num_blocks_max(&self) -> usize {
        blocks_for(self.request.prompt.len() + self.request.max_new_tokens.max(1) - 1)
    }

    /// What is in the cache when the first of its tokens are run; only the first time.
    pub(crate) fn announce(&mut self) -> Option<PrefixOutcome> {
        if std::mem::replace(&mut self.is_announced, true) {
            return None;
        }
        let num_cached_tokens = self.num_computed;
        let end = match self.prefix_end {
            Some(end) if num_cached_tokens < self.num_skippable() => end,
            // A prompt whose log-probabilities are asked for skips nothing, and that is why.
            Some(
                end @ (PrefixEnd::PromptLogprobs | PrefixEnd::NotAsked | PrefixEnd::TurnedOff),
            ) => end,
            Some(_) | None => PrefixEnd::Whole,
        };
        Some(PrefixOutcome { num_cached_tokens, end })
    }

    /// Tokens that have not been run.
    pub(crate) fn num_pending(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// Blocks that the tokens so far will need beyond those it has.
    pub(crate) fn num_blocks_pending(&self) -> usize {
        blocks_for(self.tokens.len()) - self.table.blocks().len()
    }

    /// Whether log-probabilities of the prompt are still to be reported.
    pub(crate) fn has_unscored(&self) -> bool {
        self.request.prompt_logprobs.is_some() && self.num_scored + 1 < self.request.prompt.len()
    }

    /// Tokens that need not be run if their keys are there already. The last is run in any case: what
    /// comes after it is asked; and so is one after which a log-probability is asked.
    pub(crate) fn num_skippable(&self) -> usize {
        if self.has_unscored() { self.num_scored } else { self.tokens.len() - 1 }
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
        SampleContext {
            tokens,
            prompt_len: self.request.prompt.len(),
            stream: self.request.choice,
            allowed: self.request.constraint.as_ref().map(|_| self.allowed.as_slice()),
        }
    }

    /// What the next draft is guessed by: everything.
    pub(crate) fn context_with_drafts(&self) -> SampleContext<'_> {
        SampleContext {
            tokens: &self.tokens,
            prompt_len: self.request.prompt.len(),
            stream: self.request.choice,
            allowed: None,
        }
    }

    /// Asks what the output follows which tokens may come next.
    pub(crate) fn allow(&mut self, vocab_size: usize) -> Result<(), SampleError> {
        let Some(constraint) = &mut self.request.constraint else { return Ok(()) };
        self.allowed.resize(vocab_size.div_ceil(32), 0);
        constraint.allow(&mut self.allowed).map_err(SampleError::Constraint)
    }

    /// Tells what the output follows that a token was chosen. One that ends the output is not part of it.
    pub(crate) fn accept(&mut self, token: u32) -> Result<(), SampleError> {
        match &mut self.request.constraint {
            Some(constraint) if !self.request.stop_tokens.contains(&token) => {
                constraint.accept(token).map_err(SampleError::Constraint)
            }
            _ => Ok(()),
        }
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

    /// Where its remembered blocks end in the tree and the block of tokens that comes next, if another
    /// sequence may fill that block for it.
    pub(crate) fn next_block(&self) -> Option<(PathEnd, &[u32])> {
        let at = self.num_remembered * BLOCK_TOKENS;
        let whole = at == self.num_computed && at + BLOCK_TOKENS <= self.num_skippable();
        let end = self.end.filter(|_| whole && self.request.reuse_prefix)?;
        Some((end, &self.tokens[at..at + BLOCK_TOKENS]))
    }

    /// Where its remembered blocks end in the tree and the block of tokens that it fills next.
    fn filling(&self) -> Option<(PathEnd, &[u32])> {
        let at = self.num_remembered * BLOCK_TOKENS;
        let tokens = self.tokens.get(at..at + BLOCK_TOKENS);
        self.end.zip(tokens)
    }

    /// Whether what this one is about to read is being read by another, and not in the small steps of a
    /// prompt that is scored.
    pub(crate) fn waits_for(&self, other: &Self) -> bool {
        let next = self.next_block();
        next.is_some() && !other.has_unscored() && next == other.filling()
    }

    /// Goes on with blocks of the pool that hold what comes next.
    pub(crate) fn follow(&mut self, pool: &mut BlockPool) {
        while let Some((end, tokens)) = self.next_block() {
            let Some((block, end)) = pool.prefixes().child(end, tokens) else { return };
            self.table.attach_full(pool, block);
            self.num_computed = self.table.num_tokens();
            self.num_remembered += 1;
            self.end = Some(end);
        }
    }

    /// Notes that all tokens have been run for which the table has room, but for guesses that were
    /// wrong.
    pub(crate) fn note_run(&mut self, pool: &mut BlockPool, has_chosen: bool) {
        self.drop_drafts();
        // The token that was chosen last has not been run.
        let known = self.tokens.len() - usize::from(has_chosen);
        self.table.truncate(pool, known);
        self.num_computed = self.table.num_tokens();
        self.remember_full(pool);
    }

    /// Lets others find the blocks that are full.
    fn remember_full(&mut self, pool: &mut BlockPool) {
        for index in self.num_remembered..self.num_computed / BLOCK_TOKENS {
            let Some(end) = self.end else { return };
            let tokens = &self.tokens[index * BLOCK_TOKENS..][..BLOCK_TOKENS];
            let own = self.table.blocks()[index];
            self.end = match pool.remember(end, tokens, own) {
                Grown::New(end) => Some(end),
                // Somebody has computed the same meanwhile; one block of the two is enough.
                Grown::Known(block, end) => {
                    self.table.replace(pool, index, block);
                    Some(end)
                }
                Grown::Collision => None,
            };
            self.num_remembered += usize::from(self.end.is_some());
        }
    }

    /// Gives all blocks back. What has been computed can be found as long as nobody needs the room.
    pub(crate) fn release(&mut self, pool: &mut BlockPool) {
        self.drop_drafts();
        self.table.truncate(pool, self.num_computed);
        self.remember_full(pool);
        let full = self.num_computed / BLOCK_TOKENS;
        let tail = &self.tokens[full * BLOCK_TOKENS..self.num_computed];
        if let (Some(end), false) = (self.end, tail.is_empty()) {
            pool.remember_tail(end, tail, self.table.blocks()[full]);
        }
        self.table.release(pool);
        self.num_computed = 0;
        self.num_remembered = 0;
        self.end = self.end.map(|_| PathEnd::root(self.request.cache_salt));
    }

    /// Why no more than nothing was found of the prompt, if nothing may be taken.
    pub(crate) fn refuses_prefix(&self) -> Option<PrefixEnd> {
        if self.end.is_none() {
            Some(PrefixEnd::TurnedOff)
        } else if !self.request.reuse_prefix {
            Some(PrefixEnd::NotAsked)
        } else if self.num_skippable() == 0 && self.has_unscored() {
            Some(PrefixEnd::PromptLogprobs)
        } else {
            None
        }
    }

    /// Why the output is complete, if it is; to be asked when all tokens have been run.
    pub(crate) fn finish(&self) -> Option<Finish> {
        if self.request.max_new_tokens == 0 {
            return Some(Finish::Length);
        }
        let last = self.context().tokens.last().filter(|_| 0 < self.num_new())?;
        if self.request.stop_tokens.contains(last) {
            return Some(Finish::Stop);
        }
        if self.request.constraint.as_ref().is_some_and(|constraint| constraint.is_complete()) {
            return Some(Finish::Stop);
        }
        (self.num_new() == self.request.max_new_tokens).then_some(Finish::Length)
    }
}

/// Length of the common beginning.
pub(crate) fn num_common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

//! The scheduler: who is admitted, how many tokens of whom a step runs, who gives way, and which blocks
//! are whose.
//!
//! It knows requests, tokens and blocks, and never sees a logit, a clock or a cache: it says what is to
//! be run and copied, and is told what was chosen.
//!
//! Who goes first is settled by priority, then by arrival; `running` and `waiting` are in that order.
//! A step
//!
//! 1. admits from the front of `waiting` while there is a place and there are blocks for the tokens
//!    that the request has now, beside what those that run still need for theirs and a block for each
//!    to grow by. Nobody overtakes. If the first one that waits has a smaller priority than the last
//!    that run, these give way, the last one first, as many as it takes; none does where all of them
//!    would not be enough;
//! 2. runs a token of each sequence that decodes: those are awaited;
//! 3. divides what the step still holds between prompts. One half goes to them in order, the other
//!    first to those that are nearest to their end. So a short prompt does not wait for all of a long
//!    one, the long one still gets on at half speed at least, and of equal prompts the first is done
//!    first. Where two are about to read the same block, the later one waits for it;
//! 4. takes blocks as tokens need them. When there are none, the last that runs gives way: its blocks
//!    go back, where they can be found as long as nobody needs them, and it waits again, in its place,
//!    with its tokens so far. What they are computed from is the same the second time, and so is what
//!    follows.
//!
//! **Invariant:** the first of all requests gets on in every step, so every request ends, unless smaller
//! priorities than its own keep coming without an end.
//! **Invariant:** only the last that runs gives way, so the indices of the others stay.
//! **Invariant:** what a step writes is in blocks of one owner that nobody else can find.

use std::collections::VecDeque;

use crate::block_pool::{BLOCK_TOKENS, BlockPool};
use crate::block_table::BlockCopy;
use crate::error::RequestError;
use crate::options::EngineOptions;
use crate::prefix_tree::PathEnd;
use crate::request::{PrefixEnd, PrefixOutcome, Request, RequestId};
use crate::sequence::Sequence;

/// A running sequence's part in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// Index in `running`.
    pub(crate) sequence: usize,
    pub(crate) num_tokens: usize,
    /// After how many of its last tokens something is asked.
    pub(crate) num_logits: usize,
    /// Of these, after how many of the first the log-probability of the prompt's next token.
    pub(crate) num_scored: usize,
    /// Whether a token is chosen after the others: all tokens of the sequence are run.
    pub(crate) chooses: bool,
}

impl Share {
    /// Whether this is one token, after which the next is chosen.
    pub(crate) fn decodes(&self) -> bool {
        self.chooses && self.num_tokens == 1
    }
}

/// A prompt that is to be read further, or a sequence that gave way.
#[derive(Clone, Copy, Debug)]
struct Reading {
    /// Index in `running`.
    sequence: usize,
    priority: i32,
    /// Tokens that it could run.
    wanted: usize,
    /// How many of these take no row of logits but its own.
    num_rowless: usize,
    allotted: usize,
}

impl Reading {
    /// Allots what there are tokens and rows for.
    fn allot(&mut self, num_tokens: &mut usize, num_rows: &mut usize) {
        let rowless = self.num_rowless.max(self.allotted);
        let most = self.wanted.min(self.allotted + *num_tokens);
        let allotted = most.min(rowless.saturating_add(*num_rows));
        *num_tokens -= allotted - self.allotted;
        *num_rows -= allotted.saturating_sub(rowless);
        self.allotted = allotted;
    }
}

/// What is there of the tokens of a sequence that waits; the blocks are in `Scheduler::path`.
#[derive(Clone, Copy, Debug)]
struct Found {
    /// A block to copy, and how many of its tokens are wanted.
    tail: Option<(u32, usize)>,
    why: PrefixEnd,
}

/// Requests in order, and the blocks they have.
#[derive(Debug)]
pub(crate) struct Scheduler {
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    max_num_logits: usize,
    max_num_waiting: usize,
    enable_prefix_caching: bool,
    pub(crate) pool: BlockPool,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    next_id: u64,
    /// The step, in the order of its rows.
    shares: Vec<Share>,
    /// Blocks to copy before it, in order.
    copies: Vec<BlockCopy>,
    /// Who runs for the first time.
    admitted: Vec<(RequestId, PrefixOutcome)>,
    /// Who gave way.
    preempted: Vec<RequestId>,
    /// What the step has room for beyond its shares.
    num_tokens_left: usize,
    /// Rows that no sequence has as its own.
    num_logits_left: usize,
    /// The blocks of `find_prefix`.
    path: Vec<u32>,
    /// By block, how many owners would give way; zero but in `has_place`.
    num_leaving: Vec<u32>,
    readings: Vec<Reading>,
}

impl Scheduler {
    pub(crate) fn new(options: &EngineOptions) -> Self {
        let seqs = options.max_num_seqs;
        Self {
            max_num_seqs: seqs,
            max_num_batched_tokens: options.max_num_batched_tokens,
            max_num_logits: options.max_num_logits(),
            max_num_waiting: options.max_num_waiting,
            enable_prefix_caching: options.enable_prefix_caching,
            pool: BlockPool::new(options.num_blocks),
            waiting: VecDeque::new(),
            running: Vec::with_capacity(seqs),
            next_id: 0,
            shares: Vec::with_capacity(seqs),
            copies: Vec::with_capacity(seqs),
            admitted: Vec::with_capacity(seqs),
            preempted: Vec::with_capacity(seqs),
            num_tokens_left: 0,
            num_logits_left: 0,
            path: Vec::with_capacity(crate::blocks_for(options.max_context)),
            num_leaving: vec![0; options.num_blocks],
            readings: Vec::with_capacity(seqs),
        }
    }

    pub(crate) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn num_running(&self) -> usize {
        self.running.len()
    }

    pub(crate) fn shares(&self) -> &[Share] {
        &self.shares
    }

    pub(crate) fn copies(&self) -> &[BlockCopy] {
        &self.copies
    }

    pub(crate) fn admitted(&self) -> &[(RequestId, PrefixOutcome)] {
        &self.admitted
    }

    pub(crate) fn preempted(&self) -> &[RequestId] {
        &self.preempted
    }

    /// A running sequence, by the index of a share.
    pub(crate) fn sequence(&self, index: usize) -> &Sequence {
        &self.running[index]
    }

    /// As [`sequence`](Self::sequence), to append to its tokens.
    pub(crate) fn sequence_mut(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    /// Queues a request that has been checked.
    pub(crate) fn add(&mut self, request: Request) -> Result<RequestId, RequestError> {
        if self.max_num_waiting <= self.waiting.len() {
            return Err(RequestError::QueueFull { limit: self.max_num_waiting });
        }
        self.add_further(request)
    }

    /// As [`add`](Self::add), however many wait.
    pub(crate) fn add_further(&mut self, request: Request) -> Result<RequestId, RequestError> {
        let id = RequestId(self.next_id);
        let sequence = Sequence::new(id, request, self.enable_prefix_caching);
        let (needed, num_blocks) = (sequence.num_blocks_max(), self.pool.num_blocks());
        if num_blocks < needed {
            return Err(RequestError::Blocks { needed, num_blocks });
        }
        self.next_id += 1;
        self.queue(sequence);
        Ok(id)
    }

    fn queue(&mut self, sequence: Sequence) {
        let place = self.waiting.partition_point(|other| other.rank() < sequence.rank());
        self.waiting.insert(place, sequence);
    }

    /// Drops a request and takes its blocks; false if there is none of this id any more.
    pub(crate) fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(index) = self.waiting.iter().position(|sequence| sequence.id == id) {
            self.waiting.remove(index);
            return true;
        }
        let index = self.running.iter().position(|sequence| sequence.id == id);
        index.map(|index| self.remove(index)).is_some()
    }

    /// Drops a running sequence and takes its blocks. Indices after it move.
    pub(crate) fn remove(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        sequence.release(&mut self.pool);
    }

    /// Decides the next step.
    pub(crate) fn schedule(&mut self) {
        self.shares.clear();
        self.copies.clear();
        self.admitted.clear();
        self.preempted.clear();
        self.admit();
        self.num_tokens_left = self.max_num_batched_tokens;
        self.num_logits_left = self.max_num_logits - self.running.len();
        self.share_with_decoding();
        self.share_with_reading();
    }

    fn admit(&mut self) {
        while let Some(next) = self.waiting.front() {
            let priority = next.request.priority;
            // Those after them may have to give way to it.
            let staying = self.running.partition_point(|other| other.request.priority <= priority);
            if self.max_num_seqs <= staying {
                return;
            }
            let found = find_prefix(&self.pool, next, &mut self.path);
            if self.has_place(self.running.len()) {
                let next = self.waiting.pop_front().expect("it is the first");
                self.start(next, found);
                continue;
            }
            if staying == self.running.len() || !self.has_place(staying) {
                return;
            }
            self.preempt();
        }
    }

    /// Whether the first that waits can run beside the first so many that run, when the others have given
    /// way; `path` holds what is there of it.
    fn has_place(&mut self, num_staying: usize) -> bool {
        if num_staying == 0 {
            return true;
        }
        let Self { pool, path, num_leaving, .. } = self;
        let (staying, leaving) = self.running.split_at(num_staying);
        let blocks = leaving.iter().flat_map(|sequence| sequence.table.blocks());
        let mut num_freed = 0;
        for &block in blocks.clone() {
            let owners = &mut num_leaving[block as usize];
            *owners += 1;
            // The last of its owners leaves it free.
            num_freed += usize::from(*owners == pool.ref_count(block));
        }
        let is_idle = |&&block: &&u32| pool.ref_count(block) == num_leaving[block as usize];
        let idle = path.iter().filter(is_idle).count();
        blocks.for_each(|&block| num_leaving[block as usize] = 0);
        let promised: usize = staying.iter().map(Sequence::num_blocks_pending).sum();
        let needed = self.waiting[0].num_blocks_pending() - path.len();
        // Each may need one more block soon.
        let growth = num_staying;
        num_staying < self.max_num_seqs
            && promised + growth + needed + idle <= pool.num_free() + num_freed
    }

    fn start(&mut self, mut sequence: Sequence, found: Found) {
        sequence.follow(&mut self.pool);
        if let Some(tail) = found.tail {
            let copy = sequence.table.attach_copy(&mut self.pool, tail);
            self.copies.extend(copy.expect("a place was found"));
            sequence.num_computed = sequence.table.num_tokens();
        }
        sequence.prefix_end.get_or_insert(found.why);
        let place = self.running.partition_point(|other| other.rank() < sequence.rank());
        self.running.insert(place, sequence);
    }

    /// Makes the last that runs wait again.
    fn preempt(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        let index = self.running.len();
        if let Some(at) = self.shares.iter().position(|share| share.sequence == index) {
            self.num_tokens_left += self.shares.remove(at).num_tokens;
        }
        sequence.release(&mut self.pool);
        self.preempted.push(sequence.id);
        self.queue(sequence);
    }

    fn share_with_decoding(&mut self) {
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].num_pending() == 1 {
                self.share(index, 1);
            }
            index += 1;
        }
    }

    fn share_with_reading(&mut self) {
        self.readings.clear();
        for index in 0..self.running.len() {
            let (earlier, rest) = self.running.split_at_mut(index);
            let sequence = &mut rest[0];
            if sequence.num_pending() == 1 {
                continue;
            }
            // Others may have filled blocks meanwhile, or be about to.
            sequence.follow(&mut self.pool);
            if !earlier.iter().any(|other| sequence.waits_for(other)) {
                // Beyond what is scored already, each token takes a row; one is its own.
                let scored = sequence.num_scored.saturating_sub(sequence.num_computed);
                self.readings.push(Reading {
                    sequence: index,
                    priority: sequence.request.priority,
                    wanted: sequence.num_pending(),
                    num_rowless: if sequence.has_unscored() { scored + 1 } else { usize::MAX },
                    allotted: 0,
                });
            }
        }
        let mut half = self.num_tokens_left.div_ceil(2);
        let mut rest = self.num_tokens_left - half;
        let rows = &mut self.num_logits_left;
        self.readings.iter_mut().for_each(|reading| reading.allot(&mut half, rows));
        rest += half;
        self.readings.sort_unstable_by_key(|reading| {
            (reading.priority, reading.wanted - reading.allotted, reading.sequence)
        });
        self.readings.iter_mut().for_each(|reading| reading.allot(&mut rest, rows));
        self.readings.sort_unstable_by_key(|reading| reading.sequence);
        for index in 0..self.readings.len() {
            let Reading { sequence, allotted, .. } = self.readings[index];
            // Those at the end may have given way to those before.
            if 0 < allotted && sequence < self.running.len() {
                self.share(sequence, allotted);
            }
        }
    }

    /// Lets a sequence run up to so many tokens, as there are blocks for them.
    fn share(&mut self, index: usize, wanted: usize) {
        let num_tokens = self.make_room(index, wanted);
        if num_tokens == 0 {
            return;
        }
        self.num_tokens_left -= num_tokens;
        let sequence = &mut self.running[index];
        let id = sequence.id;
        self.admitted.extend(sequence.announce().map(|prefix| (id, prefix)));
        let end = sequence.num_computed + num_tokens;
        let completes = end == sequence.tokens.len();
        let chooses = completes && sequence.request.max_new_tokens != 0;
        let (num_logits, num_scored) = if sequence.has_unscored() {
            let first = sequence.num_computed.max(sequence.num_scored);
            let last = end.min(sequence.request.prompt.len() - 1);
            (end.saturating_sub(first), last.saturating_sub(first))
        } else {
            (usize::from(chooses), 0)
        };
        self.shares.push(Share { sequence: index, num_tokens, num_logits, num_scored, chooses });
    }

    /// Appends up to so many tokens to a sequence's table. If there is no block for the first, the last
    /// that runs gives way; if it is this one, it waits for others to end.
    fn make_room(&mut self, index: usize, wanted: usize) -> usize {
        loop {
            let table = &mut self.running[index].table;
            let granted = wanted.min(table.slack() + self.pool.num_free() * BLOCK_TOKENS);
            if granted != 0 {
                append(&mut self.running[index], &mut self.pool, granted);
                return granted;
            }
            if index + 1 == self.running.len() {
                return 0;
            }
            self.preempt();
        }
    }

    /// Makes room for guesses after a share that decodes, as far as there is any that nobody has to give
    /// up. How many.
    pub(crate) fn grant_drafts(&mut self, share: usize, wanted: usize) -> usize {
        let sequence = &mut self.running[self.shares[share].sequence];
        let wanted = wanted.min(sequence.room_for_drafts());
        let room = sequence.table.slack() + self.pool.num_free() * BLOCK_TOKENS;
        let granted = wanted.min(room).min(self.num_tokens_left).min(self.num_logits_left);
        append(sequence, &mut self.pool, granted);
        granted
    }

    /// Notes how many guesses there are.
    pub(crate) fn note_drafts(&mut self, share: usize) {
        let share = &mut self.shares[share];
        let sequence = &mut self.running[share.sequence];
        let num_drafts = sequence.num_drafts;
        sequence.table.truncate(&mut self.pool, sequence.num_computed + 1 + num_drafts);
        share.num_tokens += num_drafts;
        share.num_logits += num_drafts;
        self.num_tokens_left -= num_drafts;
        self.num_logits_left -= num_drafts;
    }

    /// Notes that a share has been run and what was chosen has been appended to its sequence.
    pub(crate) fn note_run(&mut self, share: Share) {
        let sequence = &mut self.running[share.sequence];
        sequence.num_scored += share.num_scored;
        sequence.note_run(&mut self.pool, share.chooses);
    }
}

fn append(sequence: &mut Sequence, pool: &mut BlockPool, tokens: usize) {
    let copy = sequence.table.append(pool, tokens);
    // A shared half-filled block would be copied.
    assert_eq!(copy, Ok(None), "room was found, and what is written belongs to one sequence");
}

/// Finds what is there of a sequence that waits.
fn find_prefix(pool: &BlockPool, sequence: &Sequence, path: &mut Vec<u32>) -> Found {
    path.clear();
    if let Some(why) = sequence.refuses_prefix() {
        return Found { tail: None, why };
    }
    let skippable = sequence.num_skippable();
    let mut end = PathEnd::root(sequence.request.cache_salt);
    let tree = pool.prefixes();
    let mut blocks = sequence.tokens[..skippable].chunks_exact(BLOCK_TOKENS);
    let missing = loop {
        let Some(tokens) = blocks.next() else { break None };
        match tree.child(end, tokens) {
            Some((block, next)) => {
                path.push(block);
                end = next;
            }
            None => break Some(tokens),
        }
    };
    let full = path.len() * BLOCK_TOKENS;
    let rest = &sequence.tokens[full..skippable.min(full + BLOCK_TOKENS - 1)];
    let tail = tree.closest(end, rest);
    let why = match missing {
        Some(tokens) if tree.was_evicted(end, tokens) => PrefixEnd::Evicted,
        _ => PrefixEnd::Cold,
    };
    Found { tail, why }
}

#[cfg(test)]
impl Scheduler {
    /// Asserts what holds between any two steps.
    pub(crate) fn check(&self) {
        let mut owners = vec![0; self.pool.num_blocks()];
        for sequence in &self.running {
            let Sequence { tokens, table, num_computed, num_drafts, .. } = sequence;
            assert_eq!((table.num_tokens(), *num_drafts), (*num_computed, 0));
            assert_eq!(table.blocks().len(), crate::blocks_for(*num_computed));
            assert!(*num_computed < tokens.len(), "something is left to run");
            table.blocks().iter().for_each(|&block| owners[block as usize] += 1);
            let full = num_computed / BLOCK_TOKENS;
            if let Some(&tail) = table.blocks().get(full) {
                assert_eq!(self.pool.ref_count(tail), 1, "a block that is written is shared");
                assert!(!self.pool.prefixes().holds(tail), "a block that is written can be found");
            }
        }
        self.pool.check(&owners);
        assert!(self.running.len() <= self.max_num_seqs);
        assert!(self.running.is_sorted_by_key(Sequence::rank));
        assert!(self.waiting.iter().map(Sequence::rank).is_sorted());
        for sequence in &self.waiting {
            assert!(sequence.table.blocks().is_empty(), "one that waits has a block");
        }
    }

    /// Who goes before all others.
    pub(crate) fn first(&self) -> Option<RequestId> {
        let all = self.running.iter().chain(&self.waiting);
        all.min_by_key(|sequence| sequence.rank()).map(|sequence| sequence.id)
    }

    /// Tokens that a request has, and how many of them have been run if it is running.
    pub(crate) fn progress(&self, id: RequestId) -> Option<(usize, Option<usize>)> {
        let sequence = |sequence: &&Sequence| sequence.id == id;
        let waiting = self.waiting.iter().find(sequence).map(|found| (found.tokens.len(), None));
        let running = self.running.iter().find(sequence);
        waiting.or(running.map(|found| (found.tokens.len(), Some(found.num_computed))))
    }
}

#[cfg(test)]
mod tests;

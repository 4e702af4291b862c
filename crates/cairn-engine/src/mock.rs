//! A model that costs nothing: what it says is a hash of the tokens so far.
//!
//! It finds the measure of everything around a model, and it makes the engine a simulator: its cache
//! holds one word a token, so that a token in the wrong place, or one that was written over, gives
//! other tokens.

use cairn_kernels::splitmix;
use cairn_program::RunError;

use crate::block_pool::BLOCK_TOKENS;
use crate::block_table::BlockCopy;
use crate::mirostat::MirostatState;
use crate::model::{Depth, Model, Piece};
use crate::request::PositionLogprobs;
use crate::sampler::{SampleContext, SampleError};
use crate::sampling::SamplingParams;

/// What is cached of a token: it, and the hash of all tokens up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lane {
    token: u32,
    hash: u64,
}

/// A model whose tokens are a function of the context, the seed and the choice.
///
/// ```
/// use cairn_engine::{Engine, EngineOptions, MockModel, Request, SamplingParams};
/// use std::ops::ControlFlow;
///
/// let options = EngineOptions::new(1, 64);
/// let mut engine = Engine::with_model(MockModel::new(100, options.num_blocks), options)?;
/// let request = Request::new(vec![1, 2, 3], SamplingParams::greedy(), 8);
/// let output = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
/// assert_eq!(output.tokens.len(), 8);
/// # Ok::<(), cairn_engine::EngineError>(())
/// ```
#[derive(Debug)]
pub struct MockModel {
    vocab_size: usize,
    blocks: Vec<[Lane; BLOCK_TOKENS]>,
    /// Hashes after the tokens of the last run about which something is asked.
    rows: Vec<u64>,
    /// Whether all that a run reads is checked first.
    checks: bool,
}

impl MockModel {
    /// A model of `vocab_size` tokens with a cache of `num_blocks` blocks.
    pub fn new(vocab_size: usize, num_blocks: usize) -> Self {
        let blocks = vec![[Lane::default(); BLOCK_TOKENS]; num_blocks];
        Self { vocab_size, blocks, rows: Vec::new(), checks: false }
    }

    /// As [`new`](Self::new); panics if a run reads a token that is not what its sequence wrote.
    #[cfg(test)]
    pub(crate) fn checking(vocab_size: usize, num_blocks: usize) -> Self {
        Self { checks: true, ..Self::new(vocab_size, num_blocks) }
    }

    /// What a sequence goes on with.
    #[cfg(test)]
    pub(crate) fn expected(
        &self,
        tokens: &[u32],
        chosen: (&SamplingParams, u32),
        state: &mut MirostatState,
    ) -> u32 {
        let hash = tokens.iter().fold(0, |hash, &token| after(hash, token));
        self.steered(hash, chosen, state)
    }

    /// How likely each token after the first is.
    #[cfg(test)]
    pub(crate) fn expected_logprobs(&self, tokens: &[u32], count: usize) -> Vec<PositionLogprobs> {
        let hashes = tokens.iter().scan(0, |hash, &token| {
            *hash = after(*hash, token);
            Some(*hash)
        });
        let next = tokens[1..].iter();
        hashes.zip(next).map(|(hash, &token)| self.position(hash, token, count)).collect()
    }

    /// The next token of an output that is steered, if it is.
    fn steered(
        &self,
        hash: u64,
        (params, choice): (&SamplingParams, u32),
        state: &mut MirostatState,
    ) -> u32 {
        let Some(steering) = params.mirostat else {
            return self.token(hash, params.seed, choice);
        };
        let token = self.token(hash ^ state.mu(steering).to_bits(), params.seed, choice);
        // Surprising as often as not.
        state.note(steering, if token.is_multiple_of(2) { 0.5 } else { 0.01 });
        token
    }

    #[expect(clippy::cast_possible_truncation, reason = "a remainder by a number of tokens")]
    fn token(&self, hash: u64, seed: u64, choice: u32) -> u32 {
        (splitmix(hash ^ splitmix(seed ^ splitmix(u64::from(choice)))) % self.vocab_size as u64)
            as u32
    }

    /// The first token from `token` on, past the last one from 0 on, whose bit is set.
    #[expect(clippy::cast_possible_truncation, reason = "tokens are u32")]
    fn next_allowed(&self, token: u32, allowed: &[u32]) -> Option<u32> {
        let may = |&token: &u32| allowed[token as usize / 32] >> (token % 32) & 1 == 1;
        (token..self.vocab_size as u32).chain(0..token).find(may)
    }

    #[expect(clippy::cast_possible_truncation, reason = "a remainder")]
    fn position(&self, hash: u64, token: u32, count: usize) -> PositionLogprobs {
        let logprob = |token: u32| -((splitmix(hash ^ u64::from(!token)) % 1024) as f32) / 64.0;
        let rank = 1 + (splitmix(hash) % self.vocab_size as u64) as usize;
        let top = (0..self.vocab_size.min(count) as u32).map(|token| (token, logprob(token)));
        PositionLogprobs { chosen: logprob(token), rank, top: top.collect() }
    }

    fn lane(&self, blocks: &[u32], position: usize) -> Lane {
        self.blocks[blocks[position / BLOCK_TOKENS] as usize][position % BLOCK_TOKENS]
    }

    fn check(&self, piece: &Piece<'_>) {
        let mut hash = 0;
        for position in 0..piece.cached {
            let lane = self.lane(piece.blocks, position);
            hash = after(hash, lane.token);
            assert_eq!(lane.hash, hash, "position {position} was written over: {piece:?}");
        }
    }
}

/// The hash of one more token.
fn after(hash: u64, token: u32) -> u64 {
    splitmix(hash ^ u64::from(token).rotate_left(32))
}

impl Model for MockModel {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn run<'a>(
        &mut self,
        _: Depth,
        pieces: impl Iterator<Item = Piece<'a>>,
    ) -> Result<(), RunError> {
        self.rows.clear();
        for piece in pieces {
            if self.checks {
                self.check(&piece);
            }
            let before = piece.cached.checked_sub(1);
            let mut hash = before.map_or(0, |last| self.lane(piece.blocks, last).hash);
            let first_row = piece.tokens.len() - piece.num_logits;
            for (index, &token) in piece.tokens.iter().enumerate() {
                hash = after(hash, token);
                let position = piece.cached + index;
                let block = piece.blocks[position / BLOCK_TOKENS] as usize;
                self.blocks[block][position % BLOCK_TOKENS] = Lane { token, hash };
                if first_row <= index {
                    self.rows.push(hash);
                }
            }
        }
        Ok(())
    }

    fn copy_block(&mut self, BlockCopy { from, to }: BlockCopy) {
        self.blocks[to as usize] = self.blocks[from as usize];
    }

    fn choose(
        &mut self,
        row: usize,
        context: SampleContext<'_>,
        params: &SamplingParams,
        state: &mut MirostatState,
    ) -> Result<u32, SampleError> {
        let token = self.steered(self.rows[row], (params, context.stream), state);
        let Some(allowed) = context.allowed else { return Ok(token) };
        let position = context.tokens.len();
        self.next_allowed(token, allowed).ok_or(SampleError::NoCandidate { position })
    }

    fn logprobs(&mut self, row: usize, token: u32, count: usize) -> PositionLogprobs {
        self.position(self.rows[row], token, count)
    }
}

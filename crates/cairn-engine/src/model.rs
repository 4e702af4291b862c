//! What an engine needs of a model: runs over pieces of sequences, and choices after their tokens.
//!
//! Two implementations exist: [`Executor`](crate::Executor), which is a program with its weights and
//! its cache, and [`MockModel`](crate::MockModel), which computes nothing.

use std::fmt::Debug;

use cairn_program::RunError;

use crate::block_table::BlockCopy;
use crate::mirostat::MirostatState;
use crate::request::PositionLogprobs;
use crate::sampler::{SampleContext, SampleError};
use crate::sampling::SamplingParams;

/// Consecutive tokens of one sequence. Its table has room for them already.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// Position of the first, which is the number of tokens in the cache.
    pub cached: usize,
    /// The sequence's block table.
    pub blocks: &'a [u32],
    /// After how many of its last tokens something is asked.
    pub num_logits: usize,
}

/// How much of the model a run goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// All of it.
    Whole,
    /// The first blocks and the head, to guess by: [`crate::DraftMethod::Depth`].
    Shallow,
}

/// A model with a paged cache.
///
/// What it says after a token depends on that token and those before it in its sequence, and on
/// nothing else.
pub trait Model: Debug {
    /// Tokens it knows.
    fn vocab_size(&self) -> usize;

    /// Runs pieces of different sequences together. The *rows* of a run are the tokens after which
    /// something is asked, in order.
    ///
    /// # Errors
    ///
    /// [`RunError`] when the pieces do not fit the plan, which the scheduler prevents, or when the
    /// weights are gone.
    fn run<'a>(
        &mut self,
        depth: Depth,
        pieces: impl Iterator<Item = Piece<'a>>,
    ) -> Result<(), RunError>;

    /// Keeps what others lend while nothing runs; to be called every few seconds.
    ///
    /// # Errors
    ///
    /// [`RunError`] when it is gone.
    fn keep(&mut self) -> Result<(), RunError> {
        Ok(())
    }

    /// Copies the keys and values of one block to another, in every layer.
    fn copy_block(&mut self, copy: BlockCopy);

    /// Chooses a token after a row of the last run. `state` is that of its sequence; the choice changes it where
    /// the parameters steer by it.
    ///
    /// # Errors
    ///
    /// [`SampleError`] if there is none to choose.
    fn choose(
        &mut self,
        row: usize,
        context: SampleContext<'_>,
        params: &SamplingParams,
        state: &mut MirostatState,
    ) -> Result<u32, SampleError>;

    /// How likely `token` was after a row of the last run, and the `count` likeliest tokens.
    fn logprobs(&mut self, row: usize, token: u32, count: usize) -> PositionLogprobs;
}

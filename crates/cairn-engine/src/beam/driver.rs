//! A beam search over the model: beams share the blocks of what they have in common.

use super::{BeamParams, BeamSearch, Hypothesis};
use crate::block_pool::BlockPool;
use crate::block_table::BlockTable;
use crate::engine::Engine;
use crate::error::{EngineError, GenerateError};
use crate::executor::Executor;
use crate::logprob::log_softmax;
use crate::model::{Depth, Model, Piece};
use crate::request::Request;
use crate::sampling::SamplingParams;

/// A prompt and how to search for its continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct BeamRequest {
    /// Token ids to continue; at least one.
    pub prompt: Vec<u32>,
    /// How to search.
    pub beams: BeamParams,
    /// Tokens to add at most; at least one.
    pub max_new_tokens: usize,
    /// Any of these ends a hypothesis.
    pub stop_tokens: Vec<u32>,
}

impl Engine {
    /// Searches for the likeliest continuations, best first.
    ///
    /// # Errors
    ///
    /// [`GenerateError::Busy`] while requests run, [`GenerateError::Request`] or
    /// [`GenerateError::Beam`] if something asked is out of range, [`GenerateError::Blocks`] if the
    /// beams outgrow the cache. All blocks are given back either way.
    pub fn beam_search(&mut self, request: &BeamRequest) -> Result<Vec<Hypothesis>, GenerateError> {
        self.check_idle()?;
        Request {
            stop_tokens: request.stop_tokens.clone(),
            ..Request::new(request.prompt.clone(), SamplingParams::greedy(), request.max_new_tokens)
        }
        .check(self.spec().vocab_size, self.options().max_context)?;
        request.beams.check(self.options().max_num_seqs)?;
        let (chunk, vocab_size) = (self.options().max_num_batched_tokens, self.spec().vocab_size);
        let mut run = BeamRun {
            executor: &mut self.model,
            pool: &mut self.scheduler.pool,
            tables: vec![BlockTable::with_capacity(request.prompt.len())],
            logprobs: Vec::with_capacity(request.beams.num_beams * vocab_size),
            vocab_size,
        };
        let result = run.search(request, chunk);
        run.tables.iter_mut().for_each(|table| table.release(run.pool));
        result
    }
}

struct BeamRun<'a> {
    executor: &'a mut Executor,
    pool: &'a mut BlockPool,
    /// One a beam.
    tables: Vec<BlockTable>,
    /// `[beams, v]`, of the last run.
    logprobs: Vec<f32>,
    vocab_size: usize,
}

impl BeamRun<'_> {
    fn search(
        &mut self,
        request: &BeamRequest,
        chunk: usize,
    ) -> Result<Vec<Hypothesis>, GenerateError> {
        self.prefill(&request.prompt, chunk)?;
        let BeamRequest { beams, max_new_tokens, ref stop_tokens, .. } = *request;
        let mut search = BeamSearch::new(beams, max_new_tokens, stop_tokens);
        while search.advance(|beam| &self.logprobs[beam * self.vocab_size..][..self.vocab_size]) {
            self.follow(search.parents());
            self.decode(&search)?;
        }
        Ok(search.into_hypotheses())
    }

    fn prefill(&mut self, prompt: &[u32], chunk: usize) -> Result<(), GenerateError> {
        for tokens in prompt.chunks(chunk) {
            let table = &mut self.tables[0];
            let cached = table.num_tokens();
            let copy = table.append(self.pool, tokens.len())?;
            assert_eq!(copy, None, "nothing is shared yet");
            let num_logits = usize::from(cached + tokens.len() == prompt.len());
            let piece = Piece { tokens, cached, blocks: table.blocks(), num_logits };
            self.executor.run(Depth::Whole, [piece].into_iter()).map_err(EngineError::from)?;
        }
        self.read_logprobs(1);
        Ok(())
    }

    /// Replaces each table by a fork of its parent's.
    fn follow(&mut self, parents: &[usize]) {
        let forks: Vec<BlockTable> =
            parents.iter().map(|&parent| self.tables[parent].fork(self.pool)).collect();
        let mut left = std::mem::replace(&mut self.tables, forks);
        left.iter_mut().for_each(|table| table.release(self.pool));
    }

    /// Runs each beam's last token.
    fn decode(&mut self, search: &BeamSearch<'_>) -> Result<(), GenerateError> {
        for table in &mut self.tables {
            if let Some(copy) = table.append(self.pool, 1)? {
                self.executor.copy_block(copy);
            }
        }
        let tokens: Vec<u32> = (0..self.tables.len()).map(|beam| search.last_token(beam)).collect();
        let pieces = self.tables.iter().zip(tokens.chunks(1)).map(|(table, tokens)| Piece {
            tokens,
            cached: table.num_tokens() - 1,
            blocks: table.blocks(),
            num_logits: 1,
        });
        self.executor.run(Depth::Whole, pieces).map_err(EngineError::from)?;
        self.read_logprobs(self.tables.len());
        Ok(())
    }

    fn read_logprobs(&mut self, beams: usize) {
        self.logprobs.clear();
        for beam in 0..beams {
            let cpu = self.executor.session().cpu();
            log_softmax(cpu, self.executor.logits(beam), &mut self.logprobs);
        }
    }
}

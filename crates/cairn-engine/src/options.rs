//! What an engine is made for, as data: encodings, limits, and the bytes they come to.
//!
//! **Invariant:** an [`EnginePlan`] that exists can be run: its limits are within the model's and its
//! bytes are known, though nothing is allocated yet.

use std::collections::BTreeMap;

use cairn_kernels::{CacheType, Compute, Encoding, Layout};
use cairn_model::{AdapterMap, BuildOptions, Head, build_stored_program};
use cairn_program::{CacheOptions, KvPlacement, MemoryPlan, SessionProgram, Sizes};
use cairn_program::{PlannedBytes, Program};
use cairn_spec::ModelSpec;
use cairn_spec::model::MaskKind;
use serde::{Deserialize, Serialize};

use crate::block_pool::blocks_for;
use crate::error::EngineError;
use crate::executor::Buckets;
use crate::speculation::{DraftMethod, NUM_SPECULATIVE_TOKENS_MAX, SpeculativeOptions};

/// Tokens of the largest run by default: long prompts are read in chunks of this many.
pub const MAX_NUM_BATCHED_TOKENS: usize = 512;
/// Requests that may wait by default.
pub const MAX_NUM_WAITING: usize = 1024;
/// Blocks that a cache may have.
const NUM_BLOCKS_MAX: usize = 1 << 28;

/// How a model is held and how much may be asked of it at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineOptions {
    /// Storage of weight matrices.
    pub encoding: Encoding,
    /// Arithmetic of the products by them.
    #[serde(default)]
    pub compute: Compute,
    /// Layout of weight matrices; panels are read front to back, which is what decoding needs.
    pub layout: Layout,
    /// Storage of cached keys and values.
    pub cache_type: CacheType,
    /// Longest sequence, prompt and output together, in tokens.
    pub max_context: usize,
    /// Most sequences in one step; beams count each.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_num_batched_tokens: usize,
    /// KV-cache blocks for all sequences together.
    pub num_blocks: usize,
    /// Most requests that wait for blocks or for a place in the step.
    pub max_num_waiting: usize,
    /// Tokens of prompts after which a step may say how likely the next one was: prompts whose
    /// log-probabilities are asked for are read in pieces of so many. Each takes a row of logits in the
    /// arena.
    #[serde(default = "default_prompt_logits")]
    pub max_num_prompt_logits: usize,
    /// Whether keys and values stay in the cache after their request, as long as nobody needs the room,
    /// and serve requests that begin alike.
    #[serde(default = "default_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// How tokens are guessed ahead, if they are.
    #[serde(default)]
    pub speculative: Option<SpeculativeOptions>,
}

fn default_prompt_logits() -> usize {
    1
}

fn default_prefix_caching() -> bool {
    true
}

impl EngineOptions {
    /// Room for `max_num_seqs` sequences of `max_context` tokens each; `f32` weights and cache.
    pub fn new(max_num_seqs: usize, max_context: usize) -> Self {
        Self {
            encoding: Encoding::F32,
            compute: Compute::F32,
            layout: Layout::Panel,
            cache_type: CacheType::F32,
            max_context,
            max_num_seqs,
            max_num_batched_tokens: MAX_NUM_BATCHED_TOKENS.max(max_num_seqs),
            // One more block a sequence: where a beam copies its half-filled last block.
            num_blocks: max_num_seqs * (blocks_for(max_context) + 1),
            max_num_waiting: MAX_NUM_WAITING,
            max_num_prompt_logits: default_prompt_logits(),
            enable_prefix_caching: default_prefix_caching(),
            speculative: None,
        }
    }

    /// Checks what holds for every model.
    pub(crate) fn check_limits(&self) -> Result<(), EngineError> {
        let limit = check_limit;
        limit("max_context", self.max_context, 1, 1 << 28)?;
        limit("max_num_seqs", self.max_num_seqs, 1, 1 << 16)?;
        // A step must at least hold one token of every sequence.
        limit("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs, 1 << 20)?;
        limit("num_blocks", self.num_blocks, blocks_for(self.max_context), NUM_BLOCKS_MAX)?;
        limit("max_num_prompt_logits", self.max_num_prompt_logits, 1, 1 << 20)?;
        let guesses = self.speculative.map_or(1, |options| options.num_speculative_tokens);
        limit("num_speculative_tokens", guesses, 1, NUM_SPECULATIVE_TOKENS_MAX)
    }

    /// Checks that the cache holds every sequence at its longest.
    pub(crate) fn check_whole_contexts(&self) -> Result<(), EngineError> {
        let needed = self.max_num_seqs * blocks_for(self.max_context);
        check_limit("num_blocks", self.num_blocks, needed, NUM_BLOCKS_MAX)
    }

    fn check(&self, spec: &ModelSpec) -> Result<(), EngineError> {
        if spec.attention.mask != MaskKind::Causal {
            return Err(EngineError::NotCausal);
        }
        check_limit("max_context", self.max_context, 1, spec.context_limit())?;
        self.check_limits()?;
        match self.speculative.map(|speculative| speculative.method) {
            Some(DraftMethod::Depth(blocks)) => {
                check_limit("depth", blocks, 1, spec.num_hidden_layers.saturating_sub(1))
            }
            Some(DraftMethod::Ngram | DraftMethod::Model) | None => Ok(()),
        }
    }

    /// Most rows of logits of a step.
    pub(crate) fn max_num_logits(&self) -> usize {
        // After each guess a choice is made, so each has a row of logits.
        let guesses = self.speculative.map_or(0, |options| options.num_speculative_tokens);
        // And each sequence has its own, whatever prompts are scored beside it.
        (self.max_num_seqs * (1 + guesses)).max(self.max_num_seqs - 1 + self.max_num_prompt_logits)
    }

    /// Numbers of tokens that a program is planned for: powers of two, so that a step works in a
    /// small part of the arena that stays in cache, and the largest step.
    fn bucket_tokens(&self) -> impl Iterator<Item = usize> + use<> {
        let most = self.max_num_batched_tokens;
        let powers = std::iter::successors(Some(1_usize), |tokens| tokens.checked_mul(2));
        powers.take_while(move |&tokens| tokens < most).chain([most])
    }

    /// Bounds of a run of so many tokens.
    fn sizes(&self, tokens: usize) -> Sizes {
        let sequences = tokens.min(self.max_num_seqs);
        let outputs = tokens.min(self.max_num_logits());
        Sizes { tokens, sequences, outputs, cached: self.num_blocks * crate::BLOCK_TOKENS }
    }
}

fn check_limit(
    name: &'static str,
    value: usize,
    min: usize,
    max: usize,
) -> Result<(), EngineError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(EngineError::Limit { name, value, min, max })
}

/// An engine that fits the model, laid out but not allocated.
#[derive(Debug)]
pub struct EnginePlan {
    pub(crate) memory: MemoryPlan,
    /// Bounds of the programs of `memory`.
    pub(crate) buckets: Buckets,
    pub(crate) spec: ModelSpec,
    pub(crate) adapters: AdapterMap,
    pub(crate) options: EngineOptions,
}

impl EnginePlan {
    /// Lays out an engine.
    ///
    /// One program is planned for several numbers of tokens, powers of two up to a full step.
    ///
    /// # Errors
    ///
    /// [`EngineError::Limit`] names a limit that the model does not allow, [`EngineError::Build`] and
    /// [`EngineError::Session`] say why the model has no plan.
    pub fn new(spec: &ModelSpec, options: EngineOptions) -> Result<Self, EngineError> {
        Self::with_adapters(spec, options, &AdapterMap::default())
    }

    /// As [`new`](Self::new), with low-rank adapters beside the model's projections.
    ///
    /// # Errors
    ///
    /// As from [`new`](Self::new).
    pub fn with_adapters(
        spec: &ModelSpec,
        options: EngineOptions,
        adapters: &AdapterMap,
    ) -> Result<Self, EngineError> {
        Self::with_storage(spec, options, adapters, &BTreeMap::new())
    }

    /// As [`with_adapters`](Self::with_adapters), with encodings of their own for some weights, by name.
    ///
    /// # Errors
    ///
    /// As from [`new`](Self::new).
    pub fn with_storage(
        spec: &ModelSpec,
        options: EngineOptions,
        adapters: &AdapterMap,
        encodings: &BTreeMap<String, Encoding>,
    ) -> Result<Self, EngineError> {
        options.check(spec)?;
        let build = BuildOptions {
            encoding: options.encoding,
            layout: options.layout,
            compute: options.compute,
            ..BuildOptions::new(Head::GatheredLogits)
        };
        let build_stored = |build: &BuildOptions| {
            Ok::<_, EngineError>(build_stored_program(spec, build, adapters, encodings)?)
        };
        let whole = build_stored(&build)?;
        let shallow = match options.speculative.map(|options| options.method) {
            Some(DraftMethod::Depth(blocks)) => {
                let build = BuildOptions { num_blocks: Some(blocks), ..build };
                Some(build_stored(&build)?)
            }
            _ => None,
        };
        let buckets = Buckets {
            whole: options.bucket_tokens().map(|tokens| options.sizes(tokens)).collect(),
            // Guesses are made one sequence and one token at a time.
            shallow: shallow.iter().map(|_| options.sizes(1)).collect(),
        };
        let planned = |(program, sizes): (&Program, &Sizes)| SessionProgram {
            program: program.clone(),
            sizes: *sizes,
            kv: KvPlacement::Paged,
        };
        let whole = std::iter::repeat(&whole).zip(&buckets.whole);
        let programs = whole.chain(shallow.iter().zip(&buckets.shallow)).map(planned).collect();
        let cache = CacheOptions { dtype: options.cache_type, num_blocks: options.num_blocks };
        let memory = MemoryPlan::new(programs, Some(cache))?;
        Ok(Self { memory, buckets, spec: spec.clone(), adapters: adapters.clone(), options })
    }

    /// Bytes of weights, cache and arena; exactly what the engine will allocate.
    pub fn bytes(&self) -> PlannedBytes {
        self.memory.bytes()
    }

    /// Token counts that the program is planned for, ascending.
    pub fn token_buckets(&self) -> impl Iterator<Item = usize> {
        self.buckets.whole.iter().map(|sizes| sizes.tokens)
    }

    /// What it was planned for.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }
}

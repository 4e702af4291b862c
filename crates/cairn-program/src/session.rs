//! Sessions: the memory of programs that share weights and states, and their runs.
//!
//! A training step is two programs (forward and backward; update), a server's step is one of
//! several plans for different token counts: they share persistent values by name and take turns
//! with one arena. [`MemoryPlan`] lays everything out and knows every byte before anything is
//! allocated; [`Session`] allocates it once.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use cairn_kernels::{BytesMut, CacheSpec, Cpu, Layout, Lent, Memory, MemoryError, SeqSlot, Span};
use serde::{Deserialize, Serialize};

use crate::dim::Sizes;
use crate::execute;
use crate::op::Op;
use crate::plan::{ArenaPlan, KvPlacement, aligned};
use crate::program::Program;
use crate::value::{Class, Value, ValueId, ValueType};

/// Region of persistent values in a session's memory.
const STORE: u16 = 0;
/// Region of the arena.
const ARENA: u16 = 1;
/// First region of weights that somebody else keeps, where there are any.
const LENT: u16 = 2;
/// Bytes of cache that are made resident before the first run; of a larger one, each part when it is written.
const TOUCHED_BYTES_MAX: usize = 512 << 20;

/// Index of a program in its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProgramId(pub usize);

/// A program and the largest run it is planned for.
#[derive(Clone, Debug)]
pub struct SessionProgram {
    /// What it does.
    pub program: Program,
    /// Bounds of the dynamic axes.
    pub sizes: Sizes,
    /// Where its keys and values live.
    pub kv: KvPlacement,
}

/// The KV cache that the paged programs of a session share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheOptions {
    /// Element type of cached keys and values.
    pub dtype: cairn_kernels::CacheType,
    /// Blocks for all sequences together; a block holds [`cairn_kernels::PAGE_TOKENS`] tokens.
    pub num_blocks: usize,
}

/// Why a session cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// Two programs declare one persistent value differently.
    #[error("{name} is {first} in one program and {second} in another")]
    Disagreement {
        /// The value.
        name: String,
        /// Its declaration in the first program.
        first: String,
        /// Its declaration in the second.
        second: String,
    },
    /// A program reads a paged cache, and the session has none.
    #[error("the program caches keys, but the session has no cache options")]
    NoCache,
    /// A program that reads a paged cache generates, and drops nothing.
    #[error("instruction {instr} ({op}) drops at random, which a program with a cache must not")]
    Dropout {
        /// Index of the instruction.
        instr: usize,
        /// Its operation.
        op: &'static str,
    },
    /// The operating system refused the memory.
    #[error("could not reserve the planned memory")]
    Memory(#[from] MemoryError),
}

/// Why a run is refused. But for [`Withdrawn`](Self::Withdrawn) and [`NoCopy`](Self::NoCopy), nothing has
/// been computed then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A size is over its bound.
    #[error("{what}: {actual} exceeds the plan's bound of {bound}")]
    Bound {
        /// Which axis.
        what: &'static str,
        /// The run's size.
        actual: usize,
        /// The plan's size.
        bound: usize,
    },
    /// An input of the program was not fed.
    #[error("input {name} was not fed")]
    Missing {
        /// Its name.
        name: String,
    },
    /// An input has the wrong length or type.
    #[error("input {name}: expected {expected} elements of {value_type}, found {found}")]
    Feed {
        /// Its name.
        name: String,
        /// Elements the run's sizes demand.
        expected: usize,
        /// Declared type.
        value_type: String,
        /// What was fed.
        found: String,
    },
    /// A token id, target or row index is out of range.
    #[error("input {name}: {found} at position {position} is not below {bound}")]
    Range {
        /// The input.
        name: String,
        /// Where in it.
        position: usize,
        /// The offending index.
        found: u32,
        /// Number of rows it indexes.
        bound: usize,
    },
    /// The file that weights are read from in place was changed by another program. What the run has
    /// computed is lost.
    #[error("the weights are not there any more: {problem}")]
    Withdrawn {
        /// What became of them.
        problem: String,
    },
    /// Another program wants to change the file that weights are read from in place, and they cannot be copied.
    #[error("the weights have to be copied, which failed: {problem}")]
    NoCopy {
        /// What the system says.
        problem: String,
    },
    /// Sequences do not tile the tokens, or a block id is out of range.
    #[error("sequence {sequence}: {problem}")]
    Sequence {
        /// Index in the batch.
        sequence: usize,
        /// What is wrong.
        problem: String,
    },
}

/// One named input of a run.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// The input's name in the program.
    pub name: &'a str,
    /// Its elements.
    pub data: FeedData<'a>,
}

/// Elements of an input.
#[derive(Clone, Copy, Debug)]
pub enum FeedData<'a> {
    /// Ids, positions, row indices.
    U32(&'a [u32]),
    /// Floats.
    F32(&'a [f32]),
    /// Scalars that must not be rounded (the learning rate).
    F64(&'a [f64]),
}

impl<'a> Feed<'a> {
    /// Feeds indices.
    pub fn u32(name: &'a str, data: &'a [u32]) -> Self {
        Self { name, data: FeedData::U32(data) }
    }

    /// Feeds doubles.
    pub fn f64(name: &'a str, data: &'a [f64]) -> Self {
        Self { name, data: FeedData::F64(data) }
    }

    /// Feeds floats.
    pub fn f32(name: &'a str, data: &'a [f32]) -> Self {
        Self { name, data: FeedData::F32(data) }
    }
}

/// One run of a program: its inputs, the sequences laid end to end in them, and what keys its
/// randomness.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// Every input of the program.
    pub feeds: &'a [Feed<'a>],
    /// The ragged batch. Training rows hold one sequence per document piece.
    pub sequences: &'a [SeqSlot<'a>],
    /// Output rows; equal to the tokens where the program gathers none.
    pub outputs: usize,
    /// Tokens per batch row: the unit to which sums over tokens are aligned.
    pub row_tokens: usize,
    /// Adds to the gradients instead of starting them: false in a step's first micro-batch.
    pub accumulate: bool,
    /// Keys dropout.
    pub seed: u64,
    /// Keys dropout.
    pub step: u64,
    /// Number of the first token within the step, over all micro-batches; keys dropout.
    pub first_token: u64,
}

impl<'a> Run<'a> {
    /// A run without gradients or randomness in which every token is an output.
    pub fn forward(feeds: &'a [Feed<'a>], sequences: &'a [SeqSlot<'a>]) -> Self {
        let tokens = sequences.iter().map(|sequence| sequence.len).sum();
        Self {
            feeds,
            sequences,
            outputs: tokens,
            row_tokens: tokens,
            accumulate: false,
            seed: 0,
            step: 0,
            first_token: 0,
        }
    }

    /// How large it is.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            tokens: self.sequences.iter().map(|sequence| sequence.len).sum(),
            sequences: self.sequences.len(),
            outputs: self.outputs,
            cached: self.sequences.iter().map(|sequence| sequence.cached).sum(),
        }
    }
}

/// A persistent value and where it lies.
#[derive(Clone, Debug)]
struct Persistent {
    class: Class,
    value_type: ValueType,
    shape: crate::Shape,
    span: Span,
}

/// A program with every operand resolved to memory.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) program: Program,
    pub(crate) arena: ArenaPlan,
    persistent: Vec<Option<Span>>,
    /// Cache geometry and pages of each `kv_write` site.
    pub(crate) caches: BTreeMap<u32, (CacheSpec, Span)>,
    /// The site whose cache a cached key or value stands for.
    pub(crate) cache_of: Vec<Option<u32>>,
}

impl Prepared {
    /// Where a value lies at the sizes of a run; empty for cached keys, which lie in pages.
    pub(crate) fn span(&self, id: ValueId, sizes: &Sizes) -> Span {
        if let Some(span) = self.persistent[id.index()] {
            return span;
        }
        let bytes = self.program.value(id).bytes(sizes);
        match self.arena.slot(id) {
            Some(slot) => Span { region: ARENA, offset: slot.offset, bytes },
            None => Span { region: ARENA, offset: 0, bytes: 0 },
        }
    }

    pub(crate) fn scratch(&self, instr: usize) -> Span {
        match self.arena.scratch(instr) {
            Some(slot) => Span { region: ARENA, offset: slot.offset, bytes: slot.bytes },
            None => Span { region: ARENA, offset: 0, bytes: 0 },
        }
    }
}

/// Bytes of a session by class, known before it exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PlannedBytes {
    /// Parameters.
    pub weights: usize,
    /// Their gradients.
    pub gradients: usize,
    /// Moments, masters, averages.
    pub states: usize,
    /// Pages of the KV cache.
    pub cache: usize,
    /// The arena: activations, inputs, working memory of single instructions.
    pub arena: usize,
}

impl PlannedBytes {
    /// Everything together.
    pub fn total(&self) -> usize {
        self.weights + self.gradients + self.states + self.cache + self.arena
    }
}

impl fmt::Display for PlannedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "weights {:.1} MiB, gradients {:.1} MiB, states {:.1} MiB, cache {:.1} MiB, arena {:.1} MiB",
            mib(self.weights),
            mib(self.gradients),
            mib(self.states),
            mib(self.cache),
            mib(self.arena)
        )
    }
}

/// Weights that lie in one memory which somebody else keeps, byte for byte as kernels read them.
#[derive(Debug)]
pub struct LentWeights {
    /// The memory.
    pub memory: Box<dyn Lent>,
    /// The form of each weight, and where in the memory it lies.
    pub places: BTreeMap<String, (ValueType, Range<usize>)>,
}

/// Where every byte of a session will lie.
#[derive(Debug)]
pub struct MemoryPlan {
    programs: Vec<Prepared>,
    store: BTreeMap<String, Persistent>,
    store_bytes: usize,
    arena_bytes: usize,
    bytes: PlannedBytes,
}

impl MemoryPlan {
    /// Lays out programs that share persistent values by name.
    ///
    /// # Errors
    ///
    /// [`SessionError::Disagreement`] when two programs declare one name differently,
    /// [`SessionError::NoCache`] when a program wants a paged cache and `cache` is `None`,
    /// [`SessionError::Dropout`] when such a program has dropout.
    pub fn new(
        programs: Vec<SessionProgram>,
        cache: Option<CacheOptions>,
    ) -> Result<Self, SessionError> {
        let mut plan = Self {
            programs: Vec::new(),
            store: BTreeMap::new(),
            store_bytes: 0,
            arena_bytes: 0,
            bytes: PlannedBytes::default(),
        };
        let mut pages = BTreeMap::new();
        for SessionProgram { program, sizes, kv } in programs {
            let arena = ArenaPlan::new(&program, sizes, kv);
            plan.arena_bytes = plan.arena_bytes.max(arena.bytes);
            let persistent = program
                .ids()
                .map(|id| plan.place(program.value(id)))
                .collect::<Result<Vec<_>, _>>()?;
            let mut prepared = Prepared {
                cache_of: vec![None; program.values.len()],
                program,
                arena,
                persistent,
                caches: BTreeMap::new(),
            };
            if kv == KvPlacement::Paged {
                plan.place_caches(&mut prepared, cache, &mut pages)?;
            }
            plan.programs.push(prepared);
        }
        plan.bytes.arena = plan.arena_bytes;
        Ok(plan)
    }

    /// Bytes by class; exactly what [`Session::new`] allocates.
    pub fn bytes(&self) -> PlannedBytes {
        self.bytes
    }

    /// Bytes at the beginning of the store that hold weights and nothing else.
    fn leading_weight_bytes(&self) -> usize {
        let others = self.store.values().filter(|value| value.class != Class::Weight);
        let others = others.map(|value| value.span.offset);
        let caches = self.programs.iter().flat_map(|prepared| prepared.caches.values());
        let pages = caches.map(|(_, pages)| pages.offset);
        others.chain(pages).min().unwrap_or(self.store_bytes)
    }

    /// Whether a weight could be lent in this form: in the planned encoding, and in the planned layout or
    /// in rows.
    pub fn takes(&self, name: &str, value_type: ValueType, bytes: usize) -> bool {
        let Some(value) = self.store.get(name) else { return false };
        let Persistent { class, value_type: planned, shape, .. } = value;
        let layout = value_type.layout();
        let is_readable = layout == planned.layout() || layout == Layout::RowMajor;
        is_readable
            && *class == Class::Weight
            && planned.laid_out(layout) == value_type
            && value_type.bytes(shape.row_elements()) == bytes
    }

    /// Takes weights that are lent out of what will be allocated; everything else moves up. Programs read
    /// them in the layout in which they lie.
    fn lend(&mut self, lent: &[LentWeights]) {
        let mut moved = BTreeMap::new();
        for (region, lent) in (LENT..).zip(lent) {
            for (name, (value_type, range)) in &lent.places {
                if range.is_empty() || !self.takes(name, *value_type, range.len()) {
                    continue;
                }
                let Some(value) = self.store.get_mut(name) else { continue };
                if moved.contains_key(&value.span.offset) {
                    // Somebody else lends it.
                    continue;
                }
                let span = Span { region, offset: range.start, bytes: range.len() };
                moved.insert(value.span.offset, span);
                self.bytes.weights += aligned(span.bytes);
                self.bytes.weights -= aligned(value.span.bytes);
                value.value_type = *value_type;
                let values =
                    self.programs.iter_mut().flat_map(|prepared| &mut prepared.program.values);
                values.filter(|known| known.name == *name).for_each(|known| {
                    known.value_type = *value_type;
                });
            }
        }
        let stays = |value: &&Persistent| !moved.contains_key(&value.span.offset);
        let mut kept: Vec<Span> =
            self.store.values().filter(stays).map(|value| value.span).collect();
        let caches = self.programs.iter().flat_map(|prepared| prepared.caches.values());
        kept.extend(caches.map(|(_, pages)| *pages));
        kept.sort_by_key(|span| span.offset);
        self.store_bytes = 0;
        for span in kept {
            // Programs share pages; spans without bytes share an offset with their neighbor.
            if span.bytes > 0 && !moved.contains_key(&span.offset) {
                let new = self.reserve(span.bytes);
                moved.insert(span.offset, new);
            }
        }
        let move_span = |span: &mut Span| {
            if span.bytes > 0 && span.region == STORE {
                *span = moved[&span.offset];
            }
        };
        self.store.values_mut().for_each(|value| move_span(&mut value.span));
        for prepared in &mut self.programs {
            prepared.persistent.iter_mut().flatten().for_each(&move_span);
            prepared.caches.values_mut().for_each(|(_, pages)| move_span(pages));
        }
    }

    fn reserve(&mut self, bytes: usize) -> Span {
        let span = Span { region: STORE, offset: self.store_bytes, bytes };
        self.store_bytes += aligned(bytes);
        span
    }

    fn place(&mut self, value: &Value) -> Result<Option<Span>, SessionError> {
        if matches!(value.class, Class::Temp | Class::Input) {
            return Ok(None);
        }
        if let Some(existing) = self.store.get(&value.name) {
            if existing.value_type != value.value_type || existing.shape != value.shape {
                return Err(SessionError::Disagreement {
                    name: value.name.clone(),
                    first: format!("{}{}", existing.value_type, existing.shape),
                    second: format!("{}{}", value.value_type, value.shape),
                });
            }
            return Ok(Some(existing.span));
        }
        // Persistent values have no dynamic axis, so the sizes do not matter.
        let span = self.reserve(value.bytes(&Sizes::dense(0, 0)));
        let class_bytes = match value.class {
            Class::Weight => &mut self.bytes.weights,
            Class::Gradient => &mut self.bytes.gradients,
            Class::State | Class::Input | Class::Temp => &mut self.bytes.states,
        };
        *class_bytes += aligned(span.bytes);
        self.store.insert(
            value.name.clone(),
            Persistent {
                class: value.class,
                value_type: value.value_type,
                shape: value.shape.clone(),
                span,
            },
        );
        Ok(Some(span))
    }

    /// Gives each `kv_write` its pages; programs that share a site share them.
    fn place_caches(
        &mut self,
        prepared: &mut Prepared,
        cache: Option<CacheOptions>,
        pages: &mut BTreeMap<u32, (CacheSpec, Span)>,
    ) -> Result<(), SessionError> {
        for index in 0..prepared.program.instrs.len() {
            let instr = &prepared.program.instrs[index];
            if instr.op.drops() {
                return Err(SessionError::Dropout { instr: index, op: instr.op.name() });
            }
            let Op::KvWrite { site } = instr.op else { continue };
            let options = cache.ok_or(SessionError::NoCache)?;
            let spec = cache_spec(&prepared.program, index, options);
            let entry = match pages.get(&site) {
                Some(&entry) => entry,
                None => {
                    let span = self.reserve(options.num_blocks * spec.page_bytes());
                    self.bytes.cache += aligned(span.bytes);
                    pages.insert(site, (spec, span));
                    (spec, span)
                }
            };
            for id in prepared.program.instrs[index].writes() {
                prepared.cache_of[id.index()] = Some(site);
            }
            prepared.caches.insert(site, entry);
        }
        Ok(())
    }
}

/// Geometry of the cache that one `kv_write` fills.
fn cache_spec(program: &Program, index: usize, options: CacheOptions) -> CacheSpec {
    let instr = &program.instrs[index];
    let dims = |slot: usize| {
        instr.inputs[slot].map(|id| {
            let shape = &program.value(id).shape;
            (shape.0[1].size.expect("verified: [t, g, k]"), shape.last())
        })
    };
    let (kv_heads, key_dim) = dims(0).expect("verified: keys are present");
    let values_in_keys = instr.inputs[1].is_none();
    // Values that are columns of their keys have no operand; the attention that reads them tells.
    let latent_dim = || {
        let reader = program.instrs.iter().find_map(|reader| match &reader.op {
            Op::Attention(attrs) if reader.inputs[1] == instr.outputs[0] => Some(attrs.value_dim),
            _ => None,
        });
        reader.unwrap_or(0)
    };
    CacheSpec {
        dtype: options.dtype,
        kv_heads,
        key_dim,
        value_dim: dims(1).map_or_else(latent_dim, |(_, value_dim)| value_dim),
        values_in_keys,
    }
}

/// Sees to it that lent weights can be read for the next seconds.
pub(crate) fn keep_lent(memory: &mut Memory, cpu: &Cpu) -> Result<(), RunError> {
    memory.keep_lent(cpu).map_err(|error| match error {
        MemoryError::Withdrawn(source) => RunError::Withdrawn { problem: source.to_string() },
        error => RunError::NoCopy { problem: error.to_string() },
    })
}

/// Programs with their memory.
#[derive(Debug)]
pub struct Session {
    cpu: Cpu,
    memory: Memory,
    programs: Vec<Prepared>,
    store: BTreeMap<String, Persistent>,
    bytes: PlannedBytes,
    /// The last run: the arena holds its outputs, and those of no other program.
    last: Option<(ProgramId, Sizes)>,
}

impl Session {
    /// Allocates and touches all planned memory. Persistent values start as zeros.
    ///
    /// # Errors
    ///
    /// [`SessionError::Memory`] when the system has no such memory.
    pub fn new(plan: MemoryPlan, cpu: Cpu) -> Result<Self, SessionError> {
        let mut memory = Memory::new();
        let store = memory.add_owned(plan.store_bytes, &cpu)?;
        let arena = memory.add_owned(plan.arena_bytes, &cpu)?;
        Ok(Self::over(memory, [store, arena], plan, cpu))
    }

    /// As [`new`](Self::new), but weights at the beginning of the store become resident when they are
    /// filled, which the caller does at once. Weights that are lent in a form that the plan
    /// [takes](MemoryPlan::takes) are read where they lie: no memory is allocated for them, and they need
    /// not be filled. A large cache becomes resident as it is written.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn to_be_loaded(
        mut plan: MemoryPlan,
        cpu: Cpu,
        mut lent: Vec<LentWeights>,
    ) -> Result<Self, SessionError> {
        // What nothing is read from need not stay resident.
        lent.retain(|lent| {
            let mut places = lent.places.iter();
            places.any(|(name, (value_type, range))| plan.takes(name, *value_type, range.len()))
        });
        plan.lend(&lent);
        let first = plan.leading_weight_bytes();
        let mut memory = Memory::new();
        // Clearing gigabytes of pages takes seconds, and a server's cache may never be full.
        let store = match plan.store_bytes.saturating_sub(first) <= TOUCHED_BYTES_MAX {
            true => memory.add_to_be_filled(plan.store_bytes, first, &cpu)?,
            false => memory.add_untouched(plan.store_bytes)?,
        };
        let arena = memory.add_owned(plan.arena_bytes, &cpu)?;
        for (expected, lent) in (LENT..).zip(lent) {
            let region = memory.add_lent(lent.memory)?;
            assert_eq!(region, expected, "regions are numbered from 0");
        }
        Ok(Self::over(memory, [store, arena], plan, cpu))
    }

    /// As [`new`](Self::new), but memory becomes resident when it is written: the first training step
    /// writes all of it, and a run is at that step the sooner.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn to_be_trained(plan: MemoryPlan, cpu: Cpu) -> Result<Self, SessionError> {
        let mut memory = Memory::new();
        let store = memory.add_untouched(plan.store_bytes)?;
        let arena = memory.add_untouched(plan.arena_bytes)?;
        Ok(Self::over(memory, [store, arena], plan, cpu))
    }

    fn over(memory: Memory, [store, arena]: [u16; 2], plan: MemoryPlan, cpu: Cpu) -> Self {
        assert_eq!((store, arena), (STORE, ARENA), "regions are numbered from 0");
        let MemoryPlan { programs, store, bytes, .. } = plan;
        Self { cpu, memory, programs, store, bytes, last: None }
    }

    /// What was planned: allocated, or read where it lies.
    pub fn bytes(&self) -> PlannedBytes {
        self.bytes
    }

    /// Bytes that the session allocated.
    pub fn allocated_bytes(&self) -> usize {
        self.memory.owned_bytes()
    }

    /// Bytes of weights that are read where they lie.
    pub fn lent_weight_bytes(&self) -> usize {
        let lent = self.store.values().filter(|value| self.memory.is_lent(value.span.region));
        lent.map(|value| aligned(value.span.bytes)).sum()
    }

    /// Sees to it that weights that are lent can be read for the next seconds: what is asked back is copied. Each run
    /// does so itself; between runs it is for whoever waits for long.
    ///
    /// # Errors
    ///
    /// [`RunError`] if the weights are gone.
    pub fn keep_lent(&mut self) -> Result<(), RunError> {
        keep_lent(&mut self.memory, &self.cpu)
    }

    /// Whether a weight is read where it lies, so that nothing can be written to it.
    pub fn is_lent(&self, name: &str) -> bool {
        self.store.get(name).is_some_and(|value| value.span.region != STORE)
    }

    /// The processor it runs on.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The processor and the arena, whose memory is free between runs: the outputs of the last run
    /// are lost.
    pub fn between_runs(&mut self) -> (&mut Cpu, &mut [f32]) {
        self.last = None;
        let bytes = self.memory.region_bytes(ARENA) / size_of::<f32>() * size_of::<f32>();
        let arena = Span { region: ARENA, offset: 0, bytes };
        (&mut self.cpu, self.memory.write(arena).f32s())
    }

    /// A program of the session.
    pub fn program(&self, id: ProgramId) -> &Program {
        &self.programs[id.0].program
    }

    /// Names, classes, types and shapes of the persistent values, in name order.
    pub fn persistent(&self) -> impl Iterator<Item = (&str, Class, ValueType, &crate::Shape)> {
        self.store.iter().map(|(name, p)| (name.as_str(), p.class, p.value_type, &p.shape))
    }

    /// Runs one program.
    ///
    /// # Errors
    ///
    /// [`RunError`] says which leave something computed; its outputs are lost.
    pub fn run(&mut self, program: ProgramId, run: &Run<'_>) -> Result<(), RunError> {
        self.execute(program, run, None)
    }

    /// Runs one program and calls `observe` with each instruction's index and its seconds.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn run_observed(
        &mut self,
        program: ProgramId,
        run: &Run<'_>,
        observe: &mut dyn FnMut(usize, f64),
    ) -> Result<(), RunError> {
        self.execute(program, run, Some(observe))
    }

    fn execute(
        &mut self,
        program: ProgramId,
        run: &Run<'_>,
        observe: Option<&mut dyn FnMut(usize, f64)>,
    ) -> Result<(), RunError> {
        let prepared = &self.programs[program.0];
        let sizes = run.sizes();
        execute::check_run(prepared, run, &sizes)?;
        keep_lent(&mut self.memory, &self.cpu)?;
        self.last = None;
        execute::execute(&self.cpu, &mut self.memory, prepared, run, observe)?;
        self.last = Some((program, sizes));
        Ok(())
    }

    /// Where a persistent value or an output of the last run lies.
    fn locate(&self, program: Option<ProgramId>, name: &str) -> Option<(ValueType, Span)> {
        if let Some(persistent) = self.store.get(name) {
            return Some((persistent.value_type, persistent.span));
        }
        let prepared = &self.programs[program?.0];
        let id = prepared.program.find(name)?;
        let kept = prepared.program.outputs.contains(&id);
        let (_, sizes) = self.last.filter(|(last, _)| Some(*last) == program)?;
        let span = prepared.span(id, &sizes);
        kept.then(|| (prepared.program.value(id).value_type, span))
    }

    /// Reads an output of the last run, which was of `program`, at that run's sizes.
    ///
    /// # Panics
    ///
    /// Panics if the program has no such `f32` output, or another program ran since: programs
    /// share the arena.
    pub fn output(&self, program: ProgramId, name: &str) -> &[f32] {
        match self.locate(Some(program), name) {
            Some((ValueType::F32, span)) => self.memory.read(span).f32s(),
            found => panic!("{name} is not an f32 output of the program: {found:?}"),
        }
    }

    /// Reads a scalar `f64` output of the last run, which was of `program`.
    ///
    /// # Panics
    ///
    /// Panics if the program has no such output, or another program ran since.
    pub fn output_f64(&self, program: ProgramId, name: &str) -> f64 {
        match self.locate(Some(program), name) {
            Some((ValueType::F64, span)) => self.memory.read(span).f64s()[0],
            found => panic!("{name} is not an f64 output of the program: {found:?}"),
        }
    }

    /// Copies one block of every cache onto another: keys and values of sixteen tokens, all layers.
    ///
    /// # Panics
    ///
    /// Panics if a block is outside the cache, or both are the same.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let caches: BTreeMap<_, _> =
            self.programs.iter().flat_map(|prepared| &prepared.caches).collect();
        for (spec, pages) in caches.into_values() {
            let page = |block: u32| {
                let bytes = spec.page_bytes();
                let offset = block as usize * bytes;
                assert!(offset + bytes <= pages.bytes, "block {block} is outside the cache");
                Span { region: pages.region, offset: pages.offset + offset, bytes }
            };
            let ([source], [target]) = self.memory.split([page(from)], [page(to)]);
            target.u8s().copy_from_slice(source.u8s());
        }
    }

    /// The stored bytes of a persistent value; `None` if there is no such value.
    pub fn stored(&self, name: &str) -> Option<&[u8]> {
        self.store.get(name).map(|persistent| self.memory.read(persistent.span).u8s())
    }

    /// The stored bytes of a persistent value, to fill; `None` if there is no such value.
    pub fn stored_mut(&mut self, name: &str) -> Option<&mut [u8]> {
        let span = self.store.get(name)?.span;
        Some(self.memory.write(span).u8s())
    }

    /// As [`stored_mut`](Self::stored_mut), with the processor to fill it with.
    pub fn stored_mut_with_cpu(&mut self, name: &str) -> Option<(&Cpu, BytesMut<'_>)> {
        let span = self.store.get(name)?.span;
        Some((&self.cpu, self.memory.write(span)))
    }

    /// An `f32` persistent value; `None` if there is no such value or it is of another type.
    pub fn stored_f32(&self, name: &str) -> Option<&[f32]> {
        let persistent = self.store.get(name)?;
        (persistent.value_type == ValueType::F32).then(|| self.memory.read(persistent.span).f32s())
    }

    /// An `f32` persistent value, to fill.
    pub fn stored_f32_mut(&mut self, name: &str) -> Option<&mut [f32]> {
        let persistent = self.store.get(name)?;
        if persistent.value_type != ValueType::F32 {
            return None;
        }
        let span = persistent.span;
        Some(self.memory.write(span).f32s())
    }
}

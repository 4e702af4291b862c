//! Small programs over a table of random vectors, and how to run them.

use std::collections::BTreeSet;

use cairn_kernels::{CacheType, Cpu, Encoding, Isa, Layout, SeqSlot};
use cairn_program::{
    Builder, CacheOptions, Class, Dim, DimName, Feed, KvPlacement, MemoryPlan, Program, ProgramId,
    Run, Session, SessionProgram, Sizes, ValueId, ValueType,
};

/// Rows of the lookup table that feeds every program.
pub(crate) const ROWS: usize = 7;
/// Width of its rows.
pub(crate) const WIDTH: usize = 12;
/// Tokens of a run: two sequences of 4 and 3.
pub(crate) const IDS: [u32; 7] = [0, 3, 1, 6, 2, 5, 4];
/// Positions restart with each sequence.
pub(crate) const POSITIONS: [u32; 7] = [0, 1, 2, 3, 0, 1, 2];

pub(crate) fn hidden() -> Dim {
    Dim::fixed(DimName::Hidden, WIDTH)
}

pub(crate) fn dim(name: DimName, size: usize) -> Dim {
    Dim::fixed(name, size)
}

pub(crate) fn sequences() -> [SeqSlot<'static>; 2] {
    [
        SeqSlot { start: 0, len: 4, cached: 0, blocks: &[] },
        SeqSlot { start: 4, len: 3, cached: 0, blocks: &[] },
    ]
}

/// A deterministic stream of numbers in (−1, 1).
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((self.0 >> 40) as f32) / (1_u32 << 23) as f32 - 1.0
    }

    pub(crate) fn fill(&mut self, out: &mut [f32]) {
        out.fill_with(|| self.next());
    }
}

/// A builder that has looked up one vector per token in the trainable table `table`.
pub(crate) fn with_vectors() -> (Builder, ValueId) {
    let mut builder = Builder::new();
    let ids = builder.input("ids", ValueType::U32, &[Dim::TOKENS]);
    builder.input("positions", ValueType::U32, &[Dim::TOKENS]);
    let rows = dim(DimName::Vocab, ROWS);
    let storage = (Encoding::F32, Layout::RowMajor);
    let table = builder.matrix("table", &[rows], &[hidden()], storage);
    let x = builder.push("x", cairn_program::Op::Embed, &[ids, table]).unwrap();
    (builder, x)
}

/// Names of the plain `f32` weights: what gradients are checked for.
pub(crate) fn trainable(program: &Program) -> BTreeSet<String> {
    program
        .of_class(Class::Weight)
        .filter(|(_, weight)| weight.value_type == ValueType::F32)
        .map(|(_, weight)| weight.name.clone())
        .collect()
}

pub(crate) fn session(program: Program, kv: KvPlacement) -> Session {
    let cache =
        (kv == KvPlacement::Paged).then_some(CacheOptions { dtype: CacheType::F32, num_blocks: 8 });
    let program = SessionProgram { program, sizes: Sizes::dense(32, 4), kv };
    let plan = MemoryPlan::new(vec![program], cache).unwrap();
    Session::new(plan, Cpu::new(Isa::best(), 2)).unwrap()
}

/// Fills every `f32` weight with noise, norms around one.
pub(crate) fn fill_weights(session: &mut Session, seed: u64) {
    let names: Vec<String> = session
        .persistent()
        .filter(|(_, class, value_type, _)| {
            *class == Class::Weight && *value_type == ValueType::F32
        })
        .map(|(name, ..)| name.to_owned())
        .collect();
    for (index, name) in names.iter().enumerate() {
        let mut noise = Noise(seed + index as u64);
        let weight = session.stored_f32_mut(name).unwrap();
        noise.fill(weight);
        let scale = if name.contains("norm") { 0.2 } else { 0.5 };
        let shift = if name.contains("norm") { 1.0 } else { 0.0 };
        weight.iter_mut().for_each(|w| *w = *w * scale + shift);
    }
}

/// Runs the one program of a session on the standard tokens.
pub(crate) fn run(session: &mut Session, more: &[Feed<'_>]) {
    let mut feeds = vec![Feed::u32("ids", &IDS), Feed::u32("positions", &POSITIONS)];
    feeds.extend_from_slice(more);
    let outputs =
        more.iter().find(|feed| feed.name == "rows").map_or(IDS.len(), |feed| match feed.data {
            cairn_program::FeedData::U32(rows) => rows.len(),
            _ => IDS.len(),
        });
    let sequences = sequences();
    let run = Run { outputs, row_tokens: 4, ..Run::forward(&feeds, &sequences) };
    session.run(ProgramId(0), &run).unwrap();
}

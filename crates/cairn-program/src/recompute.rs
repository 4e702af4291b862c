//! Recomputation: trading arithmetic for memory.
//!
//! A training program keeps every value that its backward pass reads. [`recompute`] drops chosen
//! ones and clones their producers in front of the first backward instruction that needs them. The
//! clones run the same kernels on the same bits, so losses do not change.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::op::Op;
use crate::program::{Instr, Program};
use crate::value::{Class, ValueId};

/// What is thrown away after the forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Nothing: the fastest.
    None,
    /// Results of cheap row operations (norms, activations, GLU): a few percent of the time.
    #[default]
    Cheap,
    /// Everything inside this many blocks, counted from the first, but their inputs (Chen et al. 2016,
    /// <https://arxiv.org/abs/1604.06174>): about a third more arithmetic for each. Of the other
    /// blocks, what [`Cheap`](Self::Cheap) drops. The first blocks, because memory is scarcest when
    /// the backward pass begins, and it begins with the last.
    Blocks(u32),
}

impl Recompute {
    /// Everything inside every block.
    pub const ALL_BLOCKS: Self = Self::Blocks(u32::MAX);
}

/// Rewrites a training program so that the chosen values are computed again for the backward pass.
pub fn recompute(program: &Program, policy: Recompute) -> Program {
    let dropped = match policy {
        Recompute::None => return program.clone(),
        Recompute::Cheap => dropped_by(program, is_cheap),
        Recompute::Blocks(count) => {
            let boundary = boundary_values(program);
            let chosen = |instr: &Instr| instr.block.is_some_and(|block| block < count);
            let mut inside = dropped_by(program, chosen);
            inside.retain(|id| !boundary.contains(id));
            inside.extend(dropped_by(program, is_cheap));
            inside
        }
    };
    Rewriter::new(program, dropped).run()
}

/// Row operations of a block: far less arithmetic than the products around them.
fn is_cheap(instr: &Instr) -> bool {
    let cheap =
        matches!(instr.op, Op::RmsNorm(_) | Op::LayerNorm(_) | Op::Glu(_) | Op::Activation(_));
    cheap && instr.block.is_some()
}

/// Temporaries written by the forward instructions that `select` picks, outputs left out.
fn dropped_by(program: &Program, select: impl Fn(&Instr) -> bool) -> BTreeSet<ValueId> {
    let forward = &program.instrs[..program.forward_len];
    let mut dropped: BTreeSet<ValueId> =
        forward.iter().filter(|instr| select(instr)).flat_map(Instr::writes).collect();
    dropped.retain(|id| program.value(*id).class == Class::Temp && !program.outputs.contains(id));
    dropped
}

/// Values that one block makes and another (or the head) reads in the forward pass.
fn boundary_values(program: &Program) -> BTreeSet<ValueId> {
    let mut made_in: HashMap<ValueId, Option<u32>> = HashMap::new();
    let mut boundary = BTreeSet::new();
    for instr in &program.instrs[..program.forward_len] {
        for id in instr.reads() {
            if made_in.get(&id).is_some_and(|block| *block != instr.block) {
                boundary.insert(id);
            }
        }
        made_in.extend(instr.writes().map(|id| (id, instr.block)));
    }
    boundary
}

struct Rewriter<'a> {
    source: &'a Program,
    result: Program,
    dropped: BTreeSet<ValueId>,
    producer: HashMap<ValueId, usize>,
    clone_of: HashMap<ValueId, ValueId>,
}

impl<'a> Rewriter<'a> {
    fn new(source: &'a Program, dropped: BTreeSet<ValueId>) -> Self {
        let mut producer = HashMap::new();
        for (index, instr) in source.instrs[..source.forward_len].iter().enumerate() {
            producer.extend(instr.writes().map(|id| (id, index)));
        }
        let mut result = source.clone();
        result.instrs.truncate(source.forward_len);
        Self { source, result, dropped, producer, clone_of: HashMap::new() }
    }

    fn run(mut self) -> Program {
        for index in self.source.forward_len..self.source.instrs.len() {
            let mut instr = self.source.instrs[index].clone();
            for id in instr.inputs.iter_mut().flatten() {
                *id = self.available(*id);
            }
            self.result.instrs.push(instr);
        }
        self.result
    }

    /// The value to read in place of `id` in the backward pass, emitting its recomputation if it
    /// is dropped and this is its first use.
    fn available(&mut self, id: ValueId) -> ValueId {
        if !self.dropped.contains(&id) {
            return id;
        }
        if let Some(&clone) = self.clone_of.get(&id) {
            return clone;
        }
        let mut instr = self.source.instrs[self.producer[&id]].clone();
        for input in instr.inputs.iter_mut().flatten() {
            *input = self.available(*input);
        }
        for output in instr.outputs.iter_mut().flatten() {
            let mut value = self.source.value(*output).clone();
            value.name = format!("{}.again", value.name);
            let clone =
                ValueId(u32::try_from(self.result.values.len()).expect("fewer than 2^32 values"));
            self.result.values.push(value);
            self.clone_of.insert(*output, clone);
            *output = clone;
        }
        self.result.instrs.push(instr);
        self.clone_of[&id]
    }
}

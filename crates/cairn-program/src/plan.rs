//! Planning: where every value lives, so that the bytes of a run are known before it starts.
//!
//! Temporaries share one arena. A value's lifetime runs from the instruction that writes it to the
//! last that reads it; values whose lifetimes do not meet may share bytes. Operations that can work
//! in place reuse the buffer of an operand that dies with them. Offsets are chosen largest buffer
//! first, each at the lowest offset free for its whole lifetime (the greedy-by-size strategy of
//! Pisarchyk and Lee 2020, <https://arxiv.org/abs/2001.03288>).

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::dim::Sizes;
use crate::op::Op;
use crate::program::{Instr, Program};
use crate::value::{Class, ValueId};

/// Every offset is a multiple of this: a cache line, and the widest vector.
pub const ALIGNMENT: usize = 64;

/// Rounds up to [`ALIGNMENT`].
pub(crate) fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Where keys and values wait for later queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvPlacement {
    /// In the arena: they die with the run (training, scoring).
    Arena,
    /// In the pages of a cache that persists between runs (generation, serving).
    Paged,
}

/// Bytes of one buffer of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Offset in the arena.
    pub offset: usize,
    /// Bytes at the plan's bounds.
    pub bytes: usize,
}

/// Offsets of one program's temporaries and inputs.
#[derive(Clone, Debug)]
pub struct ArenaPlan {
    /// Bound of each dynamic axis.
    pub sizes: Sizes,
    /// Where keys and values live.
    pub kv: KvPlacement,
    /// Bytes of the arena.
    pub bytes: usize,
    slots: Vec<Option<Slot>>,
    /// Working memory of single instructions: the head's chunk of logits, sorted routed rows.
    scratch: Vec<Option<Slot>>,
}

impl ArenaPlan {
    /// Lays out the arena of `program` for runs of at most `sizes`.
    pub fn new(program: &Program, sizes: Sizes, kv: KvPlacement) -> Self {
        let mut buffers = Buffers::collect(program, &sizes, kv);
        buffers.assign_offsets();
        let slot = |buffer: Option<usize>| {
            buffer.map(|index| {
                let buffer = &buffers.list[index];
                Slot { offset: buffer.offset, bytes: buffer.bytes }
            })
        };
        let slots = buffers.of_value.iter().map(|&buffer| slot(buffer)).collect();
        let scratch = buffers.of_instr.iter().map(|&buffer| slot(buffer)).collect();
        Self { sizes, kv, bytes: buffers.total(), slots, scratch }
    }

    /// Where a temporary or input lies; `None` for persistent values and for cached keys.
    pub fn slot(&self, id: ValueId) -> Option<Slot> {
        self.slots[id.index()]
    }

    /// Working memory of an instruction.
    pub fn scratch(&self, instr: usize) -> Option<Slot> {
        self.scratch[instr]
    }
}

/// Result slots that may take over the buffer of an operand slot: the kernel works in place.
pub(crate) fn in_place(op: &Op) -> Option<(usize, usize)> {
    match op {
        Op::Add | Op::Rope(_) | Op::RopeGrad(_) | Op::Scale(_) | Op::Dropout(_) => Some((0, 0)),
        Op::MatmulDx => Some((2, 0)),
        Op::Matmul => Some((3, 0)),
        Op::RmsNormGrad(_) | Op::LayerNormGrad(_) => Some((3, 0)),
        _ => None,
    }
}

struct Buffer {
    first: usize,
    last: usize,
    bytes: usize,
    offset: usize,
    /// Holds an input or an output of the program, or cached keys: never taken over.
    pinned: bool,
}

struct Buffers {
    list: Vec<Buffer>,
    of_value: Vec<Option<usize>>,
    of_instr: Vec<Option<usize>>,
}

impl Buffers {
    fn collect(program: &Program, sizes: &Sizes, kv: KvPlacement) -> Self {
        let end = program.instrs.len();
        let mut buffers = Self {
            list: Vec::new(),
            of_value: vec![None; program.values.len()],
            of_instr: vec![None; end],
        };
        for (id, value) in program.of_class(Class::Input) {
            let bytes = aligned(value.bytes(sizes));
            buffers.of_value[id.index()] = Some(buffers.list.len());
            buffers.list.push(Buffer { first: 0, last: end, bytes, offset: 0, pinned: true });
        }
        let last_read = last_reads(program);
        for (index, instr) in program.instrs.iter().enumerate() {
            buffers.place_results(program, sizes, kv, (index, instr), &last_read);
            let scratch = scratch_bytes(program, instr, sizes);
            if scratch != 0 {
                let bytes = aligned(scratch);
                buffers.of_instr[index] = Some(buffers.list.len());
                let buffer = Buffer { first: index, last: index, bytes, offset: 0, pinned: true };
                buffers.list.push(buffer);
            }
        }
        buffers
    }

    fn place_results(
        &mut self,
        program: &Program,
        sizes: &Sizes,
        kv: KvPlacement,
        (index, instr): (usize, &Instr),
        last_read: &HashMap<ValueId, usize>,
    ) {
        for (slot, &output) in instr.outputs.iter().enumerate() {
            let Some(id) = output else { continue };
            if program.value(id).class != Class::Temp {
                continue;
            }
            let last = last_read.get(&id).copied().unwrap_or(index).max(index);
            if let Op::KvWrite { .. } = instr.op {
                if kv == KvPlacement::Arena {
                    // Reading through the cache's name reads the same bytes.
                    let source = instr.inputs[slot].expect("kv_write has what it yields");
                    self.of_value[id.index()] = self.of_value[source.index()];
                    self.extend(source, last);
                }
                continue;
            }
            let buffer = self.taken_over(index, instr, slot).unwrap_or_else(|| {
                let bytes = aligned(program.value(id).bytes(sizes));
                let pinned = false;
                self.list.push(Buffer { first: index, last, bytes, offset: 0, pinned });
                self.list.len() - 1
            });
            self.of_value[id.index()] = Some(buffer);
            self.list[buffer].last = self.list[buffer].last.max(last);
        }
    }

    /// The operand's buffer that result `slot` may reuse: it dies here and is read only once.
    fn taken_over(&self, index: usize, instr: &Instr, slot: usize) -> Option<usize> {
        let (operand, _) = in_place(&instr.op).filter(|&(_, result)| result == slot)?;
        let buffer = self.of_value[instr.inputs.get(operand).copied().flatten()?.index()]?;
        let readers = instr.reads().filter(|id| self.of_value[id.index()] == Some(buffer)).count();
        let free = self.list[buffer].last == index && !self.list[buffer].pinned;
        (free && readers == 1).then_some(buffer)
    }

    fn extend(&mut self, id: ValueId, last: usize) {
        if let Some(buffer) = self.of_value[id.index()] {
            self.list[buffer].last = self.list[buffer].last.max(last);
        }
    }

    fn assign_offsets(&mut self) {
        let mut order: Vec<usize> = (0..self.list.len()).collect();
        order.sort_by_key(|&index| (std::cmp::Reverse(self.list[index].bytes), index));
        let mut placed: Vec<usize> = Vec::with_capacity(order.len());
        for index in order {
            let Buffer { first, last, bytes, .. } = self.list[index];
            let mut offset = 0;
            // `placed` is kept in order of offset, so the first gap that fits is the lowest.
            for &other in &placed {
                let other = &self.list[other];
                if other.last < first || last < other.first {
                    continue;
                }
                if offset + bytes <= other.offset {
                    break;
                }
                offset = offset.max(other.offset + other.bytes);
            }
            self.list[index].offset = offset;
            let position = placed.partition_point(|&other| self.list[other].offset <= offset);
            placed.insert(position, index);
        }
    }

    fn total(&self) -> usize {
        self.list.iter().map(|buffer| buffer.offset + buffer.bytes).max().unwrap_or(0)
    }
}

/// The last instruction that reads each value; outputs of the program are read after the end.
fn last_reads(program: &Program) -> HashMap<ValueId, usize> {
    let mut last = HashMap::new();
    for (index, instr) in program.instrs.iter().enumerate() {
        last.extend(instr.reads().map(|id| (id, index)));
    }
    last.extend(program.outputs.iter().map(|&id| (id, program.instrs.len())));
    last
}

/// Working memory of one instruction, in bytes: the head's chunk of logits, or routed rows sorted by
/// expert.
fn scratch_bytes(program: &Program, instr: &Instr, sizes: &Sizes) -> usize {
    if let Op::ExpertMatmul | Op::ExpertMatmulDx | Op::ExpertMatmulDw = instr.op {
        let weight = if instr.op == Op::ExpertMatmulDw { 3 } else { 1 };
        let shape = |slot: usize| instr.inputs[slot].map(|id| &program.value(id).shape);
        let rows = shape(2).map_or(0, |shape| shape.elements(sizes));
        let experts = shape(weight).and_then(|shape| shape.0[0].size).unwrap_or(0);
        return 4 * cairn_kernels::expert_scratch_len(rows, experts);
    }
    let weight = match instr.op {
        Op::TokenLogprob(_) | Op::CrossEntropy(_) => instr.inputs[1],
        Op::TokenLogprobGrad(_) => instr.inputs[2],
        _ => None,
    };
    weight.map_or(0, |id| {
        let (vocab, _) = program.value(id).matrix(1);
        4 * cairn_kernels::HEAD_CHUNK.min(sizes.outputs.max(sizes.tokens)) * vocab
    })
}

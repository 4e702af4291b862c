//! Execution: each instruction through its kernel.
//!
//! One `match` over the instruction set. Operands are resolved to spans of the session's memory at
//! the sizes of the run; nothing is allocated here. An operation that works in place gets its
//! operand copied into the result first where the plan could not share the buffer.

mod adjoint;
mod experts;
mod forward;
mod update;

use std::time::Instant;

use cairn_kernels::{AttentionSpec, Bytes, Cpu, LowRank, Memory, RaggedBatch, Span, Weight};

use crate::dim::{DimName, Sizes};
use crate::op::{AttentionAttrs, Op};
use crate::program::Instr;
use crate::session::{Feed, FeedData, Prepared, Run, RunError, keep_lent};
use crate::value::{Class, Value, ValueId, ValueType};

/// The input that is zero for every token where a run does not feed it: to have several types of
/// tokens is rare.
pub const TOKEN_TYPES: &str = "token_types";

/// Checks everything about a run that could make a kernel read or write where it must not.
pub(crate) fn check_run(prepared: &Prepared, run: &Run<'_>, sizes: &Sizes) -> Result<(), RunError> {
    let bounds = &prepared.arena.sizes;
    for (what, actual, bound) in [
        ("tokens", sizes.tokens, bounds.tokens),
        ("sequences", sizes.sequences, bounds.sequences),
        ("output rows", sizes.outputs, bounds.outputs),
    ] {
        if actual > bound {
            return Err(RunError::Bound { what, actual, bound });
        }
    }
    check_sequences(prepared, run)?;
    for (_, input) in prepared.program.of_class(Class::Input) {
        match find_feed(run, &input.name) {
            Err(_) if input.name == TOKEN_TYPES => {}
            feed => check_feed(input, feed?, sizes)?,
        }
    }
    check_indices(prepared, run, sizes)
}

fn find_feed<'a>(run: &'a Run<'_>, name: &str) -> Result<&'a Feed<'a>, RunError> {
    run.feeds
        .iter()
        .find(|feed| feed.name == name)
        .ok_or_else(|| RunError::Missing { name: name.to_owned() })
}

fn check_feed(input: &Value, feed: &Feed<'_>, sizes: &Sizes) -> Result<(), RunError> {
    let expected = input.shape.elements(sizes);
    let (fits, length, fed) = match (feed.data, input.value_type) {
        (FeedData::U32(data), value_type) => (value_type == ValueType::U32, data.len(), "u32"),
        (FeedData::F32(data), value_type) => (value_type == ValueType::F32, data.len(), "f32"),
        (FeedData::F64(data), value_type) => (value_type == ValueType::F64, data.len(), "f64"),
    };
    if fits && length == expected {
        return Ok(());
    }
    Err(RunError::Feed {
        name: input.name.clone(),
        expected,
        value_type: input.value_type.to_string(),
        found: format!("{length} of {fed}"),
    })
}

fn check_sequences(prepared: &Prepared, run: &Run<'_>) -> Result<(), RunError> {
    let caches = prepared.caches.values();
    let num_blocks = caches.map(|(spec, pages)| pages.bytes / spec.page_bytes()).min().unwrap_or(0);
    let mut next = 0;
    for (index, sequence) in run.sequences.iter().enumerate() {
        let fault = |problem: String| RunError::Sequence { sequence: index, problem };
        if sequence.start != next {
            return Err(fault(format!("starts at row {}, expected {next}", sequence.start)));
        }
        next += sequence.len;
        if prepared.caches.is_empty() {
            if sequence.cached != 0 {
                return Err(fault("has cached keys, but the program has no cache".to_owned()));
            }
            continue;
        }
        let needed = (sequence.cached + sequence.len).div_ceil(cairn_kernels::PAGE_TOKENS);
        if sequence.blocks.len() < needed {
            let found = sequence.blocks.len();
            return Err(fault(format!("needs {needed} blocks, its table has {found}")));
        }
        if let Some(block) = sequence.blocks.iter().find(|&&block| block as usize >= num_blocks) {
            return Err(fault(format!("block {block} is not below {num_blocks}")));
        }
    }
    Ok(())
}

/// Ids, targets and row indices index other operands; the kernels rely on them being in range.
fn check_indices(prepared: &Prepared, run: &Run<'_>, sizes: &Sizes) -> Result<(), RunError> {
    let program = &prepared.program;
    for instr in &program.instrs {
        let (index_slot, bound) = match instr.op {
            Op::Embed => (0, program.value(instr.inputs[1].expect("verified")).matrix_rows()),
            Op::PositionEmbed => {
                (1, program.value(instr.inputs[2].expect("verified")).matrix_rows())
            }
            Op::GatherRows => (1, sizes.tokens),
            Op::TokenLogprob(_) | Op::CrossEntropy(_) => {
                (2, program.value(instr.inputs[1].expect("verified")).matrix_rows())
            }
            Op::ExpertMatmul | Op::ExpertMatmulDx => {
                (2, program.value(instr.inputs[1].expect("verified")).matrix_rows())
            }
            Op::ExpertMatmulDw => {
                (2, program.value(instr.inputs[3].expect("verified")).matrix_rows())
            }
            Op::ExpertLoad => (1, program.value(instr.inputs[0].expect("verified")).shape.last()),
            Op::RouteGrad(_) => (2, program.value(instr.inputs[1].expect("verified")).shape.last()),
            _ => continue,
        };
        let input = program.value(instr.inputs[index_slot].expect("verified"));
        if input.class != Class::Input {
            continue;
        }
        let data = match find_feed(run, &input.name) {
            Err(_) if input.name == TOKEN_TYPES => continue,
            feed => feed?.data,
        };
        let FeedData::U32(data) = data else { continue };
        if let Some(position) = data.iter().position(|&row| row as usize >= bound) {
            return Err(RunError::Range {
                name: input.name.clone(),
                position,
                found: data[position],
                bound,
            });
        }
    }
    Ok(())
}

/// Instructions between two looks at weights that are lent, where tokens are few: far less than a second of
/// work, and a look costs what a call of the system costs. With more tokens, each instruction is enough.
const INSTRS_BETWEEN_LOOKS: usize = 64;
/// Tokens that are few.
const FEW_TOKENS: usize = 16;

/// Runs every instruction; the run has been checked. The clock is read only for an observer.
pub(crate) fn execute(
    cpu: &Cpu,
    memory: &mut Memory,
    prepared: &Prepared,
    run: &Run<'_>,
    mut observe: Option<&mut dyn FnMut(usize, f64)>,
) -> Result<(), RunError> {
    let sizes = run.sizes();
    for (id, input) in prepared.program.of_class(Class::Input) {
        let target = memory.write(prepared.span(id, &sizes));
        let Ok(feed) = find_feed(run, &input.name) else {
            // Checked: the one input that may be absent.
            target.u8s().fill(0);
            continue;
        };
        match feed.data {
            FeedData::U32(data) => target.u32s().copy_from_slice(data),
            FeedData::F32(data) => target.f32s().copy_from_slice(data),
            FeedData::F64(data) => target.f64s().copy_from_slice(data),
        }
    }
    let instrs = &prepared.program.instrs;
    let between = if sizes.tokens <= FEW_TOKENS { INSTRS_BETWEEN_LOOKS } else { 1 };
    let (mut index, mut next_look) = (0, between - 1);
    while let Some(instr) = instrs.get(index) {
        if next_look <= index {
            keep_lent(memory, cpu)?;
            next_look = index + between;
        }
        let mut step = Step { cpu, memory, prepared, run, sizes: &sizes, index, instr };
        // An observer wants the time of each.
        let Some(observe) = &mut observe else {
            index += step.dispatch_together();
            continue;
        };
        let start = Instant::now();
        step.dispatch();
        observe(index, start.elapsed().as_secs_f64());
        index += 1;
    }
    Ok(())
}

/// How many of the first instructions multiply the same inputs, none of them starting from a sum.
fn matmuls_alike(instrs: &[Instr]) -> usize {
    let is_alike = |instr: &&Instr| {
        let first = &instrs[0];
        instr.op == Op::Matmul
            && instr.inputs.get(3).copied().flatten().is_none()
            && (instr.inputs[0], instr.compute) == (first.inputs[0], first.compute)
    };
    instrs.iter().take(TOGETHER_MAX).take_while(is_alike).count()
}

/// Products that share out the threads together, at most: queries, keys and values.
const TOGETHER_MAX: usize = 3;

/// One instruction about to run.
struct Step<'a> {
    cpu: &'a Cpu,
    memory: &'a mut Memory,
    prepared: &'a Prepared,
    run: &'a Run<'a>,
    sizes: &'a Sizes,
    index: usize,
    instr: &'a Instr,
}

impl<'a> Step<'a> {
    /// Runs this instruction, or the products that begin with it; how many.
    fn dispatch_together(&mut self) -> usize {
        let matmuls = self.matmuls_together();
        match matmuls {
            2 => self.matmuls::<2>(),
            TOGETHER_MAX => self.matmuls::<TOGETHER_MAX>(),
            _ => self.dispatch(),
        }
        matmuls.max(1)
    }

    /// Products of the same inputs from this instruction on, as many as leave each other's memory alone: a
    /// plan made for one after the other may give a result what an earlier one does not need any more.
    fn matmuls_together(&self) -> usize {
        let instrs = &self.prepared.program.instrs[self.index..];
        let spans = |instr: &Instr| {
            let of = |id: Option<ValueId>| {
                id.map_or_else(Span::default, |id| self.prepared.span(id, self.sizes))
            };
            let input = |slot: usize| of(instr.inputs.get(slot).copied().flatten());
            [of(instr.outputs[0]), input(0), input(1), input(2)]
        };
        let alike = &instrs[..matmuls_alike(instrs)];
        let is_apart = |count: &usize| {
            let (earlier, [last, ..]) = (&alike[..*count], spans(&alike[*count]));
            earlier.iter().all(|instr| spans(instr).iter().all(|span| !last.overlaps(span)))
        };
        if alike.len() < 2 {
            alike.len()
        } else {
            1 + (1..alike.len()).take_while(is_apart).count()
        }
    }

    fn dispatch(&mut self) {
        match &self.instr.op {
            Op::Embed => self.embed(),
            Op::PositionEmbed => self.position_embed(),
            Op::GatherRows => self.gather_rows(),
            Op::Matmul => self.matmul(),
            Op::HeadMatmul => self.head_matmul(),
            Op::Route(routing) => self.route(*routing),
            Op::RouteGrad(routing) => self.route_grad(*routing),
            Op::ExpertMatmul => self.expert_matmul(),
            Op::ExpertMatmulDx => self.expert_matmul_dx(),
            Op::ExpertMatmulDw => self.expert_matmul_dw(),
            Op::ExpertSum => self.expert_sum(),
            Op::ExpertSumGrad => self.expert_sum_grad(),
            Op::ExpertLoad => self.expert_load(),
            Op::ExpertLoadGrad => self.expert_load_grad(),
            Op::BalanceLoss(attrs) => self.balance_loss(*attrs),
            Op::BalanceLossGrad(attrs) => self.balance_loss_grad(*attrs),
            Op::RmsNorm(attrs) => self.rms_norm(*attrs),
            Op::LayerNorm(attrs) => self.layer_norm(*attrs),
            Op::Rope(attrs) => self.rope(attrs, false),
            Op::RopeGrad(attrs) => self.rope(attrs, true),
            Op::KvWrite { site } => self.kv_write(*site),
            Op::Attention(attrs) => self.attention(attrs),
            Op::Glu(act) => self.glu(*act),
            Op::Activation(act) => self.activation(*act),
            Op::Add => self.add(),
            Op::Scale(factor) => self.scale(*factor),
            Op::Softcap(cap) => self.softcap(*cap),
            Op::Dropout(attrs) => self.dropout(*attrs),
            Op::Concat(_) => self.concat(),
            Op::Split(..) => self.split(),
            Op::TokenLogprob(attrs) => self.token_logprob(*attrs),
            Op::CrossEntropy(attrs) => self.cross_entropy(*attrs),
            Op::TokenLogprobGrad(attrs) => self.token_logprob_grad(*attrs),
            Op::EmbedGrad => self.embed_grad(),
            Op::MatmulDx => self.matmul_dx(),
            Op::MatmulDw => self.matmul_dw(),
            Op::BiasGrad => self.bias_grad(),
            Op::HeadMatmulDx => self.head_matmul_dx(),
            Op::HeadMatmulDw => self.head_matmul_dw(),
            Op::RmsNormGrad(attrs) => self.rms_norm_grad(*attrs),
            Op::LayerNormGrad(attrs) => self.layer_norm_grad(*attrs),
            Op::AttentionGrad(attrs) => self.attention_grad(attrs),
            Op::GluGrad(act) => self.glu_grad(*act),
            Op::ActivationGrad(act) => self.activation_grad(*act),
            Op::SoftcapGrad(cap) => self.softcap_grad(*cap),
            Op::ScatterRows => self.scatter_rows(),
            Op::GlobalNorm => self.global_norm(),
            Op::Clip { max_norm } => self.clip(*max_norm),
            Op::AdamW(attrs) => self.adamw(attrs),
            Op::Ema { decay } => self.ema(*decay),
        }
    }

    /// Where an operand lies; empty if it is absent.
    fn input(&self, slot: usize) -> Span {
        match self.instr.inputs.get(slot).copied().flatten() {
            Some(id) => self.prepared.span(id, self.sizes),
            None => Span::default(),
        }
    }

    /// Where a result goes; empty if nobody reads it.
    fn output(&self, slot: usize) -> Span {
        match self.instr.outputs.get(slot).copied().flatten() {
            Some(id) => self.prepared.span(id, self.sizes),
            None => Span::default(),
        }
    }

    fn has_input(&self, slot: usize) -> bool {
        self.instr.inputs.get(slot).copied().flatten().is_some()
    }

    fn has_output(&self, slot: usize) -> bool {
        self.instr.outputs.get(slot).copied().flatten().is_some()
    }

    /// The declaration of an operand that is present.
    fn value(&self, slot: usize) -> &'a Value {
        let id = self.instr.inputs[slot].expect("verified: this operand is not optional");
        self.prepared.program.value(id)
    }

    /// Width of an operand's rows: the product of its fixed axes.
    fn width(&self, slot: usize) -> usize {
        self.value(slot).shape.row_elements()
    }

    /// Rows along the leading axis of an operand.
    fn rows(&self, slot: usize) -> usize {
        self.value(slot).shape.elements(self.sizes) / self.width(slot)
    }

    /// Size of a named axis of an operand.
    fn axis(&self, slot: usize, position: usize) -> usize {
        self.value(slot).shape.0[position].size.expect("verified: this axis is fixed")
    }

    /// Tokens per batch row; sums over tokens are aligned to it.
    fn row_tokens(&self) -> usize {
        self.run.row_tokens
    }

    /// Whether a gradient is added to what is there.
    fn adds(&self) -> bool {
        self.run.accumulate || !self.instr.first_write
    }

    fn batch(&self) -> RaggedBatch<'a> {
        RaggedBatch { sequences: self.run.sequences }
    }

    /// A weight operand whose rows contract `inputs` elements.
    fn weight(&self, slot: usize, inputs: usize) -> WeightShape {
        let value = self.value(slot);
        let outputs = value.shape.row_elements() / inputs;
        WeightShape { value_type: value.value_type, outputs, inputs }
    }

    /// The matrix of a head's adapter, whose inputs are in `slot`, if the head has one.
    fn adapter_of_head(&self, slot: usize) -> Option<WeightShape> {
        self.has_input(slot).then(|| self.weight(slot + 1, self.width(slot)))
    }

    /// Copies an operand to the result unless the plan let them share a buffer.
    fn copy_in_place(&mut self, operand: usize, result: usize) {
        let (from, to) = (self.input(operand), self.output(result));
        if from != to {
            let ([from], [to]) = self.memory.split([from], [to]);
            to.u8s().copy_from_slice(from.u8s());
        }
    }

    fn attention_spec(&self, attrs: &AttentionAttrs, first: usize) -> AttentionSpec {
        AttentionSpec {
            heads: self.axis(first, 1),
            kv_heads: self.axis(first + 1, 1),
            key_dim: self.axis(first, 2),
            value_dim: attrs.value_dim,
            values_in_keys: attrs.values_in_keys,
            mask: attrs.mask,
            scale: attrs.scale,
            softcap: attrs.softcap,
        }
    }
}

/// Shape and storage of a weight, waiting for its bytes.
#[derive(Clone, Copy)]
struct WeightShape {
    value_type: ValueType,
    outputs: usize,
    inputs: usize,
}

impl WeightShape {
    fn of(self, bytes: Bytes<'_>) -> Weight<'_> {
        Weight {
            encoding: self.value_type.encoding().expect("verified: this operand is a weight"),
            layout: self.value_type.layout(),
            n: self.outputs,
            k: self.inputs,
            bytes: bytes.u8s(),
        }
    }

    /// As the adapter of a head, behind its first product.
    fn low_rank<'a>(self, low: Bytes<'a>, bytes: Bytes<'a>) -> LowRank<'a> {
        LowRank { low_or: low.f32s(), weight: self.of(bytes) }
    }
}

impl Value {
    /// Rows of a lookup table: the size of its first axis.
    fn matrix_rows(&self) -> usize {
        debug_assert!(!matches!(self.shape.0[0].name, DimName::Tokens | DimName::Outputs));
        self.shape.0[0].size.unwrap_or(0)
    }
}

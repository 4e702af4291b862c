//! Verification: what each operation demands of its operands and what it yields.
//!
//! [`infer`] is the one place that knows the types and shapes of every operation. The builder uses
//! it to declare results, [`verify`] to check a whole program, so the two cannot disagree.

mod experts;

use cairn_kernels::{Compute, Layout};

use crate::dim::{Dim, DimName, Shape};
use crate::op::{AttentionAttrs, Op};
use crate::program::{Instr, Program};
use crate::value::{Class, Value, ValueId, ValueType};

/// A program that must not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// An operand has the wrong type, shape, layout, order of dimensions or class.
    #[error(
        "instruction {instr} ({op}), operand {slot} ({value}): expected {expected}, found {found}"
    )]
    Operand {
        /// Index of the instruction.
        instr: usize,
        /// Its operation.
        op: &'static str,
        /// Operand slot, counted from 0.
        slot: usize,
        /// Name of the value there.
        value: String,
        /// What the operation needs.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A result is declared otherwise than the operation yields it.
    #[error(
        "instruction {instr} ({op}), result {slot} ({value}): the operation yields {expected}, declared is {found}"
    )]
    Result {
        /// Index of the instruction.
        instr: usize,
        /// Its operation.
        op: &'static str,
        /// Result slot, counted from 0.
        slot: usize,
        /// Name of the value there.
        value: String,
        /// What the operation yields.
        expected: String,
        /// What is declared.
        found: String,
    },
    /// A temporary is read before it is written, or written twice, or an input is written.
    #[error("instruction {instr} ({op}) {what} {value}")]
    Order {
        /// Index of the instruction.
        instr: usize,
        /// Its operation.
        op: &'static str,
        /// What it does wrong, as a verb phrase.
        what: &'static str,
        /// Name of the value.
        value: String,
    },
    /// The instruction has no product of that arithmetic: another operation, or a weight stored as
    /// something else.
    #[error("instruction {instr} ({op}) has no product in {compute}")]
    Compute {
        /// Index of the instruction.
        instr: usize,
        /// Its operation.
        op: &'static str,
        /// The arithmetic.
        compute: Compute,
    },
}

/// What an operation yields in one result slot.
pub(crate) enum Inferred {
    /// A new value.
    New(ValueType, Shape),
    /// The persistent operand it writes in place, if that operand is present.
    InPlace(Option<ValueId>),
}

/// A violation, before it is known where.
#[derive(Debug)]
pub(crate) struct Fault {
    slot: usize,
    value: String,
    expected: String,
    found: String,
}

impl Fault {
    pub(crate) fn at(self, index: usize, instr: &Instr) -> VerifyError {
        VerifyError::Operand {
            instr: index,
            op: instr.op.name(),
            slot: self.slot,
            value: self.value,
            expected: self.expected,
            found: self.found,
        }
    }
}

type Results = Result<Vec<Inferred>, Fault>;

/// Checks a whole program; see [`Program::verify`].
pub(crate) fn verify(program: &Program) -> Result<(), VerifyError> {
    let mut written = vec![false; program.values.len()];
    for (index, instr) in program.instrs.iter().enumerate() {
        let order = |what, id: ValueId| VerifyError::Order {
            instr: index,
            op: instr.op.name(),
            what,
            value: program.value(id).name.clone(),
        };
        for id in instr.reads() {
            if program.value(id).class == Class::Temp && !written[id.index()] {
                return Err(order("reads before it is written", id));
            }
        }
        let inferred = infer(program, instr).map_err(|fault| fault.at(index, instr))?;
        if !multiplies(program, instr, instr.compute) {
            let (op, compute) = (instr.op.name(), instr.compute);
            return Err(VerifyError::Compute { instr: index, op, compute });
        }
        for (slot, id) in instr.outputs.iter().enumerate() {
            let Some(id) = *id else { continue };
            check_result(program, index, slot, id, inferred.get(slot))?;
            match program.value(id).class {
                Class::Input => return Err(order("writes the input", id)),
                Class::Temp if written[id.index()] => return Err(order("writes again", id)),
                Class::Temp => written[id.index()] = true,
                Class::Weight | Class::Gradient | Class::State => {}
            }
        }
    }
    for &id in &program.outputs {
        if program.value(id).class == Class::Temp && !written[id.index()] {
            return Err(VerifyError::Order {
                instr: program.instrs.len(),
                op: "output",
                what: "reads before it is written",
                value: program.value(id).name.clone(),
            });
        }
    }
    Ok(())
}

/// Whether the instruction may be computed in that arithmetic: anything in f32; in bf16 a forward product
/// by a weight that is stored as such values.
pub(crate) fn multiplies(program: &Program, instr: &Instr, compute: Compute) -> bool {
    let is_product = matches!(instr.op, Op::Matmul | Op::ExpertMatmul | Op::TokenLogprob(_));
    let weight = instr.inputs.get(1).copied().flatten();
    let stored = weight.and_then(|id| program.value(id).value_type.encoding());
    match compute {
        Compute::F32 => true,
        Compute::Bf16 => is_product && stored.is_some_and(|stored| compute.multiplies(stored)),
        Compute::Int8 => {
            let is_product = is_product && instr.op != Op::ExpertMatmul;
            is_product && stored.is_some_and(|stored| compute.multiplies(stored))
        }
    }
}

fn check_result(
    program: &Program,
    index: usize,
    slot: usize,
    id: ValueId,
    inferred: Option<&Inferred>,
) -> Result<(), VerifyError> {
    let value = program.value(id);
    let expected = match inferred {
        Some(Inferred::InPlace(Some(target))) if *target == id => return Ok(()),
        Some(Inferred::InPlace(Some(target))) => program.value(*target).name.clone(),
        Some(Inferred::New(value_type, shape))
            if *value_type == value.value_type
                && *shape == value.shape
                && value.class != Class::Weight =>
        {
            return Ok(());
        }
        Some(Inferred::New(value_type, shape)) => format!("{value_type}{shape}"),
        Some(Inferred::InPlace(None)) | None => "nothing".to_owned(),
    };
    Err(VerifyError::Result {
        instr: index,
        op: program.instrs[index].op.name(),
        slot,
        value: value.name.clone(),
        expected,
        found: describe(value),
    })
}

fn describe(value: &Value) -> String {
    format!("{}{}", value.value_type, value.shape)
}

/// The operands of one instruction, with the checks that every operation shares.
struct Operands<'a> {
    program: &'a Program,
    slots: &'a [Option<ValueId>],
}

impl<'a> Operands<'a> {
    fn optional(&self, slot: usize) -> Option<&'a Value> {
        self.slots.get(slot).copied().flatten().map(|id| self.program.value(id))
    }

    fn id(&self, slot: usize) -> Option<ValueId> {
        self.slots.get(slot).copied().flatten()
    }

    fn get(&self, slot: usize) -> Result<&'a Value, Fault> {
        self.optional(slot).ok_or_else(|| Fault {
            slot,
            value: "absent".to_owned(),
            expected: "an operand".to_owned(),
            found: "nothing".to_owned(),
        })
    }

    fn fault(&self, slot: usize, expected: impl Into<String>) -> Fault {
        let (value, found) = self
            .optional(slot)
            .map_or_else(|| ("absent".into(), "nothing".into()), |v| (v.name.clone(), describe(v)));
        Fault { slot, value, expected: expected.into(), found }
    }

    /// An `f32` operand of any shape.
    fn f32(&self, slot: usize) -> Result<&'a Shape, Fault> {
        let value = self.get(slot)?;
        if value.value_type == ValueType::F32 {
            Ok(&value.shape)
        } else {
            Err(self.fault(slot, "f32"))
        }
    }

    /// Demands an exact type and shape.
    fn exactly(&self, slot: usize, value_type: ValueType, dims: &[Dim]) -> Result<(), Fault> {
        let value = self.get(slot)?;
        if value.value_type == value_type && value.shape.0 == dims {
            Ok(())
        } else {
            let expected = format!("{value_type}{}", Shape::new(dims));
            Err(self.fault(slot, expected))
        }
    }

    /// Demands an exact type and shape of an operand that may be absent.
    fn maybe(&self, slot: usize, value_type: ValueType, dims: &[Dim]) -> Result<(), Fault> {
        if self.optional(slot).is_some() { self.exactly(slot, value_type, dims) } else { Ok(()) }
    }

    /// A weight matrix whose rows contract `inputs`; returns the output axes.
    fn matrix(&self, slot: usize, inputs: &[Dim]) -> Result<&'a [Dim], Fault> {
        let value = self.get(slot)?;
        let dims = &value.shape.0;
        let width: usize = inputs.iter().filter_map(|dim| dim.size).product();
        let inputs_match = dims.len() > inputs.len() && dims.ends_with(inputs);
        let type_matches = match value.value_type {
            ValueType::F32 => true,
            ValueType::Encoded { inputs, .. } => inputs == width,
            ValueType::F64 | ValueType::U32 => false,
        };
        if inputs_match && type_matches {
            Ok(&dims[..dims.len() - inputs.len()])
        } else {
            Err(self.fault(slot, format!("a matrix [out.., {}]", Shape::new(inputs))))
        }
    }

    /// Splits `[lead, rest..]` off an `f32` operand.
    fn rows(&self, slot: usize) -> Result<(Dim, &'a [Dim]), Fault> {
        let shape = self.f32(slot)?;
        match shape.0.split_first() {
            Some((&lead, rest)) if lead.size.is_none() && !rest.is_empty() => Ok((lead, rest)),
            _ => Err(self.fault(slot, "f32[t | o, ..]")),
        }
    }

    /// A gradient accumulator for something of shape `dims`: plain `f32`.
    fn accumulator(&self, slot: usize, dims: &[Dim]) -> Result<Inferred, Fault> {
        self.maybe(slot, ValueType::F32, dims)?;
        Ok(Inferred::InPlace(self.id(slot)))
    }
}

fn new_f32(dims: &[Dim]) -> Inferred {
    Inferred::New(ValueType::F32, Shape::new(dims))
}

fn same(shape: &Shape) -> Inferred {
    new_f32(&shape.0)
}

/// What `instr` yields, or why its operands do not fit.
pub(crate) fn infer(program: &Program, instr: &Instr) -> Results {
    let operands = Operands { program, slots: &instr.inputs };
    match &instr.op {
        Op::Embed | Op::PositionEmbed | Op::GatherRows | Op::ScatterRows | Op::EmbedGrad => {
            infer_lookup(&operands, &instr.op)
        }
        Op::Matmul | Op::HeadMatmul | Op::MatmulDx | Op::MatmulDw | Op::BiasGrad => {
            infer_product(&operands, &instr.op)
        }
        Op::HeadMatmulDx | Op::HeadMatmulDw => infer_product(&operands, &instr.op),
        Op::Route(routing) | Op::RouteGrad(routing) => {
            experts::route(&operands, &instr.op, routing)
        }
        Op::ExpertMatmul | Op::ExpertMatmulDx | Op::ExpertMatmulDw => {
            experts::product(&operands, &instr.op)
        }
        Op::ExpertSum | Op::ExpertSumGrad => experts::sum(&operands, &instr.op),
        Op::ExpertLoad | Op::ExpertLoadGrad | Op::BalanceLoss(_) | Op::BalanceLossGrad(_) => {
            experts::balance(&operands, &instr.op)
        }
        Op::RmsNorm(_) | Op::LayerNorm(_) | Op::RmsNormGrad(_) | Op::LayerNormGrad(_) => {
            infer_norm(&operands, &instr.op)
        }
        Op::Rope(_)
        | Op::RopeGrad(_)
        | Op::Glu(_)
        | Op::GluGrad(_)
        | Op::Activation(_)
        | Op::ActivationGrad(_)
        | Op::Add
        | Op::Scale(_)
        | Op::Softcap(_)
        | Op::SoftcapGrad(_)
        | Op::Dropout(_) => infer_elementwise(&operands, &instr.op),
        Op::Concat(_) | Op::Split(..) => infer_heads(&operands, &instr.op),
        Op::KvWrite { .. } => infer_kv_write(&operands),
        Op::Attention(attrs) => infer_attention(&operands, attrs),
        Op::AttentionGrad(attrs) => infer_attention_grad(&operands, attrs),
        Op::TokenLogprob(_) | Op::CrossEntropy(_) | Op::TokenLogprobGrad(_) => {
            infer_head(&operands, &instr.op)
        }
        Op::GlobalNorm | Op::Clip { .. } | Op::AdamW(_) | Op::Ema { .. } => {
            infer_update(&operands, &instr.op)
        }
    }
}

fn infer_lookup(x: &Operands<'_>, op: &Op) -> Results {
    let rows_in = |slot| x.exactly(slot, ValueType::U32, &[Dim::TOKENS]);
    match op {
        Op::Embed => {
            rows_in(0)?;
            let table = x.get(1)?;
            let [_, width @ ..] = table.shape.0.as_slice() else {
                return Err(x.fault(1, "a matrix [v, d]"));
            };
            x.matrix(1, width)?;
            Ok(vec![Inferred::New(ValueType::F32, Shape::with_lead(Dim::TOKENS, width))])
        }
        Op::PositionEmbed => {
            let (lead, width) = x.rows(0)?;
            x.exactly(1, ValueType::U32, &[lead])?;
            let table = x.matrix(2, width)?;
            if !matches!(table, [Dim { name: DimName::Positions, .. }]) {
                return Err(x.fault(2, format!("a matrix [w, {}]", Shape::new(width))));
            }
            Ok(vec![same(x.f32(0)?)])
        }
        Op::GatherRows => {
            let (_, width) = x.rows(0)?;
            x.exactly(1, ValueType::U32, &[Dim::OUTPUTS])?;
            Ok(vec![Inferred::New(ValueType::F32, Shape::with_lead(Dim::OUTPUTS, width))])
        }
        Op::ScatterRows => {
            let (lead, width) = x.rows(0)?;
            x.exactly(1, ValueType::U32, &[lead])?;
            Ok(vec![Inferred::New(ValueType::F32, Shape::with_lead(Dim::TOKENS, width))])
        }
        _ => {
            let (lead, width) = x.rows(0)?;
            x.exactly(1, ValueType::U32, &[lead])?;
            x.f32(2)?;
            x.matrix(2, width)?;
            Ok(vec![Inferred::InPlace(x.id(2))])
        }
    }
}

fn infer_product(x: &Operands<'_>, op: &Op) -> Results {
    let (lead, width) = x.rows(0)?;
    match op {
        Op::Matmul => {
            let outputs = x.matrix(1, width)?;
            x.maybe(2, ValueType::F32, outputs)?;
            let result = Shape::with_lead(lead, outputs);
            x.maybe(3, ValueType::F32, &result.0)?;
            if x.optional(2).is_some() && x.optional(3).is_some() {
                return Err(x.fault(3, "no sum: the chains start from a bias"));
            }
            Ok(vec![Inferred::New(ValueType::F32, result)])
        }
        Op::MatmulDx => {
            let weight = x.get(1)?;
            let Some(inputs) = weight.shape.0.strip_prefix(width) else {
                return Err(x.fault(1, format!("a matrix [{}, in..]", Shape::new(width))));
            };
            x.matrix(1, inputs)?;
            let result = Shape::with_lead(lead, inputs);
            x.maybe(2, ValueType::F32, &result.0)?;
            Ok(vec![Inferred::New(ValueType::F32, result)])
        }
        Op::MatmulDw => {
            let (_, inputs) = x.rows(1)?;
            let dims: Vec<Dim> = width.iter().chain(inputs).copied().collect();
            x.exactly(2, ValueType::F32, &dims)?;
            Ok(vec![Inferred::InPlace(x.id(2))])
        }
        Op::BiasGrad => {
            x.exactly(1, ValueType::F32, width)?;
            Ok(vec![Inferred::InPlace(x.id(1))])
        }
        _ => infer_head_product(x, op, lead, width),
    }
}

fn infer_head_product(x: &Operands<'_>, op: &Op, lead: Dim, width: &[Dim]) -> Results {
    let [heads, inner] = *width else { return Err(x.fault(0, "f32[t, h, in]")) };
    match op {
        Op::HeadMatmul => match x.f32(1)?.0.as_slice() {
            [h, out, i] if *h == heads && *i == inner => Ok(vec![new_f32(&[lead, heads, *out])]),
            _ => Err(x.fault(1, format!("f32[{heads}, out, {inner}]"))),
        },
        Op::HeadMatmulDx => match x.f32(1)?.0.as_slice() {
            [h, out, i] if *h == heads && *out == inner => Ok(vec![new_f32(&[lead, heads, *i])]),
            _ => Err(x.fault(1, format!("f32[{heads}, {inner}, in]"))),
        },
        _ => match x.rows(1)?.1 {
            [h, i] if *h == heads => {
                x.exactly(2, ValueType::F32, &[heads, inner, *i])?;
                Ok(vec![Inferred::InPlace(x.id(2))])
            }
            _ => Err(x.fault(1, format!("f32[{lead}, {heads}, in]"))),
        },
    }
}

fn infer_norm(x: &Operands<'_>, op: &Op) -> Results {
    let shape = x.f32(0)?;
    let forward = matches!(op, Op::RmsNorm(_) | Op::LayerNorm(_));
    // The weight says how many of the last axes are one row: a head's, or those of all heads.
    let slot = if forward { 1 } else { 2 };
    let axes = x.f32(slot)?.0.len();
    let Some(width) = shape.0.len().checked_sub(axes.max(1)).map(|first| &shape.0[first..]) else {
        return Err(x.fault(0, "f32[.., d]"));
    };
    if width.iter().any(|dim| dim.size.is_none()) {
        return Err(x.fault(0, "f32[.., d]"));
    }
    x.exactly(slot, ValueType::F32, width)?;
    match op {
        Op::RmsNorm(_) | Op::LayerNorm(_) => {
            if matches!(op, Op::LayerNorm(_)) {
                x.maybe(2, ValueType::F32, width)?;
            }
            Ok(vec![same(shape)])
        }
        _ => {
            x.exactly(1, ValueType::F32, &shape.0)?;
            x.maybe(3, ValueType::F32, &shape.0)?;
            let mut results = vec![same(shape), x.accumulator(4, width)?];
            if matches!(op, Op::LayerNormGrad(_)) {
                results.push(x.accumulator(5, width)?);
            }
            Ok(results)
        }
    }
}

/// A dropout of everything leaves nothing to scale.
fn check_probability(x: &Operands<'_>, slot: usize, p: f32) -> Result<(), Fault> {
    if (0.0..1.0).contains(&p) {
        return Ok(());
    }
    let fault = x.fault(slot, "dropout with a probability in [0, 1)");
    Err(Fault { found: format!("p={p}"), ..fault })
}

fn infer_elementwise(x: &Operands<'_>, op: &Op) -> Results {
    let shape = x.f32(0)?;
    match op {
        Op::Rope(rope) | Op::RopeGrad(rope) => {
            if shape.0.len() != 3 || shape.last() < 2 * rope.inv_freq.len() {
                let needed = 2 * rope.inv_freq.len();
                return Err(x.fault(0, format!("f32[t, h, k] with k of at least {needed}")));
            }
            x.exactly(1, ValueType::U32, &[shape.0[0]])?;
        }
        Op::Dropout(dropout) => check_probability(x, 0, dropout.p)?,
        Op::Glu(_) | Op::Add | Op::ActivationGrad(_) | Op::SoftcapGrad(_) => {
            x.exactly(1, ValueType::F32, &shape.0)?;
        }
        Op::GluGrad(_) => {
            x.exactly(1, ValueType::F32, &shape.0)?;
            x.exactly(2, ValueType::F32, &shape.0)?;
            return Ok(vec![same(shape), same(shape)]);
        }
        _ => {}
    }
    Ok(vec![same(shape)])
}

fn infer_heads(x: &Operands<'_>, op: &Op) -> Results {
    let (lead, width) = x.rows(0)?;
    let [heads, inner] = *width else { return Err(x.fault(0, "f32[t, h, k]")) };
    match op {
        Op::Concat(name) => {
            let (other_lead, other) = x.rows(1)?;
            match *other {
                [h, k] if other_lead == lead && h == heads => {
                    let size = inner.size.unwrap_or(0) + k.size.unwrap_or(0);
                    Ok(vec![new_f32(&[lead, heads, Dim::fixed(*name, size)])])
                }
                _ => Err(x.fault(1, format!("f32[{lead}, {heads}, ..]"))),
            }
        }
        Op::Split(first, second) => {
            let total = first.size.unwrap_or(0) + second.size.unwrap_or(0);
            if inner.size != Some(total) {
                return Err(x.fault(0, format!("a last axis of {total}")));
            }
            Ok(vec![new_f32(&[lead, heads, *first]), new_f32(&[lead, heads, *second])])
        }
        _ => unreachable!("called for concat and split only"),
    }
}

fn infer_kv_write(x: &Operands<'_>) -> Results {
    let keys = x.f32(0)?;
    let (lead, width) = x.rows(0)?;
    if lead != Dim::TOKENS || width.len() != 2 {
        return Err(x.fault(0, "f32[t, g, k]"));
    }
    let values = match x.optional(1) {
        None => None,
        Some(_) => {
            let (lead, value_width) = x.rows(1)?;
            if lead != Dim::TOKENS || value_width.len() != 2 || value_width[0] != width[0] {
                return Err(x.fault(1, format!("f32[t, {}, k]", width[0])));
            }
            Some(x.f32(1)?)
        }
    };
    let mut results = vec![same(keys)];
    results.extend(values.map(same));
    Ok(results)
}

/// Head counts and widths that attention works on.
struct AttentionShape {
    heads: Dim,
    kv_heads: Dim,
    key: Dim,
    value: Dim,
}

fn attention_shape(
    x: &Operands<'_>,
    attrs: &AttentionAttrs,
    first: usize,
) -> Result<AttentionShape, Fault> {
    let [lead, heads, key] = x.f32(first)?.0[..] else {
        return Err(x.fault(first, "f32[t, h, k]"));
    };
    if let Some(dropout) = attrs.dropout {
        check_probability(x, first, dropout.p)?;
    }
    let kv_heads = match x.f32(first + 1)?.0[..] {
        [l, g, k] if l == lead && k == key => g,
        _ => return Err(x.fault(first + 1, format!("f32[{lead}, g, {key}]"))),
    };
    let (query_heads, shared) = (heads.size.unwrap_or(0), kv_heads.size.unwrap_or(0));
    if shared == 0 || !query_heads.is_multiple_of(shared) {
        return Err(x.fault(first + 1, format!("a number of heads that divides {query_heads}")));
    }
    let value = if attrs.values_in_keys {
        if x.optional(first + 2).is_some() || key.size.unwrap_or(0) < attrs.value_dim {
            return Err(x.fault(first + 2, "no operand: the values are columns of the keys"));
        }
        Dim::fixed(DimName::Rank, attrs.value_dim)
    } else {
        match x.f32(first + 2)?.0[..] {
            [l, g, v] if l == lead && g == kv_heads && v.size == Some(attrs.value_dim) => v,
            _ => {
                let expected = format!("f32[{lead}, {kv_heads}, k={}]", attrs.value_dim);
                return Err(x.fault(first + 2, expected));
            }
        }
    };
    Ok(AttentionShape { heads, kv_heads, key, value })
}

fn infer_attention(x: &Operands<'_>, attrs: &AttentionAttrs) -> Results {
    let shape = attention_shape(x, attrs, 0)?;
    Ok(vec![
        new_f32(&[Dim::TOKENS, shape.heads, shape.value]),
        new_f32(&[Dim::TOKENS, shape.heads]),
    ])
}

fn infer_attention_grad(x: &Operands<'_>, attrs: &AttentionAttrs) -> Results {
    let shape = attention_shape(x, attrs, 1)?;
    let out = [Dim::TOKENS, shape.heads, shape.value];
    x.exactly(0, ValueType::F32, &out)?;
    x.exactly(4, ValueType::F32, &out)?;
    x.exactly(5, ValueType::F32, &[Dim::TOKENS, shape.heads])?;
    let mut results = vec![
        new_f32(&[Dim::TOKENS, shape.heads, shape.key]),
        new_f32(&[Dim::TOKENS, shape.kv_heads, shape.key]),
    ];
    if !attrs.values_in_keys {
        results.push(new_f32(&[Dim::TOKENS, shape.kv_heads, shape.value]));
    }
    Ok(results)
}

fn infer_head(x: &Operands<'_>, op: &Op) -> Results {
    // `token_logprob_grad` has the seed gradient in front.
    let first = usize::from(matches!(op, Op::TokenLogprobGrad(_)));
    let (lead, width) = x.rows(first)?;
    let outputs = x.matrix(first + 1, width)?;
    if !matches!(outputs, [Dim { name: DimName::Vocab, .. }]) {
        return Err(x.fault(first + 1, format!("a matrix [v, {}]", Shape::new(width))));
    }
    x.exactly(first + 2, ValueType::U32, &[lead])?;
    let per_row = || new_f32(&[lead]);
    let dx = || Inferred::New(ValueType::F32, Shape::with_lead(lead, width));
    let head: Vec<Dim> = outputs.iter().chain(width).copied().collect();
    match op {
        Op::TokenLogprob(_) => {
            x.maybe(3, ValueType::F32, outputs)?;
            low_rank(x, 4, lead, outputs)?;
            Ok(vec![per_row(), per_row()])
        }
        Op::CrossEntropy(_) => {
            x.exactly(3, ValueType::F32, &[lead])?;
            x.maybe(5, ValueType::F32, outputs)?;
            let [dlow, db] = low_rank_grads(x, 7, lead, outputs)?;
            let (dw, dbias) = (x.accumulator(4, &head)?, x.accumulator(6, outputs)?);
            Ok(vec![per_row(), dx(), dw, dbias, dlow, db])
        }
        _ => {
            x.exactly(0, ValueType::F32, &[lead])?;
            x.exactly(4, ValueType::F32, &[lead])?;
            x.maybe(6, ValueType::F32, outputs)?;
            let [dlow, db] = low_rank_grads(x, 8, lead, outputs)?;
            Ok(vec![dx(), x.accumulator(5, &head)?, x.accumulator(7, outputs)?, dlow, db])
        }
    }
}

/// The adapter of a head, `low[o, r]` and `b[v, r]` from `slot` on; its rank, if there is one.
fn low_rank<'a>(
    x: &Operands<'a>,
    slot: usize,
    lead: Dim,
    outputs: &[Dim],
) -> Result<Option<&'a [Dim]>, Fault> {
    if x.optional(slot).is_none() && x.optional(slot + 1).is_none() {
        return Ok(None);
    }
    let (rows, rank) = x.rows(slot)?;
    if rows != lead {
        return Err(x.fault(slot, format!("f32[{lead}, r]")));
    }
    if x.matrix(slot + 1, rank)? != outputs {
        let expected = format!("a matrix [{}, {}]", Shape::new(outputs), Shape::new(rank));
        return Err(x.fault(slot + 1, expected));
    }
    Ok(Some(rank))
}

/// The gradients of a head's adapter; the accumulator of `b` comes after the adapter.
fn low_rank_grads(
    x: &Operands<'_>,
    slot: usize,
    lead: Dim,
    outputs: &[Dim],
) -> Result<[Inferred; 2], Fault> {
    let Some(rank) = low_rank(x, slot, lead, outputs)? else {
        return Ok([Inferred::InPlace(None), Inferred::InPlace(None)]);
    };
    let dims: Vec<Dim> = outputs.iter().chain(rank).copied().collect();
    let dlow = Inferred::New(ValueType::F32, Shape::with_lead(lead, rank));
    Ok([dlow, x.accumulator(slot + 2, &dims)?])
}

fn infer_update(x: &Operands<'_>, op: &Op) -> Results {
    match op {
        Op::GlobalNorm => {
            for slot in 0..x.slots.len() {
                x.f32(slot)?;
            }
            Ok(vec![Inferred::New(ValueType::F64, Shape::default())])
        }
        Op::Clip { .. } => {
            x.exactly(0, ValueType::F64, &[])?;
            Ok(vec![new_f32(&[])])
        }
        Op::Ema { .. } => {
            let weight = x.f32(0)?;
            x.exactly(1, ValueType::F32, &weight.0)?;
            Ok(vec![Inferred::InPlace(x.id(1))])
        }
        _ => {
            let master = x.f32(0)?;
            for slot in 1..4 {
                x.exactly(slot, ValueType::F32, &master.0)?;
            }
            x.maybe(4, ValueType::F32, &[])?;
            x.exactly(5, ValueType::F64, &[])?;
            x.exactly(6, ValueType::U32, &[])?;
            if let Some(copy) = x.optional(7) {
                let row_major = copy.value_type.layout() == Layout::RowMajor;
                if copy.shape != *master || !row_major {
                    return Err(x.fault(7, format!("a row-major copy {master}")));
                }
            }
            let in_place = |slot| Inferred::InPlace(x.id(slot));
            Ok(vec![in_place(0), in_place(2), in_place(3), in_place(7)])
        }
    }
}

//! What the operations of mixtures of experts demand and yield.

use cairn_kernels::{Layout, Routing};

use super::{Fault, Inferred, Operands, Results, new_f32};
use crate::dim::{Dim, DimName, Shape};
use crate::op::{BalanceAttrs, Op};
use crate::value::ValueType;

/// Sixteen outputs share a panel; an expert begins with a panel of its own.
const PANEL_ROWS: usize = 16;

/// `route` and its adjoint.
pub(super) fn route(x: &Operands<'_>, op: &Op, routing: &Routing) -> Results {
    // The adjoint has the gradient of the weights in front.
    let logits = usize::from(matches!(op, Op::RouteGrad(_)));
    let (lead, width) = x.rows(logits)?;
    let [experts @ Dim { name: DimName::Experts, size: Some(count) }] = *width else {
        return Err(x.fault(logits, "f32[t, e]"));
    };
    if !routing.fits(count) {
        let expected = format!("experts among which {routing:?} can choose");
        return Err(x.fault(logits, expected));
    }
    let ranks = [lead, Dim::fixed(DimName::Chosen, routing.top_k)];
    if logits == 0 {
        x.maybe(1, ValueType::F32, &[experts])?;
        return Ok(vec![Inferred::New(ValueType::U32, Shape::new(ranks)), new_f32(&ranks)]);
    }
    x.exactly(0, ValueType::F32, &ranks)?;
    x.exactly(2, ValueType::U32, &ranks)?;
    Ok(vec![new_f32(&[lead, experts])])
}

/// The axis of a token's experts: the last of `experts[t, a]`.
fn chosen(x: &Operands<'_>, slot: usize, lead: Dim) -> Result<Dim, Fault> {
    let value = x.get(slot)?;
    match (value.value_type, value.shape.0.as_slice()) {
        (ValueType::U32, [first, a @ Dim { name: DimName::Chosen, .. }]) if *first == lead => {
            Ok(*a)
        }
        _ => Err(x.fault(slot, format!("u32[{lead}, a]"))),
    }
}

/// The contracted axes of `x`, which has one row a token or one a routed row.
fn contracted(width: &[Dim], a: Dim) -> &[Dim] {
    width.strip_prefix(&[a]).unwrap_or(width)
}

/// The output axes of `w[e, out.., in..]`.
fn expert_outputs<'a>(x: &Operands<'a>, slot: usize, inputs: &[Dim]) -> Result<&'a [Dim], Fault> {
    let fault = || x.fault(slot, format!("a matrix [e, out.., {}]", Shape::new(inputs)));
    let [Dim { name: DimName::Experts, .. }, outputs @ ..] = x.matrix(slot, inputs)? else {
        return Err(fault());
    };
    if inputs.is_empty() || outputs.is_empty() {
        return Err(fault());
    }
    let rows = Shape::new(outputs).row_elements();
    let in_panels = x.get(slot)?.value_type.layout() == Layout::Panel;
    if in_panels && !rows.is_multiple_of(PANEL_ROWS) {
        let expected = format!("a multiple of {PANEL_ROWS} outputs in panels, or row-major");
        return Err(x.fault(slot, expected));
    }
    Ok(outputs)
}

/// `expert_matmul` and its two adjoints.
pub(super) fn product(x: &Operands<'_>, op: &Op) -> Results {
    let (lead, width) = x.rows(0)?;
    let a = chosen(x, 2, lead)?;
    if let Op::ExpertMatmul = op {
        let outputs = expert_outputs(x, 1, contracted(width, a))?;
        return Ok(vec![new_f32(&[&[lead, a], outputs].concat())]);
    }
    let Some(outputs) = width.strip_prefix(&[a]).filter(|outputs| !outputs.is_empty()) else {
        return Err(x.fault(0, format!("f32[{lead}, {a}, out..]")));
    };
    if let Op::ExpertMatmulDx = op {
        let weight = x.get(1)?;
        let inputs = match weight.shape.0.as_slice() {
            [_, rest @ ..] => rest.strip_prefix(outputs),
            [] => None,
        };
        let Some(inputs) = inputs else {
            return Err(x.fault(1, format!("a matrix [e, {}, in..]", Shape::new(outputs))));
        };
        expert_outputs(x, 1, inputs)?;
        return Ok(vec![new_f32(&[&[lead, a], inputs].concat())]);
    }
    let (input_lead, input_width) = x.rows(1)?;
    if input_lead != lead {
        return Err(x.fault(1, format!("f32[{lead}, in..]")));
    }
    let rest = [outputs, contracted(input_width, a)].concat();
    match x.f32(3)?.0.as_slice() {
        [Dim { name: DimName::Experts, .. }, found @ ..] if *found == rest => {
            Ok(vec![Inferred::InPlace(x.id(3))])
        }
        _ => Err(x.fault(3, format!("f32[e, {}]", Shape::new(rest)))),
    }
}

/// `expert_sum` and its adjoint.
pub(super) fn sum(x: &Operands<'_>, op: &Op) -> Results {
    let (lead, width) = x.rows(0)?;
    if let Op::ExpertSum = op {
        let [a @ Dim { name: DimName::Chosen, .. }, rest @ ..] = width else {
            return Err(x.fault(0, "f32[t, a, d..]"));
        };
        x.maybe(1, ValueType::F32, &[lead, *a])?;
        return Ok(vec![new_f32(&[&[lead], rest].concat())]);
    }
    // Rows or weights say how many experts a token has.
    let known = if x.optional(1).is_some() { 1 } else { 2 };
    let a = match x.f32(known)?.0.as_slice() {
        [_, a @ Dim { name: DimName::Chosen, .. }, ..] => *a,
        _ => return Err(x.fault(known, format!("f32[{lead}, a, ..]"))),
    };
    let rows = [&[lead, a], width].concat();
    x.maybe(1, ValueType::F32, &rows)?;
    x.maybe(2, ValueType::F32, &[lead, a])?;
    let mut results = vec![new_f32(&rows)];
    results.extend((known == 1).then(|| new_f32(&[lead, a])));
    Ok(results)
}

/// `expert_load`, `balance_loss` and their adjoints.
pub(super) fn balance(x: &Operands<'_>, op: &Op) -> Results {
    match op {
        Op::ExpertLoad => {
            let (lead, experts) = router(x, 0)?;
            chosen(x, 1, lead)?;
            x.maybe(2, ValueType::F32, &[experts])?;
            x.maybe(3, ValueType::F32, &[experts])?;
            if x.optional(2).is_some() != x.optional(3).is_some() {
                return Err(x.fault(3, "choices and mass of the layers before, or neither"));
            }
            Ok(vec![new_f32(&[experts]), new_f32(&[experts])])
        }
        Op::ExpertLoadGrad => {
            let (lead, experts) = router(x, 1)?;
            x.exactly(0, ValueType::F32, &[experts])?;
            Ok(vec![new_f32(&[lead, experts])])
        }
        Op::BalanceLoss(attrs) => {
            let experts = per_expert(x, 0, attrs)?;
            x.exactly(1, ValueType::F32, &[experts])?;
            Ok(vec![new_f32(&[])])
        }
        Op::BalanceLossGrad(attrs) => {
            x.exactly(0, ValueType::F32, &[])?;
            Ok(vec![new_f32(&[per_expert(x, 1, attrs)?])])
        }
        _ => unreachable!("called for these operations only"),
    }
}

/// A router's product: its rows and its experts.
fn router(x: &Operands<'_>, slot: usize) -> Result<(Dim, Dim), Fault> {
    match x.rows(slot)? {
        (lead, [experts @ Dim { name: DimName::Experts, size: Some(_) }]) => Ok((lead, *experts)),
        _ => Err(x.fault(slot, "f32[t, e]")),
    }
}

/// The axis of a number for each expert.
fn per_expert(x: &Operands<'_>, slot: usize, attrs: &BalanceAttrs) -> Result<Dim, Fault> {
    match x.f32(slot)?.0.as_slice() {
        [experts @ Dim { name: DimName::Experts, size: Some(count) }]
            if (1..=*count).contains(&attrs.top_k) =>
        {
            Ok(*experts)
        }
        _ => Err(x.fault(slot, format!("f32[e], of which a token goes to {}", attrs.top_k))),
    }
}

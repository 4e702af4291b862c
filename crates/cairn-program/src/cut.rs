//! Cutting a forward program in two at a block boundary.
//!
//! The values that cross the cut become outputs of the first part and inputs of the second, under
//! the same names. Running both, handing the crossing values over, is running the whole: the
//! activation cache, stack-wise training and pipelines stand on this.

use std::collections::BTreeSet;

use crate::program::{Builder, Instr, Program};
use crate::value::{Class, ValueId};
use crate::verify::VerifyError;

/// Splits the forward pass of `program` in front of the first instruction of `block`.
///
/// # Errors
///
/// [`VerifyError`] if a part does not verify, which a verified program rules out.
pub fn cut(program: &Program, block: u32) -> Result<(Program, Program), VerifyError> {
    let forward = &program.instrs[..program.forward_len];
    let position = forward
        .iter()
        .position(|instr| instr.block.is_some_and(|b| b >= block))
        .unwrap_or(forward.len());
    let (first, second) = forward.split_at(position);
    let made: BTreeSet<ValueId> = first.iter().flat_map(Instr::writes).collect();
    let crossing: BTreeSet<ValueId> =
        second.iter().flat_map(Instr::reads).filter(|id| made.contains(id)).collect();
    let kept = program.outputs.iter().copied();
    let (early, late): (Vec<_>, Vec<_>) = kept.partition(|id| made.contains(id));
    let early: Vec<ValueId> = crossing.iter().copied().chain(early).collect();
    Ok((part(program, first, &early, &BTreeSet::new())?, part(program, second, &late, &crossing)?))
}

fn part(
    source: &Program,
    instrs: &[Instr],
    outputs: &[ValueId],
    inputs: &BTreeSet<ValueId>,
) -> Result<Program, VerifyError> {
    let mut builder = Builder::new();
    let mut new_id = vec![None; source.values.len()];
    let used: BTreeSet<ValueId> =
        instrs.iter().flat_map(|instr| instr.reads().chain(instr.writes())).collect();
    for id in source.ids().filter(|id| used.contains(id) || outputs.contains(id)) {
        let value = source.value(id);
        let class = if inputs.contains(&id) { Class::Input } else { value.class };
        new_id[id.index()] =
            Some(builder.declare(&value.name, class, value.value_type, value.shape.clone()));
    }
    let renamed = |id: &Option<ValueId>| id.and_then(|id| new_id[id.index()]);
    for instr in instrs {
        let mut instr = instr.clone();
        instr.inputs = instr.inputs.iter().map(renamed).collect();
        instr.outputs = instr.outputs.iter().map(renamed).collect();
        builder.program.instrs.push(instr);
    }
    for id in outputs {
        builder.output(new_id[id.index()].expect("outputs were declared"));
    }
    builder.finish()
}

//! Instructions of a template, changed so that every one that could be expensive is counted first.
//!
//! The engine's own operators know no budget: `a ~ a` in a loop doubles a text a million times
//! within its fuel. Operators that make values become filters of ours (`operations`), the others
//! get one before them that pays; texts of the template become values, so that they pass the
//! formatter, which pays as well. Jumps are moved along.

use minijinja::machinery::{Instruction, Instructions};
use minijinja::{Error, ErrorKind, Value};

use super::operations::{ADD, CONCAT, MULTIPLY, PAY, PAY_ITEMS, PAY_TEXT, SLICE};

/// "Look the filter up each time."
const NO_LOCAL: u8 = !0;

/// The same instructions, counted.
pub(super) fn bounded<'s>(instructions: &Instructions<'s>) -> Result<Instructions<'s>, Error> {
    let mut starts = Vec::new();
    let mut lines = Vec::new();
    let mut changed = Vec::new();
    let mut index = 0;
    while let Some(instruction) = instructions.get(index) {
        starts.push(u32::try_from(changed.len()).unwrap_or(u32::MAX));
        let before = index.checked_sub(1).and_then(|before| instructions.get(before));
        expand(instruction, before, &mut changed)?;
        lines.resize(changed.len(), instructions.get_line(index));
        index += 1;
    }
    starts.push(u32::try_from(changed.len()).unwrap_or(u32::MAX));
    let mut moved = Instructions::new(instructions.name(), instructions.source());
    for (mut instruction, line) in changed.into_iter().zip(lines) {
        move_jump(&mut instruction, &starts);
        match line.and_then(|line| u16::try_from(line).ok()) {
            Some(line) => moved.add_with_line(instruction, line),
            None => moved.add(instruction),
        };
    }
    Ok(moved)
}

fn filter<'s>(name: &'static str, arguments: u16) -> Instruction<'s> {
    Instruction::ApplyFilter(name, Some(arguments), NO_LOCAL)
}

#[expect(clippy::too_many_lines, reason = "a table of every instruction there is")]
fn expand<'s>(
    instruction: &Instruction<'s>,
    before: Option<&Instruction<'s>>,
    changed: &mut Vec<Instruction<'s>>,
) -> Result<(), Error> {
    let same = || instruction.clone();
    match instruction {
        Instruction::EmitRaw(text) => {
            changed.extend([Instruction::LoadConst(Value::from(*text)), Instruction::Emit]);
        }
        Instruction::Add => changed.push(filter(ADD, 2)),
        Instruction::Mul => changed.push(filter(MULTIPLY, 2)),
        Instruction::StringConcat => changed.push(filter(CONCAT, 2)),
        Instruction::Slice => changed.push(filter(SLICE, 4)),
        // A comparison costs at most what its right side does.
        Instruction::Eq
        | Instruction::Ne
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::In
        | Instruction::CompareAndPreserve(_) => changed.extend([filter(PAY, 1), same()]),
        Instruction::PushLoop(_) => changed.extend([filter(PAY_ITEMS, 1), same()]),
        Instruction::GetItem => {
            // Finding a character of a text takes time; a key of a map does not.
            let is_key =
                matches!(before, Some(Instruction::LoadConst(key)) if key.as_str().is_some());
            if !is_key {
                changed.extend([Instruction::Swap, filter(PAY_TEXT, 1), Instruction::Swap]);
            }
            changed.push(same());
        }
        Instruction::SetAttr(_) => {
            // The value is kept from here on.
            changed.extend([Instruction::Swap, filter(PAY, 1), Instruction::Swap, same()]);
        }
        Instruction::BuildList(_)
        | Instruction::BuildTuple(_)
        | Instruction::BuildMap(_)
        | Instruction::BuildKwargs(_) => {
            changed.push(same());
            if !matches!(instruction, Instruction::BuildKwargs(_)) {
                changed.push(filter(PAY, 1));
            }
        }
        Instruction::UnpackLists(_) | Instruction::MergeKwargs(_) => {
            let reason = "unpacked arguments (`*list`, `**map`) are not for chat templates";
            return Err(Error::new(ErrorKind::SyntaxError, reason));
        }
        // All others are named: what a later engine adds does not compile until it is thought
        // about. First what calls, and is paid for by what it calls.
        Instruction::ApplyFilter(..)
        | Instruction::PerformTest(..)
        | Instruction::CallFunction(..)
        | Instruction::CallMethod(..)
        | Instruction::CallObject(_)
        | Instruction::FastRecurse
        | Instruction::Emit
        // Numbers of at most 16 bytes.
        | Instruction::Sub
        | Instruction::Div
        | Instruction::IntDiv
        | Instruction::Rem
        | Instruction::Pow
        | Instruction::Neg
        // One value, or as many as the template spells out.
        | Instruction::StoreLocal(_)
        | Instruction::Lookup(_)
        | Instruction::GetAttr(_)
        | Instruction::LoadConst(_)
        | Instruction::UnpackList(_)
        | Instruction::Not
        | Instruction::DupTop
        | Instruction::DiscardTop
        | Instruction::Swap
        // Where the template is, and where its text goes.
        | Instruction::PushWith
        | Instruction::Iterate(_)
        | Instruction::PushDidNotIterate
        | Instruction::PopFrame
        | Instruction::PopLoopFrame
        | Instruction::Jump(_)
        | Instruction::JumpIfFalse(_)
        | Instruction::JumpIfFalseOrPop(_)
        | Instruction::JumpIfTrueOrPop(_)
        | Instruction::PushAutoEscape
        | Instruction::PopAutoEscape
        | Instruction::BeginCapture(_)
        | Instruction::EndCapture
        | Instruction::ExportLocals
        | Instruction::BuildMacro(..)
        | Instruction::Return
        | Instruction::IsUndefined
        | Instruction::Enclose(_)
        | Instruction::GetClosure
        // A chat template is one text without blocks: these fail, with their line, when they are
        // reached.
        | Instruction::FastSuper
        | Instruction::CallBlock(_)
        | Instruction::LoadBlocks
        | Instruction::Include(_) => changed.push(same()),
    }
    Ok(())
}

/// Every instruction with a target; `expand` would not compile with one more.
fn move_jump(instruction: &mut Instruction<'_>, starts: &[u32]) {
    match instruction {
        Instruction::Iterate(target)
        | Instruction::Jump(target)
        | Instruction::JumpIfFalse(target)
        | Instruction::JumpIfFalseOrPop(target)
        | Instruction::JumpIfTrueOrPop(target)
        | Instruction::BuildMacro(_, target, _) => {
            let old = usize::try_from(*target).unwrap_or(usize::MAX);
            *target = starts.get(old).copied().unwrap_or(u32::MAX);
        }
        _ => {}
    }
}

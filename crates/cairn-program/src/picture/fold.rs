//! Which instructions are drawn: blocks that repeat are folded into one.

use std::collections::HashMap;
use std::fmt::Write as _;

use crate::op::{AttentionAttrs, DropoutAttrs, Op};
use crate::program::Program;
use crate::value::{Class, ValueId};

/// Blocks that take turns, at most.
const PERIOD_MAX: usize = 12;

/// Instructions that are drawn together.
pub(super) struct Section {
    /// What it is.
    pub(super) title: String,
    /// Indices into the program.
    pub(super) instrs: Vec<usize>,
}

/// The forward pass cut into sections, in order.
pub(super) fn sections(program: &Program) -> Vec<Section> {
    let mut pieces: Vec<(Option<u32>, Vec<usize>)> = Vec::new();
    for (index, instr) in program.instrs[..program.forward_len].iter().enumerate() {
        match pieces.last_mut() {
            Some((block, instrs)) if *block == instr.block => instrs.push(index),
            _ => pieces.push((instr.block, vec![index])),
        }
    }
    let shapes: Vec<String> = pieces.iter().map(|(_, instrs)| shape_of(program, instrs)).collect();
    let mut sections = Vec::new();
    let mut at = 0;
    while at < pieces.len() {
        let (block, instrs) = &pieces[at];
        let Some(block) = *block else {
            let title = if at == 0 { "embedding" } else { "head" };
            sections.push(Section { title: title.to_owned(), instrs: instrs.clone() });
            at += 1;
            continue;
        };
        let (period, times) = longest_repetition(&shapes[at..]);
        let step = u32::try_from(period).expect("a period is short");
        for turn in 0..period {
            let first = block + u32::try_from(turn).expect("a period is short");
            let last = first + step * u32::try_from(times - 1).expect("blocks are counted in u32");
            let title = match (period, times) {
                (_, 1) => format!("block {first}"),
                (1, _) => format!("blocks {first} to {last}, {times} times"),
                (_, 2) => format!("blocks {first} and {last}"),
                _ => format!("blocks {first}, {}, … {last}, {times} times", first + step),
            };
            sections.push(Section { title, instrs: pieces[at + turn].1.clone() });
        }
        at += period * times;
    }
    sections
}

/// The number of pieces that take turns at the front of `shapes`, and how often: what covers most,
/// the shorter period first.
fn longest_repetition(shapes: &[String]) -> (usize, usize) {
    let mut best = (1, 1);
    for period in 1..=PERIOD_MAX.min(shapes.len() / 2) {
        let (unit, rest) = shapes.split_at(period);
        let times = 1 + rest.chunks_exact(period).take_while(|next| *next == unit).count();
        if times > 1 && period * times > best.0 * best.1 {
            best = (period, times);
        }
    }
    best
}

/// A text that two pieces share exactly if they draw the same.
fn shape_of(program: &Program, instrs: &[usize]) -> String {
    let mut made: HashMap<ValueId, usize> = HashMap::new();
    let mut text = String::new();
    for &index in instrs {
        let instr = &program.instrs[index];
        match &instr.op {
            // Caches and dropouts are numbered through the model.
            Op::KvWrite { .. } => text.push_str("kv_write"),
            Op::Dropout(attrs) => {
                let _ = write!(text, "dropout {}", attrs.p);
            }
            Op::Attention(attrs) => {
                let dropout = attrs.dropout.map(|dropout| DropoutAttrs { site: 0, ..dropout });
                let _ =
                    write!(text, "{}", Op::Attention(AttentionAttrs { dropout, ..attrs.clone() }));
            }
            Op::Rope(attrs) => {
                let _ = write!(text, "{attrs:?}");
            }
            op => {
                let _ = write!(text, "{op}");
            }
        }
        for id in instr.reads() {
            let value = program.value(id);
            let _ = match (made.get(&id), value.class) {
                (Some(number), _) => write!(text, " #{number}"),
                (None, Class::Temp) => write!(text, " outside{}", value.shape),
                (None, Class::Weight) => write!(text, " {}{}", value.value_type, value.shape),
                (None, _) => write!(text, " {}", value.name),
            };
        }
        for id in instr.writes() {
            let number = made.len();
            made.insert(id, number);
            let _ = write!(text, " -> {}", program.value(id).shape);
        }
        text.push('\n');
    }
    text
}

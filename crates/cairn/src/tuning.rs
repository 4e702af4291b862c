//! The tuning of this machine: measured once by `cairn bench tune`, read by whoever computes.

use std::path::PathBuf;

use cairn_kernels::tuner::Tuning;
use cairn_kernels::{Cpu, Encoding};
use cairn_program::{Op, Program, ValueType};
use cairn_spec::Hint;

use cairn_kernels::tuner::{ProductKind, TuneCase, TuningError};

use crate::context::Context;

/// Where the tuning is kept; `None` without a cache folder.
pub(crate) fn path(context: &Context) -> Option<PathBuf> {
    Some(context.environment.cache_dir.as_ref()?.join("tuning.json"))
}

/// The stored tuning, or an empty one. A file that cannot be used is said and left out: every
/// choice gives the same bits, only the speed differs.
pub(crate) fn load(context: &Context) -> Tuning {
    let Some(path) = path(context).filter(|path| path.exists()) else { return Tuning::default() };
    Tuning::load(&path).unwrap_or_else(|error| {
        context.terminal.warn(format_args!("the tuning is not used: {error}"));
        for hint in Tuned(error).hints() {
            context.terminal.hint(hint);
        }
        Tuning::default()
    })
}

/// A processor handle with the stored tuning.
pub(crate) fn cpu(context: &Context, threads: usize) -> Cpu {
    let mut cpu = Cpu::detect(threads);
    cpu.set_tuning(load(context));
    cpu
}

/// An error of the tuner, with hints as the command prints them.
struct Tuned(TuningError);

impl Hint for Tuned {
    fn hints(&self) -> Vec<String> {
        self.0.hints()
    }
}

/// Every product of a program that runs over `tokens` tokens, each once.
pub(crate) fn cases(program: &Program, tokens: usize) -> Vec<TuneCase> {
    let mut cases: Vec<TuneCase> = Vec::new();
    for instr in &program.instrs {
        let operand = |slot: usize| {
            let id = instr.inputs.get(slot).copied().flatten();
            id.map(|id| program.value(id))
        };
        let (Some(first), Some(second)) = (operand(0), operand(1)) else { continue };
        let (rows, other) = (first.shape.row_elements(), second.shape.row_elements());
        let encoding = |value_type: ValueType| value_type.encoding().unwrap_or(Encoding::F32);
        let t = tokens;
        let case = match instr.op {
            Op::Matmul => {
                let encoding = encoding(second.value_type);
                TuneCase { product: ProductKind::Matmul, encoding, t, n: other / rows, k: rows }
            }
            Op::MatmulDx => {
                let encoding = encoding(second.value_type);
                TuneCase { product: ProductKind::MatmulDx, encoding, t, n: rows, k: other / rows }
            }
            Op::MatmulDw => {
                let encoding = Encoding::F32;
                TuneCase { product: ProductKind::MatmulDw, encoding, t, n: rows, k: other }
            }
            _ => continue,
        };
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    cases
}

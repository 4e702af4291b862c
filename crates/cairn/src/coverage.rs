//! How much of a model runs in kernels made for its encoding and this machine's instruction set.

use std::collections::BTreeSet;

use cairn_engine::Engine;
use cairn_kernels::{Encoding, Isa, registry};
use cairn_program::{Class, Instr, Program, ProgramId};
use serde::Serialize;

use crate::figures::Percent;

/// Runs of one token whose times count, after one that does not.
const RUNS: usize = 4;

/// Operators of a program by who runs them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Coverage {
    /// Instructions.
    pub(crate) operators: usize,
    /// Those with a kernel of their own.
    pub(crate) specialized: usize,
    /// Share of the time of a decoded token in those, where it was measured.
    pub(crate) time_share: Option<f64>,
    /// Kernels that are missing, by name.
    pub(crate) missing: Vec<String>,
}

/// The kernel of its own that an instruction would have.
fn kernel_of(program: &Program, instr: &Instr, isa: Isa) -> String {
    let operands = instr.inputs.iter().flatten().map(|&id| program.value(id));
    let weights = operands.filter(|value| value.class == Class::Weight);
    let matrices = weights.filter(|value| value.shape.0.len() > 1);
    let encoding = matrices.filter_map(|value| value.value_type.encoding()).next();
    format!("{}.{}.{isa}", instr.op.name(), encoding.unwrap_or(Encoding::F32))
}

impl Coverage {
    /// Counts the instructions of a program.
    pub(crate) fn of(program: &Program, isa: Isa) -> Self {
        let known: BTreeSet<String> =
            registry::kernels().iter().map(registry::KernelEntry::name).collect();
        let mut coverage = Self { operators: program.instrs.len(), ..Self::default() };
        for instr in &program.instrs {
            let kernel = kernel_of(program, instr, isa);
            // Plain loops are nobody's own.
            if isa != Isa::Scalar && known.contains(&kernel) {
                coverage.specialized += 1;
            } else if !coverage.missing.contains(&kernel) {
                coverage.missing.push(kernel);
            }
        }
        coverage
    }

    /// Counts, and measures a token by itself, in an engine that is loaded and idle.
    pub(crate) fn measured(engine: &mut Engine, isa: Isa) -> anyhow::Result<Self> {
        let program = engine.session().program(ProgramId(0));
        let mut coverage = Self::of(program, isa);
        let own: Vec<bool> = program
            .instrs
            .iter()
            .map(|instr| !coverage.missing.contains(&kernel_of(program, instr, isa)))
            .collect();
        let (mut all, mut specialized) = (0.0, 0.0);
        for run in 0..=RUNS {
            engine.observe_token(1, &mut |at, s| {
                if run > 0 {
                    all += s;
                    specialized += if own[at] { s } else { 0.0 };
                }
            })?;
        }
        coverage.time_share = Some(specialized / all);
        Ok(coverage)
    }

    /// In words.
    pub(crate) fn text(&self, isa: Isa) -> String {
        let Self { operators, specialized, time_share, missing } = self;
        let time = time_share.map(|share| format!(", {} of a token's time", Percent(share)));
        let time = time.unwrap_or_default();
        let others = match missing.as_slice() {
            [] => String::new(),
            [first] => format!("; not {first}"),
            [first, rest @ ..] => format!("; not {first} and {} more", rest.len()),
        };
        format!(
            "{specialized} of {operators} operators in {isa} kernels of their own{time}{others}"
        )
    }
}

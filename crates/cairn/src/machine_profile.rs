//! What this machine was measured to do: measured once, kept, and read by whoever computes.

use std::path::PathBuf;

use cairn_artifacts::{FileError, atomic};
use cairn_kernels::peak::measure_fma_peak;
use cairn_kernels::profile::MachineProfile;
use cairn_kernels::tuner::{ProductKind, TuneCase};
use cairn_kernels::{Compute, Cpu, CpuError, Encoding};
use cairn_program::{Op, Program, ValueType};
use cairn_train::{Host, Measured};

use crate::context::Context;
use crate::outside::Outside;

/// Seconds that a run gives to the cuts of products that no run had before.
const TUNE_SECONDS: f64 = 1.5;

/// Where the profile is kept; `None` without a cache folder.
pub(crate) fn path(context: &Context) -> Option<PathBuf> {
    Some(context.environment.cache_dir.as_ref()?.join("machine.json"))
}

/// The stored profile, or an empty one. A file that cannot be used is said and left out: choices
/// change no bit, and figures can be measured again.
pub(crate) fn load(context: &Context) -> MachineProfile {
    let Some(path) = path(context).filter(|path| path.exists()) else {
        return MachineProfile::default();
    };
    MachineProfile::load(&path).unwrap_or_else(|error| {
        context.terminal.warn(format_args!("what was measured before is not used: {error}"));
        MachineProfile::default()
    })
}

/// Keeps a profile, all of it or nothing, and says whether it could. A folder that cannot be written
/// to costs only time, so it is a warning.
pub(crate) fn keep(profile: &MachineProfile, context: &Context) -> bool {
    let write = |path: PathBuf| {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(FileError::on("create", folder))?;
        }
        atomic::write_bytes(&path, profile.to_json().as_bytes())
    };
    let Some(written) = path(context).map(write) else { return false };
    if let Err(error) = &written {
        let cause = std::error::Error::source(error);
        let cause = cause.map_or_else(String::new, |cause| format!(": {cause}"));
        context.terminal.warn(format_args!("what was measured cannot be kept: {error}{cause}"));
        context.terminal.hint("name a folder that can be written to: CAIRN_CACHE_DIR=FOLDER");
    }
    written.is_ok()
}

/// A processor handle with the stored choices.
pub(crate) fn cpu(context: &Context, threads: usize) -> Result<Cpu, CpuError> {
    let mut cpu = Cpu::try_new(context.isa, threads)?;
    cpu.set_tuning(load(context).tuning);
    Ok(cpu)
}

/// The outside of a run that measures what this machine was not measured for yet.
///
/// A run computes its first step with estimates and starts at once; then, in about two seconds at
/// most, what is open is measured and kept for all later runs.
#[derive(Debug)]
pub(crate) struct Measuring<'a> {
    outside: &'a Outside,
    context: &'a Context,
    cases: Vec<TuneCase>,
}

impl<'a> Measuring<'a> {
    /// The outside of a run over these products.
    pub(crate) fn new(outside: &'a Outside, context: &'a Context, cases: Vec<TuneCase>) -> Self {
        Self { outside, context, cases }
    }
}

impl Host for Measuring<'_> {
    fn monotonic_s(&self) -> f64 {
        self.outside.monotonic_s()
    }

    fn unix_s(&self) -> f64 {
        self.outside.unix_s()
    }

    fn anonymous_bytes(&self) -> Option<u64> {
        self.outside.anonymous_bytes()
    }

    fn stop_requested(&self) -> bool {
        self.outside.stop_requested()
    }

    fn measure(&self, cpu: &mut Cpu, room: &mut [f32]) -> Option<Measured> {
        let mut profile = load(self.context);
        let known = profile.peak(cpu);
        let open = profile.tuning.worthwhile(cpu, &self.cases).len();
        if self.stop_requested() || (known.is_some() && open == 0) {
            return None;
        }
        let peak = known.unwrap_or_else(|| measure_fma_peak(cpu));
        profile.keep_peak(peak);
        // Choices that cannot be kept are not made: every run would pay for them.
        let is_kept = keep(&profile, self.context);
        if is_kept && open > 0 {
            profile.tuning.measure_within(cpu, &self.cases, TUNE_SECONDS, room);
            keep(&profile, self.context);
        }
        let products = open - profile.tuning.worthwhile(cpu, &self.cases).len();
        cpu.set_tuning(profile.tuning);
        Some(Measured { peak_flops_per_s: peak.gflops * 1e9, products })
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
                let product = match instr.compute {
                    Compute::F32 => ProductKind::Matmul,
                    Compute::Bf16 => ProductKind::MatmulBf16,
                    // Nothing about them is chosen.
                    Compute::Int8 => continue,
                };
                TuneCase { product, encoding, t, n: other / rows, k: rows }
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

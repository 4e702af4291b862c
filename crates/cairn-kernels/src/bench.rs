//! Runs registered kernels over their shapes and relates the speeds to this machine's ceilings.

use std::time::Instant;

use crate::bandwidth::{Bandwidth, measure_bandwidth};
use crate::cpu::Cpu;
use crate::memory::MemoryError;
use crate::peak::{FmaPeak, measure_fma_peak};
use crate::registry::{Case, KernelEntry, Shape};

/// Runs of which the median counts.
const RUNS_MIN: usize = 5;
const RUNS_MAX: usize = 50;
/// Seconds after which a case has run often enough.
const ENOUGH_SECONDS: f64 = 0.15;
/// A run shorter than this is repeated inside one measurement.
const RUN_SECONDS_MIN: f64 = 2e-4;

/// The measured ceilings that speeds are related to.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Ceilings {
    /// Fused multiply-adds on registers.
    pub peak: FmaPeak,
    /// Reading memory.
    pub bandwidth: Bandwidth,
}

impl Ceilings {
    /// Measures both, which takes about half a second.
    ///
    /// # Errors
    /// [`MemoryError::Refused`] if the system does not give the bandwidth's buffer.
    pub fn measure(cpu: &Cpu) -> Result<Self, MemoryError> {
        Ok(Self { peak: measure_fma_peak(cpu), bandwidth: measure_bandwidth(cpu)? })
    }
}

/// One measured kernel and shape.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct BenchRow {
    /// `operator.encoding.isa`.
    pub kernel: String,
    /// The sizes, for instance `t4096 n384 k384`.
    pub shape: String,
    /// Threads of the handle.
    pub threads: usize,
    /// Median seconds of one call.
    pub seconds: f64,
    /// 10⁹ floating-point operations a second.
    pub gflops: f64,
    /// 10⁹ bytes a second, each byte that must move counted once.
    pub gbs: f64,
    /// Of the measured multiply-add peak.
    pub fraction_of_peak: f64,
    /// Of the measured read bandwidth; above 1 when the operands stay in cache.
    pub fraction_of_bandwidth: f64,
}

/// Measures one kernel on one shape. The handle's instruction set must be the entry's.
///
/// # Panics
/// If the handle has another instruction set.
pub fn bench_kernel(
    cpu: &Cpu,
    ceilings: &Ceilings,
    entry: &KernelEntry,
    shape: &Shape,
) -> BenchRow {
    assert_eq!(cpu.isa(), entry.isa, "a kernel is measured with its own instruction set");
    let mut case = (entry.operator.prepare)(shape, entry.encoding);
    let seconds = median_seconds(cpu, &mut case);
    let (gflops, gbs) = (case.flops / seconds / 1e9, case.bytes / seconds / 1e9);
    BenchRow {
        kernel: entry.name(),
        shape: shape.to_string(),
        threads: cpu.threads(),
        seconds,
        gflops,
        gbs,
        fraction_of_peak: gflops / ceilings.peak.gflops,
        fraction_of_bandwidth: gbs / ceilings.bandwidth.gbs,
    }
}

/// Median over at least five runs, after one that warms caches and threads.
pub(crate) fn median_seconds(cpu: &Cpu, case: &mut Case) -> f64 {
    let mut timed = |calls: usize| {
        let start = Instant::now();
        for _ in 0..calls {
            (case.run)(cpu);
        }
        start.elapsed().as_secs_f64() / calls as f64
    };
    let first = timed(1).min(timed(1));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 10⁴")]
    let calls = (RUN_SECONDS_MIN / first.max(1e-8)).ceil().clamp(1.0, 1e4) as usize;
    let mut runs = Vec::with_capacity(RUNS_MAX);
    let started = Instant::now();
    while runs.len() < RUNS_MIN
        || runs.len() < RUNS_MAX && started.elapsed().as_secs_f64() < ENOUGH_SECONDS
    {
        runs.push(timed(calls));
    }
    runs.sort_by(f64::total_cmp);
    runs[runs.len() / 2]
}

/// Measures every kernel whose name contains `filter`, for the handle's instruction set, over its
/// operator's shapes, and hands each row on as soon as it is there.
pub fn bench_kernels(
    cpu: &Cpu,
    ceilings: &Ceilings,
    filter: &str,
    mut each: impl FnMut(&BenchRow),
) {
    let of_this_isa = crate::registry::kernels().into_iter().filter(|k| k.isa == cpu.isa());
    for entry in of_this_isa.filter(|entry| entry.name().contains(filter)) {
        for shape in (entry.operator.shapes)() {
            each(&bench_kernel(cpu, ceilings, &entry, &shape));
        }
    }
}

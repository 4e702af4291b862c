//! Runs registered kernels over their shapes and relates the speeds to this machine's ceilings.

use std::time::Instant;

use crate::bandwidth::{Bandwidth, BandwidthMeter, measure_bandwidth};
use crate::compute::Compute;
use crate::cpu::Cpu;
use crate::memory::MemoryError;
use crate::peak::{FmaPeak, measure_bf16_peak, measure_fma_peak, measure_int8_peak};
use crate::registry::{Case, KernelEntry, Shape};

pub mod gates;
pub(crate) mod inputs;

/// Runs of which the median counts.
const RUNS_MIN: usize = 5;
const RUNS_MAX: usize = 50;
/// Seconds after which a case has run often enough.
const ENOUGH_SECONDS: f64 = 0.15;
/// A run shorter than this is repeated inside one measurement.
const RUN_SECONDS_MIN: f64 = 2e-4;

/// The measured ceilings of one instruction set that speeds are related to.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Ceilings {
    /// Fused multiply-adds on registers.
    pub peak: FmaPeak,
    /// Reading memory.
    pub bandwidth: Bandwidth,
}

impl Ceilings {
    /// Measures both with the instruction set and threads of `cpu`, which takes about a second.
    ///
    /// # Errors
    /// [`MemoryError::Refused`] if the system does not give the bandwidth's buffer.
    pub fn measure(cpu: &Cpu) -> Result<Self, MemoryError> {
        Ok(Self { peak: measure_fma_peak(cpu), bandwidth: measure_bandwidth(cpu)? })
    }

    /// Which ceiling work of these costs meets first, and the share of it that it reaches in
    /// `seconds`.
    pub fn roofline(&self, flops: f64, bytes: f64, seconds: f64) -> (Limit, f64) {
        let arithmetic = flops / (self.peak.gflops * 1e9);
        let memory = bytes / (self.bandwidth.gbs * 1e9);
        if arithmetic > memory {
            (Limit::Peak, arithmetic / seconds)
        } else {
            (Limit::Bandwidth, memory / seconds)
        }
    }
}

/// What bounds a kernel from below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Its arithmetic takes longer than its bytes.
    Peak,
    /// Its bytes take longer than its arithmetic.
    Bandwidth,
}

/// One measured kernel and shape.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
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
    /// Which ceiling of this instruction set it meets first.
    pub limit: Limit,
    /// 10⁹ bytes a second read from memory just before and after, in the mean.
    pub bandwidth_gbs: f64,
    /// The share of that ceiling; above 1 where bytes come from cache instead of memory.
    pub fraction: f64,
}

/// Measures one kernel on one shape, and the bandwidth right before and after: it moves from minute to
/// minute. The handle's instruction set must be the entry's.
///
/// # Panics
/// If the handle has another instruction set.
pub fn bench_kernel(
    cpu: &Cpu,
    (peak, meter): (&FmaPeak, &mut BandwidthMeter),
    entry: &KernelEntry,
    shape: &Shape,
) -> BenchRow {
    assert_eq!(cpu.isa(), entry.isa, "a kernel is measured with its own instruction set");
    let mut case = (entry.operator.prepare)(shape, entry.encoding);
    let before = meter.pass(cpu);
    let seconds = median_seconds(cpu, &mut case);
    let bandwidth_gbs = f64::midpoint(before, meter.pass(cpu));
    let bandwidth = Bandwidth { gbs: bandwidth_gbs, ..meter.bandwidth() };
    let peak = match case.compute {
        Compute::F32 => *peak,
        Compute::Bf16 => measure_bf16_peak(cpu),
        Compute::Int8 => measure_int8_peak(cpu),
    };
    let ceilings = Ceilings { peak, bandwidth };
    let (limit, fraction) = ceilings.roofline(case.flops, case.bytes, seconds);
    BenchRow {
        kernel: entry.name(),
        shape: shape.to_string(),
        threads: cpu.threads(),
        seconds,
        gflops: case.flops / seconds / 1e9,
        gbs: case.bytes / seconds / 1e9,
        limit,
        bandwidth_gbs,
        fraction,
    }
}

/// Median over at least five runs, after one that warms caches and threads.
fn median_seconds(cpu: &Cpu, case: &mut Case) -> f64 {
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
/// operator's shapes, and hands each row on as soon as it is there. Returns the peak and the median of
/// all measurements of the bandwidth.
///
/// # Errors
/// [`MemoryError::Refused`] if the system does not give the bandwidth's buffer.
pub fn bench_kernels(
    cpu: &Cpu,
    filter: &str,
    mut each: impl FnMut(&BenchRow),
) -> Result<Ceilings, MemoryError> {
    let peak = measure_fma_peak(cpu);
    let mut meter = BandwidthMeter::new(cpu)?;
    let of_this_isa = crate::registry::kernels().into_iter().filter(|k| k.isa == cpu.isa());
    for entry in of_this_isa.filter(|entry| entry.name().contains(filter)) {
        for shape in entry.operator.shapes() {
            each(&bench_kernel(cpu, (&peak, &mut meter), &entry, &shape));
        }
    }
    meter.pass(cpu);
    Ok(Ceilings { peak, bandwidth: meter.bandwidth() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::registry::kernels;

    #[test]
    fn every_registered_kernel_can_be_measured() {
        for isa in Isa::supported() {
            let cpu = Cpu::new(isa, 2);
            for entry in kernels().into_iter().filter(|entry| entry.isa == isa) {
                let shapes: Vec<Shape> = entry.operator.shapes().collect();
                assert!(!shapes.is_empty(), "{} has no shapes", entry.name());
                for shape in shapes {
                    let mut case = (entry.operator.prepare)(&shape.capped(16), entry.encoding);
                    (case.run)(&cpu);
                    (case.run)(&cpu);
                    assert!(case.bytes > 0.0 && case.flops >= 0.0, "{} {shape}", entry.name());
                }
            }
        }
    }

    #[test]
    fn rows_are_related_to_the_ceiling_they_meet_first() {
        let cpu = Cpu::new(Isa::Scalar, 1);
        let peak = FmaPeak { isa: Isa::Scalar, threads: 1, gflops: 10.0 };
        let bandwidth = Bandwidth {
            isa: Isa::Scalar,
            threads: 1,
            buffer_bytes: 1 << 30,
            passes: 1,
            gbs: 5.0,
            gbs_min: 5.0,
            gbs_max: 5.0,
        };
        let ceilings = Ceilings { peak, bandwidth };
        assert_eq!(ceilings.roofline(20e9, 5e9, 4.0), (Limit::Peak, 0.5));
        assert_eq!(ceilings.roofline(1e9, 5e9, 4.0), (Limit::Bandwidth, 0.25));
        let entry = crate::registry::find("rms_norm.f32.scalar").unwrap();
        let shape = entry.operator.shapes().next().unwrap().capped(64);
        let mut meter = BandwidthMeter::with_buffer(&cpu, 16 << 20).unwrap();
        let row = bench_kernel(&cpu, (&peak, &mut meter), &entry, &shape);
        let found = meter.bandwidth();
        assert!(found.passes == 2 && found.gbs_min <= row.bandwidth_gbs, "{found:?}");
        assert_eq!((row.kernel.as_str(), row.shape.as_str()), ("rms_norm.f32.scalar", "n64 d64"));
        let bytes = 8.0 * 64.0 * 64.0;
        assert!((row.gbs * row.seconds * 1e9 - bytes).abs() < 1e-6 * bytes);
        assert!(row.fraction > 0.0 && row.fraction.is_finite());
    }
}

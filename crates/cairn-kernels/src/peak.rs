//! How fast this machine multiplies: the ceiling that benchmarks divide by.

use std::time::Instant;

use crate::cpu::Cpu;
use crate::isa::Isa;
use crate::simd::{F32x16, I32x16, Kernel, LANES, dispatch};

/// Bursts after the best one: other work on the machine only ever slows one down, so the best
/// counts, and it is believed when so many more have not beaten it clearly.
const BURSTS_WITHOUT_GAIN: usize = 12;
/// What is a clear gain.
const GAIN: f64 = 1.01;
const BURSTS_MAX: usize = 200;
const BURST_SECONDS: f64 = 0.004;

/// Measured speed of fused multiply-adds on registers.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FmaPeak {
    /// The instruction set measured.
    pub isa: Isa,
    /// Threads that took part.
    pub threads: usize,
    /// 10⁹ floating-point operations a second, all threads together; an FMA is two.
    pub gflops: f64,
}

/// Measures independent chains of fused multiply-adds on all threads of `cpu`.
pub fn measure_fma_peak(cpu: &Cpu) -> FmaPeak {
    let simd = cpu.simd();
    measure(cpu, |rounds| dispatch(simd, Chains { rounds }))
}

/// The same for bf16 products: by their instruction where the machine has it.
pub fn measure_bf16_peak(cpu: &Cpu) -> FmaPeak {
    let simd = cpu.simd();
    if cpu.has_bf16_instruction() {
        measure(cpu, |rounds| dispatch(simd, PairChains { rounds }))
    } else {
        measure_fma_peak(cpu)
    }
}

/// The same for products of bytes: by their instruction where the machine has it.
pub fn measure_int8_peak(cpu: &Cpu) -> FmaPeak {
    let simd = cpu.simd();
    if simd.has_byte_dot() {
        measure(cpu, |rounds| dispatch(simd, ByteChains { rounds }))
    } else {
        measure_fma_peak(cpu)
    }
}

fn measure(cpu: &Cpu, chains: impl Fn(usize) -> Burst + Sync) -> FmaPeak {
    let mut rounds = 1000;
    while seconds_of(|| _ = chains(rounds)) < BURST_SECONDS {
        rounds *= 2;
    }
    let threads = cpu.threads();
    // One task a thread: a thread that comes late for its task would take a second one otherwise.
    let burst = || seconds_of(|| cpu.parallel(threads, |_, _| _ = chains(rounds)));
    let (mut best, mut clear, mut since) = (f64::INFINITY, f64::INFINITY, 0);
    for _ in 0..BURSTS_MAX {
        best = best.min(burst());
        since += 1;
        if best * GAIN < clear {
            (clear, since) = (best, 0);
        }
        if since == BURSTS_WITHOUT_GAIN {
            break;
        }
    }
    let flops = chains(1).flops_a_round * rounds as f64;
    FmaPeak { isa: cpu.isa(), threads, gflops: flops * threads as f64 / best / 1e9 }
}

fn seconds_of(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

struct Chains {
    rounds: usize,
}

struct Burst {
    flops_a_round: f64,
    _value: f32,
}

impl Kernel for Chains {
    type Output = Burst;

    #[inline(always)]
    fn run<V: F32x16>(self) -> Burst {
        // As many chains as cover the latency and leave registers for the operands.
        if V::TILE.0 == 1 { chains::<V, 6>(self.rounds) } else { chains::<V, 12>(self.rounds) }
    }
}

#[inline(always)]
fn chains<V: F32x16, const N: usize>(rounds: usize) -> Burst {
    let factor = V::splat(std::hint::black_box(0.5));
    let addend = V::splat(std::hint::black_box(1.0));
    let mut sums = [addend; N];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = sum.mul_add(factor, addend);
        }
    }
    let value = sums.into_iter().fold(0.0, |total, sum| total + sum.sum());
    Burst { flops_a_round: (2 * LANES * N) as f64, _value: std::hint::black_box(value) }
}

/// Chains of `vdpbf16ps`. Only where [`Cpu::has_bf16_instruction`].
struct PairChains {
    rounds: usize,
}

impl Kernel for PairChains {
    type Output = Burst;

    #[inline(always)]
    fn run<V: F32x16>(self) -> Burst {
        struct Called(usize);
        impl Kernel for Called {
            type Output = Burst;
            #[inline(always)]
            fn run<V: F32x16>(self) -> Burst {
                const N: usize = 12;
                let factor = V::splat(std::hint::black_box(1.0));
                let mut sums = [V::zero(); N];
                for _ in 0..self.0 {
                    for sum in &mut sums {
                        *sum = factor.pair_dot(factor, *sum);
                    }
                }
                let value = sums.into_iter().fold(0.0, |total, sum| total + sum.sum());
                Burst { flops_a_round: (4 * LANES * N) as f64, _value: std::hint::black_box(value) }
            }
        }
        // SAFETY: it is dispatched only where the handle has the instruction.
        unsafe { V::call_pair_dot(Called(self.rounds)) }
    }
}

/// Chains of `vpdpbusd`. Only where [`Simd::has_byte_dot`](crate::isa::Simd::has_byte_dot).
struct ByteChains {
    rounds: usize,
}

impl Kernel for ByteChains {
    type Output = Burst;

    #[inline(always)]
    fn run<V: F32x16>(self) -> Burst {
        struct Called(usize);
        impl Kernel for Called {
            type Output = Burst;
            #[inline(always)]
            fn run<V: F32x16>(self) -> Burst {
                const N: usize = 12;
                let factor = V::Int::splat(std::hint::black_box(0x0102_0304));
                let mut sums = [V::Int::splat(0); N];
                for _ in 0..self.0 {
                    for sum in &mut sums {
                        *sum = sum.byte_dot(factor, factor);
                    }
                }
                let add = |total: f32, sum: V::Int| total + sum.to_float().sum();
                let value = sums.into_iter().fold(0.0, add);
                Burst { flops_a_round: (8 * LANES * N) as f64, _value: std::hint::black_box(value) }
            }
        }
        // SAFETY: it is dispatched only where the handle has the instruction.
        unsafe { V::call_byte_dot(Called(self.rounds)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wider_instruction_sets_are_not_slower() {
        let speeds: Vec<f64> = Isa::supported()
            .into_iter()
            .map(|isa| measure_fma_peak(&Cpu::new(isa, 1)).gflops)
            .collect();
        assert!(speeds.iter().all(|&speed| speed > 0.0));
        // Half leaves room for whatever else the machine is doing.
        assert!(speeds.is_sorted_by(|narrow, wide| *wide > 0.5 * narrow), "{speeds:?}");
    }
}

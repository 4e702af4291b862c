//! How fast this machine reads memory: the ceiling of everything that decodes one token at a time.
//!
//! A virtual machine's bandwidth moves from second to second with what its neighbors do, so one
//! number measured at one time says little about work done at another. A [`BandwidthMeter`] keeps
//! its buffer between passes: a benchmark makes a pass between its own turns and relates its speed
//! to the median of those passes, with their spread beside it.

use std::time::Instant;

use crate::cpu::Cpu;
use crate::isa::{Isa, last_level_cache_bytes};
use crate::memory::{Anonymous, Bytes, MemoryError};
use crate::simd::kernel;

/// The buffer is at least this large …
const BUFFER_BYTES_MIN: usize = 1 << 30;
/// … and at least this many times the last-level cache, so that at most a quarter of a pass could
/// come from it.
const BUFFER_CACHES_MIN: usize = 4;
const TASK_BYTES: usize = 1 << 20;
/// Passes of a measurement by itself: about half a second.
const PASSES: usize = 15;

/// Measured read bandwidth.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bandwidth {
    /// The instruction set that read.
    pub isa: Isa,
    /// Threads that took part.
    pub threads: usize,
    /// Bytes of the buffer that was read.
    pub buffer_bytes: usize,
    /// Passes over the buffer.
    pub passes: usize,
    /// 10⁹ bytes a second, median of the passes.
    pub gbs: f64,
    /// The slowest pass.
    pub gbs_min: f64,
    /// The fastest pass.
    pub gbs_max: f64,
}

/// A buffer far beyond the caches, and the passes made over it so far.
#[derive(Debug)]
pub struct BandwidthMeter {
    buffer: Anonymous,
    isa: Isa,
    threads: usize,
    passes: Vec<f64>,
}

impl BandwidthMeter {
    /// A meter for the threads of `cpu` with a buffer of at least 1 GiB and four times the
    /// last-level cache, touched, from huge pages where the system gives them.
    ///
    /// # Errors
    /// [`MemoryError::Refused`] if the system does not give the buffer.
    pub fn new(cpu: &Cpu) -> Result<Self, MemoryError> {
        let caches = BUFFER_CACHES_MIN * last_level_cache_bytes().unwrap_or(0);
        Self::with_buffer(cpu, BUFFER_BYTES_MIN.max(caches))
    }

    pub(crate) fn with_buffer(cpu: &Cpu, bytes: usize) -> Result<Self, MemoryError> {
        let buffer = Anonymous::new_parallel(bytes.next_multiple_of(TASK_BYTES), 0, cpu)?;
        let (isa, threads) = (cpu.isa(), cpu.threads());
        let meter = Self { buffer, isa, threads, passes: Vec::new() };
        // The first pass meets cold translations and sleeping threads.
        meter.read(cpu);
        Ok(meter)
    }

    /// Reads the buffer once with all threads, keeps how fast that was and returns it, in 10⁹ bytes
    /// a second.
    pub fn pass(&mut self, cpu: &Cpu) -> f64 {
        let gbs = self.read(cpu);
        self.passes.push(gbs);
        gbs
    }

    fn read(&self, cpu: &Cpu) -> f64 {
        let words = Bytes::new(self.buffer.as_ref()).f32s();
        let task_words = TASK_BYTES / 4;
        let simd = cpu.simd();
        let start = Instant::now();
        cpu.parallel(words.len() / task_words, |task, _| {
            std::hint::black_box(sum(simd, &words[task * task_words..(task + 1) * task_words]));
        });
        self.buffer.as_ref().len() as f64 / start.elapsed().as_secs_f64() / 1e9
    }

    /// The median of the passes and their spread.
    ///
    /// # Panics
    /// Before the first pass.
    pub fn bandwidth(&self) -> Bandwidth {
        let mut sorted = self.passes.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        Bandwidth {
            isa: self.isa,
            threads: self.threads,
            buffer_bytes: self.buffer.as_ref().len(),
            passes: sorted.len(),
            gbs: f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[middle]),
            gbs_min: sorted[0],
            gbs_max: sorted[sorted.len() - 1],
        }
    }
}

/// The median of several passes made one after the other.
///
/// # Errors
/// [`MemoryError::Refused`] if the system does not give the buffer.
pub fn measure_bandwidth(cpu: &Cpu) -> Result<Bandwidth, MemoryError> {
    let mut meter = BandwidthMeter::new(cpu)?;
    for _ in 0..PASSES {
        meter.pass(cpu);
    }
    Ok(meter.bandwidth())
}

kernel! {
    /// The sum of all numbers, in eight independent chains of vectors.
    fn sum<V>(words: &[f32]) -> f32 {
        let (vectors, _) = words.as_chunks::<16>();
        let (groups, _) = vectors.as_chunks::<8>();
        let mut sums = [V::zero(); 8];
        for group in groups {
            for (sum, vector) in sums.iter_mut().zip(group) {
                *sum = *sum + V::load(vector);
            }
        }
        sums.into_iter().fold(0.0, |total, lanes| total + lanes.sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_gives_the_median_of_its_passes() {
        let cpu = Cpu::detect(1);
        let mut meter = BandwidthMeter::with_buffer(&cpu, 32 << 20).unwrap();
        assert_eq!(meter.buffer.as_ref().len(), 32 << 20);
        let mut passes: Vec<f64> = (0..4).map(|_| meter.pass(&cpu)).collect();
        assert!(passes.iter().all(|&gbs| gbs > 0.1 && gbs < 10_000.0), "{passes:?}");
        passes.sort_by(f64::total_cmp);
        let found = meter.bandwidth();
        assert_eq!((found.passes, found.threads), (4, 1));
        let expected = [passes[0], passes[3], f64::midpoint(passes[1], passes[2])];
        let bits = |numbers: [f64; 3]| numbers.map(f64::to_bits);
        assert_eq!(bits([found.gbs_min, found.gbs_max, found.gbs]), bits(expected));
        meter.passes = vec![3.0, 1.0, 2.0];
        let found = meter.bandwidth();
        assert_eq!(bits([found.gbs_min, found.gbs_max, found.gbs]), bits([1.0, 3.0, 2.0]));
    }

    #[test]
    fn every_number_is_read() {
        let simd = Cpu::detect(1).simd();
        let words: Vec<f32> = (0..1024).map(|i| i as f32).collect();
        assert_eq!(sum(simd, &words).to_bits(), (1023.0_f32 * 512.0).to_bits());
    }
}

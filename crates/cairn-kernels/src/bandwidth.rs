//! How fast this machine reads memory: the ceiling of everything that decodes one token at a time.

use std::time::Instant;

use crate::cpu::Cpu;
use crate::memory::{Anonymous, Bytes, MemoryError};
use crate::simd::kernel;

/// Far beyond the caches of one machine's share of a processor.
const BUFFER_BYTES: usize = 512 << 20;
const TASK_BYTES: usize = 1 << 20;
/// The best of this many passes; other work on the machine only ever slows one down.
const PASSES: usize = 7;

/// Measured read bandwidth.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Bandwidth {
    /// Threads that took part.
    pub threads: usize,
    /// Bytes of the buffer that was read.
    pub buffer_bytes: usize,
    /// 10⁹ bytes a second, best pass.
    pub gbs: f64,
}

/// Reads a buffer far beyond the caches, from huge pages where the system gives them, and reports
/// the best pass.
///
/// # Errors
/// [`MemoryError::Refused`] if the system does not give the buffer.
pub fn measure_bandwidth(cpu: &Cpu) -> Result<Bandwidth, MemoryError> {
    let buffer = Anonymous::new(BUFFER_BYTES)?;
    let words = Bytes::new(buffer.as_ref()).f32s();
    let tasks = BUFFER_BYTES / TASK_BYTES;
    let task_words = TASK_BYTES / 4;
    let simd = cpu.simd();
    let best = (0..PASSES)
        .map(|_| {
            let start = Instant::now();
            cpu.parallel(tasks, |task, _| {
                let part = &words[task * task_words..(task + 1) * task_words];
                std::hint::black_box(read(simd, part));
            });
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    let gbs = BUFFER_BYTES as f64 / best / 1e9;
    Ok(Bandwidth { threads: cpu.threads(), buffer_bytes: BUFFER_BYTES, gbs })
}

kernel! {
    /// Touches every vector; the largest value keeps the loads alive.
    fn read<V>(words: &[f32]) -> f32 {
        let (vectors, _) = words.as_chunks::<16>();
        let (groups, _) = vectors.as_chunks::<8>();
        let mut largest = [V::zero(); 8];
        for group in groups {
            for (lane, vector) in largest.iter_mut().zip(group) {
                *lane = V::load(vector).max(*lane);
            }
        }
        largest.into_iter().fold(0.0, |most, lanes| lanes.max_lane().max(most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_is_read() {
        let bandwidth = measure_bandwidth(&Cpu::detect(1)).unwrap();
        assert!(bandwidth.gbs > 0.1 && bandwidth.gbs < 10_000.0, "{bandwidth:?}");
    }
}

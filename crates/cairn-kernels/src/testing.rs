//! What the tests of the operators share: numbers from a seed, every instruction set, equal bits.

use crate::memory::ALIGNMENT;
use crate::{Cpu, Isa};

/// Bytes that start where a weight's must.
pub(crate) fn aligned(len: usize, bytes: &mut Vec<u8>) -> &mut [u8] {
    bytes.resize(len + ALIGNMENT, 0);
    let skip = bytes.as_ptr().align_offset(ALIGNMENT);
    &mut bytes[skip..skip + len]
}

/// Numbers that look random and are the same in every run.
pub(crate) struct Numbers {
    state: u64,
}

impl Numbers {
    /// A stream of its own for every seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def0 }
    }

    /// The next 64 bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A whole number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.bits() % limit as u64).unwrap()
    }

    /// A number in [−1, 1).
    pub(crate) fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    /// `len` numbers in [−scale, scale).
    pub(crate) fn floats(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.float() * scale).collect()
    }

    /// `len` whole numbers below `limit`.
    pub(crate) fn indices(&mut self, len: usize, limit: usize) -> Vec<u32> {
        (0..len).map(|_| u32::try_from(self.below(limit)).unwrap()).collect()
    }
}

/// Calls `f` with a handle for every instruction set of this machine, on one and on two threads, and
/// with one of three threads, which rows seldom divide among.
pub(crate) fn every_cpu(f: impl Fn(&Cpu)) {
    thread_local! {
        static CPUS: Vec<Cpu> = Isa::supported()
            .into_iter()
            .flat_map(|isa| [Cpu::new(isa, 1), Cpu::new(isa, 2)])
            .chain([Cpu::new(Isa::best(), 3)])
            .collect();
    }
    CPUS.with(|cpus| cpus.iter().for_each(f));
}

/// Fails where two results differ in a bit.
#[track_caller]
pub(crate) fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.to_bits(), expected.to_bits(), "{what}[{i}]: {found} and {expected}");
    }
}

/// Fails unless every kernel run gives the bits of the reference run. A run gets the handle, or none
/// for the reference, and returns what it wrote.
#[track_caller]
pub(crate) fn check_bits(what: &str, run: impl Fn(Option<&Cpu>) -> Vec<Vec<f32>>) {
    let expected = run(None);
    every_cpu(|cpu| {
        let found = run(Some(cpu));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_bits(
                found,
                expected,
                &format!("{what} on {} ×{}: output {i}", cpu.isa(), cpu.threads()),
            );
        }
    });
}

/// Fails unless `gradient` is the slope of `loss` at `x`, by central differences in the elements
/// `probes` names.
#[track_caller]
pub(crate) fn check_slope(
    what: &str,
    x: &[f32],
    gradient: &[f32],
    step: f32,
    tolerance: f64,
    loss: impl Fn(&[f32]) -> f64,
) {
    let scale = gradient.iter().fold(0.0_f64, |most, g| most.max(f64::from(g.abs())));
    for i in 0..x.len() {
        let mut moved = x.to_vec();
        moved[i] = x[i] + step;
        let (above, high) = (f64::from(moved[i]), loss(&moved));
        moved[i] = x[i] - step;
        let (below, low) = (f64::from(moved[i]), loss(&moved));
        let slope = (high - low) / (above - below);
        let error = (slope - f64::from(gradient[i])).abs();
        assert!(
            error <= tolerance * scale.max(1e-3),
            "{what}[{i}]: slope {slope}, gradient {} (largest {scale})",
            gradient[i]
        );
    }
}

/// A fixed random functional of outputs, for slopes: `Σ weight · y` in f64.
pub(crate) fn functional(y: &[f32], weights: &[f32]) -> f64 {
    y.iter().zip(weights).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum()
}

/// Fails where f32 and f64 differ by more than `tolerance`, relative to the largest value (at least 1).
#[track_caller]
pub(crate) fn assert_close(what: &str, found: &[f32], exact: &[f64], tolerance: f64) {
    let largest = exact.iter().fold(1.0_f64, |most, x| most.max(x.abs()));
    assert_eq!(found.len(), exact.len(), "{what}: lengths");
    for (i, (found, exact)) in found.iter().zip(exact).enumerate() {
        let error = (f64::from(*found) - exact).abs();
        assert!(error <= tolerance * largest, "{what}[{i}]: {found} and {exact}");
    }
}

//! Inputs of benchmark cases: numbers, row numbers, encoded tables.
//!
//! Costs count each byte that must move once, and for the elementary functions the operations of
//! their polynomials roughly ([`EXP_FLOPS`] an exponential), so that the fraction of the arithmetic
//! peak means something where arithmetic, not memory, is the bound.

use std::ops::{Deref, DerefMut};

use crate::compute::Compute;
use crate::cpu::Cpu;
use crate::encoding::{Encoding, Layout, Weight, encode};
use crate::memory::{ALIGNMENT, Anonymous, Bytes, BytesMut};
use crate::registry::Case;

/// Operations of an exponential, and of the functions made of one.
pub(crate) const EXP_FLOPS: f64 = 20.0;
/// Encodings of an operator without a weight.
pub(crate) const F32_ONLY: &[Encoding] = &[Encoding::F32];
/// Encodings of an operator over cached keys and values.
pub(crate) const CACHED: &[Encoding] = &[Encoding::F32, Encoding::Bf16, Encoding::Q8];

/// Bytes that the copies of a cold operand take together: far beyond any cache.
const COLD_BYTES: usize = 256 << 20;
/// Copies at most: of tiny operands, this many are out of the inner caches.
const COPIES_MAX: usize = 1024;

/// Floats in huge pages, where a session's tensors are too: strided rows in small pages would
/// measure the walks of the page table.
pub(crate) struct Floats {
    memory: Anonymous,
    len: usize,
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &Bytes::new(self.memory.as_ref()).f32s()[..self.len]
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut BytesMut::new(self.memory.as_mut()).f32s()[..self.len]
    }
}

/// Zeros.
pub(crate) fn zeros(len: usize) -> Floats {
    Floats { memory: Anonymous::new(4 * len).expect("memory for the benchmark"), len }
}

/// One number everywhere.
pub(crate) fn filled(number: f32, len: usize) -> Floats {
    let mut floats = zeros(len);
    floats.fill(number);
    floats
}

/// Values in (−1, 1) with full mantissas, others for every seed; their sums are never subnormal.
pub(crate) fn values(len: usize, seed: u32) -> Floats {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state as f32 / u32::MAX as f32).mul_add(2.0, -1.0)
    };
    let mut floats = zeros(len);
    floats.fill_with(next);
    floats
}

/// Row numbers that jump about.
pub(crate) fn ids(len: usize, limit: usize) -> Vec<u32> {
    let id = |i: usize| i.wrapping_mul(2_654_435_761) % limit;
    (0..len).map(|i| u32::try_from(id(i)).expect("tables have fewer than 2³² rows")).collect()
}

/// A case that moves `floats` floats.
pub(crate) fn case(flops: f64, floats: usize, run: impl FnMut(&Cpu) + 'static) -> Case {
    let bytes = 4.0 * floats as f64;
    Case { flops, bytes, compute: Compute::F32, run: Box::new(run) }
}

/// An encoded weight in huge pages like those of a session, alone or in copies that are read in
/// turn, so that each is out of the caches when its turn comes.
pub(crate) struct Table {
    form: (Encoding, Layout),
    n: usize,
    k: usize,
    /// Bytes of one copy.
    pub(crate) bytes: usize,
    copies: Anonymous,
    next: usize,
}

impl Table {
    /// One copy: a weight that other work has left in the caches.
    pub(crate) fn warm(form: (Encoding, Layout), n: usize, k: usize) -> Self {
        Self::new(form, (n, k), |_| 1)
    }

    /// As many copies as no cache holds.
    pub(crate) fn cold(form: (Encoding, Layout), n: usize, k: usize) -> Self {
        Self::new(form, (n, k), |stride| COLD_BYTES.div_ceil(stride).min(COPIES_MAX))
    }

    fn new(
        form: (Encoding, Layout),
        (n, k): (usize, usize),
        count: impl Fn(usize) -> usize,
    ) -> Self {
        let bytes = Weight::stored_bytes(form.0, form.1, n, k);
        let stride = bytes.next_multiple_of(ALIGNMENT);
        let mut copies = Anonymous::new(stride * count(stride)).expect("memory for the benchmark");
        let (first, others) = copies.as_mut().split_at_mut(stride);
        encode(form, (n, k), &values(n * k, 9), &mut first[..bytes]);
        for copy in others.chunks_exact_mut(stride) {
            copy.copy_from_slice(first);
        }
        Self { form, n, k, bytes, copies, next: 0 }
    }

    /// The next copy.
    pub(crate) fn weight(&mut self) -> Weight<'_> {
        let stride = self.bytes.next_multiple_of(ALIGNMENT);
        let count = self.copies.as_ref().len() / stride;
        self.next = (self.next + 1) % count;
        let bytes = &self.copies.as_ref()[self.next * stride..][..self.bytes];
        Weight { encoding: self.form.0, layout: self.form.1, n: self.n, k: self.k, bytes }
    }
}

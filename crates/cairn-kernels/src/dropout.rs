//! Dropout whose mask is a function of where an element is, not of when it is drawn.
//!
//! An element's 32 random bits hash (seed, step, site) and its (token, column): the same mask comes
//! out on every ISA and thread, in any batch, again in the backward pass and in a recomputed one,
//! and nothing is stored. Attention drops probabilities the same way, an element's place being its
//! (token, query head) and the position of the key.

#![expect(clippy::cast_possible_truncation, reason = "columns below 2³²")]

pub(crate) mod bench;

use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows, rows_per_task};
use crate::lanes::{at, put, vectors};
use crate::random::{RandomLanes, random_bits, splitmix};
use crate::simd::{F32x16, I32x16, kernel};

/// `y = x / (1 − p)` where the element is kept, else 0. Its adjoint is the same call on `dy`.
///
/// Shapes: `x_td`, `y_td` are `[t, d]`; row i is token `first_token + i`.
#[derive(Debug)]
pub struct Dropout<'a> {
    /// Inputs.
    pub x_td: &'a [f32],
    /// Outputs, overwritten.
    pub y_td: &'a mut [f32],
    /// Width of a row.
    pub d: usize,
    /// Where the mask comes from.
    pub mask: DropoutMask,
}

/// [`Dropout`] in place.
#[derive(Debug)]
pub struct DropoutAssign<'a> {
    /// Inputs and outputs.
    pub y_td: &'a mut [f32],
    /// Width of a row.
    pub d: usize,
    /// Where the mask comes from.
    pub mask: DropoutMask,
}

/// What fixes a dropout mask.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DropoutMask {
    /// Probability that an element becomes 0, in `[0, 1)`.
    pub p: f32,
    /// The run's seed.
    pub seed: u64,
    /// The training step.
    pub step: u64,
    /// Which dropout of the program this is.
    pub site: u32,
    /// The number of the first row's token within the step.
    pub first_token: u64,
}

impl DropoutMask {
    /// Kept elements have random bits at or above this.
    fn threshold(&self) -> u32 {
        assert!((0.0..1.0).contains(&self.p), "dropout probability outside [0, 1)");
        #[expect(clippy::cast_sign_loss, reason = "p is not negative")]
        let threshold = (f64::from(self.p) * 4_294_967_296.0) as u32;
        threshold
    }

    /// What kept elements are multiplied by.
    fn scale(&self) -> f32 {
        1.0 / (1.0 - self.p)
    }

    fn key(&self, place: u64) -> u64 {
        let stream = splitmix(self.seed ^ splitmix(self.step ^ (u64::from(self.site) << 40)));
        splitmix(stream.wrapping_add(splitmix(place)))
    }

    /// The key of row `row`.
    fn row_key(&self, row: usize) -> u64 {
        self.key(self.first_token.wrapping_add(row as u64))
    }

    /// The key of a query's probabilities; `token_head` counts the `[t, h]` of the run.
    pub(crate) fn query_key(&self, token_head: usize, heads: usize) -> u64 {
        let first = self.first_token.wrapping_mul(heads as u64);
        self.key(first.wrapping_add(token_head as u64))
    }

    /// What becomes of `x` in column `column` of the row that has `key`.
    pub(crate) fn apply(&self, key: u64, column: usize, x: f32) -> f32 {
        let kept = random_bits(key, column as u32) >= self.threshold();
        if kept { x * self.scale() } else { 0.0 }
    }
}

/// A mask, sixteen columns of a row at a time.
#[derive(Clone, Copy)]
pub(crate) struct DropLanes<V: F32x16> {
    random: RandomLanes<V>,
    /// Signed comparison orders unsigned numbers once their top bits are flipped.
    threshold: V::Int,
    scale: V,
}

impl<V: F32x16> DropLanes<V> {
    /// A mask before it is known which row is wanted.
    #[inline(always)]
    pub(crate) fn new(mask: &DropoutMask) -> Self {
        let threshold = (mask.threshold() ^ TOP).cast_signed();
        Self {
            random: RandomLanes::new(0, 0),
            threshold: V::Int::splat(threshold),
            scale: V::splat(mask.scale()),
        }
    }

    /// Begins with column `first` of the row that has `key`.
    #[inline(always)]
    pub(crate) fn row(self, key: u64, first: usize) -> Self {
        Self { random: RandomLanes::new(key, first as u32), ..self }
    }

    /// Which of the next sixteen columns are dropped.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> V::Mask {
        self.threshold.gt(self.random.next().xor(V::Int::splat(TOP.cast_signed())))
    }

    /// What becomes of sixteen columns.
    #[inline(always)]
    pub(crate) fn apply(&self, dropped: V::Mask, x: V) -> V {
        V::select(dropped, V::zero(), x * self.scale)
    }
}

/// The top bit.
const TOP: u32 = 1 << 31;

/// Zeroes elements at random.
pub fn dropout(cpu: &Cpu, args: Dropout<'_>) {
    let simd = cpu.simd();
    let Dropout { x_td, y_td, d, mask } = args;
    assert_eq!(x_td.len(), y_td.len(), "dropout: x and y differ in length");
    assert_eq!(y_td.len() % d, 0, "dropout: not a whole number of rows");
    let rows = y_td.len() / d;
    parallel_rows(cpu, rows, rows_per_task(d), RowSlice::new(y_td, d), |range, y_td, _| {
        let x_rows = x_td[range.start * d..].chunks_exact(d);
        for ((row, y_d), x_d) in range.zip(y_td.chunks_exact_mut(d)).zip(x_rows) {
            y_d.copy_from_slice(x_d);
            drop_row(simd, mask, row, y_d);
        }
    });
}

/// [`dropout`] in plain loops.
pub fn dropout_reference(args: Dropout<'_>) {
    let Dropout { x_td, y_td, d, mask } = args;
    assert_eq!(x_td.len(), y_td.len(), "dropout: x and y differ in length");
    y_td.copy_from_slice(x_td);
    dropout_assign_reference(DropoutAssign { y_td, d, mask });
}

/// Zeroes elements at random, in place.
pub fn dropout_assign(cpu: &Cpu, args: DropoutAssign<'_>) {
    let simd = cpu.simd();
    let DropoutAssign { y_td, d, mask } = args;
    assert_eq!(y_td.len() % d, 0, "dropout: not a whole number of rows");
    let rows = y_td.len() / d;
    parallel_rows(cpu, rows, rows_per_task(d), RowSlice::new(y_td, d), |range, y_td, _| {
        for (row, y_d) in range.zip(y_td.chunks_exact_mut(d)) {
            drop_row(simd, mask, row, y_d);
        }
    });
}

kernel! {
    fn drop_row<V>(mask: DropoutMask, row: usize, y_d: &mut [f32]) {
        let mut lanes = DropLanes::<V>::new(&mask).row(mask.row_key(row), 0);
        for i in vectors(y_d.len()) {
            let dropped = lanes.next();
            put(lanes.apply(dropped, at::<V>(y_d, i)), y_d, i);
        }
    }
}

/// [`dropout_assign`] in plain loops.
pub fn dropout_assign_reference(args: DropoutAssign<'_>) {
    let DropoutAssign { y_td, d, mask } = args;
    assert_eq!(y_td.len() % d, 0, "dropout: not a whole number of rows");
    for (row, y_d) in y_td.chunks_exact_mut(d).enumerate() {
        let key = mask.row_key(row);
        for (column, y) in y_d.iter_mut().enumerate() {
            *y = mask.apply(key, column, *y);
        }
    }
}

#[cfg(test)]
mod tests;

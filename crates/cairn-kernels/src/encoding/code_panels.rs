//! Panels of `q8` and `q4`, sixteen rows at once: rows are the lanes.
//!
//! **Invariant:** the bytes are those of [`Format::write`], the definition, which takes one group of one
//! row after the other. What a lane computes is what that computes: the same operations in the same order.
//! Rounding by [`ROUNDER`] is rounding to the nearest, ties to even, since steps are clamped before, and
//! clamping between whole numbers is the same before and after.

use super::grouped::{
    CHUNK_COLUMNS, Code, Format, PART_BYTES, PART_COLUMNS, Q4_CANDIDATES, Q8_MAX, f16_at_least,
};
use crate::compute::ROUNDER;
use crate::isa::Simd;
use crate::memory::BytesMut;
use crate::simd::{F32x16, I32x16, Kernel, LANES, Mask16, dispatch, f16_from_f32, f32_from_f16};

/// Columns that share a scale.
const GROUP: usize = CHUNK_COLUMNS;
/// The bytes of a part, as words.
const PART_WORDS: usize = PART_BYTES / 4;

/// Writes rows of finite values as panels of zeros.
pub(super) fn write(simd: Simd, format: Format, k: usize, values_nk: &[f32], bytes: &mut [u8]) {
    assert_eq!(format.group, GROUP, "columns that share a scale");
    match format.code {
        Code::Byte => dispatch(simd, Panels::<false> { format, k, values_nk, bytes }),
        Code::Nibble => dispatch(simd, Panels::<true> { format, k, values_nk, bytes }),
        Code::Nf4 | Code::E2m1 | Code::E4m3 => unreachable!("written one by one"),
    }
}

/// The panels of a weight of `q4` or `q8`.
struct Panels<'a, const NIBBLES: bool> {
    format: Format,
    k: usize,
    values_nk: &'a [f32],
    bytes: &'a mut [u8],
}

impl<const NIBBLES: bool> Kernel for Panels<'_, NIBBLES> {
    type Output = ();

    #[inline(always)]
    fn run<V: F32x16>(self) {
        let Self { format, k, values_nk, bytes } = self;
        let panels = bytes.chunks_exact_mut(format.panel_bytes(k).max(1));
        for (rows, panel) in values_nk.chunks((LANES * k).max(1)).zip(panels) {
            let (codes, scales) = panel.split_at_mut(format.scales_start(k));
            let chunks = codes.chunks_exact_mut(format.chunk_bytes());
            let (scales, _) = BytesMut::new(scales).u16s().as_chunks_mut::<LANES>();
            for ((group, chunk), scales) in chunks.enumerate().zip(scales) {
                let first = group * GROUP;
                let rows = Rows { rows, k, first, columns: GROUP.min(k - first) };
                rows.write::<V, NIBBLES>(chunk, scales);
            }
        }
    }
}

/// The columns of a group, of up to sixteen rows.
struct Rows<'a> {
    rows: &'a [f32],
    k: usize,
    first: usize,
    columns: usize,
}

impl Rows<'_> {
    #[inline(always)]
    fn write<V: F32x16, const NIBBLES: bool>(&self, chunk: &mut [u8], scales: &mut [u16; LANES]) {
        let x = self.columns_of::<V>();
        let count = self.rows.len() / self.k;
        let (mut codes, steps) = if NIBBLES { nibbles(&x) } else { bytes(&x) };
        for (to, &scale) in scales.iter_mut().zip(&steps).take(count) {
            *to = f16_from_f32(scale);
        }
        // What pads columns and rows stays zero.
        codes[self.columns..].iter_mut().for_each(|codes| *codes = V::Int::splat(0));
        let is_row = V::Mask::first(count);
        let (parts, _) = chunk.as_chunks_mut::<PART_BYTES>();
        let a_part = if NIBBLES { 2 * PART_COLUMNS } else { PART_COLUMNS };
        for (part, codes) in parts.iter_mut().zip(codes.chunks_exact(a_part)) {
            let mut word = V::Int::splat(0);
            for (c, &code) in (0..).zip(codes) {
                // Four columns in the low halves of bytes, or all of them, then four in the high.
                word = word.or(code.shl(c % 4 * 8 + c / 4 * 4));
            }
            let mut words = [0.0; PART_WORDS];
            V::select(is_row, word.as_float(), V::zero()).store(&mut words);
            let (bytes, _) = part.as_chunks_mut::<4>();
            for (to, word) in bytes.iter_mut().zip(words) {
                *to = word.to_bits().to_le_bytes();
            }
        }
    }

    /// The group's columns, missing ones and missing rows being zeros.
    #[inline(always)]
    fn columns_of<V: F32x16>(&self) -> [V; GROUP] {
        let mut columns = [V::zero(); GROUP];
        let (halves, _) = columns.as_chunks_mut::<LANES>();
        for (half, columns) in halves.iter_mut().enumerate() {
            let start = half * LANES;
            let len = self.columns.saturating_sub(start).min(LANES);
            let mut rows = [V::zero(); LANES];
            for (to, row) in rows.iter_mut().zip(self.rows.chunks_exact(self.k)) {
                let row = &row[(self.first + start).min(self.k)..][..len];
                *to = match row.first_chunk() {
                    Some(row) => V::load(row),
                    None => V::load_partial(row, 0.0),
                };
            }
            *columns = V::transpose(rows);
        }
        columns
    }
}

/// The codes of sixteen groups, and their scales: `encode_bytes`.
#[inline(always)]
fn bytes<V: F32x16>(x: &[V; GROUP]) -> ([V::Int; GROUP], [f32; LANES]) {
    let mut largest = V::zero();
    for x in x {
        largest = largest.max(x.abs());
    }
    let scales = (largest / V::splat(Q8_MAX)).to_array().map(f16_at_least);
    let scale = V::load(&scales);
    let is_live = V::zero().lt(scale);
    let mut codes = [V::Int::splat(0); GROUP];
    for (code, &x) in codes.iter_mut().zip(x) {
        let steps = V::select(is_live, x / scale, V::zero());
        let steps = steps.min(V::splat(Q8_MAX)).max(V::splat(-Q8_MAX));
        let rounded = (steps + V::splat(ROUNDER)).bits();
        // Two's complement, and 128 more.
        *code = rounded.and(V::Int::splat(0xff)).xor(V::Int::splat(0x80));
    }
    (codes, scales)
}

/// The codes of sixteen groups, and their scales: `encode_nibbles`.
#[inline(always)]
fn nibbles<V: F32x16>(x: &[V; GROUP]) -> ([V::Int; GROUP], [f32; LANES]) {
    let mut largest = V::zero();
    for &x in x {
        largest = V::select(largest.abs().lt(x.abs()), x, largest);
    }
    let whole = largest / V::splat(-8.0);
    let (mut least, mut best) = (V::splat(f32::INFINITY), V::zero());
    for factor in Q4_CANDIDATES {
        let scales = (whole * V::splat(factor)).to_array().map(|x| f32_from_f16(f16_from_f32(x)));
        let scale = V::load(&scales);
        let inverse = inverse(scale);
        let mut error = V::zero();
        for &x in x {
            let rounded = steps(x * inverse) - V::splat(ROUNDER);
            let difference = rounded.mul_add(scale, -x);
            error = difference.mul_add(difference, error);
        }
        let is_better = error.lt(least);
        least = V::select(is_better, error, least);
        best = V::select(is_better, scale, best);
    }
    let inverse = inverse(best);
    let mut codes = [V::Int::splat(0); GROUP];
    for (code, &x) in codes.iter_mut().zip(x) {
        // Two's complement, and 8 more.
        *code = steps(x * inverse).bits().and(V::Int::splat(15)).xor(V::Int::splat(8));
    }
    (codes, best.to_array())
}

/// The inverse of a scale, zero of zero.
#[inline(always)]
fn inverse<V: F32x16>(scale: V) -> V {
    V::select(scale.eq(V::zero()), V::zero(), V::splat(1.0) / scale)
}

/// The nearest whole number from -8 to 7, plus [`ROUNDER`].
#[inline(always)]
fn steps<V: F32x16>(x: V) -> V {
    x.min(V::splat(7.0)).max(V::splat(-8.0)) + V::splat(ROUNDER)
}

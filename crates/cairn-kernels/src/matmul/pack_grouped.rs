//! The columns of weights whose codes share scales: decoded four at a time.

use super::pack::{Columns, Elements, QUAD};
use crate::encoding::{Code, E2M1, E4M3_UNBIAS, Grouped, NF4, PART_BYTES, Scale, e8m0};
use crate::simd::{F32x16, I32x16, LANES};

/// Codes and scales of some panels.
#[derive(Clone, Copy, Debug)]
pub(super) struct GroupedElements<'a> {
    weight: Grouped<'a>,
    /// Inputs of a group, as a power of two.
    group_bits: u32,
}

impl<'a> GroupedElements<'a> {
    pub(super) fn new(weight: Grouped<'a>) -> Self {
        Self { weight, group_bits: weight.format.group.ilog2() }
    }

    /// Where the codes of a column begin in their panel.
    pub(super) fn column_bytes(&self, column: usize) -> usize {
        column * LANES / if self.weight.format.is_nibble() { 2 } else { 1 }
    }

    /// Sixteen scales of a group.
    ///
    /// # Safety
    /// - The matrix has that panel and that group.
    #[inline(always)]
    unsafe fn scales<V: F32x16>(self, panel: usize, group: usize) -> V {
        let scales = self.weight.scales(panel, group);
        match self.weight.format.scale {
            // SAFETY: the caller promises that the scales are there; they are aligned to 32 bytes.
            Scale::F16 => V::from_f16(unsafe { &*scales.cast() }),
            // SAFETY: the caller promises that the scales are there; they are aligned to 64 bytes.
            Scale::F32 => V::load(unsafe { &*scales.cast() }),
            Scale::E8m0 => {
                // SAFETY: the caller promises that the scales are there.
                let bytes: &[u8; LANES] = unsafe { &*scales.cast() };
                V::load(&bytes.map(e8m0))
            }
        }
    }

    /// What sixteen codes stand for.
    #[inline(always)]
    fn values<V: F32x16>(self, codes: V::Int) -> V {
        match self.weight.format.code {
            Code::Byte => (codes - V::Int::splat(128)).to_float(),
            Code::Nibble => (codes - V::Int::splat(8)).to_float(),
            Code::Nf4 => V::lookup(&NF4, codes),
            Code::E2m1 => V::lookup(&E2M1, codes),
            Code::E4m3 => {
                let magnitude = codes.and(V::Int::splat(0x7f)).shl(20).as_float();
                let sign = codes.and(V::Int::splat(0x80)).shl(24);
                (magnitude * V::splat(E4M3_UNBIAS)).bits().or(sign).as_float()
            }
        }
    }
}

impl Elements for GroupedElements<'_> {
    fn row<V: F32x16>(self, _row: usize, _column: usize, _count: usize) -> V {
        unreachable!("codes that share scales lie in panels")
    }
}

impl Columns for GroupedElements<'_> {
    const QUADS: bool = true;

    #[inline(always)]
    unsafe fn lanes<V: F32x16>(self, panel: usize, column: usize) -> V {
        let first = column - column % QUAD;
        // SAFETY: passed on; panels are padded to whole quads.
        let quad: [V; QUAD] = unsafe { self.quad(panel, first) };
        quad[column % QUAD]
    }
    #[inline(always)]
    unsafe fn bare_quad<V: F32x16>(self, panel: usize, column: usize) -> ([V; QUAD], bool) {
        // SAFETY: the caller promises that the panel has the part of that column.
        let part: &[u8; PART_BYTES] = unsafe { &*self.weight.part(panel, column) };
        let is_nibble = self.weight.format.is_nibble();
        let mask = V::Int::splat(if is_nibble { 15 } else { 255 });
        let mut bits = V::Int::load_bytes(part);
        if is_nibble && column % (2 * QUAD) >= QUAD {
            bits = bits.shr(4);
        }
        // SAFETY: the caller promises that the panel has the group of that column.
        let scales: V = unsafe { self.scales(panel, column >> self.group_bits) };
        let mut quad = [V::zero(); QUAD];
        for (shift, lanes) in [0, 8, 16, 24].into_iter().zip(&mut quad) {
            *lanes = self.values::<V>(bits.shr(shift).and(mask)) * scales;
        }
        (quad, false)
    }
    #[inline(always)]
    fn prefetch<V: F32x16>(self, panel: usize, column: usize) {
        V::prefetch(self.weight.part(panel, column).cast());
    }
}

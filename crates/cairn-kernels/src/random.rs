//! Random bits as a function of where they are needed, not of when they are drawn.
//!
//! 32 bits hash a 64-bit key and a 32-bit place: the same on every ISA and thread. Keys come from
//! splitmix64 (Steele et al. 2014); a place is mixed into one by two rounds of murmur3's 32-bit
//! finalizer, one per half of the key.

#![expect(clippy::cast_possible_truncation, reason = "halves of a key")]

use crate::simd::{F32x16, I32x16, LANES};

/// Spreads neighboring places over the 32 bits.
const STEP: u32 = 0x9e37_79b9;

/// The output function of splitmix64 (Steele et al. 2014), after one step of its counter: a bijection
/// with full avalanche, so that keys which differ in one bit have nothing in common.
pub fn splitmix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The finalizer of murmur3.
#[inline(always)]
fn mix(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    let x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

/// The random bits of a place under a key.
#[inline(always)]
pub(crate) fn random_bits(key: u64, place: u32) -> u32 {
    let (low, high) = (key as u32, (key >> 32) as u32);
    mix(mix(place.wrapping_mul(STEP).wrapping_add(low)) ^ high)
}

/// [`random_bits`] of consecutive places, sixteen at a time.
#[derive(Clone, Copy)]
pub(crate) struct RandomLanes<V: F32x16> {
    place: V::Int,
    high: V::Int,
}

impl<V: F32x16> RandomLanes<V> {
    /// Begins with places `first`, `first + 1`, ….
    #[inline(always)]
    pub(crate) fn new(key: u64, first: u32) -> Self {
        let (low, high) = (key as u32, (key >> 32) as u32);
        let lanes = const {
            let mut lanes = [0; LANES];
            let mut lane = 0;
            while lane < LANES {
                lanes[lane] = (lane as u32).wrapping_mul(STEP).cast_signed();
                lane += 1;
            }
            lanes
        };
        let first = first.wrapping_mul(STEP).wrapping_add(low);
        let place = V::Int::load(&lanes) + V::Int::splat(first.cast_signed());
        Self { place, high: V::Int::splat(high.cast_signed()) }
    }

    /// The bits of the next sixteen places.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> V::Int {
        let bits = mix_lanes::<V>(mix_lanes::<V>(self.place).xor(self.high));
        let step = STEP.wrapping_mul(LANES as u32);
        self.place = self.place + V::Int::splat(step.cast_signed());
        bits
    }
}

/// [`mix`] in every lane.
#[inline(always)]
fn mix_lanes<V: F32x16>(x: V::Int) -> V::Int {
    let x = x.xor(x.shr(16)).mul_low(V::Int::splat(0x85eb_ca6b_u32.cast_signed()));
    let x = x.xor(x.shr(13)).mul_low(V::Int::splat(0xc2b2_ae35_u32.cast_signed()));
    x.xor(x.shr(16))
}

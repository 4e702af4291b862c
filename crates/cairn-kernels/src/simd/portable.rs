//! Sixteen lanes as an array: the definition that the other implementations agree with, bit for bit.

use std::array::from_fn;
use std::ops::{Add, Div, Mul, Neg, Sub};

use super::{F32x16, I32x16, Kernel, LANES, Mask16, bf16_from_f32, f32_from_bf16, f32_from_f16};

/// Sixteen floats in an array.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable([f32; LANES]);

/// Sixteen integers in an array.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PortableInt([i32; LANES]);

/// Lane j is bit j.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BitMask(pub(crate) u16);

macro_rules! lanewise {
    ($trait:ident, $method:ident, $op:tt) => {
        impl $trait for Portable {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Self(from_fn(|j| self.0[j] $op other.0[j]))
            }
        }
    };
}
lanewise!(Add, add, +);
lanewise!(Sub, sub, -);
lanewise!(Mul, mul, *);
lanewise!(Div, div, /);

impl Neg for Portable {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        Self(self.0.map(|x| -x))
    }
}

impl Portable {
    #[inline(always)]
    fn compare(self, other: Self, holds: impl Fn(f32, f32) -> bool) -> BitMask {
        let mut bits = 0;
        for j in 0..LANES {
            bits |= u16::from(holds(self.0[j], other.0[j])) << j;
        }
        BitMask(bits)
    }

    #[inline(always)]
    fn tree(self, combine: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = self.0;
        for half in [8, 4, 2, 1] {
            for j in 0..half {
                lanes[j] = combine(lanes[j], lanes[j + half]);
            }
        }
        lanes[0]
    }
}

impl F32x16 for Portable {
    type Int = PortableInt;
    type Mask = BitMask;
    const TILE: (usize, usize) = (1, 4);

    fn call<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Self>()
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(*from)
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }
    #[inline(always)]
    fn load_partial(from: &[f32], fill: f32) -> Self {
        let mut lanes = [fill; LANES];
        lanes[..from.len()].copy_from_slice(from);
        Self(lanes)
    }
    #[inline(always)]
    fn store_partial(self, to: &mut [f32]) {
        to.copy_from_slice(&self.0[..to.len()]);
    }
    #[inline(always)]
    unsafe fn load_ptr(from: *const f32) -> Self {
        // SAFETY: the caller promises sixteen readable floats; an array of them needs no more
        // than their alignment.
        Self(unsafe { from.cast::<[f32; LANES]>().read() })
    }
    #[inline(always)]
    unsafe fn store_ptr(self, to: *mut f32) {
        // SAFETY: the caller promises sixteen writable floats.
        unsafe { to.cast::<[f32; LANES]>().write(self.0) }
    }
    #[inline(always)]
    fn prefetch(_address: *const u8) {}
    #[inline(always)]
    fn prefetch_far(_address: *const u8) {}
    #[inline(always)]
    fn from_bf16(bits: &[u16; LANES]) -> Self {
        Self(bits.map(f32_from_bf16))
    }
    #[inline(always)]
    fn to_bf16(self, to: &mut [u16; LANES]) {
        *to = self.0.map(bf16_from_f32);
    }
    #[inline(always)]
    fn from_f16(bits: &[u16; LANES]) -> Self {
        Self(bits.map(f32_from_f16))
    }
    #[inline(always)]
    fn from_i8(values: &[i8; LANES]) -> Self {
        Self(values.map(f32::from))
    }
    #[inline(always)]
    fn lookup(table: &[f32; LANES], indices: PortableInt) -> Self {
        Self(from_fn(|j| table[(indices.0[j] & 15).cast_unsigned() as usize]))
    }
    #[inline(always)]
    fn pairs_from_bf16z(bytes: &[u8; 64], codes: &[u8; 32], table: &[u8; 32]) -> ([Self; 2], bool) {
        let mut exception = false;
        let mut pairs = [Self([0.0; LANES]); 2];
        for (p, pair) in pairs.iter_mut().enumerate() {
            for (j, lane) in pair.0.iter_mut().enumerate() {
                let mut halves = [0; 2];
                for (c, half) in halves.iter_mut().enumerate() {
                    let place = (j / 4) * 16 + p * 8 + (j % 4) * 2 + c;
                    let code = usize::from(codes[place % 32] >> (place / 32 * 4) & 15);
                    exception |= code == 15;
                    let high = (bytes[place] & 0x80) | table[code];
                    let low = (bytes[place] & 0x7f) | table[LANES + code];
                    *half = u32::from(u16::from_be_bytes([high, low]));
                }
                *lane = f32::from_bits(halves[0] | halves[1] << 16);
            }
        }
        (pairs, exception)
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(from_fn(|j| self.0[j].mul_add(factor.0[j], addend.0[j])))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(from_fn(|j| if self.0[j] < other.0[j] { self.0[j] } else { other.0[j] }))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(from_fn(|j| if self.0[j] > other.0[j] { self.0[j] } else { other.0[j] }))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(self.0.map(f32::sqrt))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Self(self.0.map(f32::abs))
    }
    #[inline(always)]
    fn lt(self, other: Self) -> BitMask {
        self.compare(other, |a, b| a < b)
    }
    #[inline(always)]
    fn eq(self, other: Self) -> BitMask {
        self.compare(other, |a, b| a == b)
    }
    #[inline(always)]
    fn select(mask: BitMask, yes: Self, no: Self) -> Self {
        Self(from_fn(|j| if mask.0 >> j & 1 == 1 { yes.0[j] } else { no.0[j] }))
    }
    #[inline(always)]
    fn bits(self) -> PortableInt {
        PortableInt(self.0.map(|x| x.to_bits().cast_signed()))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        self.tree(|a, b| a + b)
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        self.tree(|a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        from_fn(|i| Self(from_fn(|j| rows[j].0[i])))
    }
}

impl Add for PortableInt {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(from_fn(|j| self.0[j].wrapping_add(other.0[j])))
    }
}

impl Sub for PortableInt {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(from_fn(|j| self.0[j].wrapping_sub(other.0[j])))
    }
}

impl I32x16 for PortableInt {
    type Float = Portable;
    type Mask = BitMask;
    #[inline(always)]
    fn splat(value: i32) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    fn load(from: &[i32; LANES]) -> Self {
        Self(*from)
    }
    #[inline(always)]
    fn byte_dot_in_words(self, w: Self, x: Self) -> Self {
        Self(from_fn(|j| {
            let (w, x) = (w.0[j].to_le_bytes(), x.0[j].to_le_bytes());
            let products = w.iter().zip(x).map(|(&w, x)| i32::from(w) * i32::from(x.cast_signed()));
            products.fold(self.0[j], i32::wrapping_add)
        }))
    }
    #[inline(always)]
    fn mul_low(self, other: Self) -> Self {
        Self(from_fn(|j| self.0[j].wrapping_mul(other.0[j])))
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(from_fn(|j| self.0[j] & other.0[j]))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(from_fn(|j| self.0[j] | other.0[j]))
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self(from_fn(|j| self.0[j] ^ other.0[j]))
    }
    #[inline(always)]
    fn shl(self, count: u32) -> Self {
        Self(self.0.map(|x| x << count))
    }
    #[inline(always)]
    fn shr(self, count: u32) -> Self {
        Self(self.0.map(|x| (x.cast_unsigned() >> count).cast_signed()))
    }
    #[inline(always)]
    fn gt(self, other: Self) -> BitMask {
        let mut bits = 0;
        for j in 0..LANES {
            bits |= u16::from(self.0[j] > other.0[j]) << j;
        }
        BitMask(bits)
    }
    #[inline(always)]
    #[expect(clippy::cast_precision_loss, reason = "the nearest float is the operation")]
    fn to_float(self) -> Portable {
        Portable(self.0.map(|x| x as f32))
    }
    #[inline(always)]
    fn as_float(self) -> Portable {
        Portable(self.0.map(|x| f32::from_bits(x.cast_unsigned())))
    }
}

impl Mask16 for BitMask {
    #[inline(always)]
    fn first(count: usize) -> Self {
        Self(if count >= LANES { u16::MAX } else { (1 << count) - 1 })
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
    #[inline(always)]
    fn not(self) -> Self {
        Self(!self.0)
    }
}

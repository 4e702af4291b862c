//! Sixteen lanes, three ways: the one vector type that kernels are written with.
//!
//! A kernel is written once, generic over [`F32x16`], inside [`kernel!`]; the macro compiles it for
//! each instruction set and calls the version that the [`Simd`](crate::isa::Simd) token proves:
//!
//! ```text
//! kernel! {
//!     /// Sum of `x`, in the fixed order of row reductions.
//!     fn row_sum<V>(x: &[f32]) -> f32 {
//!         let (blocks, tail) = x.as_chunks::<16>();
//!         let mut sum = V::zero();
//!         for block in blocks {
//!             sum = sum + V::load(block);
//!         }
//!         (sum + V::load_partial(tail, 0.0)).sum()
//!     }
//! }
//! // called as: row_sum(cpu.simd(), x)
//! ```
//!
//! Functions used inside a kernel are generic over `V: F32x16` and `#[inline(always)]`, or they
//! would be compiled without the instruction set.
//!
//! **Invariant:** every operation gives the same bits in all implementations, NaN payloads aside.
//! **Invariant:** [`Avx2`] and [`Avx512`] are named only by [`kernel!`] and `call`, behind the
//! proof; a value of them therefore exists only where the machine has the instructions.

use std::ops::{Add, Div, Mul, Neg, Sub};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Work that is compiled once for each instruction set, as a function of its own. [`kernel!`] is the
/// convenient form; this one can carry const parameters.
pub(crate) trait Kernel {
    /// What the work gives.
    type Output;
    /// Does the work with one implementation of the lanes. Implement with `#[inline(always)]`.
    fn run<V: F32x16>(self) -> Self::Output;
}

/// Sixteen 32-bit floats.
///
/// Comparisons with NaN are false. `min` and `max` give the second operand when either is NaN.
pub(crate) trait F32x16:
    Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// Sixteen 32-bit integers.
    type Int: I32x16<Float = Self, Mask = Self::Mask>;
    /// One truth value a lane.
    type Mask: Mask16;
    /// Vectors in the widest register tile of a matrix product, and its rows.
    const TILE: (usize, usize);

    /// Runs `kernel` in a function of its own, compiled for this instruction set.
    fn call<K: Kernel>(kernel: K) -> K::Output;

    /// All lanes `value`.
    fn splat(value: f32) -> Self;
    /// All lanes zero.
    #[inline(always)]
    fn zero() -> Self {
        Self::splat(0.0)
    }
    /// The sixteen values of `from`; see `as_chunks::<16>()` on slices.
    fn load(from: &[f32; LANES]) -> Self;
    /// Writes the lanes.
    fn store(self, to: &mut [f32; LANES]);
    /// The first `from.len()` (at most 16) lanes from memory, the others `fill`.
    fn load_partial(from: &[f32], fill: f32) -> Self;
    /// Writes the first `to.len()` (at most 16) lanes.
    fn store_partial(self, to: &mut [f32]);
    /// Sixteen values from an address.
    ///
    /// # Safety
    /// - `from` is valid to read for 16 floats.
    unsafe fn load_ptr(from: *const f32) -> Self;
    /// Sixteen values to an address.
    ///
    /// # Safety
    /// - `to` is valid to write for 16 floats.
    unsafe fn store_ptr(self, to: *mut f32);
    /// Hints that the cache line at `address` is used soon. Any address is fine.
    fn prefetch(address: *const u8);
    /// As [`prefetch`](Self::prefetch), into the second-level cache, which has room for more
    /// outstanding lines: for streams out of memory.
    fn prefetch_far(address: *const u8);
    /// Widens sixteen bf16 values (their bits).
    fn from_bf16(bits: &[u16; LANES]) -> Self;
    /// Rounds to the nearest bf16, ties to even; a NaN stays a (quiet) NaN.
    fn to_bf16(self, to: &mut [u16; LANES]);
    /// Widens sixteen f16 values (their bits); a signaling NaN becomes a quiet one.
    fn from_f16(bits: &[u16; LANES]) -> Self;
    /// Widens sixteen signed bytes to floats.
    fn from_i8(values: &[i8; LANES]) -> Self;
    /// The values of a table that `indices` (0 to 15) number.
    fn lookup(table: &[f32; LANES], indices: Self::Int) -> Self;
    /// Half a block of bf16z elements, four columns of sixteen lanes, as two vectors of pairs (an even
    /// column in the low half of 32 bits, the next one in the high half), from their signs and
    /// mantissas, their codes and the panel's table; and whether an exception is among them, whose
    /// lane then holds anything. The layout is described with the encoding.
    fn pairs_from_bf16z(bytes: &[u8; 64], codes: &[u8; 32], table: &[u8; 32]) -> ([Self; 2], bool);
    /// The bf16 values in the low halves, then those in the high halves.
    #[inline(always)]
    fn split_pairs(self) -> [Self; 2] {
        let (bits, high) = (self.bits(), Self::Int::splat(0xffff_0000_u32.cast_signed()));
        [bits.shl(16).as_float(), bits.and(high).as_float()]
    }
    /// The low eight bits of the lanes.
    #[inline(always)]
    fn low_bytes(self) -> [u8; LANES] {
        self.to_array().map(|lane| lane.to_bits().to_le_bytes()[0])
    }
    /// The lanes as an array.
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        lanes
    }

    /// `self · factor + addend`, rounded once.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// `if self < other { self } else { other }`.
    fn min(self, other: Self) -> Self;
    /// `if self > other { self } else { other }`.
    fn max(self, other: Self) -> Self;
    /// Square root, correctly rounded.
    fn sqrt(self) -> Self;
    /// Clears the sign.
    fn abs(self) -> Self;

    /// `self < other`.
    fn lt(self, other: Self) -> Self::Mask;
    /// `self == other`.
    fn eq(self, other: Self) -> Self::Mask;
    /// Lanes of `yes` where the mask holds, of `no` elsewhere.
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;

    /// The bits as integers.
    fn bits(self) -> Self::Int;

    /// Sum of the lanes by the fixed tree: j + (j+8), then +4, +2, +1.
    fn sum(self) -> f32;
    /// Largest lane by the same tree.
    fn max_lane(self) -> f32;

    /// Row i of the result is lane i of each row.
    fn transpose(rows: [Self; LANES]) -> [Self; LANES];

    /// Clears everything but the sign.
    #[inline(always)]
    fn zero_of_its_sign(self) -> Self {
        self.bits().and(Self::Int::splat(i32::MIN)).as_float()
    }
    /// Zeros of the lane's sign where it is subnormal.
    #[inline(always)]
    fn flushed(self) -> Self {
        let is_subnormal = self.abs().lt(Self::splat(f32::MIN_POSITIVE));
        Self::select(is_subnormal, self.zero_of_its_sign(), self)
    }

    /// Runs `kernel` in a function of its own, compiled for `vdpbf16ps` as well.
    ///
    /// # Safety
    /// - [`Simd::has_pair_dot`](crate::isa::Simd::has_pair_dot) is true, and `Self` is its
    ///   instruction set.
    unsafe fn call_pair_dot<K: Kernel>(_kernel: K) -> K::Output {
        unreachable!("{NO_PAIR_DOT}")
    }
    /// `vdpbf16ps`: adds the products of a pair of bf16 values a lane; see [`crate::compute`]. Only
    /// inside [`call_pair_dot`](Self::call_pair_dot).
    fn pair_dot(self, _w: Self, _sum: Self) -> Self {
        unreachable!("{NO_PAIR_DOT}")
    }
    /// Rounds 32 consecutive activations to sixteen pairs. Only inside
    /// [`call_pair_dot`](Self::call_pair_dot).
    fn pairs_of(_first: Self, _second: Self) -> Self {
        unreachable!("{NO_PAIR_DOT}")
    }
    /// Sixteen pairs as they lie. Only where [`call_pair_dot`](Self::call_pair_dot) is.
    fn load_pairs(_bits: &[u16; 2 * LANES]) -> Self {
        unreachable!("{NO_PAIR_DOT}")
    }
    /// Runs `kernel` in a function of its own, compiled for `vpdpbusd` as well.
    ///
    /// # Safety
    /// - [`Simd::has_byte_dot`](crate::isa::Simd::has_byte_dot) is true, and `Self` is its
    ///   instruction set.
    unsafe fn call_byte_dot<K: Kernel>(_kernel: K) -> K::Output {
        unreachable!("{NO_BYTE_DOT}")
    }
    /// Two columns of sixteen bf16 values as sixteen pairs. Only where
    /// [`call_pair_dot`](Self::call_pair_dot) is.
    fn interleave_pairs(_columns: &[u16; 2 * LANES]) -> Self {
        unreachable!("{NO_PAIR_DOT}")
    }
}

const NO_PAIR_DOT: &str = "only AVX-512 has vdpbf16ps";
const NO_BYTE_DOT: &str = "only AVX-512 has vpdpbusd here";

/// Sixteen 32-bit integers, wrapping.
pub(crate) trait I32x16: Copy + Add<Output = Self> + Sub<Output = Self> {
    /// The float vector of the same lanes.
    type Float;
    /// The truth values of the same lanes.
    type Mask;
    /// All lanes `value`.
    fn splat(value: i32) -> Self;
    /// The sixteen values of `from`.
    fn load(from: &[i32; LANES]) -> Self;
    /// Sixteen times four bytes as they lie, the first of each four in the low bits.
    #[inline(always)]
    fn load_bytes(from: &[u8; 4 * LANES]) -> Self {
        let (words, _) = from.as_chunks::<4>();
        let mut lanes = [0; LANES];
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = i32::from_le_bytes(*word);
        }
        Self::load(&lanes)
    }
    /// `vpdpbusd`: `self + Σ w·x` over the four bytes of each lane, those of `w` unsigned, those of `x`
    /// signed. Only inside [`F32x16::call_byte_dot`].
    fn byte_dot(self, _w: Self, _x: Self) -> Self {
        unreachable!("{NO_BYTE_DOT}")
    }
    /// The same everywhere, by widening the bytes.
    fn byte_dot_in_words(self, w: Self, x: Self) -> Self;
    /// The low 32 bits of the product.
    fn mul_low(self, other: Self) -> Self;
    /// Bitwise and.
    fn and(self, other: Self) -> Self;
    /// Bitwise or.
    fn or(self, other: Self) -> Self;
    /// Bitwise exclusive or.
    fn xor(self, other: Self) -> Self;
    /// Shifts left by `count` < 32 bits.
    fn shl(self, count: u32) -> Self;
    /// Shifts right by `count` < 32 bits, zeros enter.
    fn shr(self, count: u32) -> Self;
    /// `self > other`, signed.
    fn gt(self, other: Self) -> Self::Mask;
    /// The nearest float of each lane.
    fn to_float(self) -> Self::Float;
    /// The bits as floats.
    fn as_float(self) -> Self::Float;
}

/// One truth value for each of sixteen lanes.
pub(crate) trait Mask16: Copy {
    /// The first `count` lanes (all if `count` ≥ 16).
    fn first(count: usize) -> Self;
    /// Both.
    fn and(self, other: Self) -> Self;
    /// Neither.
    fn not(self) -> Self;
}

/// Rounds to the nearest bf16, ties to even; a NaN stays a quiet NaN of the same sign. The scalar
/// definition of [`F32x16::to_bf16`].
#[expect(clippy::cast_possible_truncation, reason = "the high half of 32 bits is kept")]
pub(crate) fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return ((bits >> 16) | 0x40) as u16;
    }
    let tie_to_even = (bits >> 16) & 1;
    (bits.wrapping_add(0x7fff + tie_to_even) >> 16) as u16
}

/// Widens a bf16 value.
pub(crate) fn f32_from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Widens an f16 value, exactly; a NaN becomes a quiet NaN of the same sign. The scalar definition of
/// [`F32x16::from_f16`].
#[inline(always)]
pub(crate) fn f32_from_f16(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    if magnitude < 1 << 23 {
        // A subnormal is its mantissa times 2⁻²⁴.
        let value = f32::from(bits & 0x3ff) * f32::from_bits((127 - 24) << 23);
        return f32::from_bits(sign | value.to_bits());
    }
    if magnitude < 0x1f << 23 {
        return f32::from_bits(sign | (magnitude + ((127 - 15) << 23)));
    }
    let quiet = if magnitude == 0x1f << 23 { 0 } else { 1 << 22 };
    f32::from_bits(sign | 0x7f80_0000 | magnitude | quiet)
}

/// Rounds to the nearest f16, ties to even; magnitudes from 65520 on become infinite, a NaN stays a
/// quiet NaN of the same sign.
#[expect(clippy::cast_possible_truncation, reason = "the results have sixteen bits")]
pub(crate) fn f16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | (bits >> 13) as u16 & 0x1ff;
    }
    // 65520, halfway between the largest f16 and 2¹⁶: the even one is beyond.
    if magnitude >= 0x477f_f000 {
        return sign | 0x7c00;
    }
    // 2⁻¹⁴, the smallest normal f16.
    if magnitude >= (127 - 14) << 23 {
        let tie_to_even = (magnitude >> 13) & 1;
        let rounded = magnitude - ((127 - 15) << 23) + 0xfff + tie_to_even;
        return sign | (rounded >> 13) as u16;
    }
    // Adding 1/2 leaves an f32 whose last place is 2⁻²⁴, the step of subnormal f16: the addition
    // rounds, ties to even, and its low bits count the steps.
    let steps = (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5_f32.to_bits();
    sign | steps as u16
}

/// Compiles a function for every instruction set and calls the proven one.
///
/// `fn name<V>(args…) -> R { body }` becomes `fn name(simd: Simd, args…) -> R`; inside the body `V`
/// is an [`F32x16`]. Arguments are plain names. See the module's example.
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$v:ident>($($arg:ident: $ty:ty),* $(,)?)
     $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name(simd: $crate::isa::Simd, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$v: $crate::simd::F32x16>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Avx512>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Avx2>($($arg),*)
            }

            match simd.isa() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the token proves that the machine has these features.
                $crate::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the token proves that the machine has these features.
                $crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => body::<$crate::simd::Portable>($($arg),*),
            }
        }
    };
}
pub(crate) use kernel;

/// Runs `kernel` with the proven instruction set.
pub(crate) fn dispatch<K: Kernel>(simd: crate::isa::Simd, kernel: K) -> K::Output {
    match simd.isa() {
        #[cfg(target_arch = "x86_64")]
        crate::Isa::Avx512 => Avx512::call(kernel),
        #[cfg(target_arch = "x86_64")]
        crate::Isa::Avx2 => Avx2::call(kernel),
        _ => Portable::call(kernel),
    }
}

#[cfg(test)]
mod tests;

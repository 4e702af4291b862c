//! Sixteen lanes in one AVX-512 register.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

use super::portable::BitMask;
use super::{F32x16, I32x16, Kernel, LANES, Mask16};

/// Sixteen floats in one register.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(__m512);

/// Sixteen integers in one register.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Int(__m512i);

/// Calls an intrinsic.
macro_rules! op {
    ($name:ident $(::<$($constant:tt),*>)? ($a:expr)) => {{
        let a = $a;
        op!(call $name $(::<$($constant),*>)? (a))
    }};
    ($name:ident $(::<$($constant:tt),*>)? ($a:expr, $b:expr)) => {{
        let (a, b) = ($a, $b);
        op!(call $name $(::<$($constant),*>)? (a, b))
    }};
    ($name:ident $(::<$($constant:tt),*>)? ($a:expr, $b:expr, $c:expr)) => {{
        let (a, b, c) = ($a, $b, $c);
        op!(call $name $(::<$($constant),*>)? (a, b, c))
    }};
    (call $name:ident $(::<$($constant:tt),*>)? ($($arg:expr),*)) => {{
        // SAFETY: these types are used only inside `#[target_feature]` functions that a `Simd`
        // token guards (module invariant), so the machine has the instruction.
        unsafe { $name $(::<$($constant),*>)? ($($arg),*) }
    }};
}

macro_rules! lanewise {
    ($type:ident, $trait:ident, $method:ident, $intrinsic:ident) => {
        impl $trait for $type {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Self(op!($intrinsic(self.0, other.0)))
            }
        }
    };
}
lanewise!(Avx512, Add, add, _mm512_add_ps);
lanewise!(Avx512, Sub, sub, _mm512_sub_ps);
lanewise!(Avx512, Mul, mul, _mm512_mul_ps);
lanewise!(Avx512, Div, div, _mm512_div_ps);
lanewise!(Avx512Int, Add, add, _mm512_add_epi32);
lanewise!(Avx512Int, Sub, sub, _mm512_sub_epi32);

impl Neg for Avx512 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        self.bits().xor(Avx512Int::splat(i32::MIN)).as_float()
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
#[inline(never)]
fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
#[inline(never)]
fn run_pair_dot<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

#[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
#[inline(never)]
fn run_byte_dot<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

/// Sixteen pairs of bf16 values, as the instructions on them name the register.
#[inline(always)]
fn pairs(lanes: Avx512) -> __m512bh {
    // SAFETY: both are 64 bytes, and every pattern is a value of either.
    unsafe { std::mem::transmute(lanes.0) }
}

/// Where the sixteen bits of each half lane come from: column 0 into the low halves, 1 into the high.
const INTERLEAVE: [u16; 2 * LANES] = {
    let mut from = [0; 2 * LANES];
    let mut lane = 0;
    while lane < 16 {
        from[2 * lane as usize] = lane;
        from[2 * lane as usize + 1] = lane + 16;
        lane += 1;
    }
    from
};

#[inline(always)]
fn load_words(words: &[u16; 2 * LANES]) -> __m512i {
    // SAFETY: module invariant; the array is 64 bytes.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

impl F32x16 for Avx512 {
    type Int = Avx512Int;
    type Mask = BitMask;
    const TILE: (usize, usize) = (2, 14);

    fn call<K: Kernel>(kernel: K) -> K::Output {
        op!(run(kernel))
    }
    unsafe fn call_pair_dot<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller promises that the machine has the instruction.
        unsafe { run_pair_dot(kernel) }
    }
    unsafe fn call_byte_dot<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller promises that the machine has the instruction.
        unsafe { run_byte_dot(kernel) }
    }
    #[inline(always)]
    fn pair_dot(self, w: Self, sum: Self) -> Self {
        Self(op!(_mm512_dpbf16_ps(sum.0, pairs(self), pairs(w))))
    }
    #[inline(always)]
    fn pairs_of(first: Self, second: Self) -> Self {
        let pairs = op!(_mm512_cvtne2ps_pbh(second.0, first.0));
        // SAFETY: both are 64 bytes, and every pattern is a value of either.
        Self(unsafe { std::mem::transmute::<__m512bh, __m512>(pairs) })
    }
    #[inline(always)]
    fn load_pairs(bits: &[u16; 2 * LANES]) -> Self {
        Self(op!(_mm512_castsi512_ps(load_words(bits))))
    }
    #[inline(always)]
    fn interleave_pairs(columns: &[u16; 2 * LANES]) -> Self {
        let pairs = op!(_mm512_permutexvar_epi16(load_words(&INTERLEAVE), load_words(columns)));
        Self(op!(_mm512_castsi512_ps(pairs)))
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(op!(_mm512_set1_ps(value)))
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        // SAFETY: the array holds sixteen floats.
        unsafe { Self::load_ptr(from.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        // SAFETY: the array holds sixteen floats.
        unsafe { self.store_ptr(to.as_mut_ptr()) }
    }
    #[inline(always)]
    fn load_partial(from: &[f32], fill: f32) -> Self {
        assert!(from.len() <= LANES, "more than one vector");
        let fill = Self::splat(fill).0;
        let mask = BitMask::first(from.len()).0;
        // SAFETY: module invariant; the mask covers exactly the slice, other lanes are not read.
        Self(unsafe { _mm512_mask_loadu_ps(fill, mask, from.as_ptr()) })
    }
    #[inline(always)]
    fn store_partial(self, to: &mut [f32]) {
        assert!(to.len() <= LANES, "more than one vector");
        let mask = BitMask::first(to.len()).0;
        // SAFETY: module invariant; the mask covers exactly the slice, nothing else is written.
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), mask, self.0) }
    }
    #[inline(always)]
    unsafe fn load_ptr(from: *const f32) -> Self {
        // SAFETY: module invariant; the caller promises sixteen readable floats.
        Self(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store_ptr(self, to: *mut f32) {
        // SAFETY: module invariant; the caller promises sixteen writable floats.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    fn prefetch(address: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(address.cast::<i8>()));
    }
    #[inline(always)]
    fn prefetch_far(address: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T1>(address.cast::<i8>()));
    }
    #[inline(always)]
    fn from_bf16(bits: &[u16; LANES]) -> Self {
        // SAFETY: module invariant; the array is 32 bytes.
        let half = unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) };
        Avx512Int(op!(_mm512_cvtepu16_epi32(half))).shl(16).as_float()
    }
    #[inline(always)]
    fn to_bf16(self, to: &mut [u16; LANES]) {
        let bits = self.bits();
        let high = bits.shr(16);
        let round = high.and(Avx512Int::splat(1)) + Avx512Int::splat(0x7fff);
        let rounded = (bits + round).shr(16);
        let quiet = high.or(Avx512Int::splat(0x40));
        let number = self.eq(self).0;
        let chosen = op!(_mm512_mask_blend_epi32(number, quiet.0, rounded.0));
        let half = op!(_mm512_cvtepi32_epi16(chosen));
        // SAFETY: module invariant; the array is 32 bytes.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), half) }
    }
    #[inline(always)]
    fn low_bytes(self) -> [u8; LANES] {
        let bytes = op!(_mm512_cvtepi32_epi8(self.bits().0));
        // SAFETY: both are 16 bytes, and every pattern is a value of either.
        unsafe { std::mem::transmute::<__m128i, [u8; LANES]>(bytes) }
    }
    #[inline(always)]
    fn from_f16(bits: &[u16; LANES]) -> Self {
        // SAFETY: module invariant; the array is 32 bytes.
        let half = unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) };
        Self(op!(_mm512_cvtph_ps(half)))
    }
    #[inline(always)]
    fn from_i8(values: &[i8; LANES]) -> Self {
        // SAFETY: module invariant; the array is 16 bytes.
        let bytes = unsafe { _mm_loadu_si128(values.as_ptr().cast()) };
        Avx512Int(op!(_mm512_cvtepi8_epi32(bytes))).to_float()
    }
    #[inline(always)]
    fn lookup(table: &[f32; LANES], indices: Avx512Int) -> Self {
        Self(op!(_mm512_permutexvar_ps(indices.0, Self::load(table).0)))
    }
    #[inline(always)]
    fn pairs_from_bf16z(bytes: &[u8; 64], codes: &[u8; 32], table: &[u8; 32]) -> ([Self; 2], bool) {
        // SAFETY: module invariant; the array is 64 bytes.
        let bytes = unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) };
        // SAFETY: module invariant; the array is 32 bytes.
        let codes = unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) };
        let (high_table, low_table) = table.split_at(LANES);
        // SAFETY: module invariant; half the array is 16 bytes.
        let high_table = unsafe { _mm_loadu_si128(high_table.as_ptr().cast()) };
        // SAFETY: module invariant; half the array is 16 bytes.
        let low_table = unsafe { _mm_loadu_si128(low_table.as_ptr().cast()) };
        // Low halves of the code bytes in the lower 256 bits, high halves in the upper.
        let shifts = op!(call _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
        let codes = op!(_mm512_srlv_epi64(op!(_mm512_broadcast_i64x4(codes)), shifts));
        let fifteen = op!(_mm512_set1_epi8(15));
        let codes = op!(_mm512_and_si512(codes, fifteen));
        let exception = op!(_mm512_cmpeq_epi8_mask(codes, fifteen)) != 0;
        let high = op!(_mm512_shuffle_epi8(op!(_mm512_broadcast_i32x4(high_table)), codes));
        let low = op!(_mm512_shuffle_epi8(op!(_mm512_broadcast_i32x4(low_table)), codes));
        // 0xF8: the first, or both others.
        let sign = op!(_mm512_set1_epi8(i8::MIN));
        let mantissa = op!(_mm512_set1_epi8(i8::MAX));
        let high = op!(_mm512_ternarylogic_epi64::<0xF8>(high, bytes, sign));
        let low = op!(_mm512_ternarylogic_epi64::<0xF8>(low, bytes, mantissa));
        let first = Avx512Int(op!(_mm512_unpacklo_epi8(low, high)));
        let second = Avx512Int(op!(_mm512_unpackhi_epi8(low, high)));
        ([first.as_float(), second.as_float()], exception)
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(op!(_mm512_fmadd_ps(self.0, factor.0, addend.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(op!(_mm512_min_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(op!(_mm512_max_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(op!(_mm512_sqrt_ps(self.0)))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        self.bits().and(Avx512Int::splat(i32::MAX)).as_float()
    }
    #[inline(always)]
    fn lt(self, other: Self) -> BitMask {
        BitMask(op!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0)))
    }
    #[inline(always)]
    fn eq(self, other: Self) -> BitMask {
        BitMask(op!(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0)))
    }
    #[inline(always)]
    fn select(mask: BitMask, yes: Self, no: Self) -> Self {
        Self(op!(_mm512_mask_blend_ps(mask.0, no.0, yes.0)))
    }
    #[inline(always)]
    fn bits(self) -> Avx512Int {
        Avx512Int(op!(_mm512_castps_si512(self.0)))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let high = op!(_mm512_extractf32x8_ps::<1>(self.0));
        super::avx2::sum8(op!(_mm256_add_ps(op!(_mm512_castps512_ps256(self.0)), high)))
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        let high = op!(_mm512_extractf32x8_ps::<1>(self.0));
        super::avx2::max8(op!(_mm256_max_ps(op!(_mm512_castps512_ps256(self.0)), high)))
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let mut out = rows;
        // Pairs of rows, then pairs of pairs: 4×4 blocks inside each 128-bit quarter.
        for i in (0..LANES).step_by(4) {
            let [a, b, c, d] = [rows[i].0, rows[i + 1].0, rows[i + 2].0, rows[i + 3].0];
            let ab_low = op!(_mm512_castps_pd(op!(_mm512_unpacklo_ps(a, b))));
            let ab_high = op!(_mm512_castps_pd(op!(_mm512_unpackhi_ps(a, b))));
            let cd_low = op!(_mm512_castps_pd(op!(_mm512_unpacklo_ps(c, d))));
            let cd_high = op!(_mm512_castps_pd(op!(_mm512_unpackhi_ps(c, d))));
            out[i].0 = op!(_mm512_castpd_ps(op!(_mm512_unpacklo_pd(ab_low, cd_low))));
            out[i + 1].0 = op!(_mm512_castpd_ps(op!(_mm512_unpackhi_pd(ab_low, cd_low))));
            out[i + 2].0 = op!(_mm512_castpd_ps(op!(_mm512_unpacklo_pd(ab_high, cd_high))));
            out[i + 3].0 = op!(_mm512_castpd_ps(op!(_mm512_unpackhi_pd(ab_high, cd_high))));
        }
        // out[4·i + j] now holds, in quarter q, column 4·q + j of rows 4·i … 4·i + 3.
        let parts = out;
        for j in 0..4 {
            let [a, b, c, d] = [parts[j].0, parts[4 + j].0, parts[8 + j].0, parts[12 + j].0];
            let ab_low = op!(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b));
            let ab_high = op!(_mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
            let cd_low = op!(_mm512_shuffle_f32x4::<0b01_00_01_00>(c, d));
            let cd_high = op!(_mm512_shuffle_f32x4::<0b11_10_11_10>(c, d));
            out[j].0 = op!(_mm512_shuffle_f32x4::<0b10_00_10_00>(ab_low, cd_low));
            out[4 + j].0 = op!(_mm512_shuffle_f32x4::<0b11_01_11_01>(ab_low, cd_low));
            out[8 + j].0 = op!(_mm512_shuffle_f32x4::<0b10_00_10_00>(ab_high, cd_high));
            out[12 + j].0 = op!(_mm512_shuffle_f32x4::<0b11_01_11_01>(ab_high, cd_high));
        }
        out
    }
}

impl I32x16 for Avx512Int {
    type Float = Avx512;
    type Mask = BitMask;
    #[inline(always)]
    fn splat(value: i32) -> Self {
        Self(op!(_mm512_set1_epi32(value)))
    }
    #[inline(always)]
    fn load(from: &[i32; LANES]) -> Self {
        // SAFETY: module invariant; the array is 64 bytes.
        Self(unsafe { _mm512_loadu_epi32(from.as_ptr()) })
    }
    #[inline(always)]
    fn load_bytes(from: &[u8; 4 * LANES]) -> Self {
        // SAFETY: module invariant; the array is 64 bytes.
        Self(unsafe { _mm512_loadu_si512(from.as_ptr().cast()) })
    }
    #[inline(always)]
    fn byte_dot(self, w: Self, x: Self) -> Self {
        Self(op!(_mm512_dpbusd_epi32(self.0, w.0, x.0)))
    }
    #[inline(always)]
    fn byte_dot_in_words(self, w: Self, x: Self) -> Self {
        let low_bytes = Self::splat(0x00ff_00ff);
        let x_even = op!(_mm512_srai_epi16::<8>(op!(_mm512_slli_epi16::<8>(x.0))));
        let x_odd = op!(_mm512_srai_epi16::<8>(x.0));
        let even = op!(_mm512_madd_epi16(w.and(low_bytes).0, x_even));
        let odd = op!(_mm512_madd_epi16(op!(_mm512_srli_epi16::<8>(w.0)), x_odd));
        self + Self(even) + Self(odd)
    }
    #[inline(always)]
    fn mul_low(self, other: Self) -> Self {
        Self(op!(_mm512_mullo_epi32(self.0, other.0)))
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(op!(_mm512_and_si512(self.0, other.0)))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(op!(_mm512_or_si512(self.0, other.0)))
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self(op!(_mm512_xor_si512(self.0, other.0)))
    }
    #[inline(always)]
    fn shl(self, count: u32) -> Self {
        Self(op!(_mm512_sllv_epi32(self.0, Self::splat(count.cast_signed()).0)))
    }
    #[inline(always)]
    fn shr(self, count: u32) -> Self {
        Self(op!(_mm512_srlv_epi32(self.0, Self::splat(count.cast_signed()).0)))
    }
    #[inline(always)]
    fn gt(self, other: Self) -> BitMask {
        BitMask(op!(_mm512_cmpgt_epi32_mask(self.0, other.0)))
    }
    #[inline(always)]
    fn to_float(self) -> Avx512 {
        Avx512(op!(_mm512_cvtepi32_ps(self.0)))
    }
    #[inline(always)]
    fn as_float(self) -> Avx512 {
        Avx512(op!(_mm512_castsi512_ps(self.0)))
    }
}

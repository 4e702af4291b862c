//! Sixteen lanes in two AVX2 registers: lanes 0–7 and 8–15.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

use super::{F32x16, I32x16, Kernel, LANES, Mask16, bf16_from_f32};

/// Sixteen floats in two registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(__m256, __m256);

/// Sixteen integers in two registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2Int(__m256i, __m256i);

/// All bits of a lane set or none, in two registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2Mask(__m256, __m256);

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
                Self(op!($intrinsic(self.0, other.0)), op!($intrinsic(self.1, other.1)))
            }
        }
    };
}
lanewise!(Avx2, Add, add, _mm256_add_ps);
lanewise!(Avx2, Sub, sub, _mm256_sub_ps);
lanewise!(Avx2, Mul, mul, _mm256_mul_ps);
lanewise!(Avx2, Div, div, _mm256_div_ps);
lanewise!(Avx2Int, Add, add, _mm256_add_epi32);
lanewise!(Avx2Int, Sub, sub, _mm256_sub_epi32);

impl Neg for Avx2 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        self.bits().xor(Avx2Int::splat(i32::MIN)).as_float()
    }
}

/// Lanes 4 apart, 2 apart, then neighbours: the last three levels of the sum tree.
#[inline(always)]
pub(super) fn sum8(lanes: __m256) -> f32 {
    let quarter = op!(_mm256_extractf128_ps::<1>(lanes));
    let four = op!(_mm_add_ps(op!(_mm256_castps256_ps128(lanes)), quarter));
    let two = op!(_mm_add_ps(four, op!(_mm_movehl_ps(four, four))));
    op!(_mm_cvtss_f32(op!(_mm_add_ss(two, op!(_mm_movehdup_ps(two))))))
}

/// As [`sum8`], for the largest lane.
#[inline(always)]
pub(super) fn max8(lanes: __m256) -> f32 {
    let quarter = op!(_mm256_extractf128_ps::<1>(lanes));
    let four = op!(_mm_max_ps(op!(_mm256_castps256_ps128(lanes)), quarter));
    let two = op!(_mm_max_ps(four, op!(_mm_movehl_ps(four, four))));
    op!(_mm_cvtss_f32(op!(_mm_max_ss(two, op!(_mm_movehdup_ps(two))))))
}

#[inline(always)]
fn widen_words(words: &[u16; 8]) -> __m256i {
    // SAFETY: module invariant; the array is 16 bytes.
    let words = unsafe { _mm_loadu_si128(words.as_ptr().cast()) };
    op!(_mm256_cvtepu16_epi32(words))
}

#[inline(always)]
fn transpose8(rows: [__m256; 8]) -> [__m256; 8] {
    let mut quads = rows;
    for i in [0, 4] {
        let [a, b, c, d] = [rows[i], rows[i + 1], rows[i + 2], rows[i + 3]];
        let ab_low = op!(_mm256_castps_pd(op!(_mm256_unpacklo_ps(a, b))));
        let ab_high = op!(_mm256_castps_pd(op!(_mm256_unpackhi_ps(a, b))));
        let cd_low = op!(_mm256_castps_pd(op!(_mm256_unpacklo_ps(c, d))));
        let cd_high = op!(_mm256_castps_pd(op!(_mm256_unpackhi_ps(c, d))));
        quads[i] = op!(_mm256_castpd_ps(op!(_mm256_unpacklo_pd(ab_low, cd_low))));
        quads[i + 1] = op!(_mm256_castpd_ps(op!(_mm256_unpackhi_pd(ab_low, cd_low))));
        quads[i + 2] = op!(_mm256_castpd_ps(op!(_mm256_unpacklo_pd(ab_high, cd_high))));
        quads[i + 3] = op!(_mm256_castpd_ps(op!(_mm256_unpackhi_pd(ab_high, cd_high))));
    }
    let mut out = quads;
    for j in 0..4 {
        out[j] = op!(_mm256_permute2f128_ps::<0x20>(quads[j], quads[j + 4]));
        out[j + 4] = op!(_mm256_permute2f128_ps::<0x31>(quads[j], quads[j + 4]));
    }
    out
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// The sums of the four products of each lane's bytes, those of `w` unsigned, those of `x` signed.
#[inline(always)]
fn four_products(w: __m256i, x: __m256i) -> __m256i {
    let low_bytes = op!(_mm256_set1_epi16(0xff));
    let x_even = op!(_mm256_srai_epi16::<8>(op!(_mm256_slli_epi16::<8>(x))));
    let even = op!(_mm256_madd_epi16(op!(_mm256_and_si256(w, low_bytes)), x_even));
    let x_odd = op!(_mm256_srai_epi16::<8>(x));
    let odd = op!(_mm256_madd_epi16(op!(_mm256_srli_epi16::<8>(w)), x_odd));
    op!(_mm256_add_epi32(even, odd))
}

/// Eight lanes of two pairs of columns of a bf16z weight.
#[inline(always)]
fn two_pairs(bytes: __m256i, codes: __m256i, [high, low]: [__m256i; 2]) -> [__m256i; 2] {
    let sign = op!(_mm256_set1_epi8(i8::MIN));
    let mantissa = op!(_mm256_set1_epi8(i8::MAX));
    let high = op!(_mm256_shuffle_epi8(high, codes));
    let low = op!(_mm256_shuffle_epi8(low, codes));
    let high = op!(_mm256_or_si256(high, op!(_mm256_and_si256(bytes, sign))));
    let low = op!(_mm256_or_si256(low, op!(_mm256_and_si256(bytes, mantissa))));
    [op!(_mm256_unpacklo_epi8(low, high)), op!(_mm256_unpackhi_epi8(low, high))]
}

impl F32x16 for Avx2 {
    type Int = Avx2Int;
    type Mask = Avx2Mask;
    const TILE: (usize, usize) = (1, 6);

    fn call<K: Kernel>(kernel: K) -> K::Output {
        op!(run(kernel))
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        let half = op!(_mm256_set1_ps(value));
        Self(half, half)
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
        let mask = Avx2Mask::first(from.len());
        let (low, high) = (mask.low_bits(), mask.high_bits());
        // SAFETY: module invariant; the masks cover exactly the slice, other lanes are not read.
        let first = unsafe { _mm256_maskload_ps(from.as_ptr(), low) };
        // SAFETY: as above; an address past the slice is not read.
        let second = unsafe { _mm256_maskload_ps(from.as_ptr().wrapping_add(8), high) };
        Self::select(mask, Self(first, second), Self::splat(fill))
    }
    #[inline(always)]
    fn store_partial(self, to: &mut [f32]) {
        assert!(to.len() <= LANES, "more than one vector");
        let mask = Avx2Mask::first(to.len());
        let (low, high) = (mask.low_bits(), mask.high_bits());
        // SAFETY: module invariant; the masks cover exactly the slice, nothing else is written.
        unsafe { _mm256_maskstore_ps(to.as_mut_ptr(), low, self.0) };
        // SAFETY: as above.
        unsafe { _mm256_maskstore_ps(to.as_mut_ptr().wrapping_add(8), high, self.1) };
    }
    #[inline(always)]
    unsafe fn load_ptr(from: *const f32) -> Self {
        // SAFETY: module invariant; the caller promises sixteen readable floats.
        let low = unsafe { _mm256_loadu_ps(from) };
        // SAFETY: eight floats on is still inside the sixteen.
        let second = unsafe { from.add(8) };
        // SAFETY: as for the first eight.
        let high = unsafe { _mm256_loadu_ps(second) };
        Self(low, high)
    }
    #[inline(always)]
    unsafe fn store_ptr(self, to: *mut f32) {
        // SAFETY: module invariant; the caller promises sixteen writable floats.
        unsafe { _mm256_storeu_ps(to, self.0) };
        // SAFETY: eight floats on is still inside the sixteen.
        let second = unsafe { to.add(8) };
        // SAFETY: as for the first eight.
        unsafe { _mm256_storeu_ps(second, self.1) };
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
        let (halves, _) = bits.as_chunks::<8>();
        Avx2Int(widen_words(&halves[0]), widen_words(&halves[1])).shl(16).as_float()
    }
    #[inline(always)]
    fn to_bf16(self, to: &mut [u16; LANES]) {
        // Left to the compiler: it is used where weights and caches are written, not in products.
        *to = self.to_array().map(bf16_from_f32);
    }
    #[inline(always)]
    fn from_f16(bits: &[u16; LANES]) -> Self {
        let (halves, _) = bits.as_chunks::<8>();
        // SAFETY: module invariant; the array is 16 bytes.
        let low = unsafe { _mm_loadu_si128(halves[0].as_ptr().cast()) };
        // SAFETY: as above.
        let high = unsafe { _mm_loadu_si128(halves[1].as_ptr().cast()) };
        Self(op!(_mm256_cvtph_ps(low)), op!(_mm256_cvtph_ps(high)))
    }
    #[inline(always)]
    fn from_i8(values: &[i8; LANES]) -> Self {
        // SAFETY: module invariant; the array is 16 bytes.
        let bytes = unsafe { _mm_loadu_si128(values.as_ptr().cast()) };
        let high = op!(_mm_unpackhi_epi64(bytes, bytes));
        Avx2Int(op!(_mm256_cvtepi8_epi32(bytes)), op!(_mm256_cvtepi8_epi32(high))).to_float()
    }
    #[inline(always)]
    fn lookup(table: &[f32; LANES], indices: Avx2Int) -> Self {
        let Self(low, high) = Self::load(table);
        // The fourth bit of an index chooses the half of the table, as a sign.
        let Self(low_sign, high_sign) = indices.shl(28).as_float();
        let first = op!(_mm256_permutevar8x32_ps(low, indices.0));
        let second = op!(_mm256_permutevar8x32_ps(high, indices.0));
        let low_lanes = op!(_mm256_blendv_ps(first, second, low_sign));
        let first = op!(_mm256_permutevar8x32_ps(low, indices.1));
        let second = op!(_mm256_permutevar8x32_ps(high, indices.1));
        Self(low_lanes, op!(_mm256_blendv_ps(first, second, high_sign)))
    }
    #[inline(always)]
    fn pairs_from_bf16z(bytes: &[u8; 64], codes: &[u8; 32], table: &[u8; 32]) -> ([Self; 2], bool) {
        // SAFETY: module invariant; the array is 32 bytes.
        let codes = unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) };
        let (high_table, low_table) = table.split_at(LANES);
        // SAFETY: module invariant; half the array is 16 bytes.
        let high_table = unsafe { _mm_loadu_si128(high_table.as_ptr().cast()) };
        // SAFETY: module invariant; half the array is 16 bytes.
        let low_table = unsafe { _mm_loadu_si128(low_table.as_ptr().cast()) };
        let tables = [
            op!(_mm256_broadcastsi128_si256(high_table)),
            op!(_mm256_broadcastsi128_si256(low_table)),
        ];
        let fifteen = op!(_mm256_set1_epi8(15));
        let low_codes = op!(_mm256_and_si256(codes, fifteen));
        let high_codes = op!(_mm256_and_si256(op!(_mm256_srli_epi64::<4>(codes)), fifteen));
        let exceptions = op!(_mm256_or_si256(
            op!(_mm256_cmpeq_epi8(low_codes, fifteen)),
            op!(_mm256_cmpeq_epi8(high_codes, fifteen))
        ));
        let exception = op!(_mm256_movemask_epi8(exceptions)) != 0;
        // Lanes 0 to 7 lie in the first half, the others in the second.
        let (halves, _) = bytes.as_chunks::<32>();
        // SAFETY: module invariant; the array is 32 bytes.
        let low_bytes = unsafe { _mm256_loadu_si256(halves[0].as_ptr().cast()) };
        // SAFETY: as above.
        let high_bytes = unsafe { _mm256_loadu_si256(halves[1].as_ptr().cast()) };
        let low = two_pairs(low_bytes, low_codes, tables);
        let high = two_pairs(high_bytes, high_codes, tables);
        let (first, second) = (Avx2Int(low[0], high[0]), Avx2Int(low[1], high[1]));
        ([first.as_float(), second.as_float()], exception)
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(
            op!(_mm256_fmadd_ps(self.0, factor.0, addend.0)),
            op!(_mm256_fmadd_ps(self.1, factor.1, addend.1)),
        )
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(op!(_mm256_min_ps(self.0, other.0)), op!(_mm256_min_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(op!(_mm256_max_ps(self.0, other.0)), op!(_mm256_max_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(op!(_mm256_sqrt_ps(self.0)), op!(_mm256_sqrt_ps(self.1)))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        self.bits().and(Avx2Int::splat(i32::MAX)).as_float()
    }
    #[inline(always)]
    fn lt(self, other: Self) -> Avx2Mask {
        Avx2Mask(
            op!(_mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0)),
            op!(_mm256_cmp_ps::<_CMP_LT_OQ>(self.1, other.1)),
        )
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Avx2Mask {
        Avx2Mask(
            op!(_mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, other.0)),
            op!(_mm256_cmp_ps::<_CMP_EQ_OQ>(self.1, other.1)),
        )
    }
    #[inline(always)]
    fn select(mask: Avx2Mask, yes: Self, no: Self) -> Self {
        Self(op!(_mm256_blendv_ps(no.0, yes.0, mask.0)), op!(_mm256_blendv_ps(no.1, yes.1, mask.1)))
    }
    #[inline(always)]
    fn bits(self) -> Avx2Int {
        Avx2Int(op!(_mm256_castps_si256(self.0)), op!(_mm256_castps_si256(self.1)))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        sum8(op!(_mm256_add_ps(self.0, self.1)))
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        max8(op!(_mm256_max_ps(self.0, self.1)))
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        // Four 8×8 blocks; the two off the diagonal change places. No closures: they would be
        // compiled without the instruction set.
        let mut halves = [[rows[0].0; 8]; 4];
        for i in 0..8 {
            halves[0][i] = rows[i].0;
            halves[1][i] = rows[i + 8].0;
            halves[2][i] = rows[i].1;
            halves[3][i] = rows[i + 8].1;
        }
        let (low, low_end) = (transpose8(halves[0]), transpose8(halves[1]));
        let (high, high_end) = (transpose8(halves[2]), transpose8(halves[3]));
        let mut out = rows;
        for i in 0..8 {
            out[i] = Self(low[i], low_end[i]);
            out[8 + i] = Self(high[i], high_end[i]);
        }
        out
    }
}

impl I32x16 for Avx2Int {
    type Float = Avx2;
    type Mask = Avx2Mask;
    #[inline(always)]
    fn splat(value: i32) -> Self {
        let half = op!(_mm256_set1_epi32(value));
        Self(half, half)
    }
    #[inline(always)]
    fn load(from: &[i32; LANES]) -> Self {
        let (halves, _) = from.as_chunks::<8>();
        // SAFETY: module invariant; the array is 32 bytes.
        let low = unsafe { _mm256_loadu_si256(halves[0].as_ptr().cast()) };
        // SAFETY: as above.
        let high = unsafe { _mm256_loadu_si256(halves[1].as_ptr().cast()) };
        Self(low, high)
    }
    #[inline(always)]
    fn load_bytes(from: &[u8; 4 * LANES]) -> Self {
        let (halves, _) = from.as_chunks::<32>();
        // SAFETY: module invariant; the array is 32 bytes.
        let low = unsafe { _mm256_loadu_si256(halves[0].as_ptr().cast()) };
        // SAFETY: as above.
        let high = unsafe { _mm256_loadu_si256(halves[1].as_ptr().cast()) };
        Self(low, high)
    }
    #[inline(always)]
    fn byte_dot_in_words(self, w: Self, x: Self) -> Self {
        self + Self(four_products(w.0, x.0), four_products(w.1, x.1))
    }
    #[inline(always)]
    fn mul_low(self, other: Self) -> Self {
        Self(op!(_mm256_mullo_epi32(self.0, other.0)), op!(_mm256_mullo_epi32(self.1, other.1)))
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(op!(_mm256_and_si256(self.0, other.0)), op!(_mm256_and_si256(self.1, other.1)))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(op!(_mm256_or_si256(self.0, other.0)), op!(_mm256_or_si256(self.1, other.1)))
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self(op!(_mm256_xor_si256(self.0, other.0)), op!(_mm256_xor_si256(self.1, other.1)))
    }
    #[inline(always)]
    fn shl(self, count: u32) -> Self {
        let count = op!(_mm256_set1_epi32(count.cast_signed()));
        Self(op!(_mm256_sllv_epi32(self.0, count)), op!(_mm256_sllv_epi32(self.1, count)))
    }
    #[inline(always)]
    fn shr(self, count: u32) -> Self {
        let count = op!(_mm256_set1_epi32(count.cast_signed()));
        Self(op!(_mm256_srlv_epi32(self.0, count)), op!(_mm256_srlv_epi32(self.1, count)))
    }
    #[inline(always)]
    fn gt(self, other: Self) -> Avx2Mask {
        let greater = Self(
            op!(_mm256_cmpgt_epi32(self.0, other.0)),
            op!(_mm256_cmpgt_epi32(self.1, other.1)),
        );
        let Avx2(low, high) = greater.as_float();
        Avx2Mask(low, high)
    }
    #[inline(always)]
    fn to_float(self) -> Avx2 {
        Avx2(op!(_mm256_cvtepi32_ps(self.0)), op!(_mm256_cvtepi32_ps(self.1)))
    }
    #[inline(always)]
    fn as_float(self) -> Avx2 {
        Avx2(op!(_mm256_castsi256_ps(self.0)), op!(_mm256_castsi256_ps(self.1)))
    }
}

impl Avx2Mask {
    #[inline(always)]
    fn low_bits(self) -> __m256i {
        op!(_mm256_castps_si256(self.0))
    }
    #[inline(always)]
    fn high_bits(self) -> __m256i {
        op!(_mm256_castps_si256(self.1))
    }
}

impl Mask16 for Avx2Mask {
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "at most 16")]
    fn first(count: usize) -> Self {
        let lanes = Avx2Int(
            op!(call _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            op!(call _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)),
        );
        Avx2Int::splat(count.min(LANES) as i32).gt(lanes)
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(op!(_mm256_and_ps(self.0, other.0)), op!(_mm256_and_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn not(self) -> Self {
        let ones = op!(_mm256_castsi256_ps(op!(_mm256_set1_epi32(-1))));
        Self(op!(_mm256_xor_ps(self.0, ones)), op!(_mm256_xor_ps(self.1, ones)))
    }
}

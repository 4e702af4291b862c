//! Encodings whose elements are short codes, consecutive inputs of a row sharing a scale.
//!
//! The weight *is* `value(code) · scale`, a product of two `f32` numbers, rounded once.
//!
//! | encoding | code | value of a code | group | scale |
//! |---|---|---|---|---|
//! | `q8` | 8 bits | code − 128 | 32 | f16 |
//! | `q4` | 4 bits | code − 8 | 32 | f16 |
//! | `nf4` | 4 bits | [`NF4`] | 64 | f32 |
//! | `fp8` | 8 bits | E4M3 | 128 | f32 |
//! | `fp4` | 4 bits | [`E2M1`] | 32 | E8M0: `2^(byte − 127)` |
//!
//! `q8` and `q4` hold what GGUF's `Q8_0` and `Q4_0` hold, `nf4` what bitsandbytes holds where a row is a
//! multiple of 64 (Dettmers et al., 2023), `fp4` is MXFP4 of the OCP Microscaling formats 1.0.
//!
//! Only in panels. `k` is padded to a multiple of 32, columns come in chunks of 32. A panel:
//!
//! ```text
//! codes   [k/32]     8 bits: 8 parts of 64 bytes, part p holding columns 4p to 4p + 3;
//!                    4 bits: 4 parts, part p columns 8p to 8p + 3 in the low halves of its bytes,
//!                    8p + 4 to 8p + 7 in the high halves
//! scales  [groups]   one for each of the sixteen lanes
//! ```
//!
//! Byte `4 · lane + c` of a part is that of its column `c`: where `vpdpbusd` wants it. Scales start at a
//! multiple of 64 bytes, and the panel is padded to one.
//!
//! **How far a value is from what was encoded**, `largest` being the largest magnitude of the group:
//!
//! - `q8`: `largest / 253 + 2⁻²⁵`: half a step, the scale being rounded up to an f16 number.
//! - `q4`: `0.29 · largest + 2⁻²²`, and the squares of a group's errors add up to no more than with
//!   `Q4_0`'s scale, with which `largest / 8` bounds each: of five scales the best is taken.
//! - `nf4`: half the widest gap of the table, `0.152 · largest`.
//! - `fp8`: `2⁻⁴` of the value, or `largest / 448 · 2⁻¹⁰` where it is subnormal.
//! - `fp4`: `largest / 4`.

use super::Encoding;
use crate::memory::{ALIGNMENT, Bytes, BytesMut};
use crate::simd::{LANES, f16_from_f32, f32_from_f16};

/// Columns of a chunk.
pub(crate) const CHUNK_COLUMNS: usize = 32;
/// Bytes of a part of a chunk.
pub(crate) const PART_BYTES: usize = 64;
/// Columns of a part, or of either half of its bytes.
pub(crate) const PART_COLUMNS: usize = 4;
/// The largest value of E4M3.
const E4M3_MAX: f32 = 448.0;
/// The largest magnitude of a byte.
pub(super) const Q8_MAX: f32 = 127.0;
/// What the first candidate for `q4`'s scale is multiplied by.
pub(super) const Q4_CANDIDATES: [f32; 5] = [1.0, 1.06, 0.94, 0.88, 0.82];

/// The values of `nf4`'s codes: quantiles of the normal distribution, as bitsandbytes has them.
pub(crate) const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The values of `fp4`'s codes: a sign, two bits of exponent, one of mantissa.
pub(crate) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// What a code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// Eight bits, 128 more than the value.
    Byte,
    /// Four bits, 8 more than the value.
    Nibble,
    /// Four bits that number the values of [`NF4`].
    Nf4,
    /// Four bits that number the values of [`E2M1`].
    E2m1,
    /// Eight bits: sign, four of exponent (bias 7), three of mantissa. 0x7f is never written.
    E4m3,
}

/// How a scale is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    /// IEEE half.
    F16,
    /// 32-bit float.
    F32,
    /// A byte, 127 more than the exponent of a power of two.
    E8m0,
}

impl Scale {
    /// Bytes of sixteen.
    pub(crate) const fn lane_bytes(self) -> usize {
        match self {
            Self::F16 => 2 * LANES,
            Self::F32 => 4 * LANES,
            Self::E8m0 => LANES,
        }
    }
}

/// The value of a scale's byte.
#[inline(always)]
pub(crate) fn e8m0(byte: u8) -> f32 {
    // 2^−127 is subnormal.
    f32::from_bits(if byte == 0 { 1 << 22 } else { u32::from(byte) << 23 })
}

/// The value of a code of eight bits: exact, since 2¹²⁰ undoes the difference of the biases.
pub(crate) fn e4m3(code: u8) -> f32 {
    let magnitude = f32::from_bits(u32::from(code & 0x7f) << 20) * E4M3_UNBIAS;
    if code >> 7 == 0 { magnitude } else { -magnitude }
}

/// What the bits of a code, moved to where `f32` has them, are multiplied by.
pub(crate) const E4M3_UNBIAS: f32 = f32::from_bits((127 + 120) << 23);

/// One of these encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) code: Code,
    pub(crate) scale: Scale,
    /// Consecutive inputs that share a scale, a multiple of 32.
    pub(crate) group: usize,
}

impl Format {
    /// The format of an encoding; `None` if it is none of these.
    pub(crate) const fn of(encoding: Encoding) -> Option<Self> {
        let (code, scale, group) = match encoding {
            Encoding::F32 | Encoding::Bf16 | Encoding::Bf16z | Encoding::F16 => return None,
            Encoding::Q8 => (Code::Byte, Scale::F16, 32),
            Encoding::Q4 => (Code::Nibble, Scale::F16, 32),
            Encoding::Nf4 => (Code::Nf4, Scale::F32, 64),
            Encoding::Fp8 => (Code::E4m3, Scale::F32, 128),
            Encoding::Fp4 => (Code::E2m1, Scale::E8m0, 32),
        };
        Some(Self { code, scale, group })
    }

    /// Whether a code has four bits.
    pub(crate) const fn is_nibble(self) -> bool {
        matches!(self.code, Code::Nibble | Code::Nf4 | Code::E2m1)
    }

    /// Bytes of a chunk's codes.
    pub(crate) const fn chunk_bytes(self) -> usize {
        CHUNK_COLUMNS * LANES / if self.is_nibble() { 2 } else { 1 }
    }

    /// Where a panel's scales start.
    pub(crate) const fn scales_start(self, k: usize) -> usize {
        k.div_ceil(CHUNK_COLUMNS) * self.chunk_bytes()
    }

    /// Bytes of a panel of `k` columns.
    pub(crate) const fn panel_bytes(self, k: usize) -> usize {
        let scales = k.div_ceil(self.group) * self.scale.lane_bytes();
        (self.scales_start(k) + scales).next_multiple_of(ALIGNMENT)
    }

    /// The byte of an element's code in its panel, and how far it is shifted there.
    fn place(self, column: usize, lane: usize) -> (usize, u32) {
        let (chunk, c) = (column / CHUNK_COLUMNS, column % CHUNK_COLUMNS);
        let (part, shift) = match self.is_nibble() {
            true => (c / 8, if c % 8 < PART_COLUMNS { 0 } else { 4 }),
            false => (c / PART_COLUMNS, 0),
        };
        let byte = PART_COLUMNS * lane + c % PART_COLUMNS;
        (chunk * self.chunk_bytes() + part * PART_BYTES + byte, shift)
    }

    fn value_of(self, code: u8) -> f32 {
        match self.code {
            Code::Byte => f32::from(code) - 128.0,
            Code::Nibble => f32::from(code) - 8.0,
            Code::Nf4 => NF4[usize::from(code)],
            Code::E2m1 => E2M1[usize::from(code)],
            Code::E4m3 => e4m3(code),
        }
    }

    fn scale_of(self, k: usize, panel: &[u8], (group, lane): (usize, usize)) -> f32 {
        let scales = &panel[self.scales_start(k) + group * self.scale.lane_bytes()..];
        match self.scale {
            Scale::F16 => f32_from_f16(Bytes::new(&scales[..2 * LANES]).u16s()[lane]),
            Scale::F32 => Bytes::new(&scales[..4 * LANES]).f32s()[lane],
            Scale::E8m0 => e8m0(scales[lane]),
        }
    }

    /// One element of a weight of `k` columns, as what its code stands for and its scale: the
    /// definition.
    pub(super) fn parts(self, bytes: &[u8], k: usize, (row, column): (usize, usize)) -> (f32, f32) {
        let (panel, lane) = (row / LANES, row % LANES);
        let panel = &bytes[panel * self.panel_bytes(k)..];
        let (byte, shift) = self.place(column, lane);
        let code = panel[byte] >> shift & if self.is_nibble() { 15 } else { 255 };
        (self.value_of(code), self.scale_of(k, panel, (column / self.group, lane)))
    }

    /// Writes rows of values as panels of zeros: the definition.
    pub(super) fn write(self, k: usize, values_nk: &[f32], bytes: &mut [u8]) {
        let mut codes = vec![0; self.group];
        for (row, values) in values_nk.chunks_exact(k.max(1)).enumerate() {
            let panel = &mut bytes[row / LANES * self.panel_bytes(k)..];
            for (group, values) in values.chunks(self.group).enumerate() {
                let codes = &mut codes[..values.len()];
                let scale = self.encode_group(values, codes);
                self.write_group(k, panel, (group, row % LANES), (codes, scale));
            }
        }
    }

    /// Writes one group of a row of a panel.
    #[expect(clippy::cast_possible_truncation, reason = "a scale of that kind has eight bits")]
    pub(super) fn write_group(
        self,
        k: usize,
        panel: &mut [u8],
        (group, lane): (usize, usize),
        (codes, scale): (&[u8], f32),
    ) {
        for (column, &code) in (group * self.group..).zip(codes) {
            let (byte, shift) = self.place(column, lane);
            panel[byte] |= code << shift;
        }
        let scales = &mut panel[self.scales_start(k) + group * self.scale.lane_bytes()..];
        match self.scale {
            Scale::F16 => {
                BytesMut::new(&mut scales[..2 * LANES]).u16s()[lane] = f16_from_f32(scale);
            }
            Scale::F32 => BytesMut::new(&mut scales[..4 * LANES]).f32s()[lane] = scale,
            Scale::E8m0 => scales[lane] = (scale.to_bits() >> 23) as u8,
        }
    }

    /// The codes of a group, and its scale as it is written.
    fn encode_group(self, values: &[f32], codes: &mut [u8]) -> f32 {
        let largest = values.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        match self.code {
            Code::Byte => encode_bytes(values, largest, codes),
            Code::Nibble => encode_nibbles(values, codes),
            Code::Nf4 => {
                for (code, x) in codes.iter_mut().zip(values) {
                    *code = nearest(&NF4, if largest > 0.0 { x / largest } else { 0.0 });
                }
                largest
            }
            Code::E2m1 => encode_e2m1(values, largest, codes),
            Code::E4m3 => {
                let scale = largest / E4M3_MAX;
                for (code, x) in codes.iter_mut().zip(values) {
                    *code = e4m3_from_f32(if scale > 0.0 { x / scale } else { 0.0 });
                }
                scale
            }
        }
    }
}

/// The least f16 number that is no less than a number that is not negative.
pub(super) fn f16_at_least(x: f32) -> f32 {
    let bits = f16_from_f32(x);
    let nearest = f32_from_f16(bits);
    if nearest < x { f32_from_f16(bits + 1) } else { nearest }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
fn encode_bytes(values: &[f32], largest: f32, codes: &mut [u8]) -> f32 {
    let scale = f16_at_least(largest / Q8_MAX);
    for (code, x) in codes.iter_mut().zip(values) {
        let steps = if scale > 0.0 { (x / scale).round_ties_even() } else { 0.0 };
        *code = (steps.clamp(-Q8_MAX, Q8_MAX) + 128.0) as u8;
    }
    scale
}

/// The largest magnitude becomes −8, or nearly; the candidate with the least squared error is taken.
fn encode_nibbles(values: &[f32], codes: &mut [u8]) -> f32 {
    let largest = values
        .iter()
        .fold(0.0_f32, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
    let mut best = (f32::INFINITY, 0.0);
    for factor in Q4_CANDIDATES {
        let scale = f32_from_f16(f16_from_f32(largest / -8.0 * factor));
        let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
        let error = values.iter().fold(0.0_f32, |sum, &x| {
            let difference = (f32::from(nibble(x * inverse)) - 8.0).mul_add(scale, -x);
            difference.mul_add(difference, sum)
        });
        if error < best.0 {
            best = (error, scale);
        }
    }
    let scale = best.1;
    let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
    for (code, x) in codes.iter_mut().zip(values) {
        *code = nibble(x * inverse);
    }
    scale
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
#[inline(always)]
fn nibble(steps: f32) -> u8 {
    (steps.round_ties_even() + 8.0).clamp(0.0, 15.0) as u8
}

/// The scale is the power of two that takes the largest magnitude below 8, of which 6 is the largest code.
fn encode_e2m1(values: &[f32], largest: f32, codes: &mut [u8]) -> f32 {
    // Exponents of the code 4 and its like are 2.
    let exponent = (largest.to_bits() >> 23).saturating_sub(2).clamp(1, 254);
    let scale = f32::from_bits(exponent << 23);
    for (code, x) in codes.iter_mut().zip(values) {
        let magnitude = nearest_even_e2m1(x.abs() / scale);
        *code = if x.is_sign_negative() { magnitude | 8 } else { magnitude };
    }
    scale
}

/// The nearest magnitude of E2M1, of two the one with the even code.
fn nearest_even_e2m1(x: f32) -> u8 {
    // Midpoints that belong to the code below come with `<=`.
    match x {
        x if x <= 0.25 => 0,
        x if x < 0.75 => 1,
        x if x <= 1.25 => 2,
        x if x < 1.75 => 3,
        x if x <= 2.5 => 4,
        x if x < 3.5 => 5,
        x if x <= 5.0 => 6,
        _ => 7,
    }
}

/// The nearest value of an ascending table, of two the smaller.
fn nearest(table: &[f32; 16], x: f32) -> u8 {
    let is_above = |pair: &&[f32]| x > (pair[0] + pair[1]) / 2.0;
    u8::try_from(table.windows(2).take_while(is_above).count()).unwrap_or(u8::MAX)
}

/// The nearest code, ties to even; what is too large becomes the largest.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a code of eight bits")]
fn e4m3_from_f32(x: f32) -> u8 {
    let sign = u8::from(x.is_sign_negative()) << 7;
    let magnitude = x.abs().min(E4M3_MAX);
    if magnitude < 2.0_f32.powi(-6) {
        // Steps of 2⁻⁹; eight of them are the first normal number, whose code is 8.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The panels of a stored weight, from some panel on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grouped<'a> {
    pub(crate) format: Format,
    bytes: &'a [u8],
    panel_bytes: usize,
    scales_start: usize,
}

impl<'a> Grouped<'a> {
    /// The weight of `k` columns whose panels are in `bytes`.
    pub(crate) fn new(format: Format, bytes: &'a [u8], k: usize) -> Self {
        let (panel_bytes, scales_start) = (format.panel_bytes(k), format.scales_start(k));
        Self { format, bytes, panel_bytes, scales_start }
    }

    /// The same without its first `panel` panels.
    pub(crate) fn after(self, panel: usize) -> Self {
        Self { bytes: &self.bytes[panel * self.panel_bytes..], ..self }
    }

    /// Bytes of a panel.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.panel_bytes
    }

    /// Where the part of a panel that holds a column, a multiple of 4, lies.
    #[inline(always)]
    pub(crate) fn part(&self, panel: usize, column: usize) -> *const [u8; PART_BYTES] {
        let columns = if self.format.is_nibble() { 8 } else { PART_COLUMNS };
        let start = panel * self.panel_bytes + column / columns * PART_BYTES;
        self.bytes.as_ptr().wrapping_add(start).cast()
    }

    /// Where the sixteen scales of a group of a panel lie.
    #[inline(always)]
    pub(crate) fn scales(&self, panel: usize, group: usize) -> *const u8 {
        let start = self.scales_start + group * self.format.scale.lane_bytes();
        self.bytes.as_ptr().wrapping_add(panel * self.panel_bytes + start)
    }
}

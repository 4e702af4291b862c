//! What the blocks of tensors mean, as `f32`.
//!
//! Layouts and meanings are those of ggml (`ggml-common.h`, `dequantize_row_*` in `ggml-quants.c`):
//! `d` and `m` are halves. Every product and difference below is rounded to `f32` on its own, in
//! the order written, as ggml and the gguf package do; so values agree with theirs bit for bit.
//!
//! | format | elements | bytes | an element is |
//! |---|---|---|---|
//! | `Q8_0` | 32 | d, 32 × i8 | q · d |
//! | `Q4_0` | 32 | d, 16 × two 4-bit: elements i and i + 16 | (q − 8) · d |
//! | `Q4_K` | 256 | d, m, 12 bytes of scales, 128 × two 4-bit | (d · s) · q − (m · o) |
//! | `Q5_K` | 256 | d, m, 12 bytes of scales, 32 of fifth bits, 128 × two 4-bit | the same |
//! | `Q6_K` | 256 | 128 × two 4-bit, 64 × four 2-bit, 16 × i8 scales, d | (d · s) · (q − 32) |
//!
//! In the K formats a scale `s` and an offset `o` of 6 bits each belong to 32 elements, in `Q6_K` a
//! scale of 8 bits to 16.

use crate::safetensors::{bf16_to_f32, f16_to_f32};
use std::ops::Range;

/// Elements of a block of a K format.
const SUPER_BLOCK: usize = 256;
/// Elements of a block of `Q4_0` and `Q8_0`.
const SMALL_BLOCK: usize = 32;

/// A type of tensor that Cairn reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// The high half of a 32-bit float.
    Bf16,
    /// 8 bits, a scale for 32.
    Q8_0,
    /// 4 bits, a scale for 32.
    Q4_0,
    /// 4 bits, a scale and an offset for 32.
    Q4K,
    /// 5 bits, a scale and an offset for 32.
    Q5K,
    /// 6 bits, a scale for 16.
    Q6K,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4K, Self::Q5K, Self::Q6K];

    /// Its name, as in ggml.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Elements of a block.
    pub const fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 => SMALL_BLOCK,
            Self::Q4K | Self::Q5K | Self::Q6K => SUPER_BLOCK,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Decodes whole blocks.
    ///
    /// # Panics
    ///
    /// Panics if `bytes` are not whole blocks or `out` is not as long as their elements.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes.len() / self.block_bytes();
        assert_eq!(bytes.len(), blocks * self.block_bytes(), "whole blocks");
        assert_eq!(out.len(), blocks * self.block_elements(), "room for their elements");
        match self {
            Self::F32 => each(bytes, out, |block: &[u8; 4], out: &mut [f32; 1]| {
                out[0] = f32::from_le_bytes(*block);
            }),
            Self::F16 => each(bytes, out, |block: &[u8; 2], out: &mut [f32; 1]| {
                out[0] = f16_to_f32(u16::from_le_bytes(*block));
            }),
            Self::Bf16 => each(bytes, out, |block: &[u8; 2], out: &mut [f32; 1]| {
                out[0] = bf16_to_f32(u16::from_le_bytes(*block));
            }),
            Self::Q8_0 => each(bytes, out, decode_q8_0),
            Self::Q4_0 => each(bytes, out, decode_q4_0),
            Self::Q4K => each(bytes, out, decode_q4_k),
            Self::Q5K => each(bytes, out, decode_q5_k),
            Self::Q6K => each(bytes, out, decode_q6_k),
        }
    }

    /// Decodes a range of a tensor's elements, which need not be whole blocks.
    pub(super) fn decode_range(self, tensor: &[u8], elements: Range<usize>, out: &mut [f32]) {
        let size = self.block_elements();
        let bytes_of = |blocks: Range<usize>| {
            &tensor[blocks.start * self.block_bytes()..blocks.end * self.block_bytes()]
        };
        let (first, last) = (elements.start.div_ceil(size), elements.end / size);
        if first > last {
            // All within one block.
            self.decode_part(bytes_of(last..first), elements.start % size, out);
            return;
        }
        let (head, rest) = out.split_at_mut(first * size - elements.start);
        let (whole, tail) = rest.split_at_mut((last - first) * size);
        if !head.is_empty() {
            self.decode_part(bytes_of(first - 1..first), size - head.len(), head);
        }
        self.decode(bytes_of(first..last), whole);
        if !tail.is_empty() {
            self.decode_part(bytes_of(last..last + 1), 0, tail);
        }
    }

    /// Decodes part of one block.
    fn decode_part(self, block: &[u8], start: usize, out: &mut [f32]) {
        let mut all = [0.0; SUPER_BLOCK];
        let all = &mut all[..self.block_elements()];
        self.decode(block, all);
        out.copy_from_slice(&all[start..start + out.len()]);
    }
}

/// Calls `decode` for every block of `B` bytes and its `E` elements.
fn each<const B: usize, const E: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; E]),
) {
    let (blocks, _) = bytes.as_chunks::<B>();
    let (elements, _) = out.as_chunks_mut::<E>();
    for (block, elements) in blocks.iter().zip(elements) {
        decode(block, elements);
    }
}

/// The half at byte `at` of a block.
fn half(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

fn decode_q8_0(block: &[u8; 34], out: &mut [f32; SMALL_BLOCK]) {
    let d = half(block, 0);
    for (out, &byte) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(byte.cast_signed()) * d;
    }
}

fn decode_q4_0(block: &[u8; 18], out: &mut [f32; SMALL_BLOCK]) {
    let d = half(block, 0);
    let value = |nibble: u8| d * (f32::from(nibble) - 8.0);
    for (i, &byte) in block[2..].iter().enumerate() {
        out[i] = value(byte & 15);
        out[i + 16] = value(byte >> 4);
    }
}

/// Scale and offset of the `index`th 32 elements, six bits each, out of the 12 bytes that hold the
/// eight pairs: the first four lie plainly in bytes 0–3 and 4–7; of the others, the low halves are
/// in bytes 8–11, the high two bits above the plain ones.
fn scale_and_offset(packed: &[u8], index: usize) -> (f32, f32) {
    let (scale, offset) = if index < 4 {
        (packed[index] & 63, packed[index + 4] & 63)
    } else {
        let low = packed[index + 4];
        ((low & 15) | (packed[index - 4] >> 6 << 4), (low >> 4) | (packed[index] >> 6 << 4))
    };
    (f32::from(scale), f32::from(offset))
}

fn decode_q4_k(block: &[u8; 144], out: &mut [f32; SUPER_BLOCK]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let (scales, nibbles) = block[4..].split_at(12);
    for (index, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = scale_and_offset(scales, index);
        let (scale, offset) = (d * scale, m * offset);
        for (out, &byte) in out.iter_mut().zip(&nibbles[index / 2 * 32..]) {
            let nibble = if index % 2 == 0 { byte & 15 } else { byte >> 4 };
            *out = scale * f32::from(nibble) - offset;
        }
    }
}

fn decode_q5_k(block: &[u8; 176], out: &mut [f32; SUPER_BLOCK]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let (scales, rest) = block[4..].split_at(12);
    let (fifth_bits, nibbles) = rest.split_at(32);
    for (index, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = scale_and_offset(scales, index);
        let (scale, offset) = (d * scale, m * offset);
        let bytes = fifth_bits.iter().zip(&nibbles[index / 2 * 32..]);
        for (out, (&high, &byte)) in out.iter_mut().zip(bytes) {
            let nibble = if index % 2 == 0 { byte & 15 } else { byte >> 4 };
            let value = nibble | (high >> index & 1) << 4;
            *out = scale * f32::from(value) - offset;
        }
    }
}

fn decode_q6_k(block: &[u8; 210], out: &mut [f32; SUPER_BLOCK]) {
    let (nibbles, rest) = block.split_at(128);
    let (pairs, rest) = rest.split_at(64);
    let (scales, _) = rest.split_at(16);
    let d = half(block, 208);
    for (i, out) in out.iter_mut().enumerate() {
        // Each half of the block: 128 elements from 64 bytes of low and 32 bytes of high bits.
        let (part, within) = (i / 128, i % 128);
        let low = nibbles[part * 64 + within % 64] >> (within / 64 * 4) & 15;
        let high = pairs[part * 32 + within % 32] >> (within / 32 * 2) & 3;
        let scale = d * f32::from(scales[i / 16].cast_signed());
        *out = scale * (f32::from(low | high << 4) - 32.0);
    }
}

/// Copies whole blocks of a tensor of `format` as values in signed bytes and scales; returns `false`, and
/// copies nothing, if the format has none.
pub(super) fn copy_codes(
    format: Format,
    tensor: &[u8],
    elements: Range<usize>,
    codes: (&mut [i8], &mut [f32]),
) -> bool {
    const BYTES: usize = Format::Q8_0.block_bytes();
    const NIBBLES: usize = Format::Q4_0.block_bytes();
    match format {
        Format::Q8_0 => copy_blocks::<BYTES>(tensor, elements, codes, |block, values| {
            for (value, &byte) in values.iter_mut().zip(&block[2..]) {
                *value = byte.cast_signed();
            }
        }),
        Format::Q4_0 => copy_blocks::<NIBBLES>(tensor, elements, codes, |block, values| {
            let value = |nibble: u8| nibble.cast_signed() - 8;
            for (i, &byte) in block[2..].iter().enumerate() {
                values[i] = value(byte & 15);
                values[i + SMALL_BLOCK / 2] = value(byte >> 4);
            }
        }),
        _ => return false,
    }
    true
}

/// Copies blocks of 32 elements that begin with their scale.
fn copy_blocks<const BYTES: usize>(
    tensor: &[u8],
    elements: Range<usize>,
    (values, scales): (&mut [i8], &mut [f32]),
    copy: impl Fn(&[u8; BYTES], &mut [i8; SMALL_BLOCK]),
) {
    let blocks = elements.start / SMALL_BLOCK..elements.end / SMALL_BLOCK;
    assert_eq!(blocks.start * SMALL_BLOCK, elements.start, "whole blocks");
    assert_eq!(blocks.end * SMALL_BLOCK, elements.end, "whole blocks");
    assert_eq!(scales.len(), blocks.len(), "room for the scales");
    let (bytes, _) = tensor[blocks.start * BYTES..blocks.end * BYTES].as_chunks::<BYTES>();
    let (values, _) = values.as_chunks_mut::<SMALL_BLOCK>();
    for ((block, values), scale) in bytes.iter().zip(values).zip(scales) {
        *scale = half(block, 0);
        copy(block, values);
    }
}

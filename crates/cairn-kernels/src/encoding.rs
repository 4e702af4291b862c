//! How a weight is stored: element encodings, layouts, and the plain functions that define them.
//!
//! Letters: `n` outputs, `k` inputs. A weight is `[n][k]` mathematically, whatever its layout.
//!
//! - [`Layout::RowMajor`] is `[n][k]`.
//! - [`Layout::Panel`] is `[n/16][k][16]`; the sixteen lanes are consecutive outputs, and rows are
//!   padded with zeros to a multiple of 16. A product reads it front to back, once.
//!
//! [`Encoding::Q8`] holds signed bytes and one f32 scale for every [`Q8_BLOCK`] consecutive inputs of
//! a row; the weight *is* `f32(byte) * scale`, rounded once. Values come first, in the layout's
//! order; scales follow at the next multiple of 64 bytes: `[n][k/32]` or `[n/16][k/32][16]`, block
//! counts rounded up. [`Encoding::Bf16z`] is described in its module.
//!
//! **Invariant:** [`Weight::value`] is the meaning of the bytes; kernels decode to exactly that.

use std::fmt;

use crate::memory::{ALIGNMENT, Bytes};
use crate::simd::{LANES, bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16};

mod bf16z;

pub(crate) use bf16z::{Bf16z, HALF_COLUMNS};

/// Consecutive inputs of a row that share one [`Encoding::Q8`] scale.
pub const Q8_BLOCK: usize = 32;

/// How one element of a stored weight is written.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// 32-bit float.
    F32,
    /// The high half of a 32-bit float.
    Bf16,
    /// [`Encoding::Bf16`] in twelve bits, without loss. Only in panels.
    Bf16z,
    /// IEEE half: 5 bits of exponent, 10 of mantissa.
    F16,
    /// Signed byte times a scale shared by 32 inputs of a row.
    Q8,
}

impl Encoding {
    /// Every encoding.
    pub const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::Bf16z, Self::F16, Self::Q8];

    /// The layouts that a weight so encoded can have.
    pub fn layouts(self) -> &'static [Layout] {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 | Self::Q8 => &Layout::ALL,
            Self::Bf16z => &[Layout::Panel],
        }
    }

    /// `layout` if a weight so encoded can have it, or else the one that it has.
    pub fn layout_near(self, layout: Layout) -> Layout {
        if self.layouts().contains(&layout) { layout } else { self.layouts()[0] }
    }

    /// Every encoding in each of its layouts.
    pub fn forms() -> Vec<(Self, Layout)> {
        let forms_of = |encoding: Self| encoding.layouts().iter().map(move |&l| (encoding, l));
        Self::ALL.into_iter().flat_map(forms_of).collect()
    }

    /// The encoding in which a weight of `n` outputs and `k` inputs is held that shall be held in
    /// this one: [`Encoding::Bf16`] where [`Encoding::Bf16z`] would not be smaller.
    pub fn for_shape(self, n: usize, k: usize) -> Self {
        let bytes = |encoding| Weight::stored_bytes(encoding, Layout::Panel, n, k);
        match self {
            Self::Bf16z if bytes(Self::Bf16z) >= bytes(Self::Bf16) => Self::Bf16,
            encoding => encoding,
        }
    }

    /// The name used in kernel names and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Bf16z => "bf16z",
            Self::F16 => "f16",
            Self::Q8 => "q8",
        }
    }

    /// The least magnitude that this encoding rounds to infinity; `None` if it has no such.
    pub fn overflow_bound(self) -> Option<f32> {
        match self {
            Self::F32 | Self::Q8 => None,
            // Half a step above the largest number, where the even neighbor is infinity.
            Self::Bf16 | Self::Bf16z => Some(f32::from_bits(0x7f7f_8000)),
            Self::F16 => Some(65520.0),
        }
    }
}

/// Why a weight cannot be encoded as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// Its exponents are too many for [`Encoding::Bf16z`].
    #[error(
        "{found} elements of sixteen rows have none of their fifteen commonest exponents, and \
         there is room for {capacity}"
    )]
    TooManyExponents {
        /// Such elements of the first such rows.
        found: usize,
        /// Elements for which there is room.
        capacity: usize,
    },
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// In which order the elements of a weight lie.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// `[n][k]`.
    RowMajor,
    /// `[n/16][k][16]`, lanes are outputs, rows padded to a multiple of 16.
    Panel,
}

impl Layout {
    /// Both layouts.
    pub const ALL: [Self; 2] = [Self::RowMajor, Self::Panel];

    /// The name used in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::RowMajor => "row_major",
            Self::Panel => "panel",
        }
    }

    /// Rows that are stored for `n` outputs.
    pub fn stored_rows(self, n: usize) -> usize {
        match self {
            Self::RowMajor => n,
            Self::Panel => n.next_multiple_of(LANES),
        }
    }

    /// Where element (`row`, `column`) of a matrix with `columns` columns lies.
    pub(crate) fn index(self, row: usize, column: usize, columns: usize) -> usize {
        match self {
            Self::RowMajor => row * columns + column,
            Self::Panel => (row / LANES * columns + column) * LANES + row % LANES,
        }
    }
}

/// A stored weight of `n` outputs and `k` inputs.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// How an element is written.
    pub encoding: Encoding,
    /// In which order elements lie.
    pub layout: Layout,
    /// Outputs (rows).
    pub n: usize,
    /// Inputs (columns).
    pub k: usize,
    /// The stored bytes, [`Weight::stored_bytes`] of them, aligned to their elements.
    pub bytes: &'a [u8],
}

impl<'a> Weight<'a> {
    /// A plain `[n][k]` f32 weight over a slice.
    pub fn f32(n: usize, k: usize, values_nk: &'a [f32]) -> Self {
        assert_eq!(values_nk.len(), n * k, "an f32 weight holds n · k values");
        let bytes = crate::memory::bytes_of(values_nk);
        Self { encoding: Encoding::F32, layout: Layout::RowMajor, n, k, bytes }
    }

    /// Bytes that a weight of this form takes.
    ///
    /// # Panics
    /// If the encoding does not exist in that layout.
    pub fn stored_bytes(encoding: Encoding, layout: Layout, n: usize, k: usize) -> usize {
        let rows = layout.stored_rows(n);
        assert!(encoding.layouts().contains(&layout), "{encoding} is not stored as {layout:?}");
        match encoding {
            Encoding::F32 => rows * k * 4,
            Encoding::Bf16 | Encoding::F16 => rows * k * 2,
            Encoding::Bf16z => rows / LANES * bf16z::panel_bytes(k),
            Encoding::Q8 => q8_scales_offset(rows, k) + rows * k.div_ceil(Q8_BLOCK) * 4,
        }
    }

    /// Checks that the bytes are as long as the form says.
    ///
    /// # Panics
    /// If they are not.
    pub fn check(&self) {
        let expected = Self::stored_bytes(self.encoding, self.layout, self.n, self.k);
        let found = self.bytes.len();
        assert_eq!(found, expected, "bytes of a {} {}×{} weight", self.encoding, self.n, self.k);
    }

    /// The value of one element: the reference decoder.
    pub fn value(&self, output: usize, input: usize) -> f32 {
        let index = self.layout.index(output, input, self.k);
        match self.encoding {
            Encoding::F32 => self.f32s()[index],
            Encoding::Bf16 => f32_from_bf16(self.u16s()[index]),
            Encoding::Bf16z => f32_from_bf16(self.bf16z().bits(output, input)),
            Encoding::F16 => f32_from_f16(self.u16s()[index]),
            Encoding::Q8 => {
                let blocks = self.k.div_ceil(Q8_BLOCK);
                let scale = self.scales()[self.layout.index(output, input / Q8_BLOCK, blocks)];
                f32::from(self.i8s()[index]) * scale
            }
        }
    }

    /// All values as `[n][k]`.
    pub fn decode(&self, values_nk: &mut [f32]) {
        self.check();
        assert_eq!(values_nk.len(), self.n * self.k, "decoded values");
        for (index, value) in values_nk.iter_mut().enumerate() {
            *value = self.value(index / self.k, index % self.k);
        }
    }

    pub(crate) fn f32s(&self) -> &'a [f32] {
        Bytes::new(self.bytes).f32s()
    }

    pub(crate) fn u16s(&self) -> &'a [u16] {
        Bytes::new(self.bytes).u16s()
    }

    /// The panels of a [`Encoding::Bf16z`] weight.
    fn bf16z(&self) -> Bf16z<'a> {
        Bf16z::new(self.bytes, self.k)
    }

    /// The bytes of a [`Encoding::Q8`] weight.
    pub(crate) fn i8s(&self) -> &'a [i8] {
        Bytes::new(&self.bytes[..self.layout.stored_rows(self.n) * self.k]).i8s()
    }

    /// The scales of a [`Encoding::Q8`] weight.
    pub(crate) fn scales(&self) -> &'a [f32] {
        let offset = q8_scales_offset(self.layout.stored_rows(self.n), self.k);
        Bytes::new(&self.bytes[offset..]).f32s()
    }
}

fn q8_scales_offset(rows: usize, k: usize) -> usize {
    (rows * k).next_multiple_of(ALIGNMENT)
}

/// Writes `values_nk` (`[n][k]`) in the given form, as [`try_encode`] does.
///
/// # Panics
/// If the lengths do not match the form, or the weight cannot be so encoded.
pub fn encode(
    form: (Encoding, Layout),
    (n, k): (usize, usize),
    values_nk: &[f32],
    bytes: &mut [u8],
) {
    if let Err(error) = try_encode(form, (n, k), values_nk, bytes) {
        panic!("a {n}×{k} weight as {}: {error}", form.0);
    }
}

/// Writes `values_nk` (`[n][k]`) in the given form; padding becomes zero.
///
/// bf16, bf16z and f16 round to nearest, ties to even; what is beyond their range becomes infinite. Q8
/// takes the largest magnitude of a block to ±127 and rounds to nearest, ties to even; a block of zeros
/// has scale 0.
///
/// # Errors
/// A weight whose exponents are too many for [`Encoding::Bf16z`].
///
/// # Panics
/// If the lengths do not match the form.
pub fn try_encode(
    (encoding, layout): (Encoding, Layout),
    (n, k): (usize, usize),
    values_nk: &[f32],
    bytes: &mut [u8],
) -> Result<(), EncodeError> {
    assert_eq!(values_nk.len(), n * k, "values of the weight");
    assert_eq!(bytes.len(), Weight::stored_bytes(encoding, layout, n, k), "bytes of the weight");
    bytes.fill(0);
    match encoding {
        Encoding::F32 => write_elements(layout, k, values_nk, bytes, f32::to_le_bytes),
        Encoding::Bf16 => {
            write_elements(layout, k, values_nk, bytes, |x| bf16_from_f32(x).to_le_bytes());
        }
        Encoding::Bf16z => bf16z::write_panels(k, values_nk, bf16_from_f32, bytes)?,
        Encoding::F16 => {
            write_elements(layout, k, values_nk, bytes, |x| f16_from_f32(x).to_le_bytes());
        }
        Encoding::Q8 => encode_q8_rows(layout, (n, k), 0, values_nk, bytes),
    }
    Ok(())
}

/// Writes a weight from its own bits, `[n][k]`: bf16 or f16 in the encodings that hold them, so that no
/// value changes.
///
/// # Errors
/// A weight whose exponents are too many for [`Encoding::Bf16z`].
///
/// # Panics
/// If the lengths do not match the form, or the encoding holds no such bits.
pub fn store_bits(
    (encoding, layout): (Encoding, Layout),
    (n, k): (usize, usize),
    bits_nk: &[u16],
    bytes: &mut [u8],
) -> Result<(), EncodeError> {
    assert_eq!(bits_nk.len(), n * k, "elements of the weight");
    assert_eq!(bytes.len(), Weight::stored_bytes(encoding, layout, n, k), "bytes of the weight");
    bytes.fill(0);
    match encoding {
        Encoding::Bf16 | Encoding::F16 => {
            write_elements(layout, k, bits_nk, bytes, u16::to_le_bytes);
            Ok(())
        }
        Encoding::Bf16z => bf16z::write_panels(k, bits_nk, |bits| bits, bytes),
        Encoding::F32 | Encoding::Q8 => panic!("{encoding} does not hold sixteen bits an element"),
    }
}

fn write_elements<const B: usize, T: Copy>(
    layout: Layout,
    k: usize,
    values_nk: &[T],
    bytes: &mut [u8],
    element: impl Fn(T) -> [u8; B],
) {
    let (elements, _) = bytes.as_chunks_mut::<B>();
    match layout {
        Layout::RowMajor => {
            for (to, &value) in elements.iter_mut().zip(values_nk) {
                *to = element(value);
            }
        }
        Layout::Panel => {
            let panels = elements.chunks_exact_mut((k * LANES).max(1));
            for (panel, rows_k) in panels.zip(values_nk.chunks((k * LANES).max(1))) {
                for (lane, row) in rows_k.chunks_exact(k).enumerate() {
                    for (column, &value) in row.iter().enumerate() {
                        panel[column * LANES + lane] = element(value);
                    }
                }
            }
        }
    }
}

/// Writes rows of a [`Encoding::Q8`] weight of `n` rows as [`encode`] does, from row `first` on, and
/// leaves the others as they are: values and scales of a row lie far apart, so that a part of the
/// weight is no part of its bytes.
///
/// # Panics
/// If the weight has no such rows, or the lengths do not match its form.
#[expect(clippy::cast_possible_truncation, reason = "the quotient is clamped to ±127")]
pub fn encode_q8_rows(
    layout: Layout,
    (n, k): (usize, usize),
    first: usize,
    rows_nk: &[f32],
    bytes: &mut [u8],
) {
    let expected = Weight::stored_bytes(Encoding::Q8, layout, n, k);
    assert_eq!(bytes.len(), expected, "bytes of the weight");
    let (values, scales) = bytes.split_at_mut(q8_scales_offset(layout.stored_rows(n), k));
    let (scales, _) = scales.as_chunks_mut::<4>();
    let blocks = k.div_ceil(Q8_BLOCK);
    for (row, row_k) in (first..n).zip(rows_nk.chunks_exact(k.max(1))) {
        for (block, from) in row_k.chunks(Q8_BLOCK).enumerate() {
            let largest = from.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            let scale = largest / 127.0;
            scales[layout.index(row, block, blocks)] = scale.to_le_bytes();
            for (i, &value) in from.iter().enumerate() {
                let steps = if scale > 0.0 { (value / scale).round_ties_even() } else { 0.0 };
                let byte = steps.clamp(-127.0, 127.0) as i8;
                values[layout.index(row, block * Q8_BLOCK + i, k)] = byte.cast_unsigned();
            }
        }
    }
}

/// Writes a [`Encoding::Q8`] weight from its own bytes and scales: `[n][k]` and `[n][k/32]`.
///
/// # Panics
/// If the lengths do not match the form.
pub fn store_q8(
    layout: Layout,
    (n, k): (usize, usize),
    (values_nk, scales): (&[i8], &[f32]),
    bytes: &mut [u8],
) {
    let blocks = k.div_ceil(Q8_BLOCK);
    assert_eq!(values_nk.len(), n * k, "values of the weight");
    assert_eq!(scales.len(), n * blocks, "scales of the weight");
    assert_eq!(
        bytes.len(),
        Weight::stored_bytes(Encoding::Q8, layout, n, k),
        "bytes of the weight"
    );
    bytes.fill(0);
    let (stored, stored_scales) = bytes.split_at_mut(q8_scales_offset(layout.stored_rows(n), k));
    let (stored_scales, _) = stored_scales.as_chunks_mut::<4>();
    for (index, value) in values_nk.iter().enumerate() {
        stored[layout.index(index / k, index % k, k)] = value.cast_unsigned();
    }
    for (index, scale) in scales.iter().enumerate() {
        stored_scales[layout.index(index / blocks, index % blocks, blocks)] = scale.to_le_bytes();
    }
}

/// Copies a stored weight into another layout, element for element: no value changes.
///
/// # Panics
/// If the lengths do not match the forms.
pub fn convert_layout(from: Weight<'_>, layout: Layout, bytes: &mut [u8]) {
    from.check();
    let Weight { encoding, n, k, .. } = from;
    assert_eq!(bytes.len(), Weight::stored_bytes(encoding, layout, n, k), "bytes of the weight");
    if from.layout == layout {
        bytes.copy_from_slice(from.bytes);
        return;
    }
    bytes.fill(0);
    let copy = |columns: usize, element: usize, source: &[u8], target: &mut [u8]| {
        for index in 0..n * columns {
            let (row, column) = (index / columns, index % columns);
            let start = from.layout.index(row, column, columns) * element;
            let end = layout.index(row, column, columns) * element;
            target[end..end + element].copy_from_slice(&source[start..start + element]);
        }
    };
    match encoding {
        Encoding::F32 => copy(k, 4, from.bytes, bytes),
        Encoding::Bf16 | Encoding::F16 => copy(k, 2, from.bytes, bytes),
        Encoding::Bf16z => unreachable!("bf16z has one layout"),
        Encoding::Q8 => {
            let (values, scales) =
                from.bytes.split_at(q8_scales_offset(from.layout.stored_rows(n), k));
            let (new_values, new_scales) =
                bytes.split_at_mut(q8_scales_offset(layout.stored_rows(n), k));
            copy(k, 1, values, new_values);
            copy(k.div_ceil(Q8_BLOCK), 4, scales, new_scales);
        }
    }
}

#[cfg(test)]
mod tests;

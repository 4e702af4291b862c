//! How a weight is stored: element encodings, layouts, and the plain functions that define them.
//!
//! Letters: `n` outputs, `k` inputs. A weight is `[n][k]` mathematically, whatever its layout.
//!
//! - [`Layout::RowMajor`] is `[n][k]`.
//! - [`Layout::Panel`] is `[n/16][k][16]`; the sixteen lanes are consecutive outputs, and rows are
//!   padded with zeros to a multiple of 16. A product reads it front to back, once.
//!
//! The narrower ones lie in panels only and are described in their modules: [`Encoding::Bf16z`] in
//! `bf16z`, those of codes that share scales in `grouped`; `code_panels` writes the commonest of these
//! sixteen rows at once.
//!
//! **Invariant:** [`Weight::value`] is the meaning of the bytes; kernels decode to exactly that.

use std::fmt;
use std::ops::Range;

use crate::isa::{Isa, Simd};
use crate::memory::Bytes;
use crate::simd::{LANES, bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16};

mod bf16z;
mod code_panels;
mod grouped;

pub(crate) use bf16z::{Bf16z, HALF_COLUMNS};
use grouped::Format;
pub(crate) use grouped::{Code, E2M1, E4M3_UNBIAS, Grouped, NF4, PART_BYTES, Scale, e8m0};

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
    /// Signed byte times an f16 scale shared by 32 inputs of a row.
    Q8,
    /// Four bits, -8 to 7, times an f16 scale shared by 32 inputs of a row.
    Q4,
    /// Four bits that number quantiles of the normal distribution, times an f32 scale shared by 64 inputs.
    Nf4,
    /// Eight-bit float (E4M3) times an f32 scale shared by 128 inputs of a row.
    Fp8,
    /// Four-bit float (E2M1) times a power of two shared by 32 inputs of a row: MXFP4.
    Fp4,
}

impl Encoding {
    /// Every encoding.
    pub const ALL: [Self; 9] = [
        Self::F32,
        Self::Bf16,
        Self::Bf16z,
        Self::F16,
        Self::Q8,
        Self::Q4,
        Self::Nf4,
        Self::Fp8,
        Self::Fp4,
    ];

    /// The layouts that a weight so encoded can have.
    pub fn layouts(self) -> &'static [Layout] {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 => &Layout::ALL,
            Self::Bf16z | Self::Q8 | Self::Q4 | Self::Nf4 | Self::Fp8 | Self::Fp4 => {
                &[Layout::Panel]
            }
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
            Self::Q4 => "q4",
            Self::Nf4 => "nf4",
            Self::Fp8 => "fp8",
            Self::Fp4 => "fp4",
        }
    }

    /// How codes that share scales are written.
    ///
    /// # Panics
    /// If this is no such encoding.
    fn format(self) -> Format {
        Format::of(self).expect("an encoding of codes that share scales")
    }

    /// The least magnitude that this encoding rounds to infinity; `None` if it has no such.
    pub fn overflow_bound(self) -> Option<f32> {
        match self {
            Self::F32 | Self::Nf4 | Self::Fp8 | Self::Fp4 => None,
            // Half a step above the largest number, where the even neighbor is infinity.
            Self::Bf16 | Self::Bf16z => Some(f32::from_bits(0x7f7f_8000)),
            Self::F16 => Some(65520.0),
            // Where the scale would become infinite: it is rounded up, and to the nearest.
            Self::Q8 => Some(8_319_008.5),
            Self::Q4 => Some(524_160.0),
        }
    }
}

/// Why a weight cannot be encoded as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// Some are infinite or no numbers, which codes that share a scale cannot be.
    #[error("{found} elements of {found_among} are infinite or no numbers")]
    NotFinite {
        /// Such elements.
        found: usize,
        /// Elements looked at.
        found_among: usize,
    },
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

/// A weight in [`Encoding::Bf16z`] one of whose lists of exceptions contradicts its codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the list of exceptions of rows {first_row} to {last_row} is damaged: {problem}")]
pub struct DamagedList {
    /// First row of the panel.
    pub first_row: usize,
    /// Its last row.
    pub last_row: usize,
    /// What is wrong.
    pub problem: ListProblem,
}

/// What is wrong with a list of exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ListProblem {
    /// Its positions do not ascend, or something follows its end.
    #[error("its positions do not ascend")]
    Order,
    /// It names an element that does not exist.
    #[error("it names column {column} of {columns}")]
    Column {
        /// The column.
        column: usize,
        /// Columns of the weight.
        columns: usize,
    },
    /// It names an element that has an exponent of its own.
    #[error("it names an element of column {column} that is none")]
    Element {
        /// The column.
        column: usize,
    },
    /// It does not name all of them.
    #[error("it names {listed} of {found}")]
    Count {
        /// Elements that it names.
        listed: usize,
        /// Exceptions by their codes.
        found: usize,
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
            Encoding::Q8 | Encoding::Q4 | Encoding::Nf4 | Encoding::Fp8 | Encoding::Fp4 => {
                rows / LANES * encoding.format().panel_bytes(k)
            }
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

    /// Checks panels for what could be read in more than one way: whether a list of exceptions names what
    /// the codes say, and nothing else. Encodings without such lists have nothing of the kind.
    ///
    /// # Errors
    /// [`DamagedList`] of the first such panel.
    ///
    /// # Panics
    /// If the bytes are not as many as the form says, or the weight lacks one of the panels.
    pub fn check_lists(&self, panels: Range<usize>) -> Result<(), DamagedList> {
        if self.encoding != Encoding::Bf16z {
            return Ok(());
        }
        self.check();
        assert!(panels.end <= self.n.div_ceil(LANES), "panels {panels:?} of {} rows", self.n);
        let stored = self.bf16z();
        for panel in panels {
            let first_row = panel * LANES;
            let last_row = self.n.min(first_row + LANES) - 1;
            let damaged = |problem| DamagedList { first_row, last_row, problem };
            stored.check_list(panel, self.k).map_err(damaged)?;
        }
        Ok(())
    }

    /// The value of one element: the reference decoder.
    pub fn value(&self, output: usize, input: usize) -> f32 {
        let index = self.layout.index(output, input, self.k);
        match self.encoding {
            Encoding::F32 => self.f32s()[index],
            Encoding::Bf16 => f32_from_bf16(self.u16s()[index]),
            Encoding::Bf16z => f32_from_bf16(self.bf16z().bits(output, input)),
            Encoding::F16 => f32_from_f16(self.u16s()[index]),
            Encoding::Q8 | Encoding::Q4 | Encoding::Nf4 | Encoding::Fp8 | Encoding::Fp4 => {
                let (value, scale) = self.code_and_scale(output, input);
                value * scale
            }
        }
    }

    /// What the code of one element stands for, and its scale.
    ///
    /// # Panics
    /// If the encoding has no such.
    pub fn code_and_scale(&self, output: usize, input: usize) -> (f32, f32) {
        self.encoding.format().parts(self.bytes, self.k, (output, input))
    }

    /// The panels of a weight whose codes share scales.
    ///
    /// # Panics
    /// If the encoding is no such.
    pub(crate) fn grouped(&self) -> Grouped<'a> {
        Grouped::new(self.encoding.format(), self.bytes, self.k)
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
/// bf16, bf16z and f16 round to nearest, ties to even; what is beyond their range becomes infinite. How
/// codes and scales are chosen and how far values move is said in the module `grouped`.
///
/// # Errors
/// A weight whose exponents are too many for [`Encoding::Bf16z`], or with values that are not finite where
/// codes share a scale.
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
        Encoding::Q8 | Encoding::Q4 | Encoding::Nf4 | Encoding::Fp8 | Encoding::Fp4 => {
            let found = values_nk.iter().filter(|x| !x.is_finite()).count();
            if found > 0 {
                return Err(EncodeError::NotFinite { found, found_among: values_nk.len() });
            }
            match encoding {
                Encoding::Q8 | Encoding::Q4 => {
                    // The bytes do not depend on the instructions: the best there are.
                    let simd = Simd::new(Isa::best());
                    code_panels::write(simd, encoding.format(), k, values_nk, bytes);
                }
                _ => encoding.format().write(k, values_nk, bytes),
            }
        }
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
        Encoding::F32
        | Encoding::Q8
        | Encoding::Q4
        | Encoding::Nf4
        | Encoding::Fp8
        | Encoding::Fp4 => panic!("{encoding} does not hold sixteen bits an element"),
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

/// Writes a [`Encoding::Q8`] weight from its own bytes and scales: `[n][k]` and `[n][k/32]`. Where a scale
/// is no finite f16 number it writes nothing and returns `false`: no value may change.
///
/// # Panics
/// If the lengths do not match the form.
pub fn store_q8(
    shape: (usize, usize),
    (values_nk, scales): (&[i8], &[f32]),
    bytes: &mut [u8],
) -> bool {
    store_values(Encoding::Q8, shape, (values_nk, scales), bytes)
}

/// As [`store_q8`], of a [`Encoding::Q4`] weight: values from -8 to 7.
///
/// # Panics
/// As [`store_q8`].
pub fn store_q4(
    shape: (usize, usize),
    (values_nk, scales): (&[i8], &[f32]),
    bytes: &mut [u8],
) -> bool {
    store_values(Encoding::Q4, shape, (values_nk, scales), bytes)
}

fn store_values(
    encoding: Encoding,
    (n, k): (usize, usize),
    (values_nk, scales): (&[i8], &[f32]),
    bytes: &mut [u8],
) -> bool {
    let blocks = k.div_ceil(Q8_BLOCK);
    assert_eq!(values_nk.len(), n * k, "values of the weight");
    assert_eq!(scales.len(), n * blocks, "scales of the weight");
    let expected = Weight::stored_bytes(encoding, Layout::Panel, n, k);
    assert_eq!(bytes.len(), expected, "bytes of the weight");
    let is_f16 = |x: f32| x.is_finite() && f32_from_f16(f16_from_f32(x)).to_bits() == x.to_bits();
    if !scales.iter().copied().all(is_f16) {
        return false;
    }
    bytes.fill(0);
    let format = encoding.format();
    assert_eq!(format.group, Q8_BLOCK, "values that share a scale");
    let (zero, mask) = if format.is_nibble() { (8, 15) } else { (0x80, 0xff) };
    let mut codes = Vec::with_capacity(Q8_BLOCK);
    for (row, values) in values_nk.chunks_exact(k.max(1)).enumerate() {
        let panel = &mut bytes[row / LANES * format.panel_bytes(k)..];
        for (block, values) in values.chunks(Q8_BLOCK).enumerate() {
            codes.clear();
            codes.extend(values.iter().map(|v| v.cast_unsigned().wrapping_add(zero) & mask));
            let scale = scales[row * blocks + block];
            format.write_group(k, panel, (block, row % LANES), (&codes, scale));
        }
    }
    true
}

/// Reads the bytes and scales of rows of a [`Encoding::Q8`] weight: `[n][k]` and `[n][k/32]`.
///
/// # Panics
/// If the lengths do not match the weight, or it is encoded otherwise.
#[expect(clippy::cast_possible_truncation, reason = "a code of eight bits less 128")]
pub fn load_q8(weight: Weight<'_>, values_nk: &mut [i8], scales: &mut [f32]) {
    let Weight { n, k, .. } = weight;
    let blocks = k.div_ceil(Q8_BLOCK);
    assert_eq!(weight.encoding, Encoding::Q8, "the encoding of the weight");
    assert_eq!((values_nk.len(), scales.len()), (n * k, n * blocks), "values and scales");
    for (index, to) in values_nk.iter_mut().enumerate() {
        let (value, scale) = weight.code_and_scale(index / k, index % k);
        *to = value as i8;
        scales[index / k * blocks + index % k / Q8_BLOCK] = scale;
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
        Encoding::Bf16z
        | Encoding::Q8
        | Encoding::Q4
        | Encoding::Nf4
        | Encoding::Fp8
        | Encoding::Fp4 => unreachable!("{encoding} has one layout"),
    }
}

#[cfg(test)]
mod tests;

//! [`Encoding::Bf16z`](super::Encoding::Bf16z): bf16 without loss, in twelve bits and a little.
//!
//! Trained weights use few exponents. Each panel (16 outputs) has a table of its fifteen commonest;
//! an element is its sign and mantissa in a byte and a four-bit code for its exponent. Code 15 says
//! that the exponent is not in the table: the element is an *exception*, its bits lie in a list.
//!
//! Only in panels. `k` is padded to a multiple of 8, columns come in blocks of 8. A panel:
//!
//! ```text
//! blocks     [k/8]       192 bytes: 64 of columns 0–3, 64 of columns 4–7, 32 codes for each half
//! table                  32 bytes: exponent >> 1 by code, then (exponent & 1) << 7 by code
//! positions  [capacity]  u32: column · 16 + lane, ascending, 2³² − 1 where there is none
//! values     [capacity]  u16: the bf16 bits
//! ```
//!
//! It is padded to a multiple of 64 bytes. Within a half, column `c` of lane `j` is byte
//! `p = (j / 4) · 16 + (c / 2) · 8 + (j % 4) · 2 + c % 2`, where interleaving with the exponents'
//! bytes leaves it in lane `j`; its code is the low half of code byte `p` for `p < 32`, else the high
//! half of byte `p − 32`.
//!
//! The capacity is one element in 128 and 8 more, so that the size is known from the shape; products do
//! not read what is not used of it. Rows of two scales 2¹¹ apart fit into one panel, normal numbers being
//! beyond seven exponents once in 128. A weight with a panel of more exceptions cannot be so encoded.

use super::{EncodeError, ListProblem};
use crate::memory::{ALIGNMENT, Bytes, BytesMut};
use crate::simd::LANES;

/// Columns of a block.
const BLOCK_COLUMNS: usize = 8;
/// Bytes of a block.
const BLOCK_BYTES: usize = 192;
/// Columns of half a block, which kernels decode at once.
pub(crate) const HALF_COLUMNS: usize = 4;
/// Bytes of a half's signs and mantissas.
const HALF_BYTES: usize = HALF_COLUMNS * LANES;
/// Bytes of a half's codes.
const HALF_CODES: usize = HALF_BYTES / 2;
/// Where a block's codes start.
const CODES_START: usize = 2 * HALF_BYTES;
/// Bytes of a panel's table.
const TABLE_BYTES: usize = 32;
/// Exponents with a code of their own.
const EXPONENTS: usize = 15;
/// The code of an exception.
const EXCEPTION: u8 = 15;
/// Elements for which there is room for one exception.
const ELEMENTS_AN_EXCEPTION: usize = 128;
/// Exceptions of the smallest panel.
const CAPACITY_MIN: usize = 8;
/// Positions in the cache line of the table.
const TABLE_LINE_POSITIONS: usize = (64 - TABLE_BYTES) / 4;
/// The position of no exception.
const NOWHERE: u32 = u32::MAX;

/// Where the parts of a panel lie in its bytes.
#[derive(Clone, Copy, Debug)]
struct Parts {
    table: usize,
    positions: usize,
    values: usize,
    capacity: usize,
    end: usize,
}

impl Parts {
    const fn new(k: usize) -> Self {
        let blocks = k.div_ceil(BLOCK_COLUMNS);
        let elements = blocks * BLOCK_COLUMNS * LANES;
        let capacity = elements.div_ceil(ELEMENTS_AN_EXCEPTION) + CAPACITY_MIN;
        let table = blocks * BLOCK_BYTES;
        let positions = table + TABLE_BYTES;
        let values = positions + 4 * capacity;
        let end = (values + 2 * capacity).next_multiple_of(ALIGNMENT);
        Self { table, positions, values, capacity, end }
    }
}

/// Bytes of a panel of a weight with `k` inputs.
pub(super) const fn panel_bytes(k: usize) -> usize {
    Parts::new(k).end
}

/// Byte of column `column % 4` of a lane within half a block.
fn place_in_half(column: usize, lane: usize) -> usize {
    let c = column % HALF_COLUMNS;
    (lane / 4) * 16 + (c / 2) * 8 + (lane % 4) * 2 + c % 2
}

/// A stored weight, from some panel on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16z<'a> {
    bytes: &'a [u8],
    parts: Parts,
}

impl<'a> Bf16z<'a> {
    /// The weight of `k` inputs whose panels are in `bytes`.
    ///
    /// # Panics
    /// If they do not begin at a multiple of four.
    pub(crate) fn new(bytes: &'a [u8], k: usize) -> Self {
        assert!(bytes.as_ptr().cast::<u32>().is_aligned(), "panels that begin between two words");
        Self { bytes, parts: Parts::new(k) }
    }

    /// Where the block of a column starts in its panel.
    pub(crate) fn column_bytes(column: usize) -> usize {
        column / BLOCK_COLUMNS * BLOCK_BYTES
    }

    /// Where columns `column` to `column + 3`, a multiple of 4, lie: the start of their signs and
    /// mantissas, and that of their codes.
    #[inline(always)]
    pub(crate) fn half(&self, panel: usize, column: usize) -> (*const u8, *const u8) {
        let block = panel * self.parts.end + Self::column_bytes(column);
        let half = column / HALF_COLUMNS % 2;
        let start = self.bytes.as_ptr().wrapping_add(block);
        (start.wrapping_add(half * HALF_BYTES), start.wrapping_add(CODES_START + half * HALF_CODES))
    }

    /// The table of a panel.
    #[inline(always)]
    pub(crate) fn table(&self, panel: usize) -> *const [u8; TABLE_BYTES] {
        self.bytes.as_ptr().wrapping_add(panel * self.parts.end + self.parts.table).cast()
    }

    /// The exceptions of a panel: positions, ascending, and bits.
    #[inline(always)]
    fn exceptions(&self, panel: usize) -> (&'a [u32], &'a [u16]) {
        let Parts { positions, values, capacity, end, .. } = self.parts;
        let panel = &self.bytes[panel * end..(panel + 1) * end];
        (
            Bytes::new(&panel[positions..][..4 * capacity]).u32s(),
            Bytes::new(&panel[values..][..2 * capacity]).u16s(),
        )
    }

    /// The column of a panel's `index`-th exception, `usize::MAX` past the last.
    #[inline(always)]
    pub(crate) fn exception_column(&self, panel: usize, index: usize) -> usize {
        if index >= self.parts.capacity {
            return usize::MAX;
        }
        let first = panel * self.parts.end + self.parts.positions;
        let positions = self.bytes.as_ptr().wrapping_add(first).cast::<u32>();
        debug_assert!((panel + 1) * self.parts.end <= self.bytes.len(), "a panel past the weight");
        // SAFETY: the caller asks for panels of the weight, each of which has that many positions; `new`
        // has asked for their alignment, and parts begin at multiples of four.
        let position = unsafe { *positions.wrapping_add(index) };
        if position == NOWHERE { usize::MAX } else { position as usize / LANES }
    }

    /// Where a panel's table and the bits of its first exceptions lie.
    #[inline(always)]
    pub(crate) fn ends(&self, panel: usize) -> [*const u8; 2] {
        let panel = self.bytes.as_ptr().wrapping_add(panel * self.parts.end);
        [panel.wrapping_add(self.parts.table), panel.wrapping_add(self.parts.values)]
    }

    /// How many exceptions of a panel lie before a column.
    pub(crate) fn exceptions_before(&self, panel: usize, column: usize) -> usize {
        let (positions, _) = self.exceptions(panel);
        let is_before = |&position: &u32| (position as usize) < column * LANES;
        // The first positions lie in the table's cache line, others in cold memory.
        let (near, far) = positions.split_at(positions.len().min(TABLE_LINE_POSITIONS));
        match near.iter().position(|position| !is_before(position)) {
            Some(index) => index,
            None => near.len() + far.partition_point(is_before),
        }
    }

    /// The exceptions among four columns, the first of which is the panel's `index`-th: the column of the
    /// four, the lane, the bits.
    #[inline(always)]
    pub(crate) fn exceptions_from(
        &self,
        panel: usize,
        column: usize,
        index: usize,
    ) -> impl Iterator<Item = (usize, usize, u16)> + 'a {
        let (positions, values) = self.exceptions(panel);
        let found = positions[index..].iter().zip(&values[index..]);
        found.map_while(move |(&position, &bits)| {
            // In a damaged list, a position may lie before the columns: that ends it, too.
            let place = (position as usize).wrapping_sub(column * LANES);
            (place < HALF_COLUMNS * LANES).then_some((place / LANES, place % LANES, bits))
        })
    }

    /// The code of an element of a panel.
    fn code(panel: &[u8], lane: usize, column: usize) -> u8 {
        let codes = &panel[Self::column_bytes(column)..][CODES_START..BLOCK_BYTES];
        let place = place_in_half(column, lane);
        let both = codes[column / HALF_COLUMNS % 2 * HALF_CODES + place % HALF_CODES];
        if place < HALF_CODES { both & 15 } else { both >> 4 }
    }

    /// Whether the list of a panel of `k` columns names its exceptions, ascending, and nothing else.
    /// Then all readers agree: those that go by the codes and those that go by the list.
    pub(super) fn check_list(&self, panel: usize, k: usize) -> Result<(), ListProblem> {
        let (positions, _) = self.exceptions(panel);
        let bytes = &self.bytes[panel * self.parts.end..][..self.parts.end];
        let listed = positions.partition_point(|&position| position != NOWHERE);
        let (named, others) = positions.split_at(listed);
        let ascends = named.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascends || others.iter().any(|&position| position != NOWHERE) {
            return Err(ListProblem::Order);
        }
        for &position in named {
            let (column, lane) = (position as usize / LANES, position as usize % LANES);
            if column >= k {
                return Err(ListProblem::Column { column, columns: k });
            }
            if Self::code(bytes, lane, column) != EXCEPTION {
                return Err(ListProblem::Element { column });
            }
        }
        let (blocks, _) = bytes[..self.parts.table].as_chunks::<BLOCK_BYTES>();
        let found = blocks.iter().map(exceptions_of_block).sum();
        if found != listed { Err(ListProblem::Count { listed, found }) } else { Ok(()) }
    }

    /// The bf16 bits of one element: the definition.
    pub(crate) fn bits(&self, row: usize, column: usize) -> u16 {
        let (panel, lane) = (row / LANES, row % LANES);
        let bytes = &self.bytes[panel * self.parts.end..];
        let block = &bytes[Self::column_bytes(column)..][..BLOCK_BYTES];
        let half = column / HALF_COLUMNS % 2;
        let sign_and_mantissa = block[half * HALF_BYTES + place_in_half(column, lane)];
        let code = usize::from(Self::code(bytes, lane, column));
        if code == usize::from(EXCEPTION) {
            let (positions, values) = self.exceptions(panel);
            let position = column * LANES + lane;
            // A list without the element is a damaged weight; kernels then read exponent 0, too.
            if let Ok(i) = positions.binary_search_by_key(&position, |&p| p as usize) {
                return values[i];
            }
        }
        let table = &bytes[self.parts.table..][..TABLE_BYTES];
        let high = (sign_and_mantissa & 0x80) | table[code];
        let low = (sign_and_mantissa & 0x7f) | table[LANES + code];
        u16::from_be_bytes([high, low])
    }
}

/// How many codes of a block are those of exceptions: half bytes all of whose bits are set.
fn exceptions_of_block(block: &[u8; BLOCK_BYTES]) -> usize {
    let (words, _) = block[CODES_START..].as_chunks::<8>();
    let mut full = [0_u64; (BLOCK_BYTES - CODES_START) / 8];
    for (full, word) in full.iter_mut().zip(words) {
        let word = u64::from_le_bytes(*word);
        let pairs = word & word >> 1;
        *full = pairs & pairs >> 2 & 0x1111_1111_1111_1111;
    }
    // Nearly every block has none.
    if full.iter().fold(0, |any, full| any | full) == 0 {
        return 0;
    }
    full.iter().map(|full| full.count_ones() as usize).sum()
}

/// Writes whole panels from rows of bf16 bits; `bytes` are theirs.
pub(super) fn write_panels<T: Copy>(
    k: usize,
    rows_nk: &[T],
    bits: impl Fn(T) -> u16,
    bytes: &mut [u8],
) -> Result<(), EncodeError> {
    let parts = Parts::new(k);
    let panels = rows_nk.chunks((LANES * k).max(1)).zip(bytes.chunks_exact_mut(parts.end));
    for (rows_k, panel) in panels {
        let rows_k: Vec<u16> = rows_k.iter().map(|&value| bits(value)).collect();
        write_panel(&parts, k, &rows_k, panel)?;
    }
    Ok(())
}

fn write_panel(
    parts: &Parts,
    k: usize,
    rows_k: &[u16],
    panel: &mut [u8],
) -> Result<(), EncodeError> {
    let mut codes = [EXCEPTION; 256];
    for (code, exponent) in (0_u8..).zip(common_exponents(rows_k)) {
        codes[usize::from(exponent)] = code;
        let table = &mut panel[parts.table..][..TABLE_BYTES];
        table[usize::from(code)] = exponent >> 1;
        table[LANES + usize::from(code)] = exponent << 7;
    }
    let mut exceptions = Vec::new();
    for (lane, row) in rows_k.chunks_exact(k).enumerate() {
        for (column, &value) in row.iter().enumerate() {
            let block = &mut panel[Bf16z::column_bytes(column)..][..BLOCK_BYTES];
            let half = column / HALF_COLUMNS % 2;
            let [high, low] = value.to_be_bytes();
            let place = place_in_half(column, lane);
            block[half * HALF_BYTES + place] = (high & 0x80) | (low & 0x7f);
            let code = codes[usize::from(value >> 7 & 0xff)];
            let shift = if place < HALF_CODES { 0 } else { 4 };
            block[CODES_START + half * HALF_CODES + place % HALF_CODES] |= code << shift;
            if code == EXCEPTION {
                exceptions.push((column * LANES + lane, value));
            }
        }
    }
    write_exceptions(parts, exceptions, panel)
}

#[expect(clippy::cast_possible_truncation, reason = "a panel has fewer than 2³² elements")]
fn write_exceptions(
    parts: &Parts,
    mut exceptions: Vec<(usize, u16)>,
    panel: &mut [u8],
) -> Result<(), EncodeError> {
    let &Parts { positions, values, capacity, .. } = parts;
    if exceptions.len() > capacity {
        return Err(EncodeError::TooManyExponents { found: exceptions.len(), capacity });
    }
    exceptions.sort_unstable();
    let positions = BytesMut::new(&mut panel[positions..][..4 * capacity]).u32s();
    positions.fill(NOWHERE);
    for (to, &(position, _)) in positions.iter_mut().zip(&exceptions) {
        *to = position as u32;
    }
    let values = BytesMut::new(&mut panel[values..][..2 * capacity]).u16s();
    for (to, &(_, value)) in values.iter_mut().zip(&exceptions) {
        *to = value;
    }
    Ok(())
}

/// The fifteen commonest exponents, the commonest first, of equals the smaller first.
fn common_exponents(bits: &[u16]) -> [u8; EXPONENTS] {
    let mut counts = [0_u32; 256];
    for value in bits {
        counts[usize::from(value >> 7 & 0xff)] += 1;
    }
    let mut exponents: Vec<u8> = (0..=255).collect();
    exponents.sort_by_key(|&exponent| std::cmp::Reverse(counts[usize::from(exponent)]));
    std::array::from_fn(|code| exponents[code])
}

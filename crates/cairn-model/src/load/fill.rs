//! The stored bytes of a session's weights, one weight after the other, its pieces on all threads.

use std::ops::Range;
use std::sync::Mutex;

use cairn_kernels::encoding::{Q8_BLOCK, store_bits, store_q4, store_q8, try_encode};
use cairn_kernels::memory::BytesMut;
use cairn_kernels::{Cpu, Encoding, Layout, Weight};
use cairn_program::{Class, Session, ValueType};

use super::{LoadError, TensorSource};
use crate::names::{Placement, TensorMap, TensorSlice};

/// Elements that a thread encodes at a time, about.
const ELEMENTS_AT_A_TIME: usize = 1 << 16;
/// Rows of a piece are a multiple of this: the height of a panel.
const PANEL_ROWS: usize = 16;

/// How a tensor of the map is spelled in the source.
type Spelled<'a> = dyn Fn(&str) -> String + 'a;

/// Which rows of a weight the tensors of a map hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coverage {
    /// Every row, once.
    All,
    /// Experts without an adapter have no tensor: their rows are zeros.
    Some,
}

/// Fills the weights of a session that `select` picks; `offset` is added to the vectors it is not
/// zero for.
pub(super) fn fill(
    session: &mut Session,
    (map, coverage): (&TensorMap, Coverage),
    select: impl Fn(&str) -> bool,
    (source, spelled): (&dyn TensorSource, &Spelled<'_>),
    offset: &dyn Fn(&str) -> f32,
) -> Result<(), LoadError> {
    let weights: Vec<(String, ValueType, usize)> = session
        .persistent()
        .filter(|(name, class, ..)| *class == Class::Weight && select(name))
        .filter(|(name, ..)| !session.is_lent(name))
        .map(|(name, _, value_type, shape)| (name.to_owned(), value_type, shape.row_elements()))
        .collect();
    let entries = map.by_weight();
    let mut too_large = Vec::new();
    let mut narrowest = Encoding::F32;
    for (name, value_type, elements) in weights {
        let slices = entries.get(name.as_str()).copied().unwrap_or_default();
        let slices: Vec<TensorSlice> = slices
            .iter()
            .map(|slice| TensorSlice { tensor: spelled(&slice.tensor), ..slice.clone() })
            .collect();
        if slices.is_empty() {
            return Err(LoadError::Unmapped { name });
        }
        let encoding = value_type.encoding().expect("a weight has an encoding");
        let form = (encoding, value_type.layout());
        let rows = elements / slices[0].columns.max(1);
        let slices = &slices;
        let filling = Filling { slices, rows, form, source, coverage, compares: false };
        let (cpu, stored) = session.stored_mut_with_cpu(&name).expect("listed by the session");
        let stored = stored.u8s();
        let found = filling.fill(cpu, stored)?;
        let offset = offset(&name);
        if offset != 0.0 {
            assert_eq!(encoding, Encoding::F32, "only vectors are shifted");
            BytesMut::new(stored).f32s().iter_mut().for_each(|value| *value += offset);
        }
        if let Some(text) = found.too_large.told(&name) {
            narrowest = encoding;
            too_large.push(text);
        }
        filling.release();
    }
    if too_large.is_empty() {
        Ok(())
    } else {
        Err(LoadError::Overflow { encoding: narrowest, tensors: too_large })
    }
}

/// Finite values that an encoding makes infinite.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct TooLarge {
    count: usize,
    largest: f32,
}

impl TooLarge {
    fn of(values: &[f32], bound: Option<f32>) -> Self {
        let Some(bound) = bound else { return Self::default() };
        let is_too_large = |x: &f32| (bound..f32::INFINITY).contains(&x.abs());
        // Nearly always there is none, and counting is quick.
        let count = values.iter().filter(|x| is_too_large(x)).count();
        if count == 0 {
            return Self::default();
        }
        let found = values.iter().filter(|x| is_too_large(x));
        Self { count, largest: found.fold(0.0, |largest, x| largest.max(x.abs())) }
    }

    fn and(self, other: Self) -> Self {
        Self { count: self.count + other.count, largest: self.largest.max(other.largest) }
    }

    /// How many values of a weight, and the largest; `None` if there are none.
    pub(super) fn told(self, weight: &str) -> Option<String> {
        let Self { count, largest } = self;
        (count > 0).then(|| format!("{count} of {weight}, up to {largest:e}"))
    }
}

/// What came of filling a weight, or a piece of one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Filled {
    pub(super) too_large: TooLarge,
    /// Whether every value is known to be the source's, bit for bit.
    pub(super) is_exact: bool,
}

impl Filled {
    const EXACT: Self = Self { too_large: TooLarge { count: 0, largest: 0.0 }, is_exact: true };

    fn and(self, other: Self) -> Self {
        Self {
            too_large: self.too_large.and(other.too_large),
            is_exact: self.is_exact && other.is_exact,
        }
    }
}

/// What one weight is filled from, and how it is stored.
pub(super) struct Filling<'a> {
    pub(super) slices: &'a [TensorSlice],
    /// Those of the weight.
    pub(super) rows: usize,
    pub(super) form: (Encoding, Layout),
    pub(super) source: &'a dyn TensorSource,
    /// Which rows the slices have to have; others are zeros.
    pub(super) coverage: Coverage,
    /// Whether what was rounded is compared with what it was.
    pub(super) compares: bool,
}

impl Filling<'_> {
    /// Whether the slices have every row once.
    fn is_complete(&self) -> bool {
        let mut parts: Vec<(usize, usize)> =
            self.slices.iter().map(|slice| (slice.first_row, slice.rows)).collect();
        parts.sort_unstable();
        let mut next = 0;
        for (first, rows) in parts {
            if first != next {
                return false;
            }
            next = first + rows;
        }
        next == self.rows
    }

    fn columns(&self) -> usize {
        self.slices[0].columns
    }

    fn rows_at_a_time(&self) -> usize {
        (ELEMENTS_AT_A_TIME / self.columns().max(1)).max(PANEL_ROWS) / PANEL_ROWS * PANEL_ROWS
    }

    /// Fills all of it; says what did not fit.
    pub(super) fn fill(&self, cpu: &Cpu, stored: &mut [u8]) -> Result<Filled, LoadError> {
        let (encoding, layout) = self.form;
        let is_complete = self.is_complete();
        if !is_complete && self.coverage == Coverage::All {
            return Err(LoadError::Rows { name: self.slices[0].weight.clone(), rows: self.rows });
        }
        if is_complete && self.read_stored(cpu, stored)? {
            return Ok(Filled::EXACT);
        }
        let is_kept = matches!(encoding, Encoding::Q8 | Encoding::Q4);
        if is_complete && is_kept && self.keep_codes(stored)? {
            return Ok(Filled::EXACT);
        }
        let at_a_time = self.rows_at_a_time();
        let chunk = Weight::stored_bytes(encoding, layout, at_a_time, self.columns());
        if chunk == 0 {
            return Ok(Filled::EXACT);
        }
        if !is_complete {
            stored.fill(0);
        }
        let outcome: Mutex<(Filled, Option<(usize, LoadError)>)> =
            Mutex::new((Filled::EXACT, None));
        cpu.parallel_chunks(stored, chunk, |start, bytes, _| {
            let first = start / chunk * at_a_time;
            let count = at_a_time.min(self.rows - first);
            let filled = self.fill_rows(first, count, bytes);
            let mut outcome = outcome.lock().expect("no piece panics");
            match filled {
                Ok(found) => outcome.0 = outcome.0.and(found),
                // Of several errors the first of the weight is told, whichever came first in time.
                Err(error) if outcome.1.as_ref().is_none_or(|(before, _)| first < *before) => {
                    outcome.1 = Some((first, error));
                }
                Err(_) => {}
            }
        });
        let (found, failed) = outcome.into_inner().expect("no piece panics");
        failed.map_or(Ok(found), |(_, error)| Err(error))
    }

    /// Tells the source that its tensors have been read.
    pub(super) fn release(&self) {
        let mut tensors: Vec<&str> = self.slices.iter().map(|s| s.tensor.as_str()).collect();
        tensors.dedup();
        tensors.into_iter().for_each(|tensor| self.source.release(tensor));
    }

    /// Reads the weight as it is, if the source has it so; otherwise changes nothing and returns
    /// `false`.
    fn read_stored(&self, cpu: &Cpu, stored: &mut [u8]) -> Result<bool, LoadError> {
        let [TensorSlice { placement: Placement::Whole, tensor, .. }] = self.slices else {
            return Ok(false);
        };
        self.source
            .read_stored(tensor, self.form, cpu, stored)
            .map_err(|problem| LoadError::Unreadable { name: tensor.clone(), problem })
    }

    /// Fills `count` rows from `first` on; `bytes` are theirs.
    fn fill_rows(&self, first: usize, count: usize, bytes: &mut [u8]) -> Result<Filled, LoadError> {
        let (form, (encoding, layout)) = (self.form, self.form);
        let shape = (count, self.columns());
        let elements = count * self.columns();
        let unencodable = |problem| {
            let name = self.slices[0].tensor.clone();
            LoadError::Unencodable { name, encoding, problem }
        };
        let held = if encoding == Encoding::Bf16z { Encoding::Bf16 } else { encoding };
        let is_kept = |slice: &TensorSlice| self.source.encoding(&slice.tensor) == Some(held);
        match encoding {
            Encoding::F32 if layout == Layout::RowMajor => {
                let out = BytesMut::new(bytes).f32s();
                gather(self.slices, first, out, &|tensor, range, out| {
                    self.source.read_f32(tensor, range, out)
                })?;
            }
            Encoding::Bf16 | Encoding::Bf16z | Encoding::F16 if self.slices.iter().all(is_kept) => {
                let mut bits = vec![0_u16; elements];
                gather(self.slices, first, &mut bits, &|tensor, range, out| {
                    self.source.read_bits(tensor, range, out)
                })?;
                store_bits(form, shape, &bits, bytes).map_err(unencodable)?;
            }
            _ => {
                let values = self.decoded(first, count)?;
                try_encode(form, shape, &values, bytes).map_err(unencodable)?;
                let too_large = TooLarge::of(&values, encoding.overflow_bound());
                let is_exact = self.compares && self.decodes_to(shape, bytes, &values);
                return Ok(Filled { too_large, is_exact });
            }
        }
        Ok(Filled::EXACT)
    }

    /// Whether rows that are encoded have these values, bit for bit.
    fn decodes_to(&self, (n, k): (usize, usize), bytes: &[u8], values: &[f32]) -> bool {
        let (encoding, layout) = self.form;
        let weight = Weight { encoding, layout, n, k, bytes };
        // Of what was rounded, one of the first values tells.
        let mut values = values.iter().enumerate();
        values.all(|(index, x)| weight.value(index / k, index % k).to_bits() == x.to_bits())
    }

    fn decoded(&self, first: usize, count: usize) -> Result<Vec<f32>, LoadError> {
        read_weight(self.slices, first..first + count, self.source)
    }

    /// Keeps a weight as the source has it, if all of it lies there in blocks of its encoding, `q8` or
    /// `q4`; otherwise changes nothing and returns `false`.
    fn keep_codes(&self, stored: &mut [u8]) -> Result<bool, LoadError> {
        let (rows, columns) = (self.rows, self.columns());
        let keeps_rows = self.slices.iter().all(TensorSlice::keeps_rows);
        if !columns.is_multiple_of(Q8_BLOCK) || !keeps_rows {
            return Ok(false);
        }
        let blocks = columns / Q8_BLOCK;
        let (mut values, mut scales) = (vec![0; rows * columns], vec![0.0; rows * blocks]);
        for slice in self.slices {
            let unreadable =
                |problem| LoadError::Unreadable { name: slice.tensor.clone(), problem };
            let mut done = 0;
            while done < slice.rows {
                let (row, run) = slice.run_at(done);
                let first = slice.first_row + done;
                let elements = row * columns..(row + run) * columns;
                let values = &mut values[first * columns..(first + run) * columns];
                let scales = &mut scales[first * blocks..(first + run) * blocks];
                let codes = (values, scales);
                let read = self.source.read_codes(self.form.0, &slice.tensor, elements, codes);
                if !read.map_err(unreadable)? {
                    return Ok(false);
                }
                done += run;
            }
        }
        let store = if self.form.0 == Encoding::Q8 { store_q8 } else { store_q4 };
        Ok(store((rows, columns), (&values, &scales), stored))
    }
}

/// Rows of a weight out of the tensors that hold them; those that none holds are zeros.
pub(crate) fn read_weight(
    slices: &[TensorSlice],
    rows: Range<usize>,
    source: &dyn TensorSource,
) -> Result<Vec<f32>, LoadError> {
    let columns = slices.first().map_or(0, |slice| slice.columns);
    let mut values = vec![0.0; rows.len() * columns];
    gather(slices, rows.start, &mut values, &|tensor, range, out| {
        source.read_f32(tensor, range, out)
    })?;
    Ok(values)
}

/// Reads the rows from `first` on that fill `out`, from the tensors that hold them.
fn gather<T: Copy + Default>(
    slices: &[TensorSlice],
    first: usize,
    out: &mut [T],
    read: &Read<'_, T>,
) -> Result<(), LoadError> {
    let columns = slices.first().map_or(1, |slice| slice.columns);
    let end = first + out.len() / columns.max(1);
    for slice in slices {
        let from = first.max(slice.first_row);
        let to = end.min(slice.first_row + slice.rows);
        if from < to {
            let out = &mut out[(from - first) * columns..(to - first) * columns];
            read_rows(slice, from - slice.first_row, out, read)
                .map_err(|problem| LoadError::Unreadable { name: slice.tensor.clone(), problem })?;
        }
    }
    Ok(())
}

/// Reads elements of a tensor.
type Read<'a, T> = dyn Fn(&str, Range<usize>, &mut [T]) -> Result<(), String> + 'a;

/// Reads rows out of the tensor that holds them, from the slice's row `first` on, as many as fill
/// `out`.
fn read_rows<T: Copy + Default>(
    slice: &TensorSlice,
    first: usize,
    out: &mut [T],
    read: &Read<'_, T>,
) -> Result<(), String> {
    let columns = slice.columns;
    let count = out.len() / columns;
    if let Placement::TransposedColumns { start } = slice.placement {
        let width = slice.width();
        let mut outputs = vec![T::default(); count];
        for input in 0..columns {
            let at = input * width + start + first;
            read(&slice.tensor, at..at + count, &mut outputs)?;
            for (row, &value) in outputs.iter().enumerate() {
                out[row * columns + input] = value;
            }
        }
        return Ok(());
    }
    if let Placement::ColumnsByTurns { start, parts } = slice.placement {
        return read_turns(slice, (start, parts), first, out, read);
    }
    let mut done = 0;
    while done < count {
        let (row, run) = slice.run_at(first + done);
        let run = run.min(count - done);
        let out = &mut out[done * columns..(done + run) * columns];
        read(&slice.tensor, row * columns..(row + run) * columns, out)?;
        done += run;
    }
    Ok(())
}

/// As [`read_rows`], where the parts' columns go by turns: each row of the tensor is read once for all
/// parts that are wanted.
fn read_turns<T: Copy + Default>(
    slice: &TensorSlice,
    (start, parts): (usize, usize),
    first: usize,
    out: &mut [T],
    read: &Read<'_, T>,
) -> Result<(), String> {
    let (columns, width, rows) = (slice.columns, slice.width(), slice.rows / parts);
    let wanted = first..first + out.len() / columns;
    let mut whole = vec![T::default(); width];
    for row in 0..rows {
        let mut turns = (wanted.start / rows..wanted.end.div_ceil(rows))
            .filter(|part| wanted.contains(&(part * rows + row)))
            .peekable();
        if turns.peek().is_none() {
            continue;
        }
        read(&slice.tensor, (start + row) * width..(start + row + 1) * width, &mut whole)?;
        for part in turns {
            let values = whole[part..].iter().step_by(parts);
            let out = &mut out[(part * rows + row - first) * columns..][..columns];
            out.iter_mut().zip(values).for_each(|(out, &value)| *out = value);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ones;

    impl TensorSource for Ones {
        fn names(&self) -> Vec<String> {
            vec!["part".to_owned()]
        }
        fn shape(&self, _: &str) -> Option<Vec<usize>> {
            Some(vec![2, 3])
        }
        fn read_f32(&self, _: &str, _: Range<usize>, out: &mut [f32]) -> Result<(), String> {
            out.fill(1.0);
            Ok(())
        }
    }

    #[test]
    fn rows_without_a_tensor_are_zeros_only_where_they_may_be() {
        let part = |first_row| TensorSlice {
            weight: "some.weight".to_owned(),
            role: crate::names::Role::FeedForward,
            block: None,
            first_row,
            rows: 2,
            columns: 3,
            tensor: "part".to_owned(),
            shape: vec![2, 3],
            placement: Placement::Whole,
        };
        let filled = |starts: &[usize], coverage| {
            let slices: Vec<TensorSlice> = starts.iter().map(|&start| part(start)).collect();
            let form = (Encoding::F32, Layout::RowMajor);
            let (slices, source) = (&slices[..], &Ones);
            let filling = Filling { slices, rows: 6, form, source, coverage, compares: false };
            let mut values = vec![7.0_f32; 18];
            let bytes = cairn_kernels::memory::bytes_of_mut(&mut values);
            filling.fill(&Cpu::detect(1), bytes).map(|_| values)
        };
        assert_eq!(filled(&[4, 0, 2], Coverage::All), Ok(vec![1.0; 18]));
        // A hole in the middle, one at the end, and one as large as what is there twice.
        for starts in [&[0, 4][..], &[0, 2], &[0, 0, 4], &[0, 2, 2]] {
            let error = filled(starts, Coverage::All).unwrap_err();
            assert_eq!(error, LoadError::Rows { name: "some.weight".to_owned(), rows: 6 });
        }
        let expected = [[1.0; 6], [0.0; 6], [1.0; 6]].concat();
        assert_eq!(filled(&[0, 4], Coverage::Some), Ok(expected));
    }

    #[test]
    fn only_finite_values_count_as_too_large() {
        let values = [1.0, -65520.0, f32::INFINITY, 65519.0, f32::NAN, 70000.0];
        let found = TooLarge::of(&values, Encoding::F16.overflow_bound());
        assert_eq!(found, TooLarge { count: 2, largest: 70000.0 });
        assert_eq!(TooLarge::of(&values, Encoding::F32.overflow_bound()), TooLarge::default());
    }
}

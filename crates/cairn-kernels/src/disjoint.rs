//! Parallel loops over rows that write several outputs at once.
//!
//! Tasks get whole rows, each task its own, so the outputs can be handed out as plain slices.

use std::marker::PhantomData;
use std::ops::Range;

use crate::cpu::Cpu;
use crate::pool::Scratch;

/// Outputs that can be cut at row boundaries.
pub(crate) trait RowParts: Sync {
    /// What a task gets.
    type Part;

    /// The rows of a range.
    ///
    /// # Safety
    /// - No two parts taken from the same outputs share a row.
    unsafe fn part(&self, rows: Range<usize>) -> Self::Part;
}

/// A slice of rows of one width.
pub(crate) struct RowSlice<'a, T> {
    pointer: *mut T,
    len: usize,
    width: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` whose parts go to several threads; `part` asks for them to be
// disjoint.
unsafe impl<T: Send> Sync for RowSlice<'_, T> {}

impl<'a, T: Send> RowSlice<'a, T> {
    /// Rows of `width` elements; the last may be shorter.
    pub(crate) fn new(slice: &'a mut [T], width: usize) -> Self {
        Self { pointer: slice.as_mut_ptr(), len: slice.len(), width, borrow: PhantomData }
    }
}

impl<'a, T: Send + 'a> RowParts for RowSlice<'a, T> {
    type Part = &'a mut [T];

    unsafe fn part(&self, rows: Range<usize>) -> &'a mut [T] {
        let start = self.len.min(rows.start * self.width);
        let end = self.len.min(rows.end * self.width).max(start);
        // SAFETY: `start` is at most the length of the slice.
        let first = unsafe { self.pointer.add(start) };
        // SAFETY: inside the slice, which is borrowed for 'a; the caller promises that nobody else
        // has these rows.
        unsafe { std::slice::from_raw_parts_mut(first, end - start) }
    }
}

impl<R: RowParts> RowParts for Option<R> {
    type Part = Option<R::Part>;

    unsafe fn part(&self, rows: Range<usize>) -> Self::Part {
        // SAFETY: passed on.
        self.as_ref().map(|inner| unsafe { inner.part(rows) })
    }
}

impl<R: RowParts, const N: usize> RowParts for [R; N] {
    type Part = [R::Part; N];

    unsafe fn part(&self, rows: Range<usize>) -> Self::Part {
        // SAFETY: passed on.
        self.each_ref().map(|inner| unsafe { inner.part(rows.clone()) })
    }
}

impl<A: RowParts, B: RowParts> RowParts for (A, B) {
    type Part = (A::Part, B::Part);

    unsafe fn part(&self, rows: Range<usize>) -> Self::Part {
        // SAFETY: passed on.
        let a = unsafe { self.0.part(rows.clone()) };
        // SAFETY: passed on.
        let b = unsafe { self.1.part(rows) };
        (a, b)
    }
}

impl<A: RowParts, B: RowParts, C: RowParts> RowParts for (A, B, C) {
    type Part = (A::Part, B::Part, C::Part);

    unsafe fn part(&self, rows: Range<usize>) -> Self::Part {
        // SAFETY: passed on.
        let a = unsafe { self.0.part(rows.clone()) };
        // SAFETY: passed on.
        let b = unsafe { self.1.part(rows.clone()) };
        // SAFETY: passed on.
        let c = unsafe { self.2.part(rows) };
        (a, b, c)
    }
}

/// Calls `f` for every `rows_per_task` consecutive rows, in parallel, with those rows of the outputs.
pub(crate) fn parallel_rows<R: RowParts>(
    cpu: &Cpu,
    rows: usize,
    rows_per_task: usize,
    outputs: R,
    f: impl Fn(Range<usize>, R::Part, &mut Scratch) + Sync,
) {
    let step = rows_per_task.max(1);
    cpu.parallel(rows.div_ceil(step), |task, scratch| {
        let range = task * step..rows.min((task + 1) * step);
        // SAFETY: each task number is handed out once, and ranges of different numbers share no row.
        let part = unsafe { outputs.part(range.clone()) };
        f(range, part, scratch);
    });
}

/// As [`parallel_rows`], on this thread and in one piece: what references use.
pub(crate) fn serial_rows<R: RowParts>(
    rows: usize,
    outputs: R,
    f: impl FnOnce(Range<usize>, R::Part),
) {
    // SAFETY: one part is taken.
    let part = unsafe { outputs.part(0..rows) };
    f(0..rows, part);
}

/// Elements of a memory-bound task: long enough that a fork costs nothing, short enough to balance.
pub(crate) const TASK_ELEMENTS: usize = 1 << 14;

/// Rows of `width` elements that make a memory-bound task.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (TASK_ELEMENTS / width.max(1)).max(1)
}

/// As [`parallel_rows`] over the elements of slices.
pub(crate) fn parallel_elements<R: RowParts>(
    cpu: &Cpu,
    elements: usize,
    outputs: R,
    f: impl Fn(Range<usize>, R::Part) + Sync,
) {
    parallel_rows(cpu, elements, TASK_ELEMENTS, outputs, |range, part, _| f(range, part));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn every_row_reaches_one_task_in_every_output() {
        for (threads, rows, per_task) in [(1, 10, 3), (2, 1000, 7), (2, 0, 1), (2, 5, 100)] {
            let cpu = Cpu::new(Isa::Scalar, threads);
            let (mut a, mut b) = (vec![0_u32; rows * 2], vec![0_u16; rows * 3]);
            let outputs = (RowSlice::new(&mut a, 2), Some(RowSlice::new(&mut b, 3)));
            parallel_rows(&cpu, rows, per_task, outputs, |range, (a, b), _| {
                assert_eq!(a.len(), range.len() * 2);
                a.iter_mut().for_each(|a| *a += 1);
                b.unwrap().iter_mut().for_each(|b| *b += 1);
            });
            assert!(a.iter().all(|&a| a == 1) && b.iter().all(|&b| b == 1));
        }
    }
}

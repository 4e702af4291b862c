//! The handle that every kernel takes first: an instruction set, threads and their scratch memory.

use std::cell::{RefCell, RefMut};
use std::marker::PhantomData;
use std::ops::Range;

use crate::isa::{Isa, Simd};
use crate::matmul::Estimates;
use crate::pool::{Pool, SCRATCH_BYTES, Scratch};
use crate::tuner::Tuning;

/// An instruction set, a pool of threads and their scratch memory, allocated once.
///
/// Not `Sync`: one thread drives it at a time, and the tasks it runs cannot fork again. It may be
/// sent to another thread.
///
/// ```
/// use cairn_kernels::Cpu;
/// let cpu = Cpu::detect(2);
/// let mut squares = vec![0_usize; 100];
/// cpu.parallel_chunks(&mut squares, 10, |first, chunk, _scratch| {
///     for (i, square) in chunk.iter_mut().enumerate() {
///         *square = (first + i) * (first + i);
///     }
/// });
/// assert_eq!(squares[99], 99 * 99);
/// ```
#[derive(Debug)]
pub struct Cpu {
    simd: Simd,
    pool: Pool,
    partials: RefCell<Scratch>,
    tuning: Tuning,
    estimates: Estimates,
}

impl Cpu {
    /// A handle with a chosen instruction set and number of threads (at least one).
    ///
    /// # Panics
    /// If the machine does not have `isa` (ask [`Isa::is_supported`]), or refuses
    /// [`SCRATCH_BYTES`] of scratch a thread or the threads themselves.
    pub fn new(isa: Isa, threads: usize) -> Self {
        let pool = Pool::new(threads).expect("the system gives threads and their scratch memory");
        let partials = Scratch::new().expect("the system gives scratch memory");
        Self {
            simd: Simd::new(isa),
            pool,
            partials: RefCell::new(partials),
            tuning: Tuning::default(),
            estimates: Estimates::default(),
        }
    }

    /// A handle with the machine's widest instruction set.
    pub fn detect(threads: usize) -> Self {
        Self::new(Isa::best(), threads)
    }

    /// The instruction set its kernels use.
    pub fn isa(&self) -> Isa {
        self.simd.isa()
    }

    /// The proof that the instruction set is there, for the `kernel!` functions.
    pub(crate) fn simd(&self) -> Simd {
        self.simd
    }

    /// Measured choices that the products follow from now on; without one they estimate.
    pub fn set_tuning(&mut self, tuning: Tuning) {
        self.tuning = tuning;
    }

    /// The measured choices.
    pub fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    /// Estimates made before, so that a product of known sizes does not estimate again.
    pub(crate) fn estimates(&self) -> &Estimates {
        &self.estimates
    }

    /// Threads that take part in [`parallel`](Self::parallel).
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Bytes of scratch memory that the handle holds, all of it resident.
    pub fn scratch_bytes(&self) -> usize {
        (self.threads() + 1) * SCRATCH_BYTES
    }

    /// Scratch memory of the calling thread that tasks may share: partial results that one fork
    /// writes and that are folded, in a fixed order, after it.
    pub(crate) fn partials(&self) -> RefMut<'_, Scratch> {
        self.partials.borrow_mut()
    }

    /// Calls `f` once for every task number below `n_tasks`, on all threads, and returns when all
    /// are done. Which thread runs which task varies: a task's result may not depend on it.
    ///
    /// # Panics
    /// If a task panics.
    pub fn parallel(&self, n_tasks: usize, f: impl Fn(usize, &mut Scratch) + Sync) {
        self.pool.run(n_tasks, &f);
    }

    /// Cuts `out` into chunks of `chunk_len` elements (the last may be shorter) and calls `f` with
    /// the index of each chunk's first element and the chunk, in parallel.
    ///
    /// # Panics
    /// If `chunk_len` is zero while `out` is not empty, or a task panics.
    pub fn parallel_chunks<T: Send + Sync>(
        &self,
        out: &mut [T],
        chunk_len: usize,
        f: impl Fn(usize, &mut [T], &mut Scratch) + Sync,
    ) {
        if out.is_empty() {
            return;
        }
        let len = out.len();
        let shared = SharedSlice::new(out);
        self.parallel(len.div_ceil(chunk_len), |task, scratch| {
            let start = task * chunk_len;
            let end = len.min(start + chunk_len);
            // SAFETY: each task number is handed out once and names its own chunk.
            let chunk = unsafe { shared.slice_mut(start..end) };
            f(start, chunk, scratch);
        });
    }
}

/// A mutable slice that tasks write disjoint parts of.
#[derive(Debug)]
pub struct SharedSlice<'a, T> {
    pointer: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` whose parts go to several threads; each use of it promises to
// touch a part nobody else touches.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    /// Takes the slice over until the last use of the result.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { pointer: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// Length of the whole slice.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the slice is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// - While the result lives, no other task reads or writes an element of `range`.
    #[expect(clippy::mut_from_ref, reason = "that the parts are disjoint is the caller's promise")]
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part leaves the slice");
        // SAFETY: `range` is inside the slice (asserted), so the offset stays in one allocation.
        let start = unsafe { self.pointer.add(range.start) };
        // SAFETY: valid for `range` (asserted), and nobody else has it (the caller's promise).
        unsafe { std::slice::from_raw_parts_mut(start, range.len()) }
    }

    /// The first element's address, for kernels that write strided tiles.
    pub(crate) fn as_mut_ptr(&self) -> *mut T {
        self.pointer
    }
}

//! The handle that every kernel takes first: an instruction set, threads and their scratch memory.

use std::cell::{RefCell, RefMut};
use std::marker::PhantomData;
use std::ops::Range;

use crate::isa::{Isa, Simd};
use crate::matmul::Estimates;
use crate::memory::MemoryError;
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

/// Why there is no handle on the processor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// The machine does not have the instruction set.
    #[error("this machine does not have {isa}")]
    Isa {
        /// The one asked for.
        isa: Isa,
    },
    /// The system did not start so many threads.
    #[error("the system started {started} of {threads} threads")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// Those there were, the calling one among them.
        started: usize,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The system did not give the threads their scratch memory.
    #[error("{threads} threads need {} MiB of scratch memory", Cpu::scratch_bytes_of(*threads) >> 20)]
    Scratch {
        /// Threads asked for.
        threads: usize,
        /// The system's reason.
        #[source]
        source: MemoryError,
    },
}

impl CpuError {
    /// What to do about it.
    pub fn hints(&self) -> Vec<String> {
        match self {
            Self::Isa { .. } => {
                let supported: Vec<_> = Isa::supported().into_iter().map(Isa::name).collect();
                vec![format!("it has {}", supported.join(", "))]
            }
            Self::Threads { .. } | Self::Scratch { .. } => {
                let all = std::thread::available_parallelism().map_or(1, usize::from);
                vec![format!("ask for fewer threads; more than the machine's {all} gain nothing")]
            }
        }
    }
}

impl Cpu {
    /// A handle with a chosen instruction set and number of threads (at least one).
    ///
    /// # Errors
    ///
    /// [`CpuError`] if the machine does not have `isa`, or does not start the threads, or refuses
    /// them [`SCRATCH_BYTES`] of scratch each.
    pub fn try_new(isa: Isa, threads: usize) -> Result<Self, CpuError> {
        if !isa.is_supported() {
            return Err(CpuError::Isa { isa });
        }
        let pool = Pool::new(threads)?;
        let partials = Scratch::new().map_err(|source| CpuError::Scratch { threads, source })?;
        Ok(Self {
            simd: Simd::new(isa),
            pool,
            partials: RefCell::new(partials),
            tuning: Tuning::default(),
            estimates: Estimates::default(),
        })
    }

    /// [`try_new`](Self::try_new) for tests and examples, which know their machine.
    ///
    /// # Panics
    /// If there is no such handle.
    pub fn new(isa: Isa, threads: usize) -> Self {
        Self::try_new(isa, threads).expect("the machine has the instruction set and the threads")
    }

    /// A handle with the machine's widest instruction set, for tests and examples.
    ///
    /// # Panics
    /// If the machine does not give the threads or their memory.
    pub fn detect(threads: usize) -> Self {
        Self::new(Isa::best(), threads)
    }

    /// The instruction set its kernels use.
    pub fn isa(&self) -> Isa {
        self.simd.isa()
    }

    /// The same handle without the instruction for bf16 products (`vdpbf16ps`): they are computed with
    /// ordinary multiply-adds, to the same bits.
    #[must_use]
    pub fn without_bf16_instruction(self) -> Self {
        Self { simd: self.simd.without_pair_dot(), ..self }
    }

    /// The same handle without the instruction for products of bytes (`vpdpbusd`): the bytes are widened,
    /// to the same bits.
    #[must_use]
    pub fn without_byte_instruction(self) -> Self {
        Self { simd: self.simd.without_byte_dot(), ..self }
    }

    /// Whether bf16 products have an instruction of their own.
    pub fn has_bf16_instruction(&self) -> bool {
        self.simd.has_pair_dot()
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
        Self::scratch_bytes_of(self.threads())
    }

    /// Bytes of scratch memory that a handle of `threads` threads holds.
    pub const fn scratch_bytes_of(threads: usize) -> usize {
        (threads + 1) * SCRATCH_BYTES
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

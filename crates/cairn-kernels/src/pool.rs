//! Fork–join over a fixed set of threads: what a kernel's loop over tiles runs on.
//!
//! A fork publishes one closure; threads take task numbers from a counter until none is left, the
//! calling thread among them. Workers spin for a short while after a job, so that the next fork
//! finds them awake (about a microsecond), then park, so that an idle process burns nothing.
//!
//! A fork takes no lock: the gate, the task counter and the flags are atomics. The one mutex holds a
//! worker's panic and is touched only after one.
//!
//! **Invariant:** the closure is called only while `Pool::run` is on the caller's stack: a worker
//! enters a job through the *gate*, which counts who is inside, and `run` closes the gate and waits
//! for that count to fall to zero, also when a task panics. A worker that wakes late finds the gate
//! closed and never delays the caller.

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::cpu::CpuError;
use crate::memory::{Arena, MemoryError};

/// Scratch memory of one thread: one huge page.
pub const SCRATCH_BYTES: usize = 2 << 20;
/// How long a worker looks for the next job before it parks.
const SPIN: Duration = Duration::from_micros(150);
/// Spins between two looks at the clock.
const SPINS_PER_LOOK: u32 = 64;

/// Memory of one thread for a kernel's packed tiles and partial rows. Its contents are whatever the
/// last task left there.
#[derive(Debug)]
pub struct Scratch {
    arena: Arena,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self, MemoryError> {
        Ok(Self { arena: Arena::new(SCRATCH_BYTES)? })
    }

    /// The first `len` floats.
    ///
    /// # Panics
    /// If `len` floats are more than [`SCRATCH_BYTES`].
    pub fn f32s(&mut self, len: usize) -> &mut [f32] {
        &mut self.arena.f32s()[..len]
    }

    /// Disjoint slices of the given lengths, each starting at a multiple of 64 bytes.
    ///
    /// # Panics
    /// If they are together more than [`SCRATCH_BYTES`].
    pub fn f32_parts<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        let mut rest = self.arena.f32s();
        lens.map(|len| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(16));
            rest = tail;
            &mut part[..len]
        })
    }
}

type Task<'a> = dyn Fn(usize, &mut Scratch) + Sync + 'a;

/// What a fork publishes. Written only while the gate is closed and nobody is inside.
#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    tasks: usize,
}

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const EPOCH_SHIFT: u32 = 32;

struct Shared {
    /// Epoch in the high half, the open bit, and the number of workers inside.
    gate: AtomicU64,
    next_task: AtomicUsize,
    job: UnsafeCell<Job>,
    parked: Box<[AtomicBool]>,
    stop: AtomicBool,
    /// Whether `panic` holds one; read after the gate has closed, which orders it.
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only field that is not `Sync` (or `Send`) already. It is written by the one
// caller while the gate is closed and empty and read only by workers inside the gate; opening the
// gate is a release, entering it an acquire.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is only followed inside the gate.
unsafe impl Send for Shared {}

/// A set of threads that run one job at a time. Not `Sync`: one thread at a time may fork, so a task
/// cannot fork again (it could not even name the pool).
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    scratch: UnsafeCell<Scratch>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts `threads - 1` workers; the caller of [`run`](Self::run) is the last thread. On an error
    /// those that were started are gone again.
    pub(crate) fn new(threads: usize) -> Result<Self, CpuError> {
        let workers = threads.max(1) - 1;
        let nothing: &'static Task<'static> = &|_, _| {};
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            next_task: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { task: nothing, tasks: 0 }),
            parked: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let new_scratch = || Scratch::new().map_err(|source| CpuError::Scratch { threads, source });
        let scratch = UnsafeCell::new(new_scratch()?);
        let mut pool = Self { shared, workers: Vec::with_capacity(workers), scratch };
        for index in 0..workers {
            let scratch = new_scratch()?;
            let shared = Arc::clone(&pool.shared);
            let spawned = thread::Builder::new()
                .name(format!("cairn-{}", index + 1))
                .spawn(move || shared.work(index, scratch));
            let started = index + 1;
            let refused = |source| CpuError::Threads { threads, started, source };
            pool.workers.push(spawned.map_err(refused)?);
        }
        Ok(pool)
    }

    /// Threads that take tasks, the caller among them.
    pub(crate) fn threads(&self) -> usize {
        self.shared.parked.len() + 1
    }

    /// Calls `task` once for every number below `tasks`, on all threads, and returns when all are
    /// done. A panic in a task stops the hand-out and is raised again here.
    pub(crate) fn run(&self, tasks: usize, task: &Task<'_>) {
        // SAFETY: the pool is not `Sync` and `task` cannot reach it (it is `Sync`), so this is the
        // only use of the caller's scratch while it lasts.
        let scratch = unsafe { &mut *self.scratch.get() };
        if tasks <= 1 || self.workers.is_empty() {
            for index in 0..tasks {
                task(index, scratch);
            }
            return;
        }
        self.open(tasks, task);
        let closing = Closing { shared: &self.shared };
        self.shared.take_tasks(tasks, task, scratch);
        drop(closing);
        if let Some(payload) = self.shared.take_panic() {
            resume_unwind(payload);
        }
    }

    fn open(&self, tasks: usize, task: &Task<'_>) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; nobody follows the pointer after `run` closed the
        // gate and waited, which is before `task` ends.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: the gate is closed and empty between runs, so nobody else looks at the job.
        let job = unsafe { &mut *shared.job.get() };
        *job = Job { task, tasks };
        shared.next_task.store(0, Ordering::Relaxed);
        let epoch = (shared.gate.load(Ordering::Relaxed) >> EPOCH_SHIFT).wrapping_add(1);
        // Sequentially consistent, as are the worker's stores to `parked` and its second look at
        // the gate: one of the two sees the other, so no wake-up is lost.
        shared.gate.store((epoch << EPOCH_SHIFT) | OPEN, Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&self.workers).take(tasks - 1) {
            if parked.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of tasks; it has none of its own to report.
            let _finished = worker.join();
        }
    }
}

/// Closes the gate and waits until nobody is inside, also while a panic unwinds.
struct Closing<'a> {
    shared: &'a Shared,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let gate = &self.shared.gate;
        if thread::panicking() {
            self.shared.next_task.store(usize::MAX / 2, Ordering::Relaxed);
        }
        let mut inside = gate.fetch_and(!OPEN, Ordering::AcqRel) & INSIDE;
        let mut spins = 0_u32;
        while inside != 0 {
            spins += 1;
            // A worker that lost its core needs ours more than we do.
            if spins.is_multiple_of(1 << 12) {
                thread::yield_now();
            } else {
                spin_loop();
            }
            inside = gate.load(Ordering::Acquire) & INSIDE;
        }
        if thread::panicking() {
            // The caller's own panic is the one reported; a worker's must not wait for the next run.
            drop(self.shared.take_panic());
        }
    }
}

impl Shared {
    fn work(&self, index: usize, mut scratch: Scratch) {
        let mut last_epoch = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let gate = self.await_job(index, last_epoch);
            last_epoch = gate >> EPOCH_SHIFT;
            if gate & OPEN == 0 || !self.enter(gate) {
                continue;
            }
            // SAFETY: this worker is inside the gate, so the caller does not write the job.
            let job = unsafe { &*self.job.get() };
            // SAFETY: `run` waits for this worker to leave the gate before its closure ends.
            let task = unsafe { &*job.task };
            let outcome =
                catch_unwind(AssertUnwindSafe(|| self.take_tasks(job.tasks, task, &mut scratch)));
            if let Err(payload) = outcome {
                self.next_task.store(usize::MAX / 2, Ordering::Relaxed);
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.gate.fetch_sub(1, Ordering::Release);
        }
    }

    /// The panic of a worker in the job that has ended, if there was one.
    fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        // Workers leave the gate with a release after they set it, and the gate was found empty.
        if !self.panicked.load(Ordering::Relaxed) {
            return None;
        }
        self.panicked.store(false, Ordering::Relaxed);
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn take_tasks(&self, tasks: usize, task: &Task<'_>, scratch: &mut Scratch) {
        loop {
            let index = self.next_task.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                return;
            }
            task(index, scratch);
        }
    }

    /// Waits for a gate of another epoch, or for the end. Spins, then parks.
    fn await_job(&self, index: usize, last_epoch: u64) -> u64 {
        let is_news = |gate: u64| gate >> EPOCH_SHIFT != last_epoch;
        let started = Instant::now();
        loop {
            for _ in 0..SPINS_PER_LOOK {
                let gate = self.gate.load(Ordering::Acquire);
                if is_news(gate) {
                    return gate;
                }
                spin_loop();
            }
            if started.elapsed() < SPIN {
                continue;
            }
            self.parked[index].store(true, Ordering::SeqCst);
            let gate = self.gate.load(Ordering::SeqCst);
            if !is_news(gate) && !self.stop.load(Ordering::SeqCst) {
                thread::park();
            }
            self.parked[index].store(false, Ordering::SeqCst);
            if is_news(gate) || self.stop.load(Ordering::SeqCst) {
                return gate;
            }
        }
    }

    /// Counts this worker in, unless the job has ended meanwhile.
    fn enter(&self, seen: u64) -> bool {
        let mut gate = seen;
        while gate & OPEN != 0 && gate >> EPOCH_SHIFT == seen >> EPOCH_SHIFT {
            let entered = self.gate.compare_exchange_weak(
                gate,
                gate + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match entered {
                Ok(_) => return true,
                Err(now) => gate = now,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).unwrap();
            for tasks in [0, 1, 2, 3, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|index, _| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_forks_lose_nothing() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        let forks = 20_000;
        for fork in 0..forks {
            let tasks = fork % 7;
            pool.run(tasks, &|index, scratch| {
                scratch.f32s(1)[0] = 1.0;
                sum.fetch_add(index + 1, Ordering::Relaxed);
            });
        }
        let expected: usize = (0..forks).map(|fork| (fork % 7) * (fork % 7 + 1) / 2).sum();
        assert_eq!(sum.into_inner(), expected);
    }

    #[test]
    fn parked_workers_wake_for_the_next_job() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..20 {
            let parked_by = Instant::now() + Duration::from_secs(10);
            while !pool.shared.parked[0].load(Ordering::SeqCst) {
                assert!(Instant::now() < parked_by, "the worker never parked");
                thread::yield_now();
            }
            // The caller's task ends only when the worker has taken the other one.
            let taken = AtomicUsize::new(0);
            pool.run(2, &|_, _| {
                taken.fetch_add(1, Ordering::SeqCst);
                while taken.load(Ordering::SeqCst) < 2 {
                    thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2).unwrap();
        for bad in [0, 1, 63] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|index, _| assert_ne!(index, bad, "task {index}"));
            }));
            assert!(outcome.is_err());
            let ran = AtomicUsize::new(0);
            pool.run(10, &|_, _| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.into_inner(), 10);
        }
    }

    #[test]
    fn scratch_parts_are_disjoint_and_aligned() {
        let mut scratch = Scratch::new().unwrap();
        let [a, b, c] = scratch.f32_parts([3, 17, 0]);
        a.fill(1.0);
        b.fill(2.0);
        assert_eq!((a[2], b[16], c.len()), (1.0, 2.0, 0));
        assert!((b.as_ptr() as usize).is_multiple_of(64));
    }
}

//! An allocator that counts what each thread holds, so that a test can bound what a parser takes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes this thread has allocated and not freed; below zero where another one allocated.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    /// The most there were since [`peak_of`] began.
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

/// Notes that a thread holds so many bytes more, or less. Beyond a thread's end nothing is noted.
fn note(bytes: isize) {
    let live = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        live.get()
    });
    if let Ok(live) = live {
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live)));
    }
}

fn size(layout: Layout) -> isize {
    isize::try_from(layout.size()).expect("a layout is at most isize::MAX bytes")
}

// SAFETY: every call goes to the system's allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(size(layout));
        // SAFETY: the caller keeps the contract of `alloc`, which is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note(-size(layout));
        // SAFETY: the caller keeps the contract of `dealloc`, and the block came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Runs `work` and says how many bytes it held at most, at one time, in this thread.
pub(crate) fn peak_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = work();
    (result, usize::try_from(PEAK.get() - before).unwrap_or(0))
}

#[test]
fn a_peak_is_what_was_held_at_one_time() {
    let ((), peak) = peak_of(|| {
        drop(vec![1_u8; 5000]);
        let held = vec![1_u8; 3000];
        drop(vec![1_u8; 4000]);
        drop(held);
    });
    assert!((7000..7500).contains(&peak), "{peak}");
}

//! Work on several threads whose results come back in the order of the items.
//!
//! **Invariant:** at most `window` items are between being taken and being handed to the sink, so
//! memory does not depend on how many there are, nor on one slow item holding up the rest.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

/// Applies work to every item on `threads` threads and `sink` to every result, in order, on the
/// caller's thread. The first error of `sink` ends it. `worker` is called once on each thread and
/// gives the work, with whatever it wants to keep from item to item.
pub(crate) fn for_each<T: Send, R: Send, E, W: FnMut(T) -> R>(
    threads: usize,
    window: usize,
    items: impl Iterator<Item = T>,
    worker: impl Fn() -> W + Sync,
    mut sink: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    assert!(0 < threads && 0 < window, "no thread or no room to work");
    let (tasks, queue) = sync_channel::<(T, SyncSender<R>)>(window);
    let queue = Mutex::new(queue);
    thread::scope(|scope| {
        // Moved in, so that leaving the closure early closes the queue and ends the workers.
        let tasks = tasks;
        for _ in 0..threads {
            scope.spawn(|| run(&queue, worker()));
        }
        let mut pending: VecDeque<Receiver<R>> = VecDeque::with_capacity(window);
        let mut receive = |result: Receiver<R>| {
            sink(result.recv().expect("a worker drops its answer only by panicking"))
        };
        for item in items {
            if pending.len() == window
                && let Some(oldest) = pending.pop_front()
            {
                receive(oldest)?;
            }
            let (answer, result) = sync_channel(1);
            tasks.send((item, answer)).expect("the queue outlives the workers");
            pending.push_back(result);
        }
        pending.into_iter().try_for_each(receive)
    })
}

fn run<T, R>(queue: &Mutex<Receiver<(T, SyncSender<R>)>>, mut work: impl FnMut(T) -> R) {
    loop {
        let task = queue.lock().expect("no worker panics while it waits for a task").recv();
        let Ok((item, answer)) = task else { break };
        // The caller has stopped listening after an error; the answer is not needed then.
        let _ = answer.send(work(item));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn results_come_in_order_within_the_window() {
        for threads in [1, 2, 5] {
            let (taken, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let mut results = Vec::new();
            let items = (0..200usize).inspect(|_| {
                let ahead = taken.fetch_add(1, Ordering::SeqCst) - done.load(Ordering::SeqCst);
                assert!(ahead <= 4, "{ahead} items in flight");
            });
            let sink = |result| {
                done.fetch_add(1, Ordering::SeqCst);
                results.push(result);
                Ok::<(), ()>(())
            };
            for_each(threads, 4, items, || |item| item * item, sink).unwrap();
            assert_eq!(results, (0..200usize).map(|item| item * item).collect::<Vec<_>>());
        }
    }

    #[test]
    fn first_error_ends_it() {
        let mut seen = 0;
        let sink = |result: usize| {
            seen += 1;
            if result == 7 { Err(result) } else { Ok(()) }
        };
        assert_eq!(for_each(2, 3, 0..1_000_000, || |item: usize| item, sink), Err(7));
        assert_eq!(seen, 8);
    }
}

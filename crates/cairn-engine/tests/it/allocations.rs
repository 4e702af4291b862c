//! A decode step allocates nothing, on any thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use cairn_engine::{
    DraftMethod, Engine, EngineOptions, Request, SamplingFields, SamplingParams, SpeculativeOptions,
};
use cairn_kernels::{CacheType, Cpu, Encoding};

use crate::model::{causal_folders, context, engine_with, golden_ids, greedy};

thread_local! {
    /// Where this thread's allocations are counted, if they are.
    static COUNTER: Cell<Option<&'static AtomicUsize>> = const { Cell::new(None) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

fn note() {
    // Beyond a thread's end nothing is counted.
    if let Ok(Some(counter)) = COUNTER.try_with(Cell::get) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller keeps the contract of `alloc`, which is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, and the block came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Sets where every thread of a processor counts.
fn set_counters(cpu: &Cpu, counter: Option<&'static AtomicUsize>) {
    let arrived = AtomicUsize::new(0);
    // A task ends only when every thread has one, so that none takes two.
    let threads = cpu.threads();
    cpu.parallel(threads, |_, _| {
        COUNTER.set(counter);
        arrived.fetch_add(1, Ordering::SeqCst);
        while arrived.load(Ordering::SeqCst) < threads {
            std::thread::yield_now();
        }
    });
}

/// Allocations of `steps` decode steps after a few of warm-up.
fn allocations(engine: &mut Engine, requests: &[Request], steps: usize) -> usize {
    let mut events = Vec::with_capacity(256);
    for request in requests {
        engine.add_request(request.clone()).unwrap();
    }
    let mut step = |engine: &mut Engine, count: usize| {
        for _ in 0..count {
            events.clear();
            engine.step(&mut events).unwrap();
        }
    };
    step(engine, 6);
    assert_eq!(engine.num_requests(), requests.len(), "all decode");
    let counter: &'static AtomicUsize = Box::leak(Box::default());
    set_counters(engine.session().cpu(), Some(counter));
    step(engine, steps);
    set_counters(engine.session().cpu(), None);
    while engine.num_requests() != 0 {
        step(engine, 1);
    }
    counter.load(Ordering::Relaxed)
}

#[test]
fn what_is_allocated_is_counted_on_every_thread() {
    let cpu = Cpu::detect(2);
    let counter: &'static AtomicUsize = Box::leak(Box::default());
    set_counters(&cpu, Some(counter));
    let arrived = AtomicUsize::new(0);
    cpu.parallel(2, |_, _| {
        drop(std::hint::black_box(vec![1_u8; 10]));
        arrived.fetch_add(1, Ordering::SeqCst);
        while arrived.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
    });
    set_counters(&cpu, None);
    assert_eq!(counter.load(Ordering::Relaxed), 2);
}

/// Sampling with everything on.
fn elaborate(prompt: &[u32], max_new_tokens: usize) -> Request {
    let fields = SamplingFields {
        top_k: Some(50),
        top_p: Some(0.95),
        min_p: Some(0.01),
        typical_p: Some(0.98),
        repetition_penalty: 1.1,
        presence_penalty: 0.1,
        frequency_penalty: 0.1,
        no_repeat_ngram_size: Some(3),
        logit_bias: vec![(3, 0.5)],
        seed: 5,
        ..SamplingFields::default()
    };
    Request::new(prompt.to_vec(), SamplingParams::new(fields).unwrap(), max_new_tokens)
}

#[test]
fn decode_steps_allocate_nothing() {
    for name in causal_folders() {
        let room = context(&name);
        let prompt = &golden_ids(&name, "input_ids")[..4];
        let steps = 64.min(room - 16);
        let options = EngineOptions::new(2, room);
        let mut engine = engine_with(&name, options);
        let one = [greedy(prompt, steps + 8)];
        assert_eq!(allocations(&mut engine, &one, steps), 0, "{name}, greedy");
        let two = [elaborate(prompt, steps + 8), greedy(prompt, steps + 8)];
        assert_eq!(allocations(&mut engine, &two, steps), 0, "{name}, two sequences");
    }
}

#[test]
fn decode_steps_allocate_nothing_however_numbers_are_stored() {
    let prompt = &golden_ids("llama", "input_ids")[..4];
    for (cache_type, encoding) in [(CacheType::Bf16, Encoding::Bf16), (CacheType::Q8, Encoding::Q8)]
    {
        let options = EngineOptions { cache_type, encoding, ..EngineOptions::new(1, 128) };
        let mut engine = engine_with("llama", options);
        assert_eq!(allocations(&mut engine, &[elaborate(prompt, 72)], 64), 0, "{encoding}");
    }
}

#[test]
fn guessing_ahead_allocates_nothing() {
    let prompt = &golden_ids("llama", "input_ids")[..4];
    for method in [DraftMethod::Ngram, DraftMethod::Depth(1), DraftMethod::Model] {
        let speculative =
            Some(SpeculativeOptions { method, num_speculative_tokens: 3, always: true });
        let mut engine =
            engine_with("llama", EngineOptions { speculative, ..EngineOptions::new(1, 128) });
        if method == DraftMethod::Model {
            engine.attach_draft(engine_with("llama", EngineOptions::new(1, 128))).unwrap();
        }
        // A step may choose four tokens.
        assert_eq!(allocations(&mut engine, &[greedy(prompt, 120)], 20), 0, "{method:?}");
    }
}

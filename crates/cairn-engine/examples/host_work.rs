//! Measures what an engine does around its model: the time of a step with a model that costs nothing.
//!
//! `cargo run --release -p cairn-engine --example host_work [SEQUENCES] [CONTEXT]`
#![expect(clippy::print_stdout, reason = "an example")]

use std::time::Instant;

use cairn_engine::{Engine, EngineOptions, Event, MockModel, Request, SamplingParams};

/// Tokens of a prompt.
const PROMPT: usize = 64;
/// Steps before those that count.
const WARM_UP: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut numbers = std::env::args().skip(1);
    let sequences: usize = numbers.next().map_or(Ok(256), |text| text.parse())?;
    let context: usize = numbers.next().map_or(Ok(2048), |text| text.parse())?;
    let options = EngineOptions::new(sequences, context);
    let mut engine = Engine::with_model(MockModel::new(150_000, options.num_blocks), options)?;
    for index in 0..sequences {
        let prompt =
            (0..PROMPT).map(|at| u32::try_from(index * at % 150_000)).collect::<Result<_, _>>();
        engine.add_request(Request::new(prompt?, SamplingParams::greedy(), context - PROMPT))?;
    }
    let mut events: Vec<Event> = Vec::with_capacity(2 * sequences);
    let mut micros = Vec::with_capacity(context);
    let mut num_new = 0;
    while engine.num_requests() == sequences {
        events.clear();
        let begin = Instant::now();
        let report = engine.step(&mut events)?;
        let seconds = begin.elapsed().as_secs_f64();
        // Steps in which all decode.
        if report.num_tokens == sequences && report.num_new == sequences {
            micros.push(seconds * 1e6);
        }
        num_new += report.num_new;
    }
    let mut counted = micros.split_off(WARM_UP.min(micros.len()));
    counted.sort_by(f64::total_cmp);
    let at = |share: usize| counted[(counted.len() - 1) * share / 100];
    println!("{sequences} sequences, {} steps, {num_new} tokens", counted.len());
    println!("a step: median {:.1} us, 90 % {:.1} us, 99 % {:.1} us", at(50), at(90), at(99));
    Ok(())
}

//! Decode speed, and the share of the memory bandwidth it uses.
//!
//! A decode step at batch 1 reads every weight but the embedding rows it does not need, and the keys
//! and values of all tokens so far; nothing it computes takes longer than that. So tokens per second
//! are judged by the bytes they move, against what the same machine reads in the same minute.

use std::ops::ControlFlow;
use std::time::Instant;

use cairn_engine::{Engine, PrefixOutcome, Request, SamplingParams, SpeculationFigures};
use cairn_kernels::bandwidth::{Bandwidth, BandwidthMeter};
use cairn_program::{Class, Op, Program, ProgramId, SessionError, ValueId};
use serde::{Deserialize, Serialize};

use crate::contract::Turn;
use crate::error::EvalError;
use crate::median::median;
use crate::scorer::check_limit;

/// How decoding is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeBench {
    /// What is read before the clock starts.
    pub prompt: Vec<u32>,
    /// Tokens that are decoded; the first comes out of the prompt and is not timed.
    pub num_new: usize,
    /// Runs; the figures are their median, best and worst.
    pub repetitions: usize,
    /// Reads the prompt in the first run and keeps its keys for the others: long contexts would take
    /// minutes to read and seconds to decode.
    pub keeps_prompt: bool,
}

/// What decoding reaches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodeFigures {
    /// Threads used.
    pub threads: usize,
    /// Tokens of the prompt.
    pub num_prompt: usize,
    /// Tokens decoded in a run.
    pub num_new: usize,
    /// Tokens of the prompt read a second, of each run that read it, in order.
    pub prefill_tokens_per_s: Vec<f64>,
    /// Tokens decoded a second, of each run, in order.
    pub tokens_per_s: Vec<f64>,
    /// Their median.
    pub tokens_per_s_median: f64,
    /// Weights read for a token.
    pub weight_bytes: u64,
    /// Cached keys and values read for a token, in the mean over a run.
    pub cache_bytes: f64,
    /// Bytes that the median run read a second.
    pub bytes_per_s: f64,
    /// What this machine reads a second, measured before, between and after the runs.
    pub bandwidth: Bandwidth,
    /// `bytes_per_s` over the median of those measurements.
    pub bandwidth_share: f64,
    /// What came of guessing ahead, if that was asked for. Then a run reads weights and cache once for
    /// several tokens, and `bytes_per_s` is what reading them for each would have taken.
    #[serde(default)]
    pub speculation: Option<SpeculationFigures>,
}

/// The bandwidth is the median of at least this many measurements.
const BANDWIDTH_PASSES_MIN: usize = 5;

/// Measures decoding at batch 1.
///
/// The bandwidth is measured before every run and after the last with the engine's own threads:
/// it moves from second to second, and so both see the same seconds.
///
/// # Errors
///
/// [`EvalError::Limit`] without repetitions or with less than two new tokens,
/// [`EvalError::Request`] if the engine refuses the lengths, [`EvalError::Engine`] if it fails.
pub fn bench_decode(engine: &mut Engine, bench: &DecodeBench) -> Result<DecodeFigures, EvalError> {
    check_limit("repetitions", bench.repetitions, usize::MAX)?;
    check_limit("num_new - 1", bench.num_new.saturating_sub(1), usize::MAX)?;
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    let mut meter = BandwidthMeter::new(engine.session().cpu()).map_err(SessionError::from)?;
    let passes = BANDWIDTH_PASSES_MIN.div_ceil(bench.repetitions + 1);
    let mut measure = |engine: &Engine| {
        (0..passes).for_each(|_| _ = meter.pass(engine.session().cpu()));
    };
    for _ in 0..bench.repetitions {
        measure(engine);
        let sampling = SamplingParams::greedy();
        let request = Request::new(bench.prompt.clone(), sampling, bench.num_new);
        let request = Request { reuse_prefix: bench.keeps_prompt, ..request };
        let (turn, prefix) = timed(engine, request)?;
        let reads_prompt = prefix.num_cached_tokens == 0;
        let rates = turn.rates(bench.prompt.len());
        if reads_prompt {
            prefill.push(rates.prefill_tokens_per_s);
        }
        decode.push(rates.decode_tokens_per_s);
    }
    measure(engine);
    let bandwidth = meter.bandwidth();
    let weight_bytes = weight_bytes(engine);
    let cache_bytes = cache_bytes(engine, bench);
    let tokens_per_s_median = median(decode.iter().copied()).unwrap_or(f64::NAN);
    let bytes_per_s = tokens_per_s_median * (weight_bytes as f64 + cache_bytes);
    Ok(DecodeFigures {
        threads: engine.session().cpu().threads(),
        num_prompt: bench.prompt.len(),
        num_new: bench.num_new,
        prefill_tokens_per_s: prefill,
        tokens_per_s: decode,
        tokens_per_s_median,
        weight_bytes,
        cache_bytes,
        bytes_per_s,
        bandwidth,
        bandwidth_share: bytes_per_s / (bandwidth.gbs * 1e9),
        speculation: engine.speculation(),
    })
}

/// Runs a request alone, timed to its first token and from there to the last; and how much of its prompt
/// was in the cache.
pub(crate) fn timed(
    engine: &mut Engine,
    request: Request,
) -> Result<(Turn, PrefixOutcome), EvalError> {
    let start = Instant::now();
    let mut first = None;
    let mut on_token = |_| {
        first.get_or_insert_with(Instant::now);
        ControlFlow::Continue(())
    };
    let output = engine.generate(request, &mut on_token)?;
    let end = Instant::now();
    let first = first.expect("a run that ends without an error chose tokens");
    let turn = Turn {
        prefill_s: first.duration_since(start).as_secs_f64(),
        decode_s: end.duration_since(first).as_secs_f64(),
        tokens: output.tokens,
    };
    Ok((turn, output.prefix))
}

/// Bytes of the weights that a step over one token reads.
pub(crate) fn weight_bytes(engine: &Engine) -> u64 {
    let program = engine.session().program(ProgramId(0));
    let stored = |name: &str| engine.session().stored(name).map_or(0, <[u8]>::len);
    program
        .of_class(Class::Weight)
        .map(|(id, weight)| {
            // Of a table that is only looked up, one row.
            let rows = weight.shape.0.first().and_then(|dim| dim.size);
            let rows = rows.filter(|_| !read_whole(program, id)).unwrap_or(1);
            (stored(&weight.name) / rows) as u64
        })
        .sum()
}

/// Whether anything but a table lookup reads a weight.
fn read_whole(program: &Program, weight: ValueId) -> bool {
    let mut readers = program.instrs.iter().filter(|instr| instr.reads().any(|id| id == weight));
    readers.any(|instr| !matches!(instr.op, Op::Embed | Op::PositionEmbed))
}

/// Bytes of keys and values that a decoded token reads, in the mean over the timed tokens.
fn cache_bytes(engine: &Engine, bench: &DecodeBench) -> f64 {
    // The k-th timed step attends to prompt + k tokens, k from 1 to num_new − 1.
    let tokens = bench.prompt.len() as f64 + bench.num_new as f64 / 2.0;
    cache_bytes_per_token(engine) * tokens
}

/// Bytes of keys and values that one token leaves in the cache.
pub(crate) fn cache_bytes_per_token(engine: &Engine) -> f64 {
    let tokens = engine.options().num_blocks * cairn_engine::BLOCK_TOKENS;
    engine.session().bytes().cache as f64 / tokens as f64
}

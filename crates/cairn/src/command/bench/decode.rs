//! `cairn bench decode`: tokens a second of one sequence, against the memory bandwidth.

use std::path::PathBuf;

use cairn_artifacts::safetensors::WeightFolder;
use cairn_engine::{Engine, EngineOptions, EnginePlan};
use cairn_eval::{DecodeBench, DecodeFigures, bench_decode};
use cairn_kernels::bandwidth::Bandwidth;
use cairn_kernels::{CacheType, Encoding};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::Output;
use crate::compute_dtype::ComputeDtypeArgs;
use crate::context::Context;
use crate::figures::{Bytes, Percent, Seconds};
use crate::model_folder::read_spec;
use crate::runs;
use crate::table::Table;

const EXAMPLES: &str = "\
Examples:
  cairn bench decode --weights bf16
  cairn bench decode --model tests/goldens/gpt2 --fresh --json";

/// Measure decoding at batch 1 against the memory bandwidth
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct DecodeArgs {
    /// Folder of a model or a run [default: the last run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Use the description only, with fresh weights
    #[arg(long, requires = "model")]
    fresh: bool,
    /// Encoding of weight matrices in memory
    #[arg(long, value_enum, default_value_t = WeightType::F32)]
    weights: WeightType,
    #[command(flatten)]
    compute: ComputeDtypeArgs,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 32)]
    prompt_tokens: usize,
    /// Tokens to decode
    #[arg(long, value_name = "N", default_value_t = 128)]
    new_tokens: usize,
    /// Runs
    #[arg(long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WeightType {
    F32,
    Bf16,
    Q8,
}

/// Measures and prints.
pub(super) fn run(args: &DecodeArgs, context: &Context) -> anyhow::Result<()> {
    let folder = runs::model_folder(args.model.as_deref())?;
    let spec = read_spec(&folder, context.terminal)?;
    let mut options = EngineOptions::new(1, args.prompt_tokens + args.new_tokens);
    options.cache_type = CacheType::F32;
    options.encoding = match args.weights {
        WeightType::F32 => Encoding::F32,
        WeightType::Bf16 => Encoding::Bf16,
        WeightType::Q8 => Encoding::Q8,
    };
    options.compute = args.compute.compute();
    let plan = EnginePlan::new(&spec, options)?;
    let mut engine = if args.fresh {
        Engine::with_fresh_weights(plan, context.cpu()?, 0)?
    } else {
        Engine::load(plan, context.cpu()?, &WeightFolder::open(&folder)?)?
    };
    let vocab_size = u32::try_from(spec.vocab_size).unwrap_or(u32::MAX);
    // Ids from all over the vocabulary, so that lookups are not all in cache.
    let prompt = (0_u32..).map(|i| i.wrapping_mul(7919) % vocab_size).take(args.prompt_tokens);
    let bench = DecodeBench {
        prompt: prompt.collect(),
        num_new: args.new_tokens,
        repetitions: args.repetitions,
    };
    let figures = bench_decode(&mut engine, &bench)?;
    let settings = json!({
        "model": folder,
        "fresh": args.fresh,
        "encoding": options.encoding,
        "compute": options.compute,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repetitions": args.repetitions,
        "threads": context.threads,
    });
    let text = decode_text(&figures);
    super::print(&args.output, ("decode", settings, serde_json::to_value(&figures)?), text, context)
}

fn decode_text(figures: &DecodeFigures) -> String {
    let mut table = Table::new(&[]).with_text_columns(2);
    let runs = |values: &[f64]| {
        values.iter().map(|value| format!("{value:.1}")).collect::<Vec<_>>().join(" ")
    };
    let median = figures.tokens_per_s_median;
    table.row([&"decode", &format!("{median:.1} tokens/s, {} a token", Seconds(1.0 / median))]);
    table.row([&"runs", &runs(&figures.tokens_per_s)]);
    table.row([&"prefill", &format!("{} tokens/s", runs(&figures.prefill_tokens_per_s))]);
    table.row([&"weights read", &Bytes(figures.weight_bytes as f64)]);
    table.row([&"cache read", &Bytes(figures.cache_bytes)]);
    let share = Percent(figures.bandwidth_share);
    let used = figures.bytes_per_s / 1e9;
    let Bandwidth { gbs, gbs_min, gbs_max, passes, .. } = figures.bandwidth;
    let spread =
        format!("median of {passes} passes between the runs, {gbs_min:.1} to {gbs_max:.1}");
    table.row([&"bandwidth", &format!("{used:.1} of {gbs:.1} GB/s ({spread}): {share}")]);
    table.to_string()
}

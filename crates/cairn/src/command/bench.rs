//! `cairn bench`: how fast this machine is, and how much of it we use.

mod train;
mod tune;

use std::path::PathBuf;

use anyhow::Context as _;
use cairn_artifacts::run::{RunRecord, RunStatus};
use cairn_engine::{Engine, EngineOptions, EnginePlan};
use cairn_eval::{DecodeBench, DecodeFigures, bench_decode};
use cairn_kernels::bandwidth::{Bandwidth, measure_bandwidth};
use cairn_kernels::bench::{BenchRow, Ceilings, bench_kernels};
use cairn_kernels::peak::measure_fma_peak;
use cairn_kernels::{CacheType, Encoding};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::context::Context;
use crate::failure::UserError;
use crate::figures::{Bytes, Percent, Seconds};
use crate::machine_profile;
use crate::model_folder::{ModelFolder, read_spec};
use crate::outside::{code_revision, timestamp};
use crate::progress_line::ProgressLine;
use crate::runs;
use crate::table::Table;

const EXAMPLES: &str = "\
Examples:
  cairn bench bandwidth
  cairn bench kernels matmul
  cairn bench decode --model runs/quickstart --weights bf16 --json
  cairn bench train recipes/llama-12m.toml --against 'python torch_train.py --model small'";

/// Measure this machine, the kernels and whole models
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    Bandwidth(PlainArgs),
    Peak(PlainArgs),
    Kernels(KernelArgs),
    Decode(DecodeArgs),
    Train(train::TrainArgs),
    Tune(tune::TuneArgs),
}

/// How fast a benchmark of the machine itself prints.
#[derive(Clone, Copy, Debug, Args)]
struct Output {
    /// Print a run record as JSON
    #[arg(long)]
    json: bool,
}

/// Measure what the machine itself can do
#[derive(Debug, Args)]
struct PlainArgs {
    #[command(flatten)]
    output: Output,
}

/// Measure kernels over the shapes that matter: GFLOP/s, GB/s, fractions of this machine's peaks
#[derive(Debug, Args)]
struct KernelArgs {
    /// Measure kernels whose name contains this
    #[arg(value_name = "FILTER", default_value = "")]
    filter: String,
    #[command(flatten)]
    output: Output,
}

/// Measure decoding at batch 1 against the memory bandwidth
#[derive(Debug, Args)]
struct DecodeArgs {
    /// Folder of a model or a run [default: the last run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Use the description only, with fresh weights
    #[arg(long, requires = "model")]
    fresh: bool,
    /// Encoding of weight matrices in memory
    #[arg(long, value_enum, default_value_t = WeightType::F32)]
    weights: WeightType,
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
pub(crate) fn run(args: &BenchArgs, context: &Context) -> anyhow::Result<()> {
    match &args.command {
        BenchCommand::Bandwidth(args) => bandwidth(args, context),
        BenchCommand::Peak(args) => peak(args, context),
        BenchCommand::Kernels(args) => kernels(args, context),
        BenchCommand::Decode(args) => decode(args, context),
        BenchCommand::Train(args) => train::run(args, context),
        BenchCommand::Tune(args) => tune::run(args, context),
    }
}

/// Prints a record as JSON, or the text.
fn print(
    output: Output,
    (what, settings, figures): (&str, Value, Value),
    text: String,
    context: &Context,
) -> anyhow::Result<()> {
    if !output.json {
        return context.terminal.print(text);
    }
    let mut record = RunRecord::new(format!("bench {what}"), settings, code_revision());
    record.status = RunStatus::Finished;
    record.finished = Some(timestamp());
    if let Value::Object(figures) = figures {
        record.figures = figures;
    }
    context.terminal.print(serde_json::to_string_pretty(&record)?)
}

fn bandwidth(args: &PlainArgs, context: &Context) -> anyhow::Result<()> {
    let cpu = context.cpu();
    let found = measure_bandwidth(&cpu).context("cannot measure the bandwidth")?;
    let mut profile = machine_profile::load(context);
    profile.keep_bandwidth(found);
    machine_profile::keep(&profile, context);
    let Bandwidth { threads, buffer_bytes, passes, gbs, gbs_min, gbs_max, .. } = found;
    let text = format!(
        "{gbs:.1} GB/s read by {threads} threads from {}, median of {passes} passes \
         ({gbs_min:.1} to {gbs_max:.1})",
        Bytes::of(buffer_bytes)
    );
    let what = ("bandwidth", json!({ "threads": threads }), serde_json::to_value(found)?);
    print(args.output, what, text, context)
}

fn peak(args: &PlainArgs, context: &Context) -> anyhow::Result<()> {
    let found = measure_fma_peak(&context.cpu());
    let mut profile = machine_profile::load(context);
    profile.keep_peak(found);
    machine_profile::keep(&profile, context);
    let text = format!(
        "{:.0} GFLOP/s of f32 multiply-adds by {} threads with {}",
        found.gflops, found.threads, found.isa
    );
    let what = ("peak", json!({ "threads": found.threads }), serde_json::to_value(found)?);
    print(args.output, what, text, context)
}

fn kernels(args: &KernelArgs, context: &Context) -> anyhow::Result<()> {
    let cpu = context.cpu();
    let is_selected = |entry: &cairn_kernels::registry::KernelEntry| {
        entry.isa == cpu.isa() && entry.name().contains(&args.filter)
    };
    if !cairn_kernels::registry::kernels().iter().any(is_selected) {
        return Err(UserError::new(format!("no kernel's name contains '{}'", args.filter))
            .hint("list them: cairn doctor --kernels")
            .into());
    }
    let ceilings = Ceilings::measure(&cpu).context("cannot measure this machine")?;
    let mut rows: Vec<BenchRow> = Vec::new();
    let mut line = ProgressLine::new(context.terminal, "Measuring");
    bench_kernels(&cpu, &ceilings, &args.filter, |row| {
        line.update(0.0, || format!("{} {}", row.kernel, row.shape));
        rows.push(row.clone());
    });
    line.finish();
    let header = ["kernel", "shape", "time", "GFLOP/s", "of peak", "GB/s", "of bandwidth"];
    let mut table = Table::new(&header).with_text_columns(2);
    for row in &rows {
        table.row([
            &row.kernel,
            &row.shape,
            &format!("{:.1} µs", row.seconds * 1e6),
            &format!("{:.1}", row.gflops),
            &Percent(row.fraction_of_peak),
            &format!("{:.1}", row.gbs),
            &Percent(row.fraction_of_bandwidth),
        ]);
    }
    let (flops, bytes) = (ceilings.peak.gflops, ceilings.bandwidth.gbs);
    let text = format!(
        "{} threads, {}: peak {flops:.0} GFLOP/s, bandwidth {bytes:.1} GB/s\n\n{table}",
        cpu.threads(),
        cpu.isa()
    );
    let settings = json!({ "threads": cpu.threads(), "filter": args.filter });
    let figures = json!({ "ceilings": ceilings, "rows": rows });
    print(args.output, ("kernels", settings, figures), text, context)
}

fn decode(args: &DecodeArgs, context: &Context) -> anyhow::Result<()> {
    let folder = runs::model_folder(args.model.as_deref())?;
    let spec = read_spec(&folder)?;
    let mut options = EngineOptions::new(1, args.prompt_tokens + args.new_tokens);
    options.cache_type = CacheType::F32;
    options.encoding = match args.weights {
        WeightType::F32 => Encoding::F32,
        WeightType::Bf16 => Encoding::Bf16,
        WeightType::Q8 => Encoding::Q8,
    };
    let plan = EnginePlan::new(&spec, options)?;
    let mut engine = if args.fresh {
        Engine::with_fresh_weights(plan, context.cpu(), 0)?
    } else {
        Engine::load(plan, context.cpu(), &ModelFolder::open(&folder)?.weights)?
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
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repetitions": args.repetitions,
        "threads": context.threads,
    });
    let text = decode_text(&figures);
    print(args.output, ("decode", settings, serde_json::to_value(&figures)?), text, context)
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

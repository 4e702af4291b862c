//! `cairn bench`: how fast this machine is, and how much of it we use.

mod compare;
mod contract;
mod corpus;
mod decode;
mod encodings;
mod gates;
mod kernels;
mod ledger;
mod serve;
mod train;
mod tune;

use std::path::PathBuf;

use anyhow::Context as _;
use cairn_artifacts::FileError;
use cairn_artifacts::run::{RunRecord, RunStatus};
use cairn_kernels::bandwidth::{Bandwidth, measure_bandwidth};
use cairn_kernels::peak::measure_fma_peak;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::context::Context;
use crate::figures::Bytes;
use crate::machine_profile;
use crate::outside::{code_revision, timestamp};

const EXAMPLES: &str = "\
Examples:
  cairn bench bandwidth
  cairn bench kernels --filter matmul --all-isas --out before.json
  cairn bench gates --json
  cairn bench compare before.json after.json
  cairn bench corpus --input ~/notes
  cairn bench decode --model runs/quickstart --dtype bf16 --json
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
    /// Measure how fast memory is read
    #[command(after_help = "Examples:\n  cairn bench bandwidth --json")]
    Bandwidth(PlainArgs),
    /// Measure how fast numbers are multiplied and added
    #[command(after_help = "Examples:\n  cairn bench peak --threads 1")]
    Peak(PlainArgs),
    Kernels(kernels::KernelArgs),
    Gates(gates::GateArgs),
    Corpus(corpus::CorpusArgs),
    Decode(decode::DecodeArgs),
    Encodings(encodings::EncodingsArgs),
    Train(train::TrainArgs),
    Tune(tune::TuneArgs),
    Contract(contract::ContractArgs),
    Ledger(ledger::LedgerArgs),
    Serve(serve::ServeArgs),
    Compare(compare::CompareArgs),
}

/// Where the results of a benchmark go.
#[derive(Clone, Debug, Args)]
struct Output {
    /// Print a run record as JSON
    #[arg(long)]
    json: bool,
    /// Write the run record to this file too, for `cairn bench compare`
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Measure what the machine itself can do
#[derive(Debug, Args)]
struct PlainArgs {
    #[command(flatten)]
    output: Output,
}

/// Measures and prints.
pub(crate) fn run(args: &BenchArgs, context: &Context) -> anyhow::Result<()> {
    match &args.command {
        BenchCommand::Bandwidth(args) => bandwidth(args, context),
        BenchCommand::Peak(args) => peak(args, context),
        BenchCommand::Kernels(args) => kernels::run(args, context),
        BenchCommand::Gates(args) => gates::run(args, context),
        BenchCommand::Corpus(args) => corpus::run(args, context),
        BenchCommand::Decode(args) => decode::run(args, context),
        BenchCommand::Encodings(args) => encodings::run(args, context),
        BenchCommand::Train(args) => train::run(args, context),
        BenchCommand::Tune(args) => tune::run(args, context),
        BenchCommand::Contract(args) => contract::run(args, context),
        BenchCommand::Ledger(args) => ledger::run(args, context),
        BenchCommand::Serve(args) => serve::run(args, context),
        BenchCommand::Compare(args) => compare::run(args, context),
    }
}

/// Prints a record as JSON, or the text, and writes the record where that is asked for.
fn print(
    output: &Output,
    (what, settings, figures): (&str, Value, Value),
    text: String,
    context: &Context,
) -> anyhow::Result<()> {
    let mut record = RunRecord::new(format!("bench {what}"), settings, code_revision());
    record.status = RunStatus::Finished;
    record.finished = Some(timestamp());
    if let Value::Object(figures) = figures {
        record.figures = figures;
    }
    if let Some(path) = &output.out {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(FileError::on("create", folder))?;
        }
        record.save(path)?;
        context.terminal.step("Wrote", path.display());
    }
    if output.json {
        return context.terminal.print(serde_json::to_string_pretty(&record)?);
    }
    context.terminal.print(text)
}

fn bandwidth(args: &PlainArgs, context: &Context) -> anyhow::Result<()> {
    let cpu = context.cpu()?;
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
    print(&args.output, what, text, context)
}

fn peak(args: &PlainArgs, context: &Context) -> anyhow::Result<()> {
    let found = measure_fma_peak(&context.cpu()?);
    let mut profile = machine_profile::load(context);
    profile.keep_peak(found);
    machine_profile::keep(&profile, context);
    let text = format!(
        "{:.0} GFLOP/s of f32 multiply-adds by {} threads with {}",
        found.gflops, found.threads, found.isa
    );
    let what = ("peak", json!({ "threads": found.threads }), serde_json::to_value(found)?);
    print(&args.output, what, text, context)
}

/// Least, median and greatest.
fn spread(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]]
}

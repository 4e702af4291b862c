//! `cairn bench decode`: tokens a second of one sequence, against the memory bandwidth.

use std::path::{Path, PathBuf};
use std::time::Instant;

use cairn_artifacts::machine::ProcessMemory;
use cairn_engine::{Engine, EngineOptions, EnginePlan};
use cairn_eval::{DecodeBench, DecodeFigures, bench_decode};
use cairn_kernels::bandwidth::Bandwidth;
use cairn_spec::ModelSpec;
use clap::Args;
use serde_json::{Value, json};

use super::Output;
use crate::command::generate::CachedType;
use crate::compute_dtype::ComputeDtypeArgs;
use crate::context::Context;
use crate::figures::{Bytes, Percent, Seconds};
use crate::model_folder::{ModelFolder, read_spec};
use crate::runs;
use crate::speculative::{SpeculativeArgs, summary};
use crate::table::Table;
use crate::weight_type::WeightTypeArgs;

const EXAMPLES: &str = "\
Examples:
  cairn bench decode --dtype bf16
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
    #[command(flatten)]
    weights: WeightTypeArgs,
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
    /// Read the prompt once, for all runs
    #[arg(long)]
    keep_prompt: bool,
    /// Type of cached keys and values
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = CachedType::F32)]
    kv_cache_dtype: CachedType,
    #[command(flatten)]
    speculative: SpeculativeArgs,
    #[command(flatten)]
    output: Output,
}

/// Measures and prints.
pub(super) fn run(args: &DecodeArgs, context: &Context) -> anyhow::Result<()> {
    let folder = runs::model_folder(args.model.as_deref())?;
    let (spec, mut engine, load) = load(args, &folder, context)?;
    let options = *engine.options();
    let vocab_size = u32::try_from(spec.vocab_size).unwrap_or(u32::MAX);
    // Ids from all over the vocabulary, so that lookups are not all in cache.
    let prompt = (0_u32..).map(|i| i.wrapping_mul(7919) % vocab_size).take(args.prompt_tokens);
    let bench = DecodeBench {
        prompt: prompt.collect(),
        num_new: args.new_tokens,
        repetitions: args.repetitions,
        keeps_prompt: args.keep_prompt,
    };
    let measured = bench_decode(&mut engine, &bench)?;
    let mut figures = serde_json::to_value(&measured)?;
    if let Value::Object(figures) = &mut figures {
        figures.insert("load".to_owned(), load);
    }
    let settings = json!({
        "model": folder,
        "fresh": args.fresh,
        "encoding": options.encoding,
        "compute": options.compute,
        "kv_cache_dtype": options.cache_type,
        "speculative": options.speculative,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repetitions": args.repetitions,
        "threads": context.threads,
    });
    super::print(&args.output, ("decode", settings, figures), decode_text(&measured), context)
}

/// An engine, and what loading it took: seconds, bytes planned, and the most bytes of this process
/// until then, pages of mapped files included.
fn load(
    args: &DecodeArgs,
    folder: &Path,
    context: &Context,
) -> anyhow::Result<(ModelSpec, Engine, Value)> {
    let mut options = EngineOptions::new(1, args.prompt_tokens + args.new_tokens);
    options.cache_type = args.kv_cache_dtype.cache_type();
    args.speculative.apply(&mut options);
    options.compute = args.compute.compute();
    let cpu = context.cpu()?;
    let begin = Instant::now();
    let (spec, mut engine) = if args.fresh {
        let spec = read_spec(folder, context.terminal)?;
        options.encoding = args.weights.dtype.storage_of(&spec, None)?.encoding;
        let engine = Engine::with_fresh_weights(EnginePlan::new(&spec, options)?, cpu, 0)?;
        (spec, engine)
    } else {
        let model = ModelFolder::open(folder, context.terminal)?;
        let storage = args.weights.dtype.storage(&model, options.compute, context)?;
        let engine = model.engine(options, &storage, cpu)?;
        (model.spec, engine)
    };
    args.speculative.attach(&mut engine, context)?;
    let seconds = begin.elapsed().as_secs_f64();
    let load = json!({
        "seconds": seconds,
        "planned_bytes": engine.session().bytes().total(),
        "peak_bytes": ProcessMemory::read().map(|memory| memory.peak_bytes),
    });
    Ok((spec, engine, load))
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
    if let Some(guessed) = summary(figures.speculation.as_ref()) {
        table.row([&"guessed", &guessed]);
    }
    table.row([&"bandwidth", &format!("{used:.1} of {gbs:.1} GB/s ({spread}): {share}")]);
    table.to_string()
}

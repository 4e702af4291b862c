//! `cairn bench train`: training steps instruction by instruction, and against a peer.
//!
//! Against a peer, both sides run as processes of their own, in turn, so that neither's memory or
//! threads touch the other and the machine's moods fall on both. A peer is any command that prints
//! a line of JSON with `tok_s` and, for memory, `peak_rss_mb`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;
use cairn_artifacts::machine::ProcessMemory;
use cairn_kernels::bench::{Ceilings, Limit};
use cairn_train::{StepPart, bench_steps};
use clap::Args;
use serde_json::{Value, json};

use super::{Output, spread};
use crate::context::Context;
use crate::failure::UserError;
use crate::figures::{Bytes, Percent, Seconds};
use crate::outside::Outside;
use crate::progress_line::ProgressLine;
use crate::signals::StopFlag;
use crate::table::Table;
use crate::training::Job;

/// Instructions shown in the table; the JSON record has all.
const ROWS_SHOWN: usize = 14;
/// Characters of a bar that is a whole step.
const BAR_WIDTH: usize = 40;

const EXAMPLES: &str = "\
Examples:
  cairn bench train recipes/llama-12m.toml --steps 3
  cairn bench train recipes/llama-12m.toml --against 'python torch_train.py --model small'";

/// Time training steps of a recipe, instruction by instruction
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct TrainArgs {
    /// The recipe: a `.toml`, `.yaml` or `.json` file
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Changes to the recipe, as section.key=value
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Steps timed, after one that is not
    #[arg(long, value_name = "N", default_value_t = 5)]
    steps: usize,
    /// Run in turn with this command, which prints a line of JSON with `tok_s` and `peak_rss_mb`
    #[arg(long, value_name = "COMMAND")]
    against: Option<String>,
    /// Turns of the two sides
    #[arg(long, value_name = "N", default_value_t = 5, requires = "against")]
    rounds: usize,
    #[command(flatten)]
    output: Output,
}

/// Times and prints.
pub(super) fn run(args: &TrainArgs, context: &Context) -> anyhow::Result<()> {
    match &args.against {
        None => alone(args, context),
        Some(peer) => against(args, peer, context),
    }
}

fn settings(args: &TrainArgs, context: &Context) -> Value {
    json!({
        "recipe": args.recipe,
        "overrides": args.overrides,
        "steps": args.steps,
        "against": args.against,
        "threads": context.threads,
    })
}

fn alone(args: &TrainArgs, context: &Context) -> anyhow::Result<()> {
    if args.steps == 0 {
        return Err(UserError::new("--steps is 0, so there is nothing to time").into());
    }
    let job = Job::read(&args.recipe, &args.overrides, context)?;
    let plan = job.plan(None)?;
    let outside = Outside::new(StopFlag::default());
    let figures = bench_steps(&job.recipe, &plan, (context.cpu()?, &outside), args.steps)?;
    let memory = ProcessMemory::read().context("cannot read this process's memory")?;
    // After everything else: a gigabyte that is read has no part in the run's own memory.
    let ceilings = Ceilings::measure(&context.cpu()?).context("cannot measure this machine")?;
    let text = format!(
        "{:.0} tokens/s, {:.1} GFLOP/s of model arithmetic ({} of {:.0}), {} a step of {} tokens\n\
         {} planned, {} of anonymous memory, {} resident at most\n\n{}",
        figures.tokens_per_s,
        figures.model_gflops,
        Percent(figures.model_gflops / ceilings.peak.gflops),
        ceilings.peak.gflops,
        Seconds(figures.tokens as f64 / figures.tokens_per_s),
        figures.tokens,
        Bytes(plan.bytes.total() as f64),
        Bytes(figures.anonymous_bytes.unwrap_or_default() as f64),
        Bytes(memory.peak_bytes as f64),
        parts_table(&figures.parts, &ceilings),
    );
    let mut object = serde_json::to_value(&figures)?;
    if let Value::Object(object) = &mut object {
        object.insert("tok_s".into(), json!(figures.tokens_per_s));
        object.insert("peak_rss_mb".into(), json!(memory.peak_bytes >> 20));
        object.insert("predicted_bytes".into(), json!(plan.bytes.total()));
        object.insert("ceilings".into(), json!(ceilings));
    }
    super::print(&args.output, ("train", settings(args, context), object), text, context)
}

/// The slowest instructions, the share of their ceiling that they reach, and of the step that they
/// take, as a number and as a bar.
fn parts_table(parts: &[StepPart], ceilings: &Ceilings) -> Table {
    let header = ["instruction", "n", "time", "GFLOP/s", "GB/s", "reached", "of", "of step", ""];
    let mut table = Table::new(&header).with_text_columns(1);
    for part in parts.iter().take(ROWS_SHOWN) {
        // Costs and time of a whole step: speeds times seconds.
        let [flops, bytes] = [part.gflops, part.gbs].map(|speed| speed * 1e9 * part.seconds);
        let (limit, fraction) = ceilings.roofline(flops, bytes, part.seconds);
        let limit = if limit == Limit::Peak { "peak" } else { "bandwidth" };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 40")]
        let bar = "█".repeat((part.share * BAR_WIDTH as f64).round() as usize);
        table.row([
            &part.name,
            &part.count,
            &Seconds(part.seconds),
            &format!("{:.1}", part.gflops),
            &format!("{:.1}", part.gbs),
            &Percent(fraction),
            &limit,
            &Percent(part.share),
            &format!("{bar:<BAR_WIDTH$}"),
        ]);
    }
    table
}

/// Speed and memory of one turn of one side.
#[derive(Clone, Copy, Debug)]
struct Turn {
    tokens_per_s: f64,
    peak_rss_mb: f64,
}

fn against(args: &TrainArgs, peer: &str, context: &Context) -> anyhow::Result<()> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut line = ProgressLine::new(context.terminal, "Measuring");
    for round in 0..args.rounds {
        let share = round as f64 / args.rounds as f64;
        line.update(share, || format!("round {} of {}: this side", round + 1, args.rounds));
        ours.push(turn(own_command(args, context)?)?);
        line.update(share, || format!("round {} of {}: the peer", round + 1, args.rounds));
        let mut command = Command::new("sh");
        command.args(["-c", peer]);
        theirs.push(turn(command)?);
    }
    line.finish();
    let speed =
        |turns: &[Turn]| spread(&turns.iter().map(|turn| turn.tokens_per_s).collect::<Vec<_>>());
    let memory =
        |turns: &[Turn]| spread(&turns.iter().map(|turn| turn.peak_rss_mb).collect::<Vec<_>>());
    let (own_speed, peer_speed) = (speed(&ours), speed(&theirs));
    let (own_memory, peer_memory) = (memory(&ours), memory(&theirs));
    let ratio = own_speed[1] / peer_speed[1];
    let memory_ratio = own_memory[1] / peer_memory[1];
    let mut table =
        Table::new(&["", "tokens/s", "min", "max", "MiB resident at most"]).with_text_columns(1);
    for (name, speed, memory) in
        [("cairn", own_speed, own_memory), ("peer", peer_speed, peer_memory)]
    {
        let [low, middle, high] = speed.map(|value| format!("{value:.0}"));
        table.row([&name, &middle, &low, &high, &format!("{:.0}", memory[1])]);
    }
    let text = format!(
        "{table}\n{ratio:.2} times the peer's tokens/s with {memory_ratio:.2} of its memory \
         (medians of {} turns each)",
        args.rounds
    );
    let runs = |turns: &[Turn]| -> Value {
        turns
            .iter()
            .map(|t| json!({"tok_s": t.tokens_per_s, "peak_rss_mb": t.peak_rss_mb}))
            .collect()
    };
    let figures = json!({
        "ratio": ratio,
        "memory_ratio": memory_ratio,
        "cairn": runs(&ours),
        "peer": runs(&theirs),
    });
    super::print(&args.output, ("train", settings(args, context), figures), text, context)
}

/// This side of a turn: the same benchmark, alone in a process.
fn own_command(args: &TrainArgs, context: &Context) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    command.args(["bench", "train"]).arg(&args.recipe).args(&args.overrides);
    command.args(["--steps", &args.steps.to_string(), "--json"]);
    command.arg(format!("run.threads={}", context.threads));
    Ok(command)
}

fn turn(mut command: Command) -> anyhow::Result<Turn> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let bad = |what: &str| {
        let error = String::from_utf8_lossy(&output.stderr);
        UserError::new(format!("{command:?} {what}"))
            .hint(format!("its last words: {}", error.lines().last().unwrap_or("none")))
    };
    if !output.status.success() {
        return Err(bad("failed").into());
    }
    // One object over several lines (ours), or one line of its own (a script's).
    let whole = serde_json::from_str::<Value>(&text).ok();
    let object = whole
        .or_else(|| text.lines().rev().find_map(|line| serde_json::from_str(line).ok()))
        .ok_or_else(|| bad("printed no JSON"))?;
    let figures = object.get("figures").unwrap_or(&object);
    let number = |key: &str| figures.get(key).and_then(Value::as_f64);
    let tokens_per_s = number("tok_s").ok_or_else(|| bad("printed no tok_s"))?;
    let peak_rss_mb = number("peak_rss_mb").ok_or_else(|| bad("printed no peak_rss_mb"))?;
    Ok(Turn { tokens_per_s, peak_rss_mb })
}

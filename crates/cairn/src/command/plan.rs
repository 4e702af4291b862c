//! `cairn plan`: what a run will take, before it starts.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::context::Context;
use crate::outside::Outside;
use crate::plan_text::plan_text;
use crate::signals::StopFlag;
use crate::training::Job;

const EXAMPLES: &str = "\
Examples:
  cairn plan recipes/llama-12m.toml
  cairn plan recipes/llama-12m.toml model.num_hidden_layers=12 budget.tokens=50M
  cairn plan recipes/gpt2-124m.toml run.memory_limit=2GiB --no-pace --json";

/// Show what a run will take: bytes, FLOPs, minutes
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PlanArgs {
    /// The recipe: a `.toml`, `.yaml` or `.json` file
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Changes to the recipe, as section.key=value
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Do not measure how fast this machine is; the plan then says nothing about time
    #[arg(long)]
    no_pace: bool,
    /// Print the resolved recipe instead of the plan
    #[arg(long, conflicts_with = "json")]
    print_recipe: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Plans and prints.
pub(crate) fn run(args: &PlanArgs, context: &Context) -> anyhow::Result<()> {
    let job = Job::read(&args.recipe, &args.overrides, context)?;
    if args.print_recipe {
        return context.terminal.print_piece(&job.recipe.to_toml());
    }
    // Refused plans are refused before anything is measured.
    let mut plan = job.plan(None)?;
    if !args.no_pace {
        plan = job.plan(Some(job.pace(&Outside::new(StopFlag::default()), context)?))?;
    }
    if args.json {
        let object = json!({ "recipe": job.recipe.to_file(), "plan": plan });
        return context.terminal.print(serde_json::to_string_pretty(&object)?);
    }
    context.terminal.print(plan_text(&job, &plan))
}

//! `cairn train`: a recipe run to its end, or resumed.

use std::path::{Path, PathBuf};

use cairn_artifacts::Hash;
use cairn_artifacts::checkpoint::TOKENIZER_FILE;
use cairn_artifacts::run::RunFolder;
use cairn_data::corpus::Corpus;
use clap::Args;
use serde_json::json;

use crate::context::Context;
use crate::failure::UserError;
use crate::figures::{Bytes, Count};
use crate::outside::Outside;
use crate::runs;
use crate::signals::StopFlag;
use crate::training::{self, Job, RunOptions};

const EXAMPLES: &str = "\
Ctrl-C finishes the step, saves and ends; the same command goes on from there. A second Ctrl-C ends
at once, with what was saved last.

A change sets its own key and leaves the recipe's others; section.key=null takes a key out, so that
a budget in steps replaces one in tokens.

Examples:
  cairn train recipes/llama-12m.toml data.corpus=data/notes
  cairn train recipes/llama-12m.toml run.name=wide model.hidden_size=512 budget.tokens=20M
  cairn train recipes/llama-12m.toml budget.tokens=null budget.steps=100
  cairn train recipes/llama-12m.toml --resume
  cairn train recipes/continue.toml --initial DIR                # any Hugging Face folder
  cairn train recipes/lora.toml model.initial=DIR adapter.r=16   # an adapter beside it";

/// Train a model by a recipe, or go on with a run
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TrainArgs {
    /// The recipe: a `.toml`, `.yaml` or `.json` file
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Changes to the recipe, as section.key=value
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Folder of the run [default: runs/ and the recipe's run.name]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Go on with an earlier run; refuse to begin a new one
    #[arg(long)]
    resume: bool,
    /// Begin with the weights of this model folder instead of fresh ones (`model.initial`); a run that
    /// goes on takes only the folder it began with
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    initial: Option<PathBuf>,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Trains.
pub(crate) fn run(args: &TrainArgs, context: &Context) -> anyhow::Result<()> {
    let outside = Outside::new(StopFlag::listen()?);
    let initial = args.initial.as_deref();
    let job = Job::read_from(&args.recipe, &args.overrides, initial, context)?;
    let corpus = job.corpus()?;
    let folder = args.output.clone().unwrap_or_else(|| runs::folder_of(&job.recipe.run.name));
    let initial = job.recipe.initial.as_deref().map(Path::new);
    if let Some(initial) = initial {
        warn_of_other_tokenizer(initial, &corpus, context)?;
    }
    let latest = RunFolder::new(&folder).checkpoints().latest()?;
    if args.resume && latest.is_none() {
        return Err(UserError::new(format!(
            "{} has no checkpoint to go on from",
            folder.display()
        ))
        .hint("leave --resume out to begin a new run")
        .into());
    }
    let plan = job.plan(None)?;
    let total_steps = plan.total_steps;
    context.terminal.step(
        "Planned",
        format_args!(
            "{} parameters, {total_steps} steps of {} tokens, {} of memory",
            Count(plan.parameters as f64),
            plan.tokens_per_step,
            Bytes(plan.bytes.total() as f64)
        ),
    );
    context.terminal.step("Learning", format_args!("from {}", job.recipe.data.corpus));
    drop(corpus);
    let options = RunOptions { folder: &folder, initial };
    let trained = training::train(&job, plan, options, &outside, context)?;
    training::conclude(&trained, total_steps, &folder, context);
    if args.json {
        return print_json(&trained, &folder, context);
    }
    Ok(())
}

/// The rows of an embedding mean what another tokenizer's tokens were.
fn warn_of_other_tokenizer(
    initial: &Path,
    corpus: &Corpus,
    context: &Context,
) -> anyhow::Result<()> {
    let path = initial.join(TOKENIZER_FILE);
    if !path.exists() {
        return Ok(());
    }
    let (found, expected) = (Hash::of_file(&path)?, corpus.manifest().tokenizer.file.blake3);
    if found != expected {
        context.terminal.warn(format_args!(
            "the weights of {} were trained with tokenizer {found}, the corpus was made with \
             {expected}",
            initial.display()
        ));
    }
    Ok(())
}

fn print_json(trained: &training::Trained, folder: &Path, context: &Context) -> anyhow::Result<()> {
    let object = json!({
        "run": folder,
        "outcome": trained.outcome,
        "state_hash": trained.state_hash,
    });
    context.terminal.print(serde_json::to_string_pretty(&object)?)
}

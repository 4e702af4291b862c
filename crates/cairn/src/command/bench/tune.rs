//! `cairn bench tune`: the fastest cut of every product of a recipe, measured once and kept.

use std::path::PathBuf;

use clap::Args;

use crate::context::Context;
use crate::failure::UserError;
use crate::machine_profile;
use crate::training::Job;

const EXAMPLES: &str = "\
Examples:
  cairn bench tune recipes/llama-12m.toml";

/// Measure which cut of each product is fastest here, and keep the choices; bits stay the same
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct TuneArgs {
    /// The recipe whose products are measured
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Changes to the recipe, as section.key=value
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

/// Measures, prints every choice and stores all of them.
pub(super) fn run(args: &TuneArgs, context: &Context) -> anyhow::Result<()> {
    let job = Job::read(&args.recipe, &args.overrides, context)?;
    let plan = job.plan(None)?;
    let tokens = plan.shape.micro_batch_size * job.recipe.data.seq_len;
    let path = machine_profile::path(context).ok_or_else(|| {
        UserError::new("there is no folder to keep the choices in")
            .hint("name one: CAIRN_CACHE_DIR=FOLDER")
    })?;
    let cpu = cairn_kernels::Cpu::try_new(context.isa, job.recipe.run.threads)?;
    let mut profile = machine_profile::load(context);
    let cases = machine_profile::cases(&plan.programs().train, tokens);
    // Asked for by name, they are measured anew and without haste.
    profile.tuning.forget(&cpu, &cases);
    let mut lines = Vec::new();
    profile.tuning.measure(&cpu, &cases, |line| lines.push(line.to_owned()));
    machine_profile::keep(&profile, context);
    for line in lines {
        context.terminal.print(line)?;
    }
    let count = profile.tuning.len();
    context.terminal.step("Kept", format_args!("{count} choices in {}", path.display()));
    Ok(())
}

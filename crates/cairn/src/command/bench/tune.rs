//! `cairn bench tune`: the fastest cut of every product of a recipe, measured once and kept.

use std::path::PathBuf;

use cairn_artifacts::FileError;
use clap::Args;

use crate::context::Context;
use crate::failure::UserError;
use crate::training::Job;
use crate::tuning;

/// Measure which cut of each product is fastest here, and keep the choices; bits stay the same
#[derive(Debug, Args)]
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
    let path = tuning::path(context).ok_or_else(|| {
        UserError::new("there is no folder to keep the choices in")
            .hint("name one: CAIRN_CACHE_DIR=FOLDER")
    })?;
    let cpu = cairn_kernels::Cpu::detect(job.recipe.run.threads);
    let mut tuning = tuning::load(context);
    let cases = tuning::cases(&plan.programs().train, tokens);
    let mut lines = Vec::new();
    tuning.measure(&cpu, &cases, |line| lines.push(line.to_owned()));
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(FileError::on("create", folder))?;
    }
    tuning.save(&path)?;
    for line in lines {
        context.terminal.print(line)?;
    }
    context.terminal.step("Kept", format_args!("{} choices in {}", tuning.len(), path.display()));
    Ok(())
}

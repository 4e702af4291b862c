//! The commands: for each its arguments and what it does.

pub(crate) mod completions;
pub(crate) mod doctor;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod logits;

use crate::args::Command;
use crate::context::Context;

/// Runs a command to its end.
pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<()> {
    match command {
        Command::Generate(args) => generate::run(&args, context),
        Command::Inspect(args) => inspect::run(&args, context),
        Command::Logits(args) => logits::run(&args, context),
        Command::Doctor(args) => doctor::run(&args, context),
        Command::Completions(args) => completions::run(&args, context),
    }
}

//! The commands: for each its arguments and what it does.

pub(crate) mod adapter;
pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod corpus;
pub(crate) mod doctor;
pub(crate) mod embed;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod fill_mask;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod logits;
pub(crate) mod pack;
pub(crate) mod plan;
pub(crate) mod quickstart;
pub(crate) mod serve;
pub(crate) mod tokenizer;
pub(crate) mod train;
pub(crate) mod unpack;
pub(crate) mod verify;

use crate::args::Command;
use crate::context::Context;

/// Runs a command to its end.
pub(crate) fn run(command: Command, context: &Context) -> anyhow::Result<()> {
    match command {
        Command::Quickstart(args) => quickstart::run(&args, context),
        Command::Corpus(args) => corpus::run(&args, context),
        Command::Tokenizer(args) => tokenizer::run(&args, context),
        Command::Plan(args) => plan::run(&args, context),
        Command::Train(args) => train::run(&args, context),
        Command::Eval(args) => eval::run(&args, context),
        Command::Adapter(args) => adapter::run(&args, context),
        Command::Bench(args) => bench::run(&args, context),
        Command::Generate(args) => generate::run(&args, context),
        Command::Chat(args) => chat::run(&args, context),
        Command::Serve(args) => serve::run(&args, context),
        Command::Embed(args) => embed::run(&args, context),
        Command::FillMask(args) => fill_mask::run(&args, context),
        Command::Inspect(args) => inspect::run(&args, context),
        Command::Pack(args) => pack::run(&args, context),
        Command::Unpack(args) => unpack::run(&args, context),
        Command::Verify(args) => verify::run(&args, context),
        Command::Export(args) => export::run(&args, context),
        Command::Logits(args) => logits::run(&args, context),
        Command::Doctor(args) => doctor::run(&args, context),
        Command::Completions(args) => completions::run(&args, context),
    }
}

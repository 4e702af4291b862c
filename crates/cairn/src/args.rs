//! The command line as data: global flags and one variant for every command.
//!
//! Each command's own arguments are declared beside its code, in `command/`.

use cairn_kernels::Isa;
use clap::builder::Styles;
use clap::builder::styling::{AnsiColor, Effects};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::command::{
    adapter, bench, chat, completions, corpus, doctor, embed, eval, export, fill_mask, generate,
    inspect, logits, pack, plan, quickstart, serve, tokenizer, train, unpack, verify,
};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().effects(Effects::BOLD))
    .usage(AnsiColor::Green.on_default().effects(Effects::BOLD))
    .literal(AnsiColor::Cyan.on_default().effects(Effects::BOLD))
    .placeholder(AnsiColor::Cyan.on_default());

const EXAMPLES: &str = "\
Examples:
  cairn quickstart
  cairn generate --prompt 'fn main() {'
  cairn train recipes/llama-12m.toml data.corpus=data/mine";

/// Text in, a trained model that answers out.
#[derive(Debug, Parser)]
#[command(
    name = "cairn",
    version,
    styles = STYLES,
    max_term_width = 100,
    after_help = EXAMPLES,
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Threads to compute with; results do not depend on it [default: all, or `CAIRN_THREADS`]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options")]
    pub(crate) threads: Option<usize>,
    /// Instruction set to compute with; results do not depend on it [default: the widest there is]
    #[arg(long, global = true, value_enum, value_name = "ISA", help_heading = "Global options")]
    pub(crate) isa: Option<InstructionSet>,
    /// Print results, warnings and errors only
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub(crate) quiet: bool,
}

/// An instruction set that every kernel exists for: [`Isa`] as a flag says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum InstructionSet {
    Scalar,
    Avx2,
    Avx512,
}

impl From<InstructionSet> for Isa {
    fn from(set: InstructionSet) -> Self {
        match set {
            InstructionSet::Scalar => Self::Scalar,
            InstructionSet::Avx2 => Self::Avx2,
            InstructionSet::Avx512 => Self::Avx512,
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Quickstart(quickstart::QuickstartArgs),
    Corpus(corpus::CorpusArgs),
    Tokenizer(tokenizer::TokenizerArgs),
    Plan(plan::PlanArgs),
    Train(train::TrainArgs),
    Eval(eval::EvalArgs),
    Generate(generate::GenerateArgs),
    Chat(chat::ChatArgs),
    Serve(serve::ServeArgs),
    Embed(embed::EmbedArgs),
    FillMask(fill_mask::FillMaskArgs),
    Inspect(inspect::InspectArgs),
    Pack(pack::PackArgs),
    Unpack(unpack::UnpackArgs),
    Verify(verify::VerifyArgs),
    Export(export::ExportArgs),
    Adapter(adapter::AdapterArgs),
    Logits(logits::LogitsArgs),
    Bench(bench::BenchArgs),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
}

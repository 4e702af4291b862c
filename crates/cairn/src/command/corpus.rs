//! `cairn corpus`: text to a corpus folder, and what such a folder holds.

use std::path::{Path, PathBuf};

use cairn_artifacts::atomic::drafts_of;
use cairn_data::corpus::{
    BuildReport, BuildSettings, Corpus, Existing, Manifest, Share, Split, build,
};
use cairn_data::tokenizer::Tokenizer;
use clap::{Args, Subcommand};

use crate::context::Context;
use crate::figures::{Bytes, Count};
use crate::progress_line::ProgressLine;
use crate::signals::StopFlag;
use crate::table::Table;
use crate::text_input::{TextArgs, interrupted, show, train_tokenizer};

const BUILD_EXAMPLES: &str = "\
Examples:
  cairn corpus build --input ~/notes --output data/notes
  cairn corpus build --output data/crates --license-allow MIT,Apache-2.0
  cairn corpus build --input a.jsonl --tokenizer tokenizer.json --output data/a";

const STATS_EXAMPLES: &str = "\
Examples:
  cairn corpus stats data/notes
  cairn corpus stats data/notes --json";

const VERIFY_EXAMPLES: &str = "\
Examples:
  cairn corpus verify data/notes";

const EXAMPLES: &str = "\
Examples:
  cairn corpus build --input ~/notes --output data/notes
  cairn corpus stats data/notes
  cairn corpus verify data/notes";

/// Groups and licenses shown before the rest is summed up.
const SHARES_SHOWN: usize = 12;

/// Build a corpus from text, look at one, check one
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CorpusArgs {
    #[command(subcommand)]
    command: CorpusCommand,
}

#[derive(Debug, Subcommand)]
enum CorpusCommand {
    Build(BuildArgs),
    Stats(StatsArgs),
    Verify(VerifyArgs),
}

/// Tokenize text into a corpus folder
#[derive(Debug, Args)]
#[command(after_help = BUILD_EXAMPLES)]
struct BuildArgs {
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Replace the folder if it exists
    #[arg(long)]
    replace: bool,
    /// A `tokenizer.json` [default: one is trained on the text]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Tokens of the tokenizer that is trained
    #[arg(long, value_name = "N", default_value_t = 4096, conflicts_with = "tokenizer")]
    vocab_size: u32,
    /// Tokens after which a new shard begins
    #[arg(long, value_name = "N", default_value_t = 128 << 20)]
    shard_tokens: u64,
    #[command(flatten)]
    text: TextArgs,
}

/// Show what a corpus holds
#[derive(Debug, Args)]
#[command(after_help = STATS_EXAMPLES)]
struct StatsArgs {
    /// The corpus folder
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Print the manifest as JSON
    #[arg(long)]
    json: bool,
}

/// Check every byte of a corpus against its manifest
#[derive(Debug, Args)]
#[command(after_help = VERIFY_EXAMPLES)]
struct VerifyArgs {
    /// The corpus folder
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Does what was asked.
pub(crate) fn run(args: &CorpusArgs, context: &Context) -> anyhow::Result<()> {
    match &args.command {
        CorpusCommand::Build(args) => run_build(args, context),
        CorpusCommand::Stats(args) => stats(args, context),
        CorpusCommand::Verify(args) => verify(&args.folder, context),
    }
}

fn run_build(args: &BuildArgs, context: &Context) -> anyhow::Result<()> {
    let stop = StopFlag::listen()?;
    let mut settings = BuildSettings::new(args.output.clone());
    settings.threads = context.threads;
    settings.shard_tokens_max = args.shard_tokens;
    if args.replace {
        settings.existing = Existing::Replace;
    }
    // Before the work: reading and training a tokenizer may take minutes.
    settings.check_folder()?;
    let given = args.tokenizer.as_deref().map(Tokenizer::load).transpose()?;
    let scan = args.text.scan(context, &stop)?;
    let tokenizer = match given {
        Some(tokenizer) => tokenizer,
        None => train_tokenizer(&scan, args.vocab_size, context)?,
    };
    let report = build_corpus(&scan, &tokenizer, &settings, (context, &stop))?;
    context.terminal.print(summary(&report.manifest))
}

/// Builds with a progress line and says what was left out.
pub(crate) fn build_corpus(
    scan: &cairn_data::corpus::Scan,
    tokenizer: &Tokenizer,
    settings: &BuildSettings,
    (context, stop): (&Context, &StopFlag),
) -> anyhow::Result<BuildReport> {
    for draft in drafts_of(&settings.folder) {
        context.terminal.warn(format_args!(
            "{} was left by a build that was killed, unless one is running; it can be removed then",
            draft.display()
        ));
    }
    let mut line = ProgressLine::new(context.terminal, "Tokenizing");
    let built = build(scan, tokenizer, settings, &mut |progress| show(&mut line, progress, stop));
    line.finish();
    let report = built.map_err(interrupted)?;
    let skips = report.skips.summary();
    if !skips.is_empty() {
        let list = settings.folder.join(&report.manifest.skipped.list.file);
        context.terminal.step("Left out", format_args!("{skips}; see {}", list.display()));
    }
    context.terminal.step("Built", format_args!("{}", settings.folder.display()));
    Ok(report)
}

fn stats(args: &StatsArgs, context: &Context) -> anyhow::Result<()> {
    let corpus = Corpus::open(&args.folder)?;
    let manifest = corpus.manifest();
    if args.json {
        return context.terminal.print(serde_json::to_string_pretty(manifest)?);
    }
    let shares = [("license", &manifest.licenses), ("group", &manifest.groups)];
    let tables = shares.map(|(name, shares)| share_table(name, shares));
    let mut text = format!("{}\n\n{}", summary(manifest), tables.join("\n\n"));
    if !manifest.skipped.counts.is_empty() {
        let mut table = Table::new(&["left out", "files or records"]);
        for (reason, count) in &manifest.skipped.counts {
            table.row([reason, count]);
        }
        text += &format!("\n\n{table}");
    }
    context.terminal.print(text)
}

fn verify(folder: &Path, context: &Context) -> anyhow::Result<()> {
    let corpus = Corpus::open(folder)?;
    corpus.verify()?;
    let files = corpus.manifest().files().count();
    context.terminal.print(format_args!("{files} files are as the manifest says"))
}

fn summary(manifest: &Manifest) -> String {
    let mut table = Table::new(&["", "documents", "tokens", "text", "bytes per token"]);
    for split in Split::ALL {
        let counts = manifest.split(split).counts;
        let ratio = counts.text_bytes as f64 / counts.tokens.max(1) as f64;
        table.row([
            &split,
            &counts.documents,
            &Count(counts.tokens as f64),
            &Bytes(counts.text_bytes as f64),
            &format!("{ratio:.2}"),
        ]);
    }
    let vocab_size = manifest.tokenizer.vocab_size;
    format!("{table}\n\nvocabulary  {vocab_size}\ndata hash   {}", manifest.data_hash)
}

/// The largest shares by text, and the rest in one line.
fn share_table(name: &str, shares: &[Share]) -> String {
    let bytes = |share: &Share| share.train.text_bytes + share.validation.text_bytes;
    let mut sorted: Vec<&Share> = shares.iter().collect();
    sorted.sort_by_key(|share| std::cmp::Reverse(bytes(share)));
    let mut table = Table::new(&[name, "documents", "tokens", "text"]);
    let mut row = |name: &str, shares: &[&Share]| {
        let sum = |count: fn(&Share) -> u64| shares.iter().map(|share| count(share)).sum::<u64>();
        table.row([
            &name,
            &sum(|share| share.train.documents + share.validation.documents),
            &Count(sum(|share| share.train.tokens + share.validation.tokens) as f64),
            &Bytes(sum(|share| share.train.text_bytes + share.validation.text_bytes) as f64),
        ]);
    };
    let (shown, rest) = sorted.split_at(sorted.len().min(SHARES_SHOWN));
    for share in shown {
        row(&share.name, &[share]);
    }
    if !rest.is_empty() {
        row(&format!("{} more", rest.len()), rest);
    }
    table.to_string()
}

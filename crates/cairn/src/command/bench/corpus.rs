//! `cairn bench corpus`: how fast text becomes a corpus, and in how much memory.
//!
//! It does what `cairn corpus build` does, into a folder that is gone at the end.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use cairn_artifacts::machine::ProcessMemory;
use cairn_data::corpus::{BuildSettings, Manifest, Split};
use cairn_data::tokenizer::Tokenizer;
use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::Output;
use crate::command::corpus::build_corpus;
use crate::context::Context;
use crate::figures::{Bytes, Count, Seconds};
use crate::signals::StopFlag;
use crate::table::Table;
use crate::text_input::{TextArgs, train_tokenizer};

/// Text whose time is told, whatever was measured.
const TOLD_BYTES: f64 = 100e6;

const EXAMPLES: &str = "\
Examples:
  cairn bench corpus
  cairn bench corpus --input ~/notes --tokenizer tokenizer.json --out corpus.json";

/// Measure how fast text becomes a corpus
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CorpusArgs {
    /// A `tokenizer.json` [default: one is trained on the text, which is part of the time]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Tokens of the tokenizer that is trained
    #[arg(long, value_name = "N", default_value_t = 4096, conflicts_with = "tokenizer")]
    vocab_size: u32,
    /// Folder below which the corpus is built and removed [default: `TMPDIR`, or /tmp]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    text: TextArgs,
}

/// What a build took.
#[derive(Clone, Copy, Debug, Serialize)]
struct Figures {
    documents: u64,
    tokens: u64,
    text_bytes: u64,
    /// Reading, checking and hashing all text.
    scan_s: f64,
    /// Training a tokenizer on a sample of it.
    tokenizer_s: f64,
    /// Reading it again, tokenizing and writing.
    build_s: f64,
    seconds: f64,
    mb_per_s: f64,
    /// A tokenizer learns from a sample of bounded size, so its time is taken as it is; the rest is
    /// in proportion.
    seconds_per_100_mb: f64,
    /// Most memory the process held, mapped files included.
    peak_resident_bytes: u64,
}

/// Builds, measures and prints.
pub(super) fn run(args: &CorpusArgs, context: &Context) -> anyhow::Result<()> {
    let stop = StopFlag::listen()?;
    let parent = args.folder.as_ref().unwrap_or(&context.environment.temporary_dir);
    let folder = parent.join(format!("cairn-bench-corpus-{}", std::process::id()));
    let mut settings = BuildSettings::new(folder.clone());
    settings.threads = context.threads;
    settings.check_folder()?;
    // From here on the folder is ours to remove.
    let built = Temporary(folder);
    let given = args.tokenizer.as_deref().map(Tokenizer::load).transpose()?;
    let clock = Instant::now();
    let scan = args.text.scan(context, &stop)?;
    let scan_s = clock.elapsed().as_secs_f64();
    let tokenizer = match given {
        Some(tokenizer) => tokenizer,
        None => train_tokenizer(&scan, args.vocab_size, context)?,
    };
    let tokenizer_s = clock.elapsed().as_secs_f64() - scan_s;
    let report = build_corpus(&scan, &tokenizer, &settings, (context, &stop))?;
    let seconds = clock.elapsed().as_secs_f64();
    let memory = ProcessMemory::read().context("cannot read this process's memory")?;
    drop(built);
    let times = [scan_s, tokenizer_s, seconds - scan_s - tokenizer_s];
    let figures = Figures::new(&report.manifest, times, memory.peak_bytes);
    let settings = json!({
        "text": args.text,
        "tokenizer": args.tokenizer,
        "vocab_size": tokenizer.vocab_size(),
        "threads": context.threads,
    });
    let what = ("corpus", settings, serde_json::to_value(figures)?);
    super::print(&args.output, what, figures.text(), context)
}

impl Figures {
    fn new(manifest: &Manifest, times: [f64; 3], peak_resident_bytes: u64) -> Self {
        let sum = |count: fn(&cairn_data::corpus::Counts) -> u64| {
            Split::ALL.iter().map(|split| count(&manifest.split(*split).counts)).sum::<u64>()
        };
        let text_bytes = sum(|counts| counts.text_bytes);
        let [scan_s, tokenizer_s, build_s] = times;
        let seconds = scan_s + tokenizer_s + build_s;
        Self {
            documents: sum(|counts| counts.documents),
            tokens: sum(|counts| counts.tokens),
            text_bytes,
            scan_s,
            tokenizer_s,
            build_s,
            seconds,
            mb_per_s: text_bytes as f64 / 1e6 / seconds,
            seconds_per_100_mb: tokenizer_s
                + (scan_s + build_s) * TOLD_BYTES / text_bytes.max(1) as f64,
            peak_resident_bytes,
        }
    }

    fn text(&self) -> String {
        let mut table = Table::new(&[]).with_text_columns(2);
        let text = Bytes(self.text_bytes as f64);
        let tokens = Count(self.tokens as f64);
        let documents = self.documents;
        table.row([&"text", &format!("{text} in {documents} documents, {tokens} tokens")]);
        table.row([
            &"time",
            &format!(
                "{}: {} reading, {} training a tokenizer, {} tokenizing and writing",
                Seconds(self.seconds),
                Seconds(self.scan_s),
                Seconds(self.tokenizer_s),
                Seconds(self.build_s)
            ),
        ]);
        table.row([&"speed", &format!("{:.2} MB/s", self.mb_per_s)]);
        let told = Seconds(self.seconds_per_100_mb);
        table.row([&"100 MB", &format!("{told}: the tokenizer as here, the rest in proportion")]);
        let peak = Bytes(self.peak_resident_bytes as f64);
        table.row([&"memory", &format!("{peak} resident at most, mapped files included")]);
        table.to_string()
    }
}

/// A folder that is gone when this is dropped, however that comes.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(folder: &Path) {
    if folder.exists() {
        // What cannot be removed here is among the system's temporary files.
        let _ = cairn_artifacts::atomic::remove_folder(folder);
    }
}

//! Times a corpus build: `cargo run --release -p cairn-data --example speed -- FOLDER [THREADS]`.
//!
//! FOLDER is Cargo's registry folder, or any folder of text. Prints seconds, megabytes a second and
//! the process's peak memory for the scan, the training of a tokenizer and the build; the corpus is
//! written to a temporary folder and removed.

use std::error::Error;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use cairn_data::corpus::{
    BuildSettings, Corpus, FileKinds, Input, ScanSettings, Split, build, scan,
};
use cairn_data::loader::{Loader, LoaderSettings};
use cairn_data::tokenizer::{BpeSettings, train_bpe};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("name a folder")?);
    let threads = arguments.next().map_or(Ok(2), |threads| threads.parse())?;
    let mut out = std::io::stdout();

    let start = Instant::now();
    let is_registry = folder.join("src").is_dir() && folder.ends_with("registry");
    let input = if is_registry { Input::CargoRegistry(folder) } else { Input::Path(folder) };
    let kinds = FileKinds::rust_sources();
    let settings = ScanSettings { kinds, threads, ..ScanSettings::new(vec![input]) };
    let scan = scan(settings, &mut |_| ControlFlow::Continue(()))?;
    let (documents, bytes) = (scan.num_documents(), scan.size(Split::Train).1);
    let bytes = bytes + scan.size(Split::Validation).1;
    let rate = |start: Instant| format!("{:.1?}, {} MiB peak", start.elapsed(), peak_mib());
    writeln!(out, "scan      {documents} documents, {bytes} bytes: {}", rate(start))?;
    writeln!(out, "skipped   {}", scan.skips().summary())?;

    let start = Instant::now();
    let tokenizer = train_bpe(&BpeSettings::default(), scan.sample(16 << 20))?;
    writeln!(out, "tokenizer {} tokens: {}", tokenizer.vocab_size(), rate(start))?;

    let start = Instant::now();
    let target = std::env::temp_dir().join(format!("cairn-speed-{}", std::process::id()));
    let settings = BuildSettings { threads, ..BuildSettings::new(target.clone()) };
    let report = build(&scan, &tokenizer, &settings, &mut |_| ControlFlow::Continue(()))?;
    writeln!(out, "build     {:?}: {}", report.manifest.train.counts, rate(start))?;
    writeln!(out, "          {:?}", report.manifest.validation.counts)?;

    let start = Instant::now();
    let corpus = std::sync::Arc::new(Corpus::open(&target)?);
    writeln!(out, "open      {:.1?}", start.elapsed())?;
    let start = Instant::now();
    corpus.verify()?;
    writeln!(out, "verify    {:.1?}", start.elapsed())?;
    let settings = LoaderSettings { seq_len: 256, batch_rows: 16, seed: 0 };
    let loader = Loader::new(corpus, settings)?;
    let start = Instant::now();
    for step in 0..1000 {
        loader.batch(step * 7919)?;
    }
    writeln!(out, "loader    1000 random batches of 4096 tokens: {:.1?}", start.elapsed())?;
    std::fs::remove_dir_all(&target)?;
    Ok(())
}

/// Peak resident memory, where the system tells.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    peak.and_then(|peak| peak.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) >> 10
}

//! `cairn doctor`: what this machine has and what it lacks.

use std::fmt::Write as _;

use cairn_kernels::bandwidth::Bandwidth;
use cairn_kernels::peak::FmaPeak;
use cairn_kernels::{Isa, registry};
use clap::Args;
use serde::Serialize;

use crate::context::Context;
use crate::figures::Bytes;
use crate::machine::MachineReport;
use crate::table::Table;

const EXAMPLES: &str = "\
Examples:
  cairn doctor
  cairn doctor --kernels
  cairn doctor --json";

/// Show what this machine has, what is missing and which kernels will run
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DoctorArgs {
    /// List every kernel
    #[arg(long)]
    kernels: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A finding that slows things down or stops them, and the remedy.
#[derive(Debug, Serialize)]
struct Finding {
    problem: String,
    remedy: String,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    machine: MachineReport,
    threads_used: usize,
    selected_isa: &'static str,
    kernels_registered: usize,
    kernels_selected: Vec<String>,
    peaks: Vec<FmaPeak>,
    bandwidths: Vec<Bandwidth>,
    tuned: Vec<String>,
    cache_folder: Option<std::path::PathBuf>,
    default_corpus: Option<std::path::PathBuf>,
    findings: Vec<Finding>,
}

/// Looks and reports.
pub(crate) fn run(args: &DoctorArgs, context: &Context) -> anyhow::Result<()> {
    let report = Report::new(context);
    if args.json {
        return context.terminal.print(serde_json::to_string_pretty(&report)?);
    }
    context.terminal.print(report.text(args.kernels))
}

impl Report {
    fn new(context: &Context) -> Self {
        let all = registry::kernels();
        let best = context.isa;
        let machine = MachineReport::read();
        let default_corpus = context.environment.registry_sources();
        let profile = crate::machine_profile::load(context);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            threads_used: context.threads,
            selected_isa: best.name(),
            kernels_registered: all.len(),
            kernels_selected: all.iter().filter(|k| k.isa == best).map(|k| k.name()).collect(),
            peaks: profile.peaks().to_vec(),
            bandwidths: profile.bandwidths().to_vec(),
            tuned: profile.tuning.explain(),
            cache_folder: context.environment.cache_dir.clone(),
            findings: findings(&machine, default_corpus.is_some(), context),
            machine,
            default_corpus,
        }
    }

    fn text(&self, list_kernels: bool) -> String {
        let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".into());
        let bytes = |bytes: Option<u64>| {
            bytes.map_or_else(|| "unknown".to_owned(), |bytes| Bytes(bytes as f64).to_string())
        };
        let path = |path: &Option<std::path::PathBuf>| {
            path.as_ref().map_or_else(|| "none".to_owned(), |path| path.display().to_string())
        };
        let machine = &self.machine;
        let mut table = Table::new(&[]).with_text_columns(2);
        table.row([&"cairn", &self.version]);
        let facts = &machine.machine;
        let system = format!("{} ({})", or_unknown(&facts.kernel), facts.architecture);
        table.row([&"system", &system]);
        table.row([&"processor", &or_unknown(&facts.cpu_model)]);
        table.row([&"threads", &format!("{} of {}", self.threads_used, facts.num_cpus)]);
        table.row([&"instruction sets", &machine.instruction_sets.join(", ")]);
        table.row([&"memory", &bytes(facts.memory_bytes)]);
        table.row([&"available", &bytes(machine.available_bytes)]);
        table.row([&"huge pages", &or_unknown(&machine.huge_pages)]);
        let kernels = format!(
            "{} registered, {} selected ({})",
            self.kernels_registered,
            self.kernels_selected.len(),
            self.selected_isa
        );
        table.row([&"kernels", &kernels]);
        let unmeasured = |command: &str| format!("not measured yet: cairn bench {command}");
        for (name, text) in [
            ("peak", list(&self.peaks, peak_text).unwrap_or_else(|| unmeasured("peak"))),
            (
                "bandwidth",
                list(&self.bandwidths, bandwidth_text).unwrap_or_else(|| unmeasured("bandwidth")),
            ),
        ] {
            table.row([&name, &text]);
        }
        let tuned = match self.tuned.len() {
            0 => "no products yet: the first training run does it".to_owned(),
            count => format!("{count} products"),
        };
        table.row([&"tuned", &tuned]);
        table.row([&"cache folder", &path(&self.cache_folder)]);
        table.row([&"default corpus", &path(&self.default_corpus)]);
        let mut text = table.to_string();
        if !self.tuned.is_empty() {
            text += "\n\nchosen cuts of products, all with the same bits:";
            for line in &self.tuned {
                let _ = write!(text, "\n  {line}");
            }
        }
        if list_kernels {
            text += "\n";
            for name in &self.kernels_selected {
                let _ = write!(text, "\n{name}");
            }
        }
        for Finding { problem, remedy } in &self.findings {
            let _ = write!(text, "\n\nmissing: {problem}\n   hint: {remedy}");
        }
        if self.findings.is_empty() {
            text += "\n\nnothing is missing";
        }
        text
    }
}

/// What was measured, one after the other; `None` if nothing was.
fn list<T>(figures: &[T], text: impl Fn(&T) -> String) -> Option<String> {
    let texts: Vec<String> = figures.iter().map(text).collect();
    (!texts.is_empty()).then(|| texts.join("; "))
}

fn peak_text(peak: &FmaPeak) -> String {
    format!("{:.0} GFLOP/s with {} on {} threads", peak.gflops, peak.isa, peak.threads)
}

fn bandwidth_text(found: &Bandwidth) -> String {
    let Bandwidth { threads, gbs, gbs_min, gbs_max, .. } = found;
    format!("{gbs:.1} GB/s ({gbs_min:.1} to {gbs_max:.1}) on {threads} threads")
}

fn findings(machine: &MachineReport, has_default_corpus: bool, context: &Context) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |problem: &str, remedy: &str| {
        findings.push(Finding { problem: problem.to_owned(), remedy: remedy.to_owned() });
    };
    if Isa::best() == Isa::Scalar {
        add(
            "no instruction set with kernels of its own: portable code will run, slowly",
            "use a processor with AVX2 and FMA, or wait for kernels for this one",
        );
    }
    if machine.huge_pages.as_deref() == Some("never") {
        add(
            "transparent huge pages are off: memory is read from small pages, more slowly",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        );
    }
    if !has_default_corpus {
        add(
            "no sources in Cargo's registry folder, so quickstart has no default corpus",
            "build something with cargo first, or pass --input FOLDER to quickstart",
        );
    }
    if context.threads > machine.machine.num_cpus {
        add(
            "more threads are asked for than this machine runs at once",
            "lower --threads or CAIRN_THREADS",
        );
    }
    findings
}

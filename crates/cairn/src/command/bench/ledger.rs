//! `cairn bench ledger`: what this program costs to have, beside a peer: code, dependencies, size,
//! settings, processes, start-up, memory.
//!
//! Every figure is counted or measured when the command runs: code in the source folders that are named,
//! libraries in the running processes, settings in what the programs print as their help.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use cairn_artifacts::bounded::{TEXT_BYTES_MAX, read_text};
use cairn_artifacts::machine::ProcessMemory;
use cairn_eval::contract::TurnBench;
use cairn_kernels::Compute;
use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::Output;
use super::contract::peer::Peer;
use super::contract::side::OwnSide;
use crate::context::Context;
use crate::failure::UserError;
use crate::figures::{Bytes, Seconds};
use crate::model_folder::ModelFolder;
use crate::runs;
use crate::table::Table;
use crate::weight_type::WeightType;

/// Files whose lines count, by the end of their names.
const CODE: [&str; 15] = [
    "c", "cc", "comp", "cpp", "cu", "cuh", "cl", "h", "hpp", "m", "metal", "py", "rs", "sh", "wgsl",
];
/// Folders that hold what is built or what others wrote.
const NOT_OWN: [&str; 5] = ["build", "target", "vendor", "node_modules", "third_party"];
/// What is run on both sides: a prompt of three tokens, and one new.
const PROMPT: [u32; 3] = [1, 2, 3];

const EXAMPLES: &str = "\
Examples:
  cairn bench ledger --model model.leanpack
  cairn bench ledger --model models/qwen3 --source . --peer-source llama.cpp \\
      --against 'llama-server -m qwen3.gguf -t {threads} --port {port}'";

/// Count what this program costs to have, beside a peer
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct LedgerArgs {
    /// The model that is started [default: the last run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Cairn's own source folder [default: this folder, if it is one]
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
    /// The peer: a command that starts a server of llama.cpp's kind, with {port} and {threads} where
    /// they belong
    #[arg(long, value_name = "COMMAND")]
    against: Option<String>,
    /// The peer's source folder
    #[arg(long, value_name = "DIR", requires = "against")]
    peer_source: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// One side's figures; what could not be counted is absent.
#[derive(Clone, Debug, Default, Serialize)]
struct Ledger {
    name: String,
    /// Lines that are neither blank nor comments, by the end of the file's name.
    code_lines: Option<BTreeMap<String, u64>>,
    /// Packages of other authors that are built in, as its lock file has them.
    packages: Option<usize>,
    /// Shared libraries in the running process.
    libraries: usize,
    /// Bytes of the program and of the libraries that come with it.
    program_bytes: Option<u64>,
    /// Long options in its help.
    settings: Option<usize>,
    /// Processes that run.
    processes: usize,
    /// Seconds from the start of a process to its first token.
    start_s: Option<f64>,
    /// The most bytes resident, pages of mapped files included.
    resident_bytes: Option<u64>,
}

/// Counts, measures and prints.
pub(super) fn run(args: &LedgerArgs, context: &Context) -> anyhow::Result<()> {
    let mut ledgers = vec![own(args, context)?];
    if let Some(command) = &args.against {
        ledgers.push(peer(command, args.peer_source.as_deref(), context)?);
    }
    let settings = json!({ "model": args.model, "against": args.against });
    let figures = json!({ "sides": ledgers });
    super::print(&args.output, ("ledger", settings, figures), text(&ledgers), context)
}

fn own(args: &LedgerArgs, context: &Context) -> anyhow::Result<Ledger> {
    let path = runs::model_folder(args.model.as_deref())?;
    let model = ModelFolder::open(&path, context.terminal)?;
    let mut side = OwnSide::load(model, (WeightType::AUTO, Compute::F32), 16, context)?;
    let id = std::process::id();
    let bench = TurnBench { prompt: PROMPT.to_vec(), new_tokens: 1 };
    bench.run(&mut side.engine)?;
    let resident = ProcessMemory::of(id).context("the system does not tell our memory")?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let here = Path::new(".");
    let is_source = |folder: &Path| folder.join("crates/cairn/Cargo.toml").is_file();
    let source = match &args.source {
        Some(source) if !is_source(source) => {
            let message = format!("{} is not Cairn's source folder", source.display());
            return Err(UserError::new(message).hint("name the folder with crates/cairn").into());
        }
        Some(source) => Some(source.as_path()),
        None => Some(here).filter(|here| is_source(here)),
    };
    let mut counted = of_process(id, &program)?;
    counted.name = "cairn".to_owned();
    counted.code_lines = source.map(code_lines).transpose()?;
    counted.packages = source.map(packages).transpose()?;
    counted.settings = settings(Command::new(&program).args(["generate", "--help"]))?;
    counted.start_s = Some(side.start_seconds(&PROMPT, context)?);
    counted.resident_bytes = Some(resident.peak_bytes);
    Ok(counted)
}

fn peer(command: &str, source: Option<&Path>, context: &Context) -> anyhow::Result<Ledger> {
    let peer = Peer::start(command, None, context.threads).context("there is no peer")?;
    let id = peer.process_id().ok_or_else(|| {
        UserError::new("a peer that runs elsewhere cannot be counted").hint("name its command")
    })?;
    let program = std::fs::read_link(format!("/proc/{id}/exe"))
        .context("the system does not tell the peer's program")?;
    let mut counted = of_process(id, &program)?;
    counted.name.clone_from(&peer.name);
    counted.code_lines = source.map(code_lines).transpose()?;
    counted.settings = settings(Command::new(&program).arg("--help"))?;
    counted.start_s = peer.start_s;
    counted.resident_bytes = peer.resident_bytes();
    Ok(counted)
}

/// Libraries, program and processes of a process that runs.
fn of_process(id: u32, program: &Path) -> anyhow::Result<Ledger> {
    let maps = std::fs::read_to_string(format!("/proc/{id}/maps"))
        .context("the system does not tell what a process has loaded")?;
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let libraries: BTreeSet<&str> = paths.filter(|path| path.contains(".so")).collect();
    let is_system = |path: &&&str| path.starts_with("/lib") || path.starts_with("/usr/lib");
    let shipped = libraries.iter().filter(|path| !is_system(path)).map(Path::new);
    // A file that is gone, being replaced while it runs, has no size that could be told.
    let size = |path: &Path| std::fs::metadata(path).ok().map(|found| found.len());
    let program_bytes = std::iter::once(program).chain(shipped).map(size).sum::<Option<u64>>();
    let processes = 1 + children(id);
    Ok(Ledger { libraries: libraries.len(), program_bytes, processes, ..Ledger::default() })
}

/// Processes that a process has started and that run.
fn children(id: u32) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let ids = lists.collect::<Vec<_>>().join(" ");
    ids.split_whitespace().filter_map(|id| id.parse().ok()).map(|id| 1 + children(id)).sum()
}

/// Long options in a program's help; `None` if it has no help with such.
fn settings(command: &mut Command) -> anyhow::Result<Option<usize>> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let text = [output.stdout, output.stderr].concat();
    Ok(Some(options(&String::from_utf8_lossy(&text))).filter(|count| *count > 0))
}

/// Lines of help that describe an option, each by its first long name.
fn options(help: &str) -> usize {
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let names = lines.filter_map(|line| {
        let mut words = line.split_whitespace().take(3);
        words.find(|word| word.len() > 2 && word.starts_with("--"))
    });
    names.map(|name| name.trim_end_matches(',')).collect::<BTreeSet<_>>().len()
}

/// Packages of others in a lock file of Cargo's.
fn packages(source: &Path) -> anyhow::Result<usize> {
    let text = read_text(&source.join("Cargo.lock"), TEXT_BYTES_MAX)?;
    Ok(text.lines().filter(|line| line.starts_with("source = ")).count())
}

/// Lines of code in a folder, by the end of the files' names.
fn code_lines(folder: &Path) -> anyhow::Result<BTreeMap<String, u64>> {
    let mut lines = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder);
        for entry in entries.with_context(|| format!("cannot list {}", folder.display()))? {
            let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !path.is_symlink() {
                if !name.starts_with('.') && !NOT_OWN.contains(&name.as_str()) {
                    folders.push(path);
                }
            } else if let Some(end) = path.extension().and_then(|end| end.to_str())
                && CODE.contains(&end)
            {
                let text = std::fs::read(&path);
                let text = text.with_context(|| format!("cannot read {}", path.display()))?;
                *lines.entry(end.to_owned()).or_default() +=
                    count_lines(&String::from_utf8_lossy(&text), end);
            }
        }
    }
    Ok(lines)
}

/// Lines that are neither blank nor comments.
fn count_lines(text: &str, end: &str) -> u64 {
    let line_comment = if matches!(end, "py" | "sh") { "#" } else { "//" };
    let (mut count, mut in_comment) = (0, false);
    for line in text.lines().map(str::trim) {
        if in_comment {
            in_comment = !line.contains("*/");
            continue;
        }
        if line.starts_with("/*") {
            in_comment = !line.contains("*/");
        } else if !line.is_empty() && !line.starts_with(line_comment) {
            count += 1;
        }
    }
    count
}

/// A figure of a side, as it is printed.
type Figure<'a> = dyn Fn(&Ledger) -> String + 'a;

fn text(ledgers: &[Ledger]) -> String {
    let names: Vec<&str> = ledgers.iter().map(|ledger| ledger.name.as_str()).collect();
    let mut table = Table::new(&[&[""], &names[..]].concat()).with_text_columns(1);
    let none = || "—".to_owned();
    let lines = |ledger: &Ledger| {
        let lines = ledger.code_lines.as_ref();
        lines.map_or_else(none, |lines| lines.values().sum::<u64>().to_string())
    };
    let count = |count: Option<usize>| count.map_or_else(none, |count| count.to_string());
    let bytes =
        |bytes: Option<u64>| bytes.map_or_else(none, |bytes| Bytes(bytes as f64).to_string());
    let seconds = |s: Option<f64>| s.map_or_else(none, |seconds| Seconds(seconds).to_string());
    let rows: [(&str, &Figure<'_>); 8] = [
        ("lines of code", &lines),
        ("packages built in", &|ledger| count(ledger.packages)),
        ("shared libraries", &|ledger| ledger.libraries.to_string()),
        ("program and its libraries", &|ledger| bytes(ledger.program_bytes)),
        ("settings", &|ledger| count(ledger.settings)),
        ("processes", &|ledger| ledger.processes.to_string()),
        ("start to first token", &|ledger| seconds(ledger.start_s)),
        ("resident at most", &|ledger| bytes(ledger.resident_bytes)),
    ];
    for (what, figure) in rows {
        let figures: Vec<String> = ledgers.iter().map(figure).collect();
        let mut row: Vec<&dyn std::fmt::Display> = vec![&what];
        row.extend(figures.iter().map(|figure| figure as &dyn std::fmt::Display));
        table.add(&row);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_lines_and_comments_do_not_count() {
        let text = "//! A file.\n\nfn main() {\n    /* a\n     b */\n    run(); // now\n}\n";
        assert_eq!(count_lines(text, "rs"), 3);
        assert_eq!(count_lines("#!/bin/sh\n# hello\nls\n\n", "sh"), 1);
        assert_eq!(count_lines("/* one line */\nint x;\n", "c"), 1);
    }

    #[test]
    fn what_could_not_be_counted_is_no_number() {
        let text = text(&[Ledger { name: "peer".to_owned(), ..Ledger::default() }]);
        let rows = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
        for name in ["program and its", "settings", "start to first", "resident at most"] {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            assert!(line.trim_end().ends_with('—') && rows(name) == 1, "{line}");
        }
        assert!(!text.contains("NaN") && !text.contains("0 B"), "{text}");
    }

    #[test]
    fn options_are_counted_once_each() {
        let help = "Usage: x [OPTIONS]\n\nOptions:\n  -q, --quiet   Say --less\n      --threads <N>\n\
                    -t,    --threads N   number of --cores\n  --json\n";
        assert_eq!(options(help), 3);
    }
}

//! `cairn bench kernels`: every kernel over the shapes that matter, against this machine's ceilings.

use anyhow::Context as _;
use cairn_kernels::bench::{BenchRow, Ceilings, Limit, bench_kernels};
use cairn_kernels::registry::{KernelEntry, kernels};
use cairn_kernels::{Cpu, Isa};
use clap::Args;
use serde_json::json;

use super::Output;
use crate::context::Context;
use crate::failure::UserError;
use crate::figures::Percent;
use crate::machine_profile;
use crate::progress_line::ProgressLine;
use crate::table::Table;

const EXAMPLES: &str = "\
Examples:
  cairn bench kernels --filter matmul
  cairn bench kernels --all-isas --out before.json";

/// Measure kernels over the shapes that matter: GFLOP/s, GB/s, share of this machine's ceilings
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct KernelArgs {
    /// Measure kernels whose name (operator.encoding.isa) contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Measure every instruction set of this machine, each against its own ceilings
    #[arg(long, conflicts_with = "isa")]
    all_isas: bool,
    #[command(flatten)]
    output: Output,
}

/// Measures and prints.
pub(super) fn run(args: &KernelArgs, context: &Context) -> anyhow::Result<()> {
    let isas = if args.all_isas { Isa::supported() } else { vec![context.isa] };
    let is_selected =
        |entry: &KernelEntry| isas.contains(&entry.isa) && entry.name().contains(&args.filter);
    if !kernels().iter().any(is_selected) {
        return Err(UserError::new(format!("no kernel's name contains '{}'", args.filter))
            .hint("list them: cairn doctor --kernels")
            .into());
    }
    let mut profile = machine_profile::load(context);
    let (mut all_ceilings, mut rows) = (Vec::new(), Vec::new());
    let mut line = ProgressLine::new(context.terminal, "Measuring");
    for isa in isas {
        let mut cpu = Cpu::try_new(isa, context.threads)?;
        cpu.set_tuning(profile.tuning.clone());
        let ceilings = bench_kernels(&cpu, &args.filter, |row| {
            line.update(None, || format!("{} {}", row.kernel, row.shape));
            rows.push(row.clone());
        });
        let ceilings = ceilings.context("cannot measure this machine")?;
        profile.keep_peak(ceilings.peak);
        profile.keep_bandwidth(ceilings.bandwidth);
        all_ceilings.push(ceilings);
    }
    line.finish();
    machine_profile::keep(&profile, context);
    let isas: Vec<Isa> = all_ceilings.iter().map(|ceilings| ceilings.peak.isa).collect();
    let settings = json!({ "threads": context.threads, "filter": args.filter, "isas": isas });
    let figures = json!({ "ceilings": all_ceilings, "rows": rows });
    super::print(&args.output, ("kernels", settings, figures), text(&all_ceilings, &rows), context)
}

fn text(ceilings: &[Ceilings], rows: &[BenchRow]) -> String {
    let mut text = String::new();
    for Ceilings { peak, bandwidth } in ceilings {
        text += &format!(
            "{} on {} threads: peak {:.0} GFLOP/s, bandwidth {:.1} GB/s ({:.1} to {:.1})\n",
            peak.isa,
            peak.threads,
            peak.gflops,
            bandwidth.gbs,
            bandwidth.gbs_min,
            bandwidth.gbs_max
        );
    }
    let header = ["kernel", "shape", "time", "GFLOP/s", "GB/s", "reached", "of"];
    let mut table = Table::new(&header).with_text_columns(2);
    for row in rows {
        let limit = match row.limit {
            Limit::Peak => "peak",
            Limit::Bandwidth => "bandwidth",
        };
        table.row([
            &row.kernel,
            &row.shape,
            &format!("{:.1} µs", row.seconds * 1e6),
            &format!("{:.1}", row.gflops),
            &format!("{:.1}", row.gbs),
            &Percent(row.fraction),
            &limit,
        ]);
    }
    format!("{text}\n{table}")
}

//! `cairn bench gates`: every encoding in every arithmetic, scored; fails if one does not pass.

use cairn_kernels::bench::gates::{Gate, gate_pairs, measure_gate};
use clap::Args;
use serde_json::json;

use super::Output;
use crate::context::Context;
use crate::failure::UserError;
use crate::gate_file;
use crate::progress_line::ProgressLine;
use crate::table::Table;

const EXAMPLES: &str = "\
Examples:
  cairn bench gates
  cairn bench gates --isa avx2 --json";

/// Score every way of holding and multiplying weights: bits, error against f64, speed against bf16
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct GateArgs {
    #[command(flatten)]
    output: Output,
}

/// Measures, prints, and fails if a pair does not pass.
pub(super) fn run(args: &GateArgs, context: &Context) -> anyhow::Result<()> {
    let cpu = context.cpu()?;
    let mut line = ProgressLine::new(context.terminal, "Measuring");
    let mut gates = Vec::new();
    for (encoding, compute) in gate_pairs() {
        line.update(None, || format!("{encoding} in {compute}"));
        gates.push(measure_gate(&cpu, (encoding, compute)));
    }
    line.finish();
    let settings = json!({ "threads": context.threads, "isa": context.isa });
    let figures = json!({ "gates": gates });
    if let Some(path) = gate_file::keep(&gates, context)? {
        context.terminal.step("Kept", format_args!("{}, for plans to go by", path.display()));
    }
    super::print(&args.output, ("gates", settings, figures), text(&gates), context)?;
    let failed: Vec<String> = gates
        .iter()
        .filter(|gate| !gate.passed)
        .map(|gate| format!("{} in {}", gate.encoding, gate.compute))
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    let message = format!("these do not pass: {}", failed.join(", "));
    Err(UserError::new(message).hint("measure again when nothing else runs to be sure").into())
}

fn text(gates: &[Gate]) -> String {
    let header = [
        "weights",
        "in",
        "bytes",
        "changed by",
        "bits",
        "error",
        "1 token",
        "of bf16",
        "256 tokens",
        "of bf16",
        "passes",
    ];
    let mut table = Table::new(&header).with_text_columns(2);
    for gate in gates {
        table.row([
            &gate.encoding,
            &gate.compute,
            &format!("{:.3}", gate.bytes_a_weight),
            &format!("{:.2e}", gate.weight_error),
            &if gate.is_exact { "equal" } else { "differ" },
            &format!("{:.3}", gate.error),
            &format!("{:.1} µs", gate.decode_seconds * 1e6),
            &format!("{:.2}", gate.decode_speed),
            &format!("{:.2} ms", gate.prompt_seconds * 1e3),
            &format!("{:.2}", gate.prompt_speed),
            &if gate.passed { "yes" } else { "no" },
        ]);
    }
    format!("{table}\nerror: largest against f64, as a share of what the arithmetic allows")
}

//! `cairn bench compare`: two run records of one benchmark, figure by figure.
//!
//! A figure of the second record that is worse than the first's by more than the tolerance is a
//! regression and makes the command fail. Times and memory are better low, speeds better high.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cairn_artifacts::run::RunRecord;
use clap::Args;
use serde_json::{Value, json};

use crate::context::Context;
use crate::failure::UserError;
use crate::figures::Percent;
use crate::table::Table;

/// Instructions of a training step that take less of it than this are not compared: their times
/// are mostly noise.
const STEP_SHARE_MIN: f64 = 0.02;

const EXAMPLES: &str = "\
Examples:
  cairn bench compare before.json after.json";

/// Compare two records of a benchmark; fail if the second is slower
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CompareArgs {
    /// The record to compare with
    #[arg(value_name = "BEFORE")]
    before: PathBuf,
    /// The record that should be no slower
    #[arg(value_name = "AFTER")]
    after: PathBuf,
    /// How much worse a figure may be, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
    tolerance: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Reads, compares, prints, and fails if something became slower.
pub(super) fn run(args: &CompareArgs, context: &Context) -> anyhow::Result<()> {
    if !(args.tolerance >= 0.0 && args.tolerance.is_finite()) {
        let message = format!("--tolerance is {}, not a percentage", args.tolerance);
        return Err(UserError::new(message).hint("give 0 or more").into());
    }
    let (before, after) = (RunRecord::load(&args.before)?, RunRecord::load(&args.after)?);
    if before.what != after.what {
        let message = format!("'{}' cannot be compared with '{}'", before.what, after.what);
        return Err(UserError::new(message).hint("give two records of one benchmark").into());
    }
    if before.machine != after.machine {
        context.terminal.warn("the two records are from different machines");
    }
    if before.settings != after.settings {
        context.terminal.warn("the two records were made with different settings");
    }
    let comparison = Comparison::new(&figures(&before), &figures(&after), args.tolerance / 100.0);
    if comparison.changes.is_empty() {
        return Err(UserError::new("the two records have no figure in common").into());
    }
    for name in &comparison.missing {
        context.terminal.warn(format_args!("{name} is only in {}", args.before.display()));
    }
    let text = if args.json {
        serde_json::to_string_pretty(&comparison.json())?
    } else {
        comparison.text()
    };
    context.terminal.print(text)?;
    let regressions = comparison.regressions();
    if regressions == 0 {
        return Ok(());
    }
    let of = comparison.changes.len();
    let message = format!("{regressions} of {of} figures are more than {} % worse", args.tolerance);
    Err(UserError::new(message).hint("measure again when nothing else runs to be sure").into())
}

/// A number to compare, and which way is better.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Figure {
    /// Seconds or bytes.
    Cost(f64),
    /// Anything a second.
    Speed(f64),
}

impl Figure {
    fn number(self) -> f64 {
        match self {
            Self::Cost(number) | Self::Speed(number) => number,
        }
    }

    /// How much worse `after` is: 0.1 for a tenth more time, or for a speed at which the same takes
    /// a tenth more time.
    fn worse_by(self, after: Self) -> f64 {
        match self {
            Self::Cost(before) => after.number() / before - 1.0,
            Self::Speed(before) => before / after.number() - 1.0,
        }
    }
}

/// The figures of a record that say how fast it was.
fn figures(record: &RunRecord) -> BTreeMap<String, Figure> {
    let mut found = BTreeMap::new();
    let number = |value: &Value, key: &str| value.get(key).and_then(Value::as_f64);
    let text = |value: &Value, key: &str| {
        value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let list = |key: &str| record.figures.get(key).and_then(Value::as_array).into_iter().flatten();
    for row in list("rows") {
        if let Some(seconds) = number(row, "seconds") {
            let name = format!("{} {}", text(row, "kernel"), text(row, "shape"));
            found.insert(name, Figure::Cost(seconds));
        }
    }
    for part in list("parts") {
        let is_large = number(part, "share").is_some_and(|share| share >= STEP_SHARE_MIN);
        if let Some(seconds) = number(part, "seconds").filter(|_| is_large) {
            found.insert(text(part, "name"), Figure::Cost(seconds));
        }
    }
    for key in ["tok_s", "tokens_per_s_median", "gflops", "gbs"] {
        if let Some(speed) = record.figures.get(key).and_then(Value::as_f64) {
            found.insert(key.to_owned(), Figure::Speed(speed));
        }
    }
    if let Some(memory) = record.figures.get("peak_rss_mb").and_then(Value::as_f64) {
        found.insert("peak_rss_mb".to_owned(), Figure::Cost(memory));
    }
    found
}

/// One figure in both records.
#[derive(Clone, Debug, PartialEq)]
struct Change {
    name: String,
    before: f64,
    after: f64,
    worse_by: f64,
    is_regression: bool,
}

/// All figures of two records.
#[derive(Clone, Debug, PartialEq)]
struct Comparison {
    /// Worst first.
    changes: Vec<Change>,
    /// Figures that only the first record has.
    missing: Vec<String>,
}

impl Comparison {
    fn new(
        before: &BTreeMap<String, Figure>,
        after: &BTreeMap<String, Figure>,
        tolerance: f64,
    ) -> Self {
        let (mut changes, mut missing) = (Vec::new(), Vec::new());
        for (name, &old) in before {
            let Some(&new) = after.get(name) else {
                missing.push(name.clone());
                continue;
            };
            let worse_by = old.worse_by(new);
            changes.push(Change {
                name: name.clone(),
                before: old.number(),
                after: new.number(),
                worse_by,
                // What cannot be told (0 / 0) is not called fine.
                is_regression: worse_by.is_nan() || worse_by > tolerance,
            });
        }
        changes.sort_by(|a, b| b.worse_by.total_cmp(&a.worse_by));
        Self { changes, missing }
    }

    fn regressions(&self) -> usize {
        self.changes.iter().filter(|change| change.is_regression).count()
    }

    fn text(&self) -> String {
        let mut table = Table::new(&["figure", "before", "after", "worse by", ""]);
        for change in &self.changes {
            let mark = if change.is_regression { "regression" } else { "" };
            let [before, after] = [change.before, change.after].map(|x| format!("{x:.4e}"));
            table.row([&change.name, &before, &after, &Percent(change.worse_by), &mark]);
        }
        table.to_string()
    }

    fn json(&self) -> Value {
        let change = |change: &Change| {
            json!({
                "figure": change.name,
                "before": change.before,
                "after": change.after,
                "worse_by": change.worse_by,
                "regression": change.is_regression,
            })
        };
        let changes: Vec<Value> = self.changes.iter().map(change).collect();
        json!({
            "regressions": self.regressions(),
            "changes": changes,
            "missing": self.missing,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(before: Figure, after: Figure) -> Change {
        let one = |figure| BTreeMap::from([("figure".to_owned(), figure)]);
        Comparison::new(&one(before), &one(after), 0.05).changes.remove(0)
    }

    #[test]
    fn more_time_and_less_speed_are_worse() {
        let slower = compare(Figure::Cost(1.0), Figure::Cost(1.1));
        assert!((slower.worse_by - 0.1).abs() < 1e-12 && slower.is_regression);
        let slower = compare(Figure::Speed(110.0), Figure::Speed(100.0));
        assert!((slower.worse_by - 0.1).abs() < 1e-12 && slower.is_regression);
        assert!(!compare(Figure::Cost(1.0), Figure::Cost(1.04)).is_regression);
        assert!(!compare(Figure::Speed(100.0), Figure::Speed(130.0)).is_regression);
        assert!(compare(Figure::Cost(0.0), Figure::Cost(0.0)).is_regression);
    }
}

//! Which ways of holding and multiplying weights passed on this machine: what `bench gates` found,
//! kept beside the machine profile, and what plans may use.
//!
//! A pair whose numbers were wrong is never used. One that was only slow is used with a warning, and
//! not at all where the plan is to be strict.

use std::path::PathBuf;

use cairn_artifacts::machine::Machine;
use cairn_artifacts::{FileError, atomic};
use cairn_kernels::bench::gates::Gate;
use cairn_kernels::profile::KERNELS_VERSION;
use cairn_kernels::{Compute, Encoding, Isa};
use serde::{Deserialize, Serialize};

use crate::context::Context;
use crate::failure::UserError;
use crate::model_folder::ModelFolder;
use crate::storage::Storage;

const SCHEMA: &str = "gates/1";

/// What was found of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// Plans may use it.
    Passed,
    /// Its numbers are right, and bf16 is faster.
    Slow,
    /// Its numbers are wrong.
    Wrong,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    schema: String,
    machine: Option<String>,
    kernels: u32,
    isa: Isa,
    pairs: Vec<(Encoding, Compute, Verdict)>,
}

impl Verdict {
    fn of(gate: &Gate) -> Self {
        match (gate.passed, gate.is_exact && gate.error <= 1.0) {
            (true, _) => Self::Passed,
            (false, true) => Self::Slow,
            (false, false) => Self::Wrong,
        }
    }
}

fn path(context: &Context) -> Option<PathBuf> {
    Some(context.environment.cache_dir.as_ref()?.join("gates.json"))
}

/// Keeps what was found; returns where, or `None` without a cache folder.
pub(crate) fn keep(gates: &[Gate], context: &Context) -> anyhow::Result<Option<PathBuf>> {
    let Some(path) = path(context) else { return Ok(None) };
    let stored = Stored {
        schema: SCHEMA.to_owned(),
        machine: Machine::read().cpu_model,
        kernels: KERNELS_VERSION,
        isa: context.isa,
        pairs: gates.iter().map(|g| (g.encoding, g.compute, Verdict::of(g))).collect(),
    };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(FileError::on("create", folder))?;
    }
    atomic::write_bytes(&path, serde_json::to_string_pretty(&stored)?.as_bytes())?;
    Ok(Some(path))
}

/// What was found of a pair here; `None` where nothing was, or not by this machine, these kernels and
/// this instruction set.
pub(crate) fn verdict(
    pair: (Encoding, Compute),
    context: &Context,
) -> anyhow::Result<Option<Verdict>> {
    Ok(load(context)?.and_then(|stored| stored.verdict(pair)))
}

/// What was found here; `None` as for [`verdict`]. A file that cannot be read forbids nothing and allows
/// nothing: that is an error.
fn load(context: &Context) -> anyhow::Result<Option<Stored>> {
    let Some(path) = path(context) else { return Ok(None) };
    let damaged = |error: &dyn std::fmt::Display| {
        let message = format!("what was measured of encodings here cannot be read: {error}");
        UserError::new(message)
            .hint(format!("measure again (cairn bench gates), or remove {}", path.display()))
    };
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(damaged(&error).into()),
    };
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| damaged(&error))?;
    // Another version wrote it, about its own kernels.
    if value.get("schema").is_some_and(|schema| schema.is_string() && schema != SCHEMA) {
        return Ok(None);
    }
    let stored: Stored = serde_json::from_value(value).map_err(|error| damaged(&error))?;
    let is_ours = stored.kernels == KERNELS_VERSION
        && stored.isa == context.isa
        && stored.machine == Machine::read().cpu_model;
    Ok(is_ours.then_some(stored))
}

impl Stored {
    fn verdict(&self, pair: (Encoding, Compute)) -> Option<Verdict> {
        let found = self.pairs.iter().find(|(encoding, compute, _)| (*encoding, *compute) == pair);
        found.map(|(.., verdict)| *verdict)
    }
}

/// Refuses a plan for a model that would multiply by weights in a way that it must not use.
pub(crate) fn check(
    model: &ModelFolder,
    (storage, compute): (&Storage, Compute),
    context: &Context,
) -> anyhow::Result<()> {
    let strict = model.pack().is_some_and(|pack| pack.check().strict);
    let Some(stored) = load(context)? else { return Ok(()) };
    for encoding in storage.in_use() {
        let compute = if compute.multiplies(encoding) { compute } else { Compute::F32 };
        check_pair((encoding, compute), stored.verdict((encoding, compute)), strict, context)?;
    }
    Ok(())
}

fn check_pair(
    (encoding, compute): (Encoding, Compute),
    verdict: Option<Verdict>,
    strict: bool,
    context: &Context,
) -> anyhow::Result<()> {
    let what = match verdict {
        None | Some(Verdict::Passed) => return Ok(()),
        Some(Verdict::Slow) => "is slower than bf16",
        Some(Verdict::Wrong) => "gives wrong numbers",
    };
    let message = format!("{encoding} in {compute} {what} on this machine, as measured before");
    if !strict && verdict == Some(Verdict::Slow) {
        context.terminal.warn(message);
        return Ok(());
    }
    Err(UserError::new(message)
        .hint("measure again: cairn bench gates")
        .hint("or hold the weights otherwise: --dtype bf16")
        .into())
}

//! Measures, once per machine, which of several bit-equal ways of cutting a product is fastest.
//!
//! The numeric policy makes every [`Blocking`] give the same bits, so the choice is free: it may
//! differ between machines, runs and threads without anyone noticing but the clock. Choices are kept
//! by (product, encoding, instruction set, threads, shape class), say what they were chosen over, and
//! can be stored in a file that names the machine they are for.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::cpu::Cpu;
use crate::encoding::{Encoding, Layout};
use crate::isa::{Isa, cpu_name};
use crate::matmul::Blocking;
use crate::matmul::tune::Trial;

const SCHEMA: &str = "tuning/1";
/// Rounds over all candidates; the best time of each counts.
const ROUNDS: usize = 5;
/// A candidate must beat the unmeasured choice by this factor: smaller differences are noise.
const CLEARLY_FASTER: f64 = 0.98;

/// Which of the three products.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum ProductKind {
    /// The forward product.
    Matmul,
    /// The input gradient.
    MatmulDx,
    /// The weight gradient.
    MatmulDw,
}

impl ProductKind {
    /// The operator's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Matmul => "matmul",
            Self::MatmulDx => "matmul_dx",
            Self::MatmulDw => "matmul_dw",
        }
    }
}

/// A product that a plan will run.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(deny_unknown_fields)]
pub struct TuneCase {
    /// Which product.
    pub product: ProductKind,
    /// The weight's encoding ([`Encoding::F32`] for the weight gradient).
    pub encoding: Encoding,
    /// Tokens. Cases whose tokens round up to the same power of two are one class.
    pub t: usize,
    /// Outputs of the weight.
    pub n: usize,
    /// Inputs of the weight.
    pub k: usize,
}

/// What a choice holds for.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(deny_unknown_fields)]
struct Key {
    case: TuneCase,
    isa: Isa,
    threads: usize,
}

impl Key {
    fn new(case: TuneCase, cpu: &Cpu) -> Self {
        let case = TuneCase { t: case.t.next_power_of_two(), ..case };
        Self { case, isa: cpu.isa(), threads: cpu.threads() }
    }
}

/// What was chosen, and over what.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// The fastest cut.
    pub blocking: Blocking,
    /// Its best seconds.
    pub seconds: f64,
    /// What would be used without measuring.
    pub unmeasured: Blocking,
    /// Its best seconds.
    pub unmeasured_seconds: f64,
    /// How many cuts were measured.
    pub candidates: usize,
}

/// The choices of one machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    machine: String,
    choices: BTreeMap<Key, Choice>,
}

/// A stored tuning that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TuningError {
    /// The file cannot be read or written.
    #[error("cannot access the tuning file {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a tuning of this version.
    #[error("{path} is not a tuning file of version {SCHEMA:?}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The file was measured elsewhere.
    #[error("{path} was measured on {found:?}, this machine is {expected:?}")]
    OtherMachine {
        /// The file.
        path: PathBuf,
        /// This machine.
        expected: String,
        /// The file's machine.
        found: String,
    },
}

impl TuningError {
    /// What the user can do, one line each.
    pub fn hints(&self) -> Vec<String> {
        match self {
            Self::Io { .. } => Vec::new(),
            Self::Format { path, .. } | Self::OtherMachine { path, .. } => {
                vec![format!("delete {} to have this machine measured again", path.display())]
            }
        }
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    schema: Schema,
    machine: String,
    choices: Vec<(Key, Choice)>,
}

#[derive(serde::Serialize, serde::Deserialize)]
enum Schema {
    #[serde(rename = "tuning/1")]
    Version1,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { machine: cpu_name(), choices: BTreeMap::new() }
    }
}

impl Tuning {
    /// Reads a stored tuning.
    ///
    /// # Errors
    /// [`TuningError::Io`] if the file cannot be read, [`TuningError::Format`] if it is not a tuning
    /// of this version, [`TuningError::OtherMachine`] if another machine measured it: measure again.
    pub fn load(path: &Path) -> Result<Self, TuningError> {
        let text = fs::read(path).map_err(|source| io(path, source))?;
        let stored: Stored = serde_json::from_slice(&text)
            .map_err(|source| TuningError::Format { path: path.to_owned(), source })?;
        let (expected, found) = (cpu_name(), stored.machine);
        if found != expected {
            return Err(TuningError::OtherMachine { path: path.to_owned(), expected, found });
        }
        Ok(Self { machine: found, choices: stored.choices.into_iter().collect() })
    }

    /// Writes the tuning: a temporary file beside `path`, synced, then renamed.
    ///
    /// # Errors
    /// [`TuningError::Io`] if a step fails; an older file is then still there.
    pub fn save(&self, path: &Path) -> Result<(), TuningError> {
        let choices = self.choices.iter().map(|(key, choice)| (*key, *choice)).collect();
        let stored = Stored { schema: Schema::Version1, machine: self.machine.clone(), choices };
        let text = serde_json::to_vec_pretty(&stored)
            .map_err(|source| TuningError::Format { path: path.to_owned(), source })?;
        let temporary = path.with_extension("tmp");
        let write = || {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        };
        write().map_err(|source| io(path, source))
    }

    /// The choice for a product on this handle, if it was measured.
    pub fn choice(&self, cpu: &Cpu, case: TuneCase) -> Option<&Choice> {
        self.choices.get(&Key::new(case, cpu))
    }

    /// Number of choices.
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// Whether nothing was measured yet.
    pub fn is_empty(&self) -> bool {
        self.choices.is_empty()
    }

    /// Measures the cases that have no choice yet (a fraction of a second each) and calls `each`
    /// with one line on every choice made.
    pub fn measure(&mut self, cpu: &Cpu, cases: &[TuneCase], mut each: impl FnMut(&str)) {
        for &case in cases {
            let key = Key::new(case, cpu);
            if self.choices.contains_key(&key) || case.t * case.n * case.k == 0 {
                continue;
            }
            let choice = choose(cpu, case);
            each(&explain(&key, &choice));
            self.choices.insert(key, choice);
        }
    }

    /// One line on every choice: what, over what, and by how much.
    pub fn explain(&self) -> Vec<String> {
        self.choices.iter().map(|(key, choice)| explain(key, choice)).collect()
    }
}

fn io(path: &Path, source: std::io::Error) -> TuningError {
    TuningError::Io { path: path.to_owned(), source }
}

fn explain(key: &Key, choice: &Choice) -> String {
    let Key { case, isa, threads } = key;
    let Choice { blocking, unmeasured, candidates, .. } = choice;
    let gain = (choice.unmeasured_seconds / choice.seconds - 1.0) * 100.0;
    let why = if blocking == unmeasured {
        format!("none of {candidates} cuts is clearly faster than the estimate")
    } else {
        format!("fastest of {candidates} cuts, {gain:.0} % faster than the estimate")
    };
    format!(
        "{}.{}.{isa} t≤{} n{} k{}, {threads} threads: {} rows × {} columns × {} steps ({why})",
        case.product.name(),
        case.encoding,
        case.t,
        case.n,
        case.k,
        blocking.rows,
        blocking.columns,
        blocking.steps,
    )
}

fn choose(cpu: &Cpu, case: TuneCase) -> Choice {
    let candidates = case.candidates(cpu);
    let mut trial = Trial::new(case, Layout::RowMajor);
    let mut best = vec![f64::INFINITY; candidates.len()];
    trial.run(cpu, &candidates[0]);
    for _ in 0..ROUNDS {
        for (seconds, blocking) in best.iter_mut().zip(&candidates) {
            let start = Instant::now();
            trial.run(cpu, blocking);
            *seconds = seconds.min(start.elapsed().as_secs_f64());
        }
    }
    let unmeasured_seconds = best[0];
    let fastest = (0..best.len()).min_by(|&a, &b| best[a].total_cmp(&best[b])).unwrap_or(0);
    let is_clear = best[fastest] < CLEARLY_FASTER * unmeasured_seconds;
    let chosen = if is_clear { fastest } else { 0 };
    Choice {
        blocking: candidates[chosen],
        seconds: best[chosen],
        unmeasured: candidates[0],
        unmeasured_seconds,
        candidates: candidates.len(),
    }
}

#[cfg(test)]
mod tests;

//! Measures, once per machine, which of several bit-equal ways of cutting a product is fastest.
//!
//! The numeric policy makes every [`Blocking`] give the same bits, so the choice is free: it may
//! differ between machines, runs and threads without anyone noticing but the clock. Choices are kept
//! by (product, encoding, instruction set, threads, shape class) and say what they were chosen over;
//! [`crate::profile`] stores them with the other figures of a machine.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::cpu::Cpu;
use crate::encoding::{Encoding, Layout};
use crate::isa::Isa;
use crate::matmul::Blocking;
use crate::matmul::tune::Trial;

/// Rounds over all candidates; the best time of each counts.
const ROUNDS: usize = 5;
/// After a round, candidates this much slower than the fastest are not measured again.
const HOPELESS: f64 = 1.15;
/// Fewer rounds than this leave the estimate in place: one slow moment of the machine would decide.
const ROUNDS_MIN: usize = 2;
/// Multiply-adds of a product that is worth the measurement when time is short: below it, a
/// product takes a fraction of a millisecond however it is cut.
const WORTHWHILE: usize = 1 << 26;
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
    /// The forward product in bf16 arithmetic.
    MatmulBf16,
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
            Self::MatmulBf16 => "matmul_bf16",
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

impl TuneCase {
    fn multiply_adds(&self) -> usize {
        self.t.saturating_mul(self.n).saturating_mul(self.k)
    }
}

/// What a choice holds for.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(deny_unknown_fields)]
pub(crate) struct Key {
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
    /// Rounds over them.
    pub rounds: usize,
}

/// The choices of one machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuning {
    pub(crate) choices: BTreeMap<Key, Choice>,
}

impl Tuning {
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

    /// Forgets the choices for these cases.
    pub fn forget(&mut self, cpu: &Cpu, cases: &[TuneCase]) {
        for &case in cases {
            self.choices.remove(&Key::new(case, cpu));
        }
    }

    /// Measures the cases that have no choice yet (a second or so each) and calls `each` with one
    /// line on every choice made.
    pub fn measure(&mut self, cpu: &Cpu, cases: &[TuneCase], mut each: impl FnMut(&str)) {
        for case in self.open_cases(cpu, cases) {
            let mut room = vec![0.0; Trial::len_of(case, Layout::RowMajor)];
            let Some(trial) = Trial::new(case, Layout::RowMajor, &mut room) else { continue };
            let choice = choose(cpu, case, trial, f64::INFINITY);
            each(&explain(&Key::new(case, cpu), &choice));
            self.choices.insert(Key::new(case, cpu), choice);
        }
    }

    /// The cases without a choice that matter for the time of a run.
    pub fn worthwhile(&self, cpu: &Cpu, cases: &[TuneCase]) -> Vec<TuneCase> {
        let open = self.open_cases(cpu, cases).into_iter();
        open.filter(|case| case.multiply_adds() >= WORTHWHILE).collect()
    }

    /// Measures the [`worthwhile`](Self::worthwhile) cases in about `seconds`, larger products
    /// longer. Where that is too short to be sure, the estimate is kept, and said to be one.
    ///
    /// Operands lie in `room`, whose contents are lost: a run measures in the memory it has planned
    /// for itself. Cases that need more are left open.
    pub fn measure_within(
        &mut self,
        cpu: &Cpu,
        cases: &[TuneCase],
        seconds: f64,
        room: &mut [f32],
    ) {
        let start = Instant::now();
        let mut open = self.worthwhile(cpu, cases);
        open.retain(|&case| Trial::len_of(case, Layout::RowMajor) <= room.len());
        let mut work: f64 = open.iter().map(|case| case.multiply_adds() as f64).sum();
        for case in open {
            let own = case.multiply_adds() as f64;
            let left = (seconds - start.elapsed().as_secs_f64()).max(0.0);
            let Some(trial) = Trial::new(case, Layout::RowMajor, room) else { continue };
            let choice = choose(cpu, case, trial, left * own / work);
            work -= own;
            self.choices.insert(Key::new(case, cpu), choice);
        }
    }

    /// The cases that have something to compute and no choice yet, each class once.
    fn open_cases(&self, cpu: &Cpu, cases: &[TuneCase]) -> Vec<TuneCase> {
        let mut open: Vec<TuneCase> = Vec::new();
        for &case in cases {
            let key = Key::new(case, cpu);
            let is_open = case.multiply_adds() > 0 && !self.choices.contains_key(&key);
            if is_open && !open.iter().any(|other| Key::new(*other, cpu) == key) {
                open.push(case);
            }
        }
        open
    }

    /// One line on every choice: what, over what, and by how much.
    pub fn explain(&self) -> Vec<String> {
        self.choices.iter().map(|(key, choice)| explain(key, choice)).collect()
    }
}

fn explain(key: &Key, choice: &Choice) -> String {
    let Key { case, isa, threads } = key;
    let Choice { blocking, unmeasured, candidates, .. } = *choice;
    let gain = (choice.unmeasured_seconds / choice.seconds - 1.0) * 100.0;
    let why = if choice.rounds < ROUNDS_MIN || candidates == 1 {
        "the estimate: there was no time to be sure of a better one".to_owned()
    } else if blocking == unmeasured {
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

/// Measures as many cuts of one case as about `seconds` allow, at least the estimate.
fn choose(cpu: &Cpu, case: TuneCase, mut trial: Trial<'_>, seconds: f64) -> Choice {
    let mut candidates = case.candidates(cpu);
    let began = Instant::now();
    let is_over = || began.elapsed().as_secs_f64() >= seconds;
    trial.run(cpu, &candidates[0]);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let runs = (seconds / began.elapsed().as_secs_f64()) as usize;
    candidates.truncate((runs / (ROUNDS_MIN + 1)).max(1));
    let mut best = vec![f64::INFINITY; candidates.len()];
    let mut in_race: Vec<usize> = (0..candidates.len()).collect();
    let mut rounds = 0;
    'rounds: while rounds < ROUNDS {
        for &i in &in_race {
            if is_over() && best[0].is_finite() {
                break 'rounds;
            }
            let start = Instant::now();
            trial.run(cpu, &candidates[i]);
            best[i] = best[i].min(start.elapsed().as_secs_f64());
        }
        rounds += 1;
        let fastest = best.iter().copied().fold(f64::INFINITY, f64::min);
        // The estimate stays in: it is what the others are compared with.
        in_race.retain(|&i| i == 0 || best[i] < HOPELESS * fastest);
    }
    let unmeasured_seconds = best[0];
    let fastest = (0..best.len()).min_by(|&a, &b| best[a].total_cmp(&best[b])).unwrap_or(0);
    let is_clear = rounds >= ROUNDS_MIN && best[fastest] < CLEARLY_FASTER * unmeasured_seconds;
    let chosen = if is_clear { fastest } else { 0 };
    Choice {
        blocking: candidates[chosen],
        seconds: best[chosen],
        unmeasured: candidates[0],
        unmeasured_seconds,
        candidates: best.iter().filter(|seconds| seconds.is_finite()).count(),
        rounds,
    }
}

#[cfg(test)]
mod tests;

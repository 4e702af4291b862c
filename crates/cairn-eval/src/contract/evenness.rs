//! Whether two sides ran the same, and by what rule their weights are compared.

use serde::{Deserialize, Serialize};

use super::{Agreement, Contract};

/// Weight bytes of two sides are the same if they differ by no more than this fraction: formats
/// store norms and scales a little differently.
const BYTES_TOLERANCE: f64 = 0.01;
/// Or by no more than this many bytes: matrices are filled up to whole panels.
const BYTES_SLACK: f64 = 4096.0;

/// Types that round every value in one way. What is put in groups depends on who does it, so that two
/// sides with the same type may hold other values.
pub const PLAIN: [&str; 3] = ["f32", "f16", "bf16"];

/// In what the weights of two sides have to be equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Even {
    /// A token reads as many bytes of them on both sides.
    #[default]
    Bytes,
    /// Every matrix holds the same values on both sides, in whatever bytes: a lossless encoding beside the
    /// plain one.
    Values,
    /// Ours is no further from the exact model than the peer's, in whatever bytes.
    Quality,
}

/// What a side ran, as it says itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ran {
    /// Tokens of the prompt that were computed in a turn, none of them kept from before.
    pub prompt_tokens: usize,
    /// Tokens made in a turn.
    pub output_tokens: usize,
    /// Threads; `None` if nobody says.
    pub threads: Option<usize>,
    /// Bytes of weights read for a token; `None` if nobody says.
    pub weight_bytes: Option<u64>,
    /// Types of the values that its matrices hold, in order; `None` if nobody says.
    pub values: Option<Vec<String>>,
}

/// What was not the same on both sides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evenness {
    /// One line each; empty if the comparison is even.
    pub uneven: Vec<String>,
}

impl Evenness {
    /// Compares what the two sides ran, ours first, and what they said, by the contract's rules.
    pub fn of(contract: &Contract, (ours, theirs): (&Ran, &Ran), agreement: &Agreement) -> Self {
        let counts = [
            ("tokens of the prompt", ours.prompt_tokens, Some(theirs.prompt_tokens)),
            ("tokens of the output", ours.output_tokens, Some(theirs.output_tokens)),
            ("threads", ours.threads.unwrap_or(0), theirs.threads),
        ];
        let unlike = |(what, own, other): (&str, usize, Option<usize>)| match other {
            Some(other) if other == own => None,
            Some(other) => Some(format!("{what}: {own} here, {other} there")),
            None => Some(format!("{what}: {own} here, unknown there")),
        };
        let mut uneven: Vec<String> = counts.into_iter().filter_map(unlike).collect();
        uneven.extend(match contract.model.even {
            Even::Bytes => bytes(ours, theirs),
            Even::Values => values(ours, theirs),
            Even::Quality => quality(agreement),
        });
        uneven.extend(contract.measure.kl_max.and_then(|most| models(agreement, most)));
        Self { uneven }
    }
}

fn models(agreement: &Agreement, most: f64) -> Option<String> {
    let found = agreement.kl_mean().unwrap_or(f64::NAN);
    (found.is_nan() || most < found)
        .then(|| format!("models: {found:.3e} nats between the sides, {most:.3e} are allowed"))
}

fn bytes(ours: &Ran, theirs: &Ran) -> Option<String> {
    let own = ours.weight_bytes.unwrap_or(0);
    let said = match theirs.weight_bytes {
        Some(other) if is_close(own, other) => return None,
        Some(other) => other.to_string(),
        None => "unknown".to_owned(),
    };
    Some(format!("bytes of weights for a token: {own} here, {said} there"))
}

fn values(ours: &Ran, theirs: &Ran) -> Option<String> {
    let said = |ran: &Ran| ran.values.as_ref().map(|types| types.join(" and "));
    let (own, other) = (said(ours), said(theirs));
    let is_plain = |types: &Vec<String>| types.iter().all(|name| PLAIN.contains(&name.as_str()));
    if own == other && ours.values.as_ref().is_some_and(is_plain) {
        return None;
    }
    let [own, other] = [own, other].map(|said| said.unwrap_or_else(|| "unknown".to_owned()));
    Some(format!("values of the weights: {own} here, {other} there"))
}

fn quality(agreement: &Agreement) -> Option<String> {
    let what = "nats from the exact model";
    let Some(kl) = &agreement.source_kl else {
        return Some(format!("{what}: unknown on both sides"));
    };
    let [own, other] = kl.means();
    // A distance that is no number is not a smaller one.
    (own.is_nan() || other.is_nan() || own > other)
        .then(|| format!("{what}: {own:.3e} here, {other:.3e} there"))
}

fn is_close(left: u64, right: u64) -> bool {
    let (left, right) = (left as f64, right as f64);
    (left - right).abs() <= BYTES_SLACK.max(BYTES_TOLERANCE * left.max(right))
}

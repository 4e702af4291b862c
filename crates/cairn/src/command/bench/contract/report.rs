//! What a contract found, as a table, a page and a verdict.

use std::fmt::Write as _;

use cairn_eval::contract::{Agreement, Contract, Evenness, SourceKl};
use cairn_kernels::bandwidth::Bandwidth;
use cairn_train::{Chart, Line, Report};
use serde::Serialize;

use super::super::spread;
use super::side::Speeds;
use crate::coverage::Coverage;
use crate::failure::UserError;
use crate::figures::{Bytes, Percent, Seconds};
use crate::table::Table;

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Found {
    /// Our sides, the one that is compared first.
    pub(super) own: Vec<Speeds>,
    /// The peer, if there was one.
    pub(super) peer: Option<Speeds>,
    /// What this machine reads a second, measured before every turn.
    pub(super) bandwidth: Bandwidth,
    /// Bytes that a decoded token of ours reads, weights and cache.
    pub(super) bytes_per_token: f64,
    /// Bytes that our engine planned and allocated.
    pub(super) own_bytes: u64,
    /// The most bytes the peer's process had.
    pub(super) peer_bytes: Option<u64>,
    /// Seconds from the start of a process to its first token.
    pub(super) own_start_s: f64,
    /// The same of the peer.
    pub(super) peer_start_s: Option<f64>,
    /// How much of ours runs in kernels of its own.
    pub(super) coverage: Coverage,
    /// Whether both ran the same.
    pub(super) evenness: Evenness,
    /// Whether both said the same.
    pub(super) agreement: Agreement,
    /// Why the run says nothing, if it does not.
    pub(super) void: Option<String>,
}

impl Found {
    /// The speeds, and whether the machine was quiet enough for them.
    pub(super) fn new(contract: &Contract, bandwidth: Bandwidth, own: Vec<Speeds>) -> Self {
        let void = contract.machine.bandwidth_min_gbs.filter(|&min| bandwidth.gbs < min);
        let void = void.map(|min| {
            format!("the machine read {:.1} GB/s, the contract wants {min:.1}", bandwidth.gbs)
        });
        Self {
            own,
            peer: None,
            bandwidth,
            bytes_per_token: 0.0,
            own_bytes: 0,
            peer_bytes: None,
            own_start_s: 0.0,
            peer_start_s: None,
            coverage: Coverage::default(),
            evenness: Evenness::default(),
            agreement: Agreement::default(),
            void,
        }
    }

    /// Fails where the figures must not be used.
    pub(super) fn verdict(&self) -> anyhow::Result<()> {
        if let Some(why) = &self.void {
            return Err(UserError::new(format!("the run is void: {why}"))
                .hint("let nothing else run, and try again")
                .into());
        }
        if !self.evenness.uneven.is_empty() {
            let uneven = self.evenness.uneven.join("; ");
            return Err(UserError::new(format!("the comparison is uneven: {uneven}"))
                .hint("make both sides the same; there is no ratio until then")
                .into());
        }
        Ok(())
    }

    /// Ratios of medians, ours over the peer's, prefill and decode; `None` where nothing may be said.
    fn ratios(&self) -> Option<[f64; 2]> {
        let (own, peer) = (&self.own[0], self.peer.as_ref()?);
        let ratio = |own: &[f64], peer: &[f64]| spread(own)[1] / spread(peer)[1];
        self.verdict().ok()?;
        Some([
            ratio(&own.prefill_tokens_per_s, &peer.prefill_tokens_per_s),
            ratio(&own.decode_tokens_per_s, &peer.decode_tokens_per_s),
        ])
    }

    /// The table, and what is to be said about it.
    pub(super) fn text(&self, contract: &Contract) -> String {
        let mut table = Table::new(&[
            "side", "prefill", "min", "max", "decode", "min", "max", "start", "memory",
        ])
        .with_text_columns(1);
        for (index, side) in self.own.iter().chain(&self.peer).enumerate() {
            let is_peer = index == self.own.len();
            let [low, middle, high] = spread(&side.prefill_tokens_per_s);
            let [slow, usual, fast] = spread(&side.decode_tokens_per_s);
            let start = match (index, is_peer) {
                (0, _) => Some(self.own_start_s),
                (_, true) => self.peer_start_s,
                _ => None,
            };
            let memory = match (index, is_peer) {
                (0, _) => Some(self.own_bytes),
                (_, true) => self.peer_bytes,
                _ => None,
            };
            table.row([
                &side.name,
                &format!("{middle:.1}"),
                &format!("{low:.1}"),
                &format!("{high:.1}"),
                &format!("{usual:.2}"),
                &format!("{slow:.2}"),
                &format!("{fast:.2}"),
                &start.map_or_else(String::new, |start| Seconds(start).to_string()),
                &memory.map_or_else(String::new, |bytes| Bytes(bytes as f64).to_string()),
            ]);
        }
        let mut text = format!("{table}\n");
        for (what, said) in self.facts(contract) {
            let _ = writeln!(text, "{what}: {said}");
        }
        text.truncate(text.trim_end().len());
        text
    }

    /// What is to be said beside the speeds, each with its name.
    fn facts(&self, contract: &Contract) -> Vec<(&'static str, String)> {
        let mut facts = Vec::new();
        if let Some([prefill, decode]) = self.ratios() {
            let turns = contract.measure.repetitions;
            let said = format!("prefill {prefill:.2}×, decode {decode:.2}× (medians of {turns})");
            facts.push(("ratio to the peer", said));
        }
        let Bandwidth { gbs, gbs_min, gbs_max, .. } = self.bandwidth;
        let used = spread(&self.own[0].decode_tokens_per_s)[1] * self.bytes_per_token / 1e9;
        let share = Percent(used / gbs);
        let said = format!(
            "decode reads {used:.1} of {gbs:.1} GB/s ({gbs_min:.1} to {gbs_max:.1}): {share}"
        );
        facts.push(("roofline", said));
        facts.push(("coverage", self.coverage.text(self.bandwidth.isa)));
        if self.peer.is_some() {
            let said = match &self.agreement.divergence {
                None => "the same tokens to the end".to_owned(),
                Some(parted) => format!(
                    "the same tokens until {}, there {} against {}, {:.4} nats apart",
                    parted.position, parted.ours, parted.theirs, parted.margin
                ),
            };
            facts.push(("agreement", said));
        }
        if let Some(mean) = self.agreement.kl_mean() {
            let count = self.agreement.kl.len();
            let most = self.agreement.kl.iter().copied().fold(0.0, f64::max);
            let said =
                format!("{mean:.2e} nats in the mean of {count} positions, {most:.2e} at most");
            facts.push(("KL(ours‖theirs)", said));
        }
        if let Some([own, other]) = self.agreement.source_kl.as_ref().map(SourceKl::means) {
            let said = format!("ours {own:.2e}, the peer {other:.2e} nats in the mean");
            facts.push(("KL from the exact model", said));
        }
        for side in self.own.iter().chain(&self.peer).filter(|side| !side.is_steady) {
            facts
                .push(("not steady", format!("{} made other tokens from turn to turn", side.name)));
        }
        facts
    }

    /// The page.
    pub(super) fn html(&self, contract: &Contract, text: &str) -> String {
        let sides = || self.own.first().into_iter().chain(&self.peer);
        let chart = |title, of: fn(&Speeds) -> &[f64]| {
            let lines = sides().enumerate().map(|(index, side)| {
                let name = if index == 0 { "cairn" } else { "peer" };
                let points = of(side).iter().enumerate();
                let points = points.map(|(turn, &speed)| ((turn + 1) as f64, speed)).collect();
                Line { name, points }
            });
            Chart { title, lines: lines.collect() }
        };
        let mut speeds = Vec::new();
        for side in self.own.iter().chain(&self.peer) {
            let [low, middle, high] = spread(&side.prefill_tokens_per_s);
            let [slow, usual, fast] = spread(&side.decode_tokens_per_s);
            let said = format!(
                "prefill {middle:.1} tokens/s ({low:.1} to {high:.1}), decode {usual:.2} \
                 ({slow:.2} to {fast:.2})"
            );
            speeds.push((side.name.clone(), said));
        }
        let facts = self.facts(contract).into_iter();
        let mut facts: Vec<_> = facts.map(|(name, said)| (name.to_owned(), said)).collect();
        let problems = self.evenness.uneven.iter().map(|what| ("uneven".to_owned(), what.clone()));
        facts.extend(problems);
        facts.extend(self.void.iter().map(|why| ("void".to_owned(), why.clone())));
        Report {
            title: &contract.name,
            tables: vec![("Speeds", speeds), ("What is to be said", facts)],
            charts: vec![
                chart("Prefill, tokens/s by turn", |side| &side.prefill_tokens_per_s),
                chart("Decode, tokens/s by turn", |side| &side.decode_tokens_per_s),
            ],
            recipe: text,
        }
        .html()
    }
}

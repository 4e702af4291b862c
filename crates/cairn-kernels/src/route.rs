//! Routing: which experts a token goes to, and what each is worth.
//!
//! Letters: `t` tokens, `e` experts, `a` experts chosen for a token.
//!
//! Per token: the scores of all experts are the softmax of the logits (maximum and sum by the 16-lane
//! tree, then `e^(logit − max) / sum`) or their sigmoids. Experts are ranked by score plus correction
//! bias, the greater first, of equals the lower number first; not-a-numbers rank last. Where experts
//! stand in groups, only those of the best groups take part. The weight of a chosen expert is its score
//! *without* the bias, over the sum of the chosen scores (a chain in order of rank) if asked, times a
//! factor.
//!
//! How evenly tokens are spread is counted in `balance`.
//!
//! Choosing has no gradient; the weights have one, for the logits.

pub mod balance;

use serde::{Deserialize, Serialize};

use crate::cpu::Cpu;
use crate::disjoint::{RowSlice, parallel_rows, rows_per_task};
use crate::isa::Simd;
use crate::lanes::{at, row_max, row_sum, sweep};
use crate::simd::kernel;
use crate::{lanes, math};

/// What makes logits scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// A softmax over all experts.
    Softmax,
    /// A sigmoid of each.
    Sigmoid,
}

/// What a group of experts is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// Its best expert (DeepSeek V2).
    Best,
    /// The sum of its two best experts (DeepSeek V3).
    BestTwo,
}

/// Equal groups of neighboring experts, of which the best take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExpertGroups {
    /// Groups.
    pub count: usize,
    /// Groups that take part.
    pub kept: usize,
    /// What they are judged by.
    pub score: GroupScore,
}

/// How experts are chosen and weighed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Routing {
    /// Experts a token goes to.
    pub top_k: usize,
    /// What makes logits scores.
    pub scoring: Scoring,
    /// Groups, where routing is limited to some.
    pub groups: Option<ExpertGroups>,
    /// Divides by the sum of the chosen scores plus this.
    pub normalize: Option<f32>,
    /// Multiplies every weight.
    pub scale: f32,
}

impl Routing {
    /// Whether every token finds its experts among `num_experts`.
    pub fn fits(&self, num_experts: usize) -> bool {
        let eligible = match self.groups {
            None => num_experts,
            Some(ExpertGroups { count, kept, score }) => {
                let size = num_experts.checked_div(count).unwrap_or(0);
                let least = if score == GroupScore::BestTwo { 2 } else { 1 };
                let divides = count <= GROUPS_MAX && size * count == num_experts;
                if !divides || kept > count || size < least {
                    return false;
                }
                kept * size
            }
        };
        self.top_k > 0 && self.top_k <= eligible
    }
}

/// Chooses and weighs experts.
#[derive(Debug)]
pub struct Route<'a> {
    /// The router's product, `[t, e]`.
    pub logits_te: &'a [f32],
    /// Added to the scores for choosing, `[e]`.
    pub bias_e: Option<&'a [f32]>,
    /// How.
    pub routing: Routing,
    /// Experts.
    pub num_experts: usize,
    /// The experts of each token in order of rank, `[t, a]`, overwritten.
    pub experts_ta: &'a mut [u32],
    /// Their weights, `[t, a]`, overwritten.
    pub weights_ta: &'a mut [f32],
}

/// The gradient of the weights of [`Route`] for the logits.
#[derive(Debug)]
pub struct RouteGrad<'a> {
    /// Gradient of the weights, `[t, a]`.
    pub dweights_ta: &'a [f32],
    /// The logits of the forward call, `[t, e]`.
    pub logits_te: &'a [f32],
    /// The experts it chose, `[t, a]`.
    pub experts_ta: &'a [u32],
    /// How.
    pub routing: Routing,
    /// Experts.
    pub num_experts: usize,
    /// Gradient of the logits, `[t, e]`, overwritten.
    pub dlogits_te: &'a mut [f32],
}

impl Route<'_> {
    /// Tokens.
    fn check(&self) -> usize {
        let (e, a) = (self.num_experts, self.routing.top_k);
        assert!(self.routing.fits(e), "{:?} cannot choose among {e} experts", self.routing);
        let t = self.logits_te.len() / e;
        assert_eq!(self.logits_te.len(), t * e, "route: logits");
        assert_eq!((self.experts_ta.len(), self.weights_ta.len()), (t * a, t * a), "route: ranks");
        assert!(self.bias_e.is_none_or(|bias| bias.len() == e), "route: bias");
        t
    }
}

impl RouteGrad<'_> {
    /// Tokens.
    fn check(&self) -> usize {
        let (e, a) = (self.num_experts, self.routing.top_k);
        let t = self.logits_te.len() / e;
        assert_eq!((self.logits_te.len(), self.dlogits_te.len()), (t * e, t * e), "route_grad: e");
        assert_eq!(
            (self.experts_ta.len(), self.dweights_ta.len()),
            (t * a, t * a),
            "route_grad: a"
        );
        t
    }
}

/// Chooses and weighs experts. See [`route_reference`] for its definition.
pub fn route(cpu: &Cpu, args: Route<'_>) {
    let t = args.check();
    let Route { logits_te, bias_e, routing, num_experts: e, experts_ta, weights_ta } = args;
    let (a, simd) = (routing.top_k, cpu.simd());
    let outputs = (RowSlice::new(experts_ta, a), RowSlice::new(weights_ta, a));
    parallel_rows(cpu, t, rows_per_task(e * 8), outputs, |rows, (experts, weights), scratch| {
        let [scores, ranked] = scratch.f32_parts([e, e]);
        let results = experts.chunks_exact_mut(a).zip(weights.chunks_exact_mut(a));
        for (row, (experts_a, weights_a)) in rows.zip(results) {
            score(simd, routing.scoring, &logits_te[row * e..][..e], scores);
            rank(&routing, scores, bias_e, ranked, experts_a);
            weigh(&routing, scores, experts_a, weights_a);
        }
    });
}

/// The scores of all experts for one token.
fn score(simd: Simd, scoring: Scoring, logits_e: &[f32], scores_e: &mut [f32]) {
    match scoring {
        Scoring::Softmax => softmax(simd, logits_e, scores_e),
        Scoring::Sigmoid => sigmoid(simd, logits_e, scores_e),
    }
}

kernel! {
    fn softmax<V>(logits: &[f32], scores: &mut [f32]) {
        let max = V::splat(row_max::<V>(logits));
        sweep!(scores, i => math::exp(at::<V>(logits, i) - max));
        let sum = V::splat(row_sum::<V>(scores));
        sweep!(scores, i => at::<V>(scores, i) / sum);
    }
}

kernel! {
    fn sigmoid<V>(logits: &[f32], scores: &mut [f32]) {
        sweep!(scores, i => math::sigmoid(at::<V>(logits, i)));
    }
}

/// Marks an expert that is taken or takes no part; what can be chosen is greater.
const OUT: f32 = f32::NEG_INFINITY;

/// Where the greatest element is, the first of equals.
fn first_greatest(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}

/// Chooses the experts of one token; `ranked` is working memory.
fn rank(
    routing: &Routing,
    scores_e: &[f32],
    bias_e: Option<&[f32]>,
    ranked: &mut [f32],
    experts_a: &mut [u32],
) {
    for (i, ranked) in ranked.iter_mut().enumerate() {
        let value = scores_e[i] + bias_e.map_or(0.0, |bias| bias[i]);
        // Not-a-numbers and −∞ rank last, but above what is out.
        *ranked = if value > f32::MIN { value } else { f32::MIN };
    }
    if let Some(groups) = routing.groups {
        keep_best_groups(&groups, ranked);
    }
    for expert in experts_a {
        let best = first_greatest(ranked);
        ranked[best] = OUT;
        *expert = u32::try_from(best).expect("experts are counted in 32 bits");
    }
}

/// Takes the experts of all but the best groups out.
fn keep_best_groups(groups: &ExpertGroups, ranked: &mut [f32]) {
    let size = ranked.len() / groups.count;
    let judge = |group: &[f32]| {
        let best = first_greatest(group);
        let others = group.iter().enumerate().filter(|(i, _)| *i != best).map(|(_, value)| *value);
        match groups.score {
            GroupScore::Best => group[best],
            GroupScore::BestTwo => group[best] + others.fold(OUT, f32::max),
        }
    };
    // A group stays if fewer than `kept` are better, or equal and before it.
    let stays = |ranked: &[f32], index: usize| {
        let own = judge(&ranked[index * size..][..size]);
        let ahead = ranked.chunks_exact(size).enumerate().filter(|(other, group)| {
            let score = judge(group);
            score > own || (score >= own && *other < index)
        });
        ahead.count() < groups.kept
    };
    // All are judged before any is taken out: a group that is out has no score.
    let mut stay = [false; GROUPS_MAX];
    for (index, stay) in stay.iter_mut().enumerate().take(groups.count) {
        *stay = stays(ranked, index);
    }
    for (group, _) in ranked.chunks_exact_mut(size).zip(stay).filter(|(_, stay)| !stay) {
        group.fill(OUT);
    }
}

/// Groups that routing can be limited to, at most.
const GROUPS_MAX: usize = 64;

/// The weights of one token's experts.
fn weigh(routing: &Routing, scores_e: &[f32], experts_a: &[u32], weights_a: &mut [f32]) {
    for (weight, &expert) in weights_a.iter_mut().zip(experts_a) {
        *weight = scores_e[expert as usize];
    }
    if let Some(eps) = routing.normalize {
        let sum = weights_a.iter().fold(0.0, |sum, weight| sum + weight) + eps;
        weights_a.iter_mut().for_each(|weight| *weight /= sum);
    }
    weights_a.iter_mut().for_each(|weight| *weight *= routing.scale);
}

/// The gradient of [`route`]. See [`route_grad_reference`] for its definition.
pub fn route_grad(cpu: &Cpu, args: RouteGrad<'_>) {
    let t = args.check();
    let RouteGrad { dweights_ta, logits_te, experts_ta, routing, num_experts: e, dlogits_te } =
        args;
    let (a, simd) = (routing.top_k, cpu.simd());
    let outputs = RowSlice::new(dlogits_te, e);
    parallel_rows(cpu, t, rows_per_task(e * 8), outputs, |rows, dlogits, scratch| {
        let [scores, dscores] = scratch.f32_parts([e, a]);
        for (row, dlogits_e) in rows.zip(dlogits.chunks_exact_mut(e)) {
            score(simd, routing.scoring, &logits_te[row * e..][..e], scores);
            let experts_a = &experts_ta[row * a..][..a];
            unweigh(&routing, scores, experts_a, &dweights_ta[row * a..][..a], dscores);
            match routing.scoring {
                Scoring::Softmax => {
                    let shared = shared_slope(scores, experts_a, dscores);
                    softmax_slope(simd, scores, shared, dlogits_e);
                }
                Scoring::Sigmoid => dlogits_e.fill(0.0),
            }
            finish_chosen(routing.scoring, (scores, experts_a, dscores), dlogits_e);
        }
    });
}

/// Gradients of the chosen scores from those of the weights.
fn unweigh(
    routing: &Routing,
    scores_e: &[f32],
    experts_a: &[u32],
    dweights_a: &[f32],
    dscores_a: &mut [f32],
) {
    let score = |expert: &u32| scores_e[*expert as usize];
    let Some(eps) = routing.normalize else {
        for (dscore, dweight) in dscores_a.iter_mut().zip(dweights_a) {
            *dscore = routing.scale * dweight;
        }
        return;
    };
    let sum = experts_a.iter().fold(0.0, |sum, expert| sum + score(expert)) + eps;
    let pairs = dweights_a.iter().zip(experts_a);
    let mean = pairs.fold(0.0, |mean, (d, expert)| d.mul_add(score(expert) / sum, mean));
    for (dscore, dweight) in dscores_a.iter_mut().zip(dweights_a) {
        *dscore = routing.scale * (dweight - mean) / sum;
    }
}

/// `Σ dscore · score` over the chosen experts, in order of rank.
fn shared_slope(scores_e: &[f32], experts_a: &[u32], dscores_a: &[f32]) -> f32 {
    let pairs = dscores_a.iter().zip(experts_a);
    pairs.fold(0.0, |sum, (d, &expert)| d.mul_add(scores_e[expert as usize], sum))
}

kernel! {
    /// What every logit gets through the sum of the softmax.
    fn softmax_slope<V>(scores: &[f32], shared: f32, dlogits: &mut [f32]) {
        let shared = V::splat(-shared);
        sweep!(dlogits, i => at::<V>(scores, i) * shared);
    }
}

/// Completes the gradients of the chosen experts' logits. A softmax's already hold `−shared · score`.
fn finish_chosen(
    scoring: Scoring,
    (scores_e, experts_a, dscores_a): (&[f32], &[u32], &[f32]),
    dlogits_e: &mut [f32],
) {
    for (&dscore, &expert) in dscores_a.iter().zip(experts_a) {
        let score = scores_e[expert as usize];
        let dlogit = &mut dlogits_e[expert as usize];
        *dlogit = match scoring {
            Scoring::Softmax => dscore.mul_add(score, *dlogit),
            Scoring::Sigmoid => dscore * (score * (1.0 - score)),
        };
    }
}

/// The scores of one token in plain loops.
fn scores_reference(scoring: Scoring, logits_e: &[f32]) -> Vec<f32> {
    match scoring {
        Scoring::Softmax => {
            let max = lanes::max(logits_e.iter().copied());
            let exp: Vec<f32> = logits_e.iter().map(|logit| math::exp(logit - max)).collect();
            let sum = lanes::sum(exp.iter().copied());
            exp.iter().map(|x| x / sum).collect()
        }
        Scoring::Sigmoid => logits_e.iter().map(|logit| math::sigmoid(*logit)).collect(),
    }
}

/// The indices of `values`, the greatest first, of equals the first.
fn descending(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[j].partial_cmp(&values[i]).expect("scores are numbers"));
    order
}

/// Defines [`route`] by sorting. Scores must be numbers.
pub fn route_reference(args: Route<'_>) {
    args.check();
    let Route { logits_te, bias_e, routing, num_experts: e, experts_ta, weights_ta } = args;
    let a = routing.top_k;
    for (row, logits_e) in logits_te.chunks_exact(e).enumerate() {
        let scores = scores_reference(routing.scoring, logits_e);
        let ranked: Vec<f32> =
            (0..e).map(|i| scores[i] + bias_e.map_or(0.0, |bias| bias[i])).collect();
        let mut order = descending(&ranked);
        if let Some(ExpertGroups { count, kept, score }) = routing.groups {
            let size = e / count;
            let judged: Vec<f32> = ranked
                .chunks_exact(size)
                .map(|group| {
                    let best = descending(group);
                    match score {
                        GroupScore::Best => group[best[0]],
                        GroupScore::BestTwo => group[best[0]] + group[best[1]],
                    }
                })
                .collect();
            let groups = &descending(&judged)[..kept];
            order.retain(|expert| groups.contains(&(expert / size)));
        }
        let experts_a = &mut experts_ta[row * a..][..a];
        for (expert, best) in experts_a.iter_mut().zip(order) {
            *expert = u32::try_from(best).expect("experts are counted in 32 bits");
        }
        weigh(&routing, &scores, experts_a, &mut weights_ta[row * a..][..a]);
    }
}

/// Defines [`route_grad`]: plain loops in the canonical order.
pub fn route_grad_reference(args: RouteGrad<'_>) {
    args.check();
    let RouteGrad { dweights_ta, logits_te, experts_ta, routing, num_experts: e, dlogits_te } =
        args;
    let a = routing.top_k;
    for (row, logits_e) in logits_te.chunks_exact(e).enumerate() {
        let scores = scores_reference(routing.scoring, logits_e);
        let experts_a = &experts_ta[row * a..][..a];
        let mut dscores = vec![0.0; a];
        unweigh(&routing, &scores, experts_a, &dweights_ta[row * a..][..a], &mut dscores);
        let dlogits_e = &mut dlogits_te[row * e..][..e];
        let shared = shared_slope(&scores, experts_a, &dscores);
        for (dlogit, score) in dlogits_e.iter_mut().zip(&scores) {
            *dlogit = if routing.scoring == Scoring::Softmax { score * -shared } else { 0.0 };
        }
        finish_chosen(routing.scoring, (&scores, experts_a, &dscores), dlogits_e);
    }
}

#[cfg(test)]
mod tests;

//! Logits to a token: the chain of [`crate::sampling`].
//!
//! Letters: `v` vocabulary. A sampler holds working memory for one row of logits and no state: what
//! it returns depends on the logits, the sequence so far, the parameters, the sequence's
//! [`MirostatState`] where it is steered, and nothing else, so it serves all sequences of an engine in turn.
//!
//! **Invariant:** `counts` is all zeros between calls.

use crate::float;
use crate::mirostat::{self, MirostatParams, MirostatState, MirostatVersion};
use crate::random;
use crate::sampling::SamplingParams;

/// Candidates that are put in order at first; more follow only if their mass is needed.
const SORTED_FIRST: usize = 256;

/// A sequence so far; the token to choose has position `tokens.len()`.
#[derive(Clone, Copy, Debug)]
pub struct SampleContext<'a> {
    /// Prompt and output.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// Separates sequences that share a seed: the choices of one request.
    pub stream: u32,
    /// Bits of the tokens that may come, bit `t % 32` of word `t / 32`; without them all may.
    pub allowed: Option<&'a [u32]>,
}

/// Why no token can be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// The model computed something that is not a number.
    #[error("the model's logit of token {token} is not a number")]
    NotANumber {
        /// The first such token.
        token: u32,
    },
    /// Penalties and biases made a logit larger than any number.
    #[error("the settings make the logit of token {token} larger than any number")]
    Overflow {
        /// The token.
        token: u32,
    },
    /// The settings exclude the whole vocabulary.
    #[error("what is asked for excludes every token at position {position}")]
    NoCandidate {
        /// Where.
        position: usize,
    },
    /// What the output follows cannot go on.
    #[error("what the output follows cannot go on: {0}")]
    Constraint(String),
}

/// A token that is still in the running.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// Smaller is better.
    rank: f64,
    /// Unnormalized probability; 1 for the likeliest. 0 until it is needed.
    weight: f64,
    id: u32,
}

/// Working memory of the chain.
#[derive(Debug)]
pub struct Sampler {
    logits_v: Vec<f32>,
    counts_v: Vec<u32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Working memory for a vocabulary of `vocab_size` tokens.
    pub fn new(vocab_size: usize) -> Self {
        Self {
            logits_v: Vec::with_capacity(vocab_size),
            counts_v: vec![0; vocab_size],
            candidates: Vec::with_capacity(vocab_size),
        }
    }

    /// Chooses the first token of an output, or the next where nothing is steered.
    ///
    /// # Errors
    ///
    /// As [`steered`](Self::steered).
    ///
    /// # Panics
    ///
    /// As [`steered`](Self::steered).
    pub fn sample(
        &mut self,
        logits_v: &[f32],
        context: SampleContext<'_>,
        params: &SamplingParams,
    ) -> Result<u32, SampleError> {
        self.steered(logits_v, context, params, &mut MirostatState::default())
    }

    /// Chooses the next token of an output that is steered by `state`, which the choice changes.
    ///
    /// # Errors
    ///
    /// [`SampleError`]; the request fails, the sampler can go on with others.
    ///
    /// # Panics
    ///
    /// Panics if `logits_v` is not one row of the vocabulary, or a token or bias is outside it;
    /// requests are checked when they are added.
    pub fn steered(
        &mut self,
        logits_v: &[f32],
        context: SampleContext<'_>,
        params: &SamplingParams,
        state: &mut MirostatState,
    ) -> Result<u32, SampleError> {
        assert_eq!(logits_v.len(), self.counts_v.len(), "one row of logits");
        if let Some(token) = first_position(logits_v, |x| x.is_nan() || x == f32::INFINITY) {
            return Err(SampleError::NotANumber { token: token_id(token) });
        }
        if params.temperature == 0.0 && leaves_logits(params) && context.allowed.is_none() {
            return match argmax(logits_v) {
                best if logits_v[best as usize] == f32::NEG_INFINITY => {
                    Err(SampleError::NoCandidate { position: context.tokens.len() })
                }
                best => Ok(best),
            };
        }
        self.logits_v.clear();
        self.logits_v.extend_from_slice(logits_v);
        for &(token, bias) in &params.logit_bias {
            self.logits_v[token as usize] += bias;
        }
        self.penalize(context, params);
        if let Some(size) = params.no_repeat_ngram_size {
            exclude_repeats(&mut self.logits_v, context.tokens, size);
        }
        if let Some(allowed) = context.allowed {
            exclude_others(&mut self.logits_v, allowed);
        }
        let best = argmax(&self.logits_v);
        let largest = self.logits_v[best as usize];
        if largest == f32::NEG_INFINITY {
            return Err(SampleError::NoCandidate { position: context.tokens.len() });
        }
        if largest == f32::INFINITY {
            return Err(SampleError::Overflow { token: best });
        }
        if params.temperature == 0.0 {
            return Ok(best);
        }
        self.rank(largest, params.temperature);
        let uniform = random::uniform(params.seed, context.tokens.len() as u64, context.stream);
        let Some(steering) = params.mirostat else {
            self.filter(params);
            return Ok(draw(&self.candidates, uniform));
        };
        self.filter_by_surprise(steering, state.mu(steering));
        let token = draw(&self.candidates, uniform);
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        let drawn = self.candidates.iter().find(|candidate| candidate.id == token);
        state.note(steering, drawn.map_or(1.0, |drawn| drawn.weight / total));
        Ok(token)
    }

    /// Leaves the candidates that are not too surprising, in order of id.
    fn filter_by_surprise(&mut self, steering: MirostatParams, mu: f64) {
        let Self { candidates, counts_v, .. } = self;
        for candidate in &mut *candidates {
            candidate.weight = float::exp(-candidate.rank);
        }
        match steering.version {
            MirostatVersion::V2 => {
                let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
                let least = mirostat::least_share(mu) * total;
                // The likeliest has weight 1 and stays in any case.
                candidates.retain(|candidate| least <= candidate.weight || candidate.rank <= 0.0);
            }
            MirostatVersion::V1 => {
                candidates.sort_unstable_by(better);
                let weights = candidates.iter().take(mirostat::ESTIMATED_FROM);
                let weights = weights.map(|candidate| candidate.weight);
                candidates.truncate(mirostat::num_kept(weights, mu, counts_v.len()));
                candidates.sort_unstable_by_key(|candidate| candidate.id);
            }
        }
    }

    #[expect(clippy::float_cmp, reason = "exactly 1 is the setting that changes nothing")]
    fn penalize(&mut self, context: SampleContext<'_>, params: &SamplingParams) {
        let Self { logits_v, counts_v, .. } = self;
        if params.repetition_penalty != 1.0 {
            for_each_distinct(counts_v, context.tokens, |token, _| {
                let logit = &mut logits_v[token];
                if *logit < 0.0 {
                    *logit *= params.repetition_penalty;
                } else {
                    *logit /= params.repetition_penalty;
                }
            });
        }
        if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
            for_each_distinct(counts_v, &context.tokens[context.prompt_len..], |token, count| {
                logits_v[token] -= params.frequency_penalty * count as f32;
                logits_v[token] -= params.presence_penalty;
            });
        }
    }

    /// Fills the candidates, in order of id, ranked by `(largest − logit) / temperature`.
    fn rank(&mut self, largest: f32, temperature: f32) {
        self.candidates.clear();
        for (token, &logit) in self.logits_v.iter().enumerate() {
            let x = f64::from((logit - largest) / temperature);
            // Excluded tokens are −∞ and leave here; 0/0 cannot be, the temperature is not 0.
            if float::EXP_MIN <= x {
                self.candidates.push(Candidate { rank: -x, weight: 0.0, id: token_id(token) });
            }
        }
    }

    fn filter(&mut self, params: &SamplingParams) {
        let candidates = &mut self.candidates;
        if let Some(k) = params.top_k.filter(|&k| k < candidates.len()) {
            candidates.select_nth_unstable_by(k - 1, better);
            candidates.truncate(k);
            candidates.sort_unstable_by_key(|candidate| candidate.id);
        }
        for candidate in &mut *candidates {
            candidate.weight = float::exp(-candidate.rank);
        }
        if let Some(mass) = params.top_p.filter(|&mass| mass < 1.0) {
            keep_mass(candidates, f64::from(mass));
        }
        if let Some(share) = params.min_p {
            // The likeliest token survives every step so far, with weight 1.
            candidates.retain(|candidate| f64::from(share) <= candidate.weight);
        }
        if let Some(mass) = params.typical_p.filter(|&mass| mass < 1.0) {
            rank_by_typicality(candidates);
            keep_mass(candidates, f64::from(mass));
        }
        if let Some(z) = params.tfs_z.filter(|&z| z < 1.0) {
            cut_tail(candidates, f64::from(z));
        }
        if let Some(epsilon) = params.epsilon_cutoff.filter(|&epsilon| 0.0 < epsilon) {
            keep_likely(candidates, f64::from(epsilon));
        }
        if let Some(epsilon) = params.eta_cutoff.filter(|&epsilon| 0.0 < epsilon) {
            let epsilon = f64::from(epsilon);
            let eta = epsilon.sqrt() * float::exp(-entropy(candidates));
            keep_likely(candidates, epsilon.min(eta));
        }
    }
}

/// Whether nothing changes a logit before it is looked at.
#[expect(clippy::float_cmp, reason = "exactly 1 is the setting that changes nothing")]
fn leaves_logits(params: &SamplingParams) -> bool {
    params.logit_bias.is_empty()
        && params.repetition_penalty == 1.0
        && params.frequency_penalty == 0.0
        && params.presence_penalty == 0.0
        && params.no_repeat_ngram_size.is_none()
}

/// Logits that are looked at together, without a branch between them.
const BLOCK: usize = 64;

/// The first logit of which something holds.
#[inline(always)]
fn first_position(logits_v: &[f32], holds: impl Fn(f32) -> bool) -> Option<usize> {
    let mut blocks = logits_v.chunks(BLOCK);
    let any = |block: &[f32]| block.iter().fold(false, |any, &x| any | holds(x));
    let block = blocks.position(any)?;
    let first = block * BLOCK;
    logits_v[first..].iter().position(|&x| holds(x)).map(|i| first + i)
}

/// The largest logit's token, the lowest id where several are equal. The first logit is a number.
#[expect(clippy::float_cmp, reason = "the largest is one of them")]
pub(crate) fn argmax(logits_v: &[f32]) -> u32 {
    let first = logits_v.first().copied().unwrap_or(f32::NEG_INFINITY);
    let mut largest = [first; BLOCK];
    for block in logits_v.chunks(BLOCK) {
        for (largest, &x) in largest.iter_mut().zip(block) {
            *largest = if *largest < x { x } else { *largest };
        }
    }
    let largest = largest.into_iter().fold(first, |a, b| if a < b { b } else { a });
    token_id(first_position(logits_v, |x| x == largest).unwrap_or(0))
}

/// The place of a token among all, likeliest first, ties by id; the likeliest has 1.
pub(crate) fn rank(logits_v: &[f32], token: u32) -> usize {
    let at = token as usize;
    let logit = logits_v[at];
    let before = logits_v[..at].iter().filter(|&&other| logit <= other).count();
    let after = logits_v[at..].iter().filter(|&&other| logit < other).count();
    1 + before + after
}

/// Writes the `count` largest logits' tokens with `logit − lse`, largest first, ties by id.
pub(crate) fn top_logprobs(logits_v: &[f32], lse: f32, count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (token, &logit) in logits_v.iter().enumerate() {
        if best.len() == count && best.last().is_none_or(|&(_, least)| logit <= least) {
            continue;
        }
        // Behind all that are at least as large: those came first, with lower ids.
        let place = best.partition_point(|&(_, other)| logit <= other);
        best.insert(place, (token_id(token), logit));
        best.truncate(count);
    }
    best.iter_mut().for_each(|(_, logit)| *logit -= lse);
    best
}

fn token_id(token: usize) -> u32 {
    u32::try_from(token).expect("vocabularies are limited to 2^24 tokens")
}

/// Calls `f` once for each distinct token with its number of occurrences; leaves `counts` zero.
fn for_each_distinct(counts: &mut [u32], tokens: &[u32], mut f: impl FnMut(usize, u32)) {
    for &token in tokens {
        counts[token as usize] += 1;
    }
    for &token in tokens {
        let count = std::mem::take(&mut counts[token as usize]);
        if count != 0 {
            f(token as usize, count);
        }
    }
}

/// Excludes every token that would end an n-gram that has occurred.
fn exclude_repeats(logits_v: &mut [f32], tokens: &[u32], size: usize) {
    let Some(start) = (tokens.len() + 1).checked_sub(size) else { return };
    let prefix = &tokens[start..];
    for gram in tokens.windows(size) {
        if gram[..size - 1] == *prefix {
            logits_v[gram[size - 1] as usize] = f32::NEG_INFINITY;
        }
    }
}

/// Excludes every token whose bit is not set.
fn exclude_others(logits_v: &mut [f32], allowed: &[u32]) {
    for (logits, &word) in logits_v.chunks_mut(32).zip(allowed) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

fn better(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    a.rank.total_cmp(&b.rank).then(a.id.cmp(&b.id))
}

/// Keeps the fewest candidates, best ranks first, whose weights reach `mass` of the sum. Expects
/// and leaves them in order of id, so that every sum has one order.
fn keep_mass(candidates: &mut Vec<Candidate>, mass: f64) {
    let goal = mass * candidates.iter().map(|candidate| candidate.weight).sum::<f64>();
    let mut sorted = 0;
    let mut chunk = SORTED_FIRST;
    let mut sum = 0.0;
    'search: while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let end = chunk.min(rest.len());
        if end < rest.len() {
            rest.select_nth_unstable_by(end - 1, better);
        }
        rest[..end].sort_unstable_by(better);
        for candidate in &rest[..end] {
            sorted += 1;
            sum += candidate.weight;
            if goal <= sum {
                break 'search;
            }
        }
        chunk *= 4;
    }
    candidates.truncate(sorted);
    candidates.sort_unstable_by_key(|candidate| candidate.id);
}

/// Keeps the candidates whose share of the probability is at least this, or else the likeliest.
fn keep_likely(candidates: &mut Vec<Candidate>, least: f64) {
    let least = least * candidates.iter().map(|candidate| candidate.weight).sum::<f64>();
    let likeliest = candidates
        .iter()
        .copied()
        .min_by(|a, b| b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id)));
    candidates.retain(|candidate| least <= candidate.weight);
    if candidates.is_empty() {
        candidates.extend(likeliest);
    }
}

/// The entropy of the candidates, in nats.
fn entropy(candidates: &[Candidate]) -> f64 {
    let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    let log_total = float::ln(total);
    let term = |candidate: &Candidate| {
        candidate.weight / total * (log_total - float::ln(candidate.weight))
    };
    // No rounding makes it negative where one candidate is left.
    candidates.iter().map(term).sum::<f64>().max(0.0)
}

/// Keeps the likeliest candidates up to where the second differences of the sorted probabilities have come to a
/// share `z` of all of them.
fn cut_tail(candidates: &mut Vec<Candidate>, z: f64) {
    if candidates.len() <= 2 {
        return;
    }
    candidates.sort_unstable_by(|a, b| b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id)));
    let bend = |three: &[Candidate]| {
        ((three[0].weight - three[1].weight) - (three[1].weight - three[2].weight)).abs()
    };
    let probability: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    let total: f64 = candidates.windows(3).map(bend).sum();
    // A straight line bends nowhere: then each place counts alike.
    let is_straight = total <= 1e-6 * probability;
    let even = 1.0 / (candidates.len() - 2) as f64;
    let mut sum = 0.0;
    let passes = |three: &[Candidate]| {
        sum += if is_straight { even } else { bend(three) / total };
        z < sum
    };
    // At least one stays.
    if let Some(end) = candidates.windows(3).position(passes) {
        candidates.truncate(end.max(1));
    }
    candidates.sort_unstable_by_key(|candidate| candidate.id);
}

/// Ranks candidates by the distance of their information from the expected one.
fn rank_by_typicality(candidates: &mut [Candidate]) {
    let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    let log_total = float::ln(total);
    // The rank is still −ln(weight), so −ln(p) = rank + ln(total).
    let information = |candidate: &Candidate| candidate.rank + log_total;
    let expected: f64 = candidates.iter().map(|c| c.weight / total * information(c)).sum();
    for candidate in candidates {
        candidate.rank = (information(candidate) - expected).abs();
    }
}

/// The candidate at which the running sum of weights passes `uniform` of the total.
fn draw(candidates: &[Candidate], uniform: f64) -> u32 {
    let goal = uniform * candidates.iter().map(|candidate| candidate.weight).sum::<f64>();
    let mut sum = 0.0;
    for candidate in candidates {
        sum += candidate.weight;
        if goal < sum {
            return candidate.id;
        }
    }
    // `uniform < 1`, but the product may round up to the sum itself.
    candidates.last().expect("at least one candidate survives every step").id
}

#[cfg(test)]
mod tests;

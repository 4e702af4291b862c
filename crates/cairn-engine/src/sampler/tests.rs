//! The chain against a plain one, and the properties that each step promises.

use proptest::prelude::*;

use super::*;
use crate::sampling::SamplingFields;

const VOCAB: usize = 40;

fn params(change: impl FnOnce(&mut SamplingFields)) -> SamplingParams {
    let mut fields = SamplingFields::default();
    change(&mut fields);
    SamplingParams::new(fields).unwrap()
}

fn context(tokens: &[u32], prompt_len: usize) -> SampleContext<'_> {
    SampleContext { tokens, prompt_len, stream: 0, allowed: None }
}

fn sample(logits: &[f32], tokens: &[u32], params: &SamplingParams) -> Result<u32, SampleError> {
    Sampler::new(logits.len()).sample(logits, context(tokens, tokens.len()), params)
}

/// Ids that survive the filters.
fn survivors(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let mut sampler = Sampler::new(logits.len());
    sampler.logits_v.extend_from_slice(logits);
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    sampler.rank(largest, params.temperature);
    sampler.filter(params);
    sampler.candidates.iter().map(|candidate| candidate.id).collect()
}

/// Probabilities by the plainest arithmetic.
fn probabilities(logits: &[f32]) -> Vec<f64> {
    let weights: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-8.0_f32..8.0, VOCAB)
}

proptest! {
    #[test]
    fn top_k_keeps_the_k_largest(logits in logits(), k in 1_usize..60) {
        let kept = survivors(&logits, &params(|f| f.top_k = Some(k)));
        prop_assert_eq!(kept.len(), k.min(VOCAB));
        let least = kept.iter().map(|&id| logits[id as usize]).fold(f32::INFINITY, f32::min);
        let above = logits.iter().filter(|&&x| least < x).count();
        prop_assert!(above < kept.len());
    }

    #[test]
    fn top_p_is_the_smallest_set_with_the_mass(logits in logits(), p in 0.01_f32..0.99) {
        let kept = survivors(&logits, &params(|f| f.top_p = Some(p)));
        let probs = probabilities(&logits);
        let mass: f64 = kept.iter().map(|&id| probs[id as usize]).sum();
        let least = kept.iter().map(|&id| probs[id as usize]).fold(1.0, f64::min);
        prop_assert!(f64::from(p) <= mass + 1e-9, "mass {}", mass);
        prop_assert!(mass - least < f64::from(p) + 1e-9, "without the least, {}", mass - least);
        prop_assert!(probs.iter().filter(|&&x| least < x).count() < kept.len(), "the largest");
    }

    #[test]
    fn min_p_keeps_by_share_of_the_largest(logits in logits(), share in 0.001_f32..1.0) {
        let kept = survivors(&logits, &params(|f| f.min_p = Some(share)));
        let probs = probabilities(&logits);
        let largest = probs.iter().copied().fold(0.0, f64::max);
        for (id, prob) in probs.iter().enumerate() {
            let ratio = prob / largest / f64::from(share);
            if 1e-6 < (ratio - 1.0).abs() {
                prop_assert_eq!(kept.contains(&u32::try_from(id).unwrap()), 1.0 < ratio);
            }
        }
    }

    #[test]
    fn typical_p_keeps_the_nearest_to_the_entropy(logits in logits(), p in 0.05_f32..0.95) {
        let kept = survivors(&logits, &params(|f| f.typical_p = Some(p)));
        let probs = probabilities(&logits);
        let entropy: f64 = probs.iter().map(|p| -p * p.ln()).sum();
        let mut order: Vec<usize> = (0..VOCAB).collect();
        let distance = |id: usize| (-probs[id].ln() - entropy).abs();
        order.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)));
        let mut mass = 0.0;
        let count = order.iter().take_while(|&&id| {
            let more = mass < f64::from(p);
            mass += probs[id];
            more
        }).count();
        let mut expected: Vec<usize> = order[..count].to_vec();
        expected.sort_unstable();
        let kept: Vec<usize> = kept.iter().map(|&id| id as usize).collect();
        prop_assert_eq!(kept, expected);
    }

    /// As transformers' `EpsilonLogitsWarper` and `EtaLogitsWarper`.
    #[test]
    fn cutoffs_are_those_of_the_papers(logits in logits(), epsilon in 0.0001_f32..0.3) {
        let probs = probabilities(&logits);
        let largest = probs.iter().copied().fold(0.0, f64::max);
        let entropy: f64 = probs.iter().map(|p| -p * p.ln()).sum();
        let wide = f64::from(epsilon);
        let eta = wide.min(wide.sqrt() * (-entropy).exp());
        for (cutoff, kept) in [
            (wide, survivors(&logits, &params(|f| f.epsilon_cutoff = Some(epsilon)))),
            (eta, survivors(&logits, &params(|f| f.eta_cutoff = Some(epsilon)))),
        ] {
            for (id, &prob) in probs.iter().enumerate() {
                // Where rounding decides, either is right.
                if 1e-6 < (prob / cutoff - 1.0).abs() {
                    let stays = cutoff <= prob || largest <= prob;
                    prop_assert_eq!(kept.contains(&u32::try_from(id).unwrap()), stays);
                }
            }
        }
    }

    /// As `llama_sampler_tail_free` did it, with at least one token.
    #[test]
    fn the_tail_is_cut_where_the_curve_has_bent(logits in logits(), z in 0.05_f32..0.99) {
        let mut sorted = probabilities(&logits);
        sorted.sort_by(|a, b| b.total_cmp(a));
        let first: Vec<f64> = sorted.windows(2).map(|two| two[0] - two[1]).collect();
        let second: Vec<f64> = first.windows(2).map(|two| (two[0] - two[1]).abs()).collect();
        let total: f64 = second.iter().sum();
        let mut sum = 0.0;
        let mut least = f64::INFINITY;
        let count = second.iter().enumerate().position(|(at, bend)| {
            sum += bend / total;
            least = least.min((sum - f64::from(z)).abs());
            f64::from(z) < sum && 1 <= at
        });
        prop_assume!(1e-9 < least);
        let kept = survivors(&logits, &params(|f| f.tfs_z = Some(z)));
        // llama.cpp looks on past the first place, whatever it has bent by there.
        let expected = if f64::from(z) < second[0] / total { 1 } else { count.unwrap_or(VOCAB) };
        prop_assert_eq!(kept.len(), expected);
        let least = kept.iter().map(|&id| logits[id as usize]).fold(f32::INFINITY, f32::min);
        prop_assert_eq!(logits.iter().filter(|&&x| least < x).count() + 1, kept.len());
    }

    /// As llama.cpp's `llama_sampler_mirostat_v2_apply` and `llama_sampler_mirostat_apply`, in `f64`.
    #[test]
    fn mirostat_steers_as_llama_cpp_does(
        rows in prop::collection::vec(logits(), 1..12),
        tau in 0.5_f32..8.0,
        eta in 0.01_f32..1.0,
        seed in any::<u64>(),
    ) {
        for version in [MirostatVersion::V1, MirostatVersion::V2] {
            let steering = MirostatParams { version, tau, eta };
            let params = params(|f| (f.mirostat, f.seed) = (Some(steering), seed));
            let mut state = MirostatState::default();
            let mut mu = 2.0 * f64::from(tau);
            let mut sampler = Sampler::new(VOCAB);
            let mut tokens = Vec::new();
            for row in &rows {
                let probs = probabilities(row);
                let mut order: Vec<usize> = (0..VOCAB).collect();
                order.sort_by(|&a, &b| probs[b].total_cmp(&probs[a]).then(a.cmp(&b)));
                let kept = match version {
                    MirostatVersion::V2 => {
                        let least = order.iter().map(|&id| (-probs[id].log2() - mu).abs());
                        prop_assume!(least.fold(f64::INFINITY, f64::min) > 1e-9);
                        order.iter().take_while(|&&id| -probs[id].log2() <= mu).count().max(1)
                    }
                    MirostatVersion::V1 => {
                        let (mut products, mut squares) = (0.0, 0.0);
                        for at in 0..VOCAB - 1 {
                            let t = ((at + 2) as f64 / (at + 1) as f64).ln();
                            products += t * (probs[order[at]] / probs[order[at + 1]]).ln();
                            squares += t * t;
                        }
                        let s = products / squares;
                        let excess = s - 1.0;
                        let top = excess * 2.0_f64.powf(mu);
                        let k = (top / (1.0 - (VOCAB as f64).powf(-excess))).powf(1.0 / s);
                        prop_assume!(1e-6 < (k - k.round()).abs());
                        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
                        let k = k as usize;
                        k.clamp(1, VOCAB)
                    }
                };
                let token =
                    sampler.steered(row, context(&tokens, 0), &params, &mut state).unwrap();
                let place = order.iter().position(|&id| id == token as usize).unwrap();
                prop_assert!(place < kept, "{version:?}: {place} of {kept}");
                let mass: f64 = order[..kept].iter().map(|&id| probs[id]).sum();
                mu -= f64::from(eta) * (-(probs[token as usize] / mass).log2() - f64::from(tau));
                prop_assert!((state.mu(steering) - mu).abs() < 1e-6 * mu.abs().max(1.0));
                tokens.push(token);
            }
        }
    }

    #[test]
    fn every_chain_leaves_somebody_and_draws_them(
        logits in logits(),
        seed in any::<u64>(),
        temperature in 0.01_f32..5.0,
        top in (1_usize..50, 0.001_f32..=1.0, 0.0_f32..=1.0, 0.001_f32..=1.0),
    ) {
        let params = params(|f| {
            f.temperature = temperature;
            (f.top_k, f.top_p) = (Some(top.0), Some(top.1));
            (f.min_p, f.typical_p) = (Some(top.2), Some(top.3));
            f.seed = seed;
        });
        let kept = survivors(&logits, &params);
        let token = sample(&logits, &[], &params).unwrap();
        prop_assert!(kept.contains(&token));
        prop_assert_eq!(token, sample(&logits, &[], &params).unwrap());
    }

    #[test]
    fn a_vanishing_temperature_is_greedy(logits in logits(), seed in any::<u64>()) {
        let cold = params(|f| (f.temperature, f.seed) = (1e-9, seed));
        let largest = logits[argmax(&logits) as usize];
        prop_assume!(logits.iter().filter(|&&x| largest <= x).count() == 1);
        let greedy = sample(&logits, &[], &SamplingParams::greedy()).unwrap();
        prop_assert_eq!(sample(&logits, &[], &cold).unwrap(), greedy);
        prop_assert_eq!(greedy, argmax(&logits));
    }

    #[test]
    fn the_largest_logit_is_that_of_a_plain_search(
        choices in prop::collection::vec(0_usize..8, 1..400),
    ) {
        let values = [-1.0, 0.0, -0.0, 2.5, f32::NEG_INFINITY, 2.5, f32::NAN, 7.0];
        let mut logits: Vec<f32> = choices.iter().map(|&i| values[i]).collect();
        let plain = |logits: &[f32]| {
            (0..logits.len()).fold(0, |best, i| if logits[best] < logits[i] { i } else { best })
        };
        prop_assert_eq!(argmax(&logits) as usize, plain(&logits));
        let greedy = SamplingParams::greedy();
        let expected = match logits.iter().position(|x| x.is_nan()) {
            Some(i) => Err(SampleError::NotANumber { token: token_id(i) }),
            None if logits[plain(&logits)] == f32::NEG_INFINITY => {
                Err(SampleError::NoCandidate { position: 0 })
            }
            None => Ok(token_id(plain(&logits))),
        };
        prop_assert_eq!(sample(&logits, &[], &greedy), expected);
        // Greedy with a bias of nothing takes the other way.
        logits.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = 1.0);
        let biased = params(|f| {
            f.temperature = 0.0;
            f.logit_bias = vec![(0, 0.0)];
        });
        prop_assert_eq!(sample(&logits, &[], &greedy), sample(&logits, &[], &biased));
    }

    #[test]
    fn sampling_leaves_no_trace(logits in logits(), tokens in prop::collection::vec(0_u32..40, 0..30)) {
        let penalties = params(|f| {
            (f.repetition_penalty, f.presence_penalty, f.frequency_penalty) = (1.3, 0.5, 0.2);
            f.no_repeat_ngram_size = Some(3);
            f.seed = 9;
        });
        let mut used = Sampler::new(VOCAB);
        for _ in 0..3 {
            let again = used.sample(&logits, context(&tokens, tokens.len() / 2), &penalties);
            let fresh =
                Sampler::new(VOCAB).sample(&logits, context(&tokens, tokens.len() / 2), &penalties);
            prop_assert_eq!(again, fresh);
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits: Vec<f32> = [0.5_f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
    let params = params(|f| f.seed = 3);
    let mut counts = [0_u32; 4];
    let tokens = vec![0; 20_000];
    let mut sampler = Sampler::new(4);
    for position in 0..tokens.len() {
        let at = context(&tokens[..position], position);
        counts[sampler.sample(&logits, at, &params).unwrap() as usize] += 1;
    }
    for (count, expected) in counts.iter().zip([10_000.0, 5_000.0, 2_500.0, 2_500.0]) {
        // Five standard deviations of the largest count.
        assert!((f64::from(*count) - expected).abs() < 5.0 * 70.0, "{counts:?}");
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    let flat = [1.0; 8];
    assert_eq!(sample(&flat, &[], &SamplingParams::greedy()), Ok(0));
    assert_eq!(survivors(&flat, &params(|f| f.top_k = Some(3))), [0, 1, 2]);
    assert_eq!(survivors(&flat, &params(|f| f.top_p = Some(0.5))), [0, 1, 2, 3]);
    assert_eq!(survivors(&flat, &params(|f| f.typical_p = Some(0.3))), [0, 1, 2]);
    let greatest = top_logprobs(&[0.0, 2.0, 2.0, 1.0], 0.5, 3);
    assert_eq!(greatest, [(1, 1.5), (2, 1.5), (3, 0.5)]);
}

#[test]
fn penalties_do_what_they_say() {
    let logits = [1.0_f32, 2.0, -1.0, 0.0];
    let mut sampler = Sampler::new(4);
    let mut penalized = |tokens: &[u32], prompt_len, change: fn(&mut SamplingFields)| {
        sampler.logits_v.clear();
        sampler.logits_v.extend_from_slice(&logits);
        sampler.penalize(context(tokens, prompt_len), &params(change));
        sampler.logits_v.clone()
    };
    // Repetition sees the prompt, once; negative logits are multiplied.
    let repeated = penalized(&[1, 1, 2], 3, |f| f.repetition_penalty = 2.0);
    assert_eq!(repeated, [1.0, 1.0, -2.0, 0.0]);
    // Frequency and presence see the output only.
    let frequent = penalized(&[0, 1, 1, 2], 1, |f| f.frequency_penalty = 0.5);
    assert_eq!(frequent, [1.0, 1.0, -1.5, 0.0]);
    let present = penalized(&[0, 1, 1, 2], 1, |f| f.presence_penalty = 0.5);
    assert_eq!(present, [1.0, 1.5, -1.5, 0.0]);
}

#[test]
fn a_bias_forces_or_excludes() {
    let logits = [1.0_f32, 2.0, -1.0, 0.0];
    let forced = params(|f| (f.temperature, f.logit_bias) = (0.0, vec![(2, 100.0)]));
    assert_eq!(sample(&logits, &[], &forced), Ok(2));
    let excluded = params(|f| (f.temperature, f.logit_bias) = (0.0, vec![(1, -100.0)]));
    assert_eq!(sample(&logits, &[], &excluded), Ok(0));
}

#[test]
fn no_ngram_repeats() {
    let greedy = |size| params(|f| (f.temperature, f.no_repeat_ngram_size) = (0.0, Some(size)));
    let logits = [0.0_f32, 3.0, 2.0, 1.0];
    // 1 2 has been followed by 1 already.
    assert_eq!(sample(&logits, &[1, 2, 1, 2], &greedy(3)), Ok(2));
    assert_eq!(sample(&logits, &[1, 2, 1, 2], &greedy(2)), Ok(2), "2 1 occurred");
    assert_eq!(sample(&logits, &[1, 2, 1, 2], &greedy(4)), Ok(1), "2 1 2 1 did not");
    assert_eq!(sample(&logits, &[1, 2], &greedy(1)), Ok(3), "every token once");
    assert_eq!(sample(&logits, &[1], &greedy(9)), Ok(1), "too short to repeat");
    let exhausted = sample(&logits, &[0, 1, 2, 3], &greedy(1));
    assert_eq!(exhausted, Err(SampleError::NoCandidate { position: 4 }));
}

#[test]
fn what_is_not_a_number_is_an_error() {
    let greedy = SamplingParams::greedy();
    for bad in [f32::NAN, f32::INFINITY] {
        let error = sample(&[0.0, bad, 1.0], &[], &greedy).unwrap_err();
        assert_eq!(error, SampleError::NotANumber { token: 1 });
    }
    assert_eq!(sample(&[f32::NEG_INFINITY, -1.0], &[], &params(|_| ())), Ok(1));
}

#[test]
fn logits_beyond_all_numbers_fail_their_request_alone() {
    let mut logits = vec![0.0_f32; VOCAB];
    logits[3] = 3e38;
    let params = params(|f| f.repetition_penalty = 0.01);
    let mut sampler = Sampler::new(VOCAB);
    let seen = context(&[3], 1);
    let error = sampler.sample(&logits, seen, &params).unwrap_err();
    assert_eq!(error, SampleError::Overflow { token: 3 });
    assert!(sampler.sample(&[0.0; VOCAB], seen, &params).is_ok());
}

#[test]
fn only_allowed_tokens_are_chosen_and_as_often_as_among_themselves() {
    let logits: Vec<f32> = (0..70).map(|token| (token % 7) as f32 / 3.0).collect();
    // Every third token; the likeliest is not among them.
    let mut allowed = [0_u32; 3];
    (0..70)
        .filter(|token| token % 3 == 1)
        .for_each(|token| allowed[token / 32] |= 1 << (token % 32));
    let mut others: Vec<f32> = logits.clone();
    (0..70).filter(|token| token % 3 != 1).for_each(|token| others[token] = f32::NEG_INFINITY);
    let mut sampler = Sampler::new(70);
    for temperature in [0.0, 1.0] {
        for seed in 0..200 {
            let fields = SamplingFields { temperature, seed, ..SamplingFields::default() };
            let params = SamplingParams::new(fields).unwrap();
            let free = context(&[1, 2], 1);
            let bound = SampleContext { allowed: Some(&allowed), ..free };
            let token = sampler.sample(&logits, bound, &params).unwrap();
            assert_eq!(token % 3, 1);
            assert_eq!(token, sampler.sample(&others, free, &params).unwrap());
        }
    }
    let bound = SampleContext { allowed: Some(&[0; 3]), ..context(&[1, 2], 1) };
    let none = sampler.sample(&logits, bound, &SamplingParams::greedy());
    assert_eq!(none, Err(SampleError::NoCandidate { position: 2 }));
}

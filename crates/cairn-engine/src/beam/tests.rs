//! The search against a literal transcript of transformers' tensors, and against all outputs there
//! are.

#![expect(clippy::cast_possible_truncation, reason = "scores are f32, as transformers' are")]

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// A model over a handful of tokens: log-probabilities by what came before.
struct Toy {
    vocab: usize,
    seed: u64,
    rows: std::cell::RefCell<HashMap<Vec<u32>, &'static [f32]>>,
}

impl Toy {
    fn new(vocab: usize, seed: u64) -> Self {
        Self { vocab, seed, rows: std::cell::RefCell::default() }
    }

    fn logprobs(&self, tokens: &[u32]) -> &'static [f32] {
        self.rows.borrow_mut().entry(tokens.to_vec()).or_insert_with(|| {
            let key = tokens.iter().fold(self.seed, |key, &t| key * 31 + u64::from(t) + 1);
            let logits: Vec<f64> =
                (0..self.vocab).map(|t| 4.0 * crate::random::uniform(key, t as u64, 9)).collect();
            let lse = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
            let row: Vec<f32> = logits.iter().map(|x| (x - lse) as f32).collect();
            Box::leak(row.into_boxed_slice())
        })
    }
}

fn search(toy: &Toy, params: BeamParams, max: usize, stops: &[u32]) -> Vec<Hypothesis> {
    let mut search = BeamSearch::new(params, max, stops);
    let mut rows = vec![toy.logprobs(&[])];
    while search.advance(|beam| rows[beam]) {
        rows = search.beams.iter().map(|beam| toy.logprobs(&beam.tokens)).collect();
    }
    search.into_hypotheses()
}

/// `_beam_search` of transformers, tensor by tensor, for one prompt.
fn transcript(toy: &Toy, params: BeamParams, max: usize, stops: &[u32]) -> Vec<Hypothesis> {
    const NEVER: f32 = -1.0e9;
    let k = params.num_beams;
    let mut running: Vec<(Vec<u32>, f32)> = vec![(vec![], NEVER); k];
    running[0].1 = 0.0;
    let mut beams: Vec<(Vec<u32>, f32, bool)> = vec![(vec![], NEVER, false); k];
    let mut unsatisfied = true;
    let mut len = 0;
    loop {
        let mut all: Vec<(Vec<u32>, f32)> = Vec::new();
        for (tokens, score) in &running {
            for (token, logprob) in toy.logprobs(tokens).iter().enumerate() {
                let next = tokens.iter().copied().chain([u32::try_from(token).unwrap()]).collect();
                all.push((next, logprob + score));
            }
        }
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.truncate((1 + stops.len()).max(2) * k);
        let hits: Vec<bool> =
            all.iter().map(|(t, _)| t.len() == max || stops.contains(t.last().unwrap())).collect();
        let mut open: Vec<(Vec<u32>, f32)> = all
            .iter()
            .zip(&hits)
            .map(|((t, score), &hit)| (t.clone(), score + if hit { NEVER } else { 0.0 }))
            .collect();
        open.sort_by(|a, b| b.1.total_cmp(&a.1));
        open.truncate(k);
        let full = beams.iter().all(|b| b.2) && params.early_stopping == EarlyStopping::AtOnce;
        let mut merged = beams.clone();
        for (rank, ((tokens, score), &hit)) in all.iter().zip(&hits).enumerate() {
            let just = hit && rank < k;
            let mut score =
                score / ((len + 1) as f64).powf(f64::from(params.length_penalty)) as f32;
            for bar in [full, !unsatisfied, !just] {
                score += if bar { NEVER } else { 0.0 };
            }
            merged.push((tokens.clone(), score, just));
        }
        merged.sort_by(|a, b| b.1.total_cmp(&a.1));
        merged.truncate(k);
        beams = merged;
        running = open;
        len += 1;
        let far =
            params.early_stopping == EarlyStopping::WhenImpossible && params.length_penalty > 0.0;
        let best_len = if far { max } else { len } as f64;
        let possible = running[0].1 / best_len.powf(f64::from(params.length_penalty)) as f32;
        let worst = beams.iter().map(|b| b.1).fold(f32::INFINITY, f32::min);
        unsatisfied &= beams.iter().any(|b| possible > if b.2 { worst } else { NEVER });
        let open_beam =
            !(beams.iter().all(|b| b.2) && params.early_stopping == EarlyStopping::AtOnce);
        if !(unsatisfied && open_beam && !hits.iter().all(|&hit| hit)) {
            break;
        }
    }
    let returned = beams.into_iter().take(params.num_return_sequences);
    returned.map(|(tokens, score, _)| Hypothesis { tokens, score }).collect()
}

proptest! {
    #[test]
    fn search_is_transformers_search(
        vocab in 6_usize..12,
        seed in 0_u64..1_000_000,
        num_beams in 1_usize..5,
        length_penalty in prop::sample::select(vec![0.0_f32, 0.6, 1.0, 2.0, -0.5]),
        early_stopping in prop::sample::select(vec![
            EarlyStopping::WhenUnlikely, EarlyStopping::AtOnce, EarlyStopping::WhenImpossible,
        ]),
        max in 1_usize..8,
        num_stops in 0_u32..3,
    ) {
        let toy = Toy::new(vocab, seed);
        let stops: Vec<u32> = (0..num_stops).collect();
        let num_return_sequences = num_beams;
        let params = BeamParams { num_beams, length_penalty, early_stopping, num_return_sequences };
        let expected = transcript(&toy, params, max, &stops);
        let found = search(&toy, params, max, &stops);
        // Where transformers has fewer finished than asked for, it pads; the search does not.
        let real = expected.iter().take_while(|hypothesis| -1e8 < hypothesis.score).count();
        prop_assert_eq!(&found[..], &expected[..real]);
    }

    #[test]
    fn enough_beams_find_the_likeliest_output(seed in 0_u64..1_000_000) {
        let (toy, max) = (Toy::new(4, seed), 3);
        let mut best = Hypothesis { tokens: vec![], score: f32::NEG_INFINITY };
        for code in 0..64_u32 {
            let tokens = vec![code / 16, code / 4 % 4, code % 4];
            let score = (0..3).fold(0.0, |sum, at| {
                sum + toy.logprobs(&tokens[..at])[tokens[at] as usize]
            }) / 3.0;
            if best.score < score {
                best = Hypothesis { tokens, score };
            }
        }
        prop_assert_eq!(search(&toy, BeamParams::new(64), max, &[]), vec![best]);
    }

    #[test]
    fn one_beam_takes_the_likeliest_token(seed in 0_u64..1_000_000) {
        let toy = Toy::new(9, seed);
        let mut tokens = Vec::new();
        while tokens.len() < 6 && tokens.last() != Some(&0) {
            tokens.push(crate::sampler::argmax(toy.logprobs(&tokens)));
        }
        let found = search(&toy, BeamParams::new(1), 6, &[0]);
        prop_assert_eq!(&found[0].tokens, &tokens);
    }
}

#[test]
fn settings_out_of_range_are_refused() {
    let check = |change: fn(&mut BeamParams)| {
        let mut params = BeamParams::new(4);
        change(&mut params);
        params.check(8).map_err(|error| error.to_string())
    };
    assert_eq!(check(|_| ()), Ok(()));
    let beams = "num_beams is 9, which is not between 1 and max_num_seqs, 8";
    assert_eq!(check(|p| p.num_beams = 9), Err(beams.to_owned()));
    assert!(check(|p| p.num_beams = 0).is_err());
    assert!(check(|p| p.num_return_sequences = 5).is_err());
    assert!(check(|p| p.num_return_sequences = 0).is_err());
    assert_eq!(check(|p| p.length_penalty = f32::NAN), Err("length_penalty is NaN".to_owned()));
}

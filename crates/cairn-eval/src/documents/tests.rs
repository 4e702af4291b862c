//! A scorer that is a formula: every property of the bookkeeping, and known answers.

use super::*;
use crate::scorer::ScoreLimits;

/// The log-probability of a target is a formula of its piece up to it.
#[derive(Debug)]
pub(crate) struct Formula {
    pub(crate) limits: ScoreLimits,
    pub(crate) vocab_size: usize,
    pub(crate) logprob: fn(&[u32], u32) -> f32,
    out: Vec<f32>,
    pub(crate) runs: usize,
}

impl Formula {
    pub(crate) fn new(limits: ScoreLimits, logprob: fn(&[u32], u32) -> f32) -> Self {
        Self { limits, vocab_size: 256, logprob, out: Vec::new(), runs: 0 }
    }
}

impl TokenScorer for Formula {
    fn limits(&self) -> ScoreLimits {
        self.limits
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn logprobs(&mut self, batch: &ScoreBatch<'_>) -> Result<&[f32], EvalError> {
        assert!(batch.ids.len() <= self.limits.tokens && batch.pieces.len() <= self.limits.pieces);
        self.runs += 1;
        self.out.clear();
        for piece in batch.pieces {
            assert_eq!((piece.start, piece.cached), (self.out.len(), 0));
            assert!(0 < piece.len && piece.len <= self.limits.context);
            for offset in 0..piece.len {
                let row = piece.start + offset;
                assert_eq!(batch.positions[row] as usize, offset);
                let seen = &batch.ids[piece.start..=row];
                self.out.push((self.logprob)(seen, batch.targets[row]));
            }
        }
        assert_eq!(self.out.len(), batch.ids.len());
        Ok(&self.out)
    }
}

pub(crate) const LIMITS: ScoreLimits = ScoreLimits { tokens: 40, pieces: 5, context: 16 };

fn scores(formula: &mut Formula, windows: Windows, documents: &[Vec<u32>]) -> Vec<DocumentScore> {
    let mut found = Vec::new();
    let mut scorer = DocumentScorer::new(formula, windows).unwrap();
    for document in documents {
        scorer.push(document, &mut |score| found.push(score)).unwrap();
    }
    scorer.finish(&mut |score| found.push(score)).unwrap();
    found
}

fn documents() -> Vec<Vec<u32>> {
    let lengths = [0, 1, 2, 100, 16, 17, 18, 3, 1, 33, 64, 5, 5, 5, 5, 5, 5, 5];
    let token = |seed: u32, at: u32| seed.wrapping_mul(31).wrapping_add(at * at * 7) % 256;
    (1..)
        .zip(lengths)
        .map(|(seed, length)| (0..length).map(|at| token(seed, at)).collect())
        .collect()
}

#[test]
fn a_uniform_model_takes_log2_of_the_vocabulary_a_token() {
    let mut uniform = Formula::new(LIMITS, |_, _| -(256.0_f32.ln()));
    let documents = documents();
    let found = scores(&mut uniform, Windows::new(16, 8).unwrap(), &documents);
    assert_eq!(found.len(), documents.len());
    for (score, document) in found.iter().zip(&documents) {
        assert_eq!(score.num_targets, document.len().saturating_sub(1) as u64);
        let bits = score.bits(256);
        let expected = 8.0 * document.len().max(1) as f64;
        assert!((bits - expected).abs() < 1e-5 * expected, "{bits} of {expected}");
    }
}

#[test]
fn a_score_depends_neither_on_the_order_nor_on_the_company() {
    // Depends on everything that the piece holds so far.
    let hashed: fn(&[u32], u32) -> f32 = |seen, target| {
        let hash = seen
            .iter()
            .chain([&target])
            .fold(7_u32, |hash, &token| (hash ^ token).wrapping_mul(0x0100_0193).rotate_left(5));
        -((hash % 1000) as f32) / 100.0
    };
    let documents = documents();
    for (context, stride) in [(16, 16), (16, 5), (7, 7), (1, 1)] {
        let windows = Windows::new(context, stride).unwrap();
        let together = scores(&mut Formula::new(LIMITS, hashed), windows, &documents);
        let reversed: Vec<Vec<u32>> = documents.iter().rev().cloned().collect();
        let mut backwards = scores(&mut Formula::new(LIMITS, hashed), windows, &reversed);
        backwards.reverse();
        assert_eq!(together, backwards);
        for (document, score) in documents.iter().zip(&together) {
            let alone =
                scores(&mut Formula::new(LIMITS, hashed), windows, std::slice::from_ref(document));
            assert_eq!(alone, [*score]);
        }
    }
}

#[test]
fn short_documents_share_runs() {
    let mut formula = Formula::new(LIMITS, |_, _| -1.0);
    scores(&mut formula, Windows::new(16, 16).unwrap(), &vec![vec![1, 2, 3]; 20]);
    assert_eq!(formula.runs, 4, "five pieces a run");
}

#[test]
fn what_is_not_a_number_names_its_place() {
    let nan: fn(&[u32], u32) -> f32 = |_, target| if target == 9 { f32::NAN } else { -1.0 };
    let mut formula = Formula::new(LIMITS, nan);
    let mut scorer = DocumentScorer::new(&mut formula, Windows::new(4, 2).unwrap()).unwrap();
    scorer.push(&[9, 1, 2], &mut |_| ()).unwrap();
    scorer.push(&[1, 2, 3, 4, 5, 6, 9, 7], &mut |_| ()).unwrap();
    let error = scorer.finish(&mut |_| ()).unwrap_err().to_string();
    assert_eq!(error, "the model's log-probability of token 6 of document 1 is NaN");
}

#[test]
fn windows_beyond_the_scorer_are_refused() {
    let mut formula = Formula::new(LIMITS, |_, _| -1.0);
    let error = DocumentScorer::new(&mut formula, Windows::new(17, 17).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "context is 17, which is not between 1 and 16");
}

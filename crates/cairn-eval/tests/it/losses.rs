//! Losses of the golden models against those of the logits that transformers computes.

use cairn_eval::{DocumentScore, DocumentScorer, EvalError, ModelScorerOptions, ModelScorerPlan};
use cairn_eval::{TokenScorer, Windows};

use crate::model::{golden, scorer, spec};

fn scores(
    scorer: &mut impl TokenScorer,
    windows: Windows,
    rows: &[Vec<u32>],
) -> Vec<DocumentScore> {
    let mut found = Vec::new();
    let mut documents = DocumentScorer::new(scorer, windows).unwrap();
    for row in rows {
        documents.push(row, &mut |score| found.push(score)).unwrap();
    }
    documents.finish(&mut |score| found.push(score)).unwrap();
    found
}

fn golden_rows(name: &str) -> Vec<Vec<u32>> {
    let ids = golden(name).tensor("input_ids").unwrap().to_i64().unwrap();
    let ids: Vec<u32> = ids.into_iter().map(|id| u32::try_from(id).unwrap()).collect();
    ids.chunks(24).map(<[u32]>::to_vec).collect()
}

#[test]
fn losses_are_those_of_the_golden_logits() {
    for name in ["llama", "gpt2"] {
        let rows = golden_rows(name);
        let logits = golden(name).tensor("logits").unwrap().to_f32().unwrap();
        let vocab_size = spec(name).vocab_size;
        let windows = Windows::new(64, 64).unwrap();
        let found = scores(&mut scorer(name, 64, 64), windows, &rows);
        for (row, (ids, score)) in rows.iter().zip(found).enumerate() {
            let mut nats = 0.0;
            for (position, &target) in ids.iter().enumerate().skip(1) {
                let at = (row * 24 + position - 1) * vocab_size;
                let logits = &logits[at..at + vocab_size];
                let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
                nats += sum.ln() - f64::from(logits[target as usize]);
            }
            assert_eq!(score.num_targets, 23);
            assert!((score.nats - nats).abs() < 1e-4 * nats, "{name}: {}, {nats}", score.nats);
        }
    }
}

#[test]
fn company_and_run_size_change_no_bit() {
    let rows: Vec<Vec<u32>> = (1..40_u32)
        .map(|row| (0..row * 5).map(|at| (row * 37 + at * at * 11) % 320).collect())
        .collect();
    let windows = Windows::new(32, 12).unwrap();
    let together = scores(&mut scorer("llama", 32, 500), windows, &rows);
    for tokens in [32, 77] {
        assert_eq!(scores(&mut scorer("llama", 32, tokens), windows, &rows), together);
    }
    let mut alone = scorer("llama", 32, 32);
    for (row, score) in rows.iter().zip(&together) {
        assert_eq!(scores(&mut alone, windows, std::slice::from_ref(row)), [*score]);
    }
}

/// With windows as long as the document nothing is cut: every stride gives the same bits.
#[test]
fn strides_only_matter_beyond_the_context() {
    let row: Vec<u32> = (0..64).map(|at| (at * at * 7 + 3) % 320).collect();
    let mut scorer = scorer("llama", 63, 63);
    let whole = scores(&mut scorer, Windows::new(63, 63).unwrap(), std::slice::from_ref(&row));
    let strided = scores(&mut scorer, Windows::new(63, 1).unwrap(), std::slice::from_ref(&row));
    assert_eq!(whole, strided);
    let cut = scores(&mut scorer, Windows::new(16, 16).unwrap(), std::slice::from_ref(&row));
    assert_eq!(cut[0].num_targets, whole[0].num_targets);
    assert!(cut[0].nats.to_bits() != whole[0].nats.to_bits(), "the context is used");
}

#[test]
fn a_context_beyond_the_model_and_foreign_tokens_are_refused() {
    let error = ModelScorerPlan::new(&spec("gpt2"), ModelScorerOptions::new(129, 129)).unwrap_err();
    assert_eq!(error.to_string(), "context is 129, which is not between 1 and 128");
    let mut scorer = scorer("gpt2", 16, 16);
    let mut documents = DocumentScorer::new(&mut scorer, Windows::new(16, 16).unwrap()).unwrap();
    documents.push(&[1, 320, 5], &mut |_| ()).unwrap();
    assert!(matches!(documents.finish(&mut |_| ()), Err(EvalError::Run(_))));
}

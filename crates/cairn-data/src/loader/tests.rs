//! Exactly once, at any step, in any order of asking.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::corpus::build_corpus_of_tokens;

/// Documents of `lens` tokens whose tokens are all different but for the end, 0.
fn documents(lens: &[usize]) -> Vec<Vec<u32>> {
    let mut next = 1;
    lens.iter()
        .map(|len| {
            let mut tokens: Vec<u32> = (next..).take(len - 1).collect();
            next += u32::try_from(tokens.len()).unwrap();
            tokens.push(0);
            tokens
        })
        .collect()
}

fn corpus(folder: &Path, train: &[Vec<u32>], validation: &[Vec<u32>]) -> Arc<Corpus> {
    build_corpus_of_tokens(folder, [train, validation]);
    Arc::new(Corpus::open(folder).unwrap())
}

fn loader(corpus: &Arc<Corpus>, seq_len: usize, batch_rows: usize, seed: u64) -> Loader {
    Loader::new(Arc::clone(corpus), LoaderSettings { seq_len, batch_rows, seed }).unwrap()
}

/// Pairs of input and target with weight 1, counted.
type Pairs = BTreeMap<(u32, u32), usize>;

fn expected_pairs(documents: &[Vec<u32>]) -> Pairs {
    let mut pairs = Pairs::new();
    for pair in documents.iter().flat_map(|tokens| tokens.windows(2)) {
        *pairs.entry((pair[0], pair[1])).or_default() += 1;
    }
    pairs
}

/// Checks a batch's form and adds its pairs.
fn take(batch: &LoaderBatch, seq_len: usize, pairs: &mut Pairs) {
    let tokens = batch.num_tokens();
    assert_eq!(batch.row_tokens, seq_len);
    assert_eq!(tokens, batch.num_rows() * seq_len);
    assert_eq!([batch.positions.len(), batch.targets.len(), batch.loss_weights.len()], [tokens; 3]);
    let mut end = 0;
    for sequence in &batch.sequences {
        assert_eq!(sequence.start, end, "sequences do not cover the batch");
        assert!(0 < sequence.len);
        end += sequence.len;
        assert_eq!(sequence.start / seq_len, (end - 1) / seq_len, "a sequence spans two rows");
        let range = sequence.start..end;
        let positions = 0..u32::try_from(sequence.len).unwrap();
        assert!(batch.positions[range.clone()].iter().copied().eq(positions));
        let weights = &batch.loss_weights[range.clone()];
        assert!(weights.iter().all(|weight| weight.to_bits() == weights[0].to_bits()));
        // Inside a sequence the next input is the target.
        if weights[0] > 0.0 {
            assert_eq!(batch.ids[range.start + 1..end], batch.targets[range.start..end - 1]);
        }
        for at in range.filter(|at| batch.loss_weights[*at] > 0.0) {
            *pairs.entry((batch.ids[at], batch.targets[at])).or_default() += 1;
        }
    }
    assert_eq!(end, tokens);
}

fn lens() -> impl Strategy<Value = Vec<usize>> {
    // Documents of one token (an end alone) have no target; more than a stride of documents.
    prop_oneof![
        prop::collection::vec(1usize..12, 1..12),
        prop::collection::vec(1usize..40, 60..200),
    ]
    .prop_filter("something to predict", |lens| lens.iter().any(|len| 1 < *len))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_target_comes_once_an_epoch(
        lens in lens(), seq_len in 1usize..20, batch_rows in 1usize..4, seed: u64, epochs in 1u64..4,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let documents = documents(&lens);
        let corpus = corpus(&folder.path().join("corpus"), &documents, &[]);
        // One row a batch, so that an epoch is a whole number of batches.
        let single = loader(&corpus, seq_len, 1, seed);
        let expected = expected_pairs(&documents);
        let targets: usize = expected.values().sum();
        prop_assert_eq!(single.targets_per_epoch(), targets as u64);
        let mut all_rows = LoaderBatch::default();
        for epoch in 0..epochs {
            let (mut pairs, mut filled) = (Pairs::new(), 0);
            for step in epoch * single.rows_per_epoch()..(epoch + 1) * single.rows_per_epoch() {
                let batch = single.batch(step).unwrap();
                filled += usize::from(batch.num_targets() < seq_len);
                take(&batch, seq_len, &mut pairs);
                all_rows.ids.extend(batch.ids);
                all_rows.targets.extend(batch.targets);
            }
            prop_assert_eq!(&pairs, &expected);
            // Only the row with the end of the last document is filled up.
            prop_assert!(filled <= 1, "{filled} rows are filled up");
        }
        // More rows a batch cut the same rows in other places, across epochs too.
        let several = loader(&corpus, seq_len, batch_rows, seed);
        let tokens = seq_len * batch_rows;
        for (step, ids) in all_rows.ids.chunks_exact(tokens).enumerate() {
            prop_assert_eq!(&several.batch(step as u64).unwrap().ids, ids);
        }
    }

    #[test]
    fn any_step_directly_equals_the_straight_run(
        lens in lens(), seq_len in 1usize..20, batch_rows in 1usize..4, seed: u64,
        asked in prop::collection::vec(0u64..60, 1..20),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let corpus = corpus(&folder.path().join("corpus"), &documents(&lens), &[]);
        let straight = loader(&corpus, seq_len, batch_rows, seed);
        let batches: Vec<LoaderBatch> = (0..60).map(|step| straight.batch(step).unwrap()).collect();
        let jumping = loader(&corpus, seq_len, batch_rows, seed);
        for step in asked {
            let resumed = jumping.resume(&straight.state(step)).unwrap();
            prop_assert_eq!(&jumping.batch(resumed).unwrap(), &batches[usize::try_from(step).unwrap()]);
        }
    }

    #[test]
    fn validation_is_read_once_in_order(
        lens in lens(), seq_len in 1usize..20, batch_rows in 1usize..4,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let documents = documents(&lens);
        let corpus = corpus(&folder.path().join("corpus"), &[vec![1, 0]], &documents);
        let batches = InOrderBatches::new(Arc::clone(&corpus), Split::Validation, seq_len, batch_rows);
        let batches = batches.unwrap();
        let (mut pairs, mut order, mut rows) = (Pairs::new(), Vec::new(), 0);
        for batch in batches.iter() {
            let batch = batch.unwrap();
            take(&batch, seq_len, &mut pairs);
            rows += batch.num_rows();
            let real = batch.loss_weights.iter().zip(&batch.targets).filter(|(w, _)| 0.0 < **w);
            order.extend(real.map(|(_, target)| *target));
        }
        prop_assert_eq!(&pairs, &expected_pairs(&documents));
        prop_assert!(order.iter().eq(documents.iter().flat_map(|tokens| &tokens[1..])));
        prop_assert_eq!(rows, order.len().div_ceil(seq_len));
        prop_assert!(batches.batch(batches.num_batches()).is_err());
        let read: Vec<Vec<u32>> =
            read_documents(&corpus, Split::Validation).map(|document| document.unwrap().tokens).collect();
        prop_assert_eq!(read, documents);
    }
}

#[test]
fn epochs_and_seeds_differ_and_repeat() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(&folder.path().join("corpus"), &documents(&[5; 50]), &[]);
    let ids = |seed: u64, epoch: u64| {
        let loader = loader(&corpus, 4, 1, seed);
        let first = epoch * loader.rows_per_epoch();
        let steps = first..first + loader.rows_per_epoch();
        steps.flat_map(|step| loader.batch(step).unwrap().ids).collect::<Vec<u32>>()
    };
    assert_eq!(ids(1, 0), ids(1, 0));
    assert_ne!(ids(1, 0), ids(1, 1));
    assert_ne!(ids(1, 0), ids(2, 0));
}

#[test]
fn other_runs_are_not_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let one = corpus(&folder.path().join("one"), &documents(&[5, 7]), &[]);
    let two = corpus(&folder.path().join("two"), &documents(&[7, 5]), &[]);
    let state = loader(&one, 4, 2, 1).state(3);
    assert_eq!(loader(&one, 4, 2, 1).resume(&state).unwrap(), 3);
    for (other, what) in [
        (loader(&two, 4, 2, 1), "data"),
        (loader(&one, 4, 2, 2), "seed"),
        (loader(&one, 5, 2, 1), "seq_len"),
        (loader(&one, 4, 3, 1), "batch_rows"),
    ] {
        let error = other.resume(&state).unwrap_err();
        assert!(matches!(&error, LoaderError::OtherRun { what: w, .. } if *w == what), "{error}");
        assert_ne!(other.hash(), loader(&one, 4, 2, 1).hash());
    }
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<LoaderState>(&json).unwrap(), state);
}

#[test]
fn impossible_settings_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(&folder.path().join("corpus"), &documents(&[5]), &[vec![0]]);
    for (seq_len, batch_rows) in [(0, 1), (1, 0), (1 << 32, 1)] {
        let settings = LoaderSettings { seq_len, batch_rows, seed: 0 };
        let error = Loader::new(Arc::clone(&corpus), settings).unwrap_err();
        assert!(matches!(error, LoaderError::Setting { .. }), "{error}");
    }
    let error = InOrderBatches::new(Arc::clone(&corpus), Split::Validation, 4, 1).unwrap_err();
    assert!(error.hints()[0].contains("validation fraction"), "{error}");
    assert!(loader(&corpus, 4, 2, 0).batch(u64::MAX).is_err());
}

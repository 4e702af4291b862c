//! A corpus from text to figures.

use std::ops::ControlFlow;
use std::path::Path;

use cairn_data::corpus::{BuildSettings, Corpus, Input, ScanSettings, Split, build, scan};
use cairn_data::tokenizer::{BpeSettings, train_bpe};
use cairn_eval::{Windows, compare, sample};

use crate::model::scorer;

/// A corpus of twenty packages whose files repeat themselves, with a vocabulary of the goldens'.
fn corpus(folder: &Path) -> Corpus {
    for package in 0..20 {
        let root = folder.join("text").join(format!("package{package}"));
        std::fs::create_dir_all(&root).unwrap();
        for file in 0..4 {
            let line = format!("package {package} says in file {file}: a cairn shows the way\n");
            std::fs::write(root.join(format!("{file}.txt")), line.repeat(4 + file * package))
                .unwrap();
        }
    }
    let mut quiet = |_| ControlFlow::Continue(());
    let settings = ScanSettings::new(vec![Input::Path(folder.join("text"))]);
    let scan = scan(settings, &mut quiet).unwrap();
    let bpe = BpeSettings { vocab_size: 320, ..BpeSettings::default() };
    let tokenizer = train_bpe(&bpe, scan.sample(1 << 20)).unwrap();
    build(&scan, &tokenizer, &BuildSettings::new(folder.join("corpus")), &mut quiet).unwrap();
    Corpus::open(&folder.join("corpus")).unwrap()
}

#[test]
fn a_corpus_is_compared() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let tokenizer = corpus.load_tokenizer().unwrap();
    let everything = sample(&corpus, Split::Train, &tokenizer, u64::MAX).unwrap();
    assert_eq!((everything.num_left_out, everything.text_bytes_left_out), (0, 0));

    let mut scorer = scorer("llama", 128, 256);
    let windows = Windows::new(128, 128).unwrap();
    let mut go_on = |_| ControlFlow::Continue(());
    let found = compare(&mut scorer, windows, &everything, &mut go_on).unwrap();
    assert_eq!(found.num_tokens, corpus.documents(Split::Train).num_tokens());
    assert_eq!(found.num_targets, found.num_tokens - found.num_documents);
    // Random weights know nothing: a token takes about as much as choosing one at random.
    assert!((found.model.loss - 320.0_f64.ln()).abs() < 0.5, "{}", found.model.loss);
    for figures in &found.compressors {
        assert!(figures.concatenated.bytes < figures.per_document.bytes);
        assert!(figures.per_document.bits_per_byte < found.model.code.bits_per_byte);
    }
}

#[test]
fn a_limit_takes_documents_evenly_and_counts_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let tokenizer = corpus.load_tokenizer().unwrap();
    let everything = sample(&corpus, Split::Train, &tokenizer, u64::MAX).unwrap();
    let limit = everything.text_bytes() / 5;
    let some = sample(&corpus, Split::Train, &tokenizer, limit).unwrap();
    assert!(0 < some.num_left_out && 1 < some.documents.len());
    assert_eq!(some.documents.len() as u64 + some.num_left_out, everything.documents.len() as u64);
    assert_eq!(some.text_bytes() + some.text_bytes_left_out, everything.text_bytes());
    assert!(some.documents.iter().all(|document| everything.documents.contains(document)));
    // Evenly: the last one taken stands in the last fifth.
    let last = some.documents.last().unwrap();
    let place = everything.documents.iter().position(|document| document == last).unwrap();
    assert!(everything.documents.len() * 3 / 5 < place);
    assert_eq!(some, sample(&corpus, Split::Train, &tokenizer, limit).unwrap());
}

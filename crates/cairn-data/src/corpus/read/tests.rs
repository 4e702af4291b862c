//! Every kind of damage is refused, by name.

use proptest::prelude::*;

use super::super::build::tests::{quiet, tokenizer};
use super::super::scan::tests::folder;
use super::super::{BuildSettings, Input, ScanSettings, SplitSettings, build, scan};
use super::*;

/// A corpus of six documents in two shards a side.
fn corpus() -> tempfile::TempDir {
    let texts =
        ["a", "b", "c", "d", "e", "f"].map(|name| (format!("{name}/x.txt"), name.repeat(30)));
    let files: Vec<(&str, &[u8])> =
        texts.iter().map(|(path, text)| (path.as_str(), text.as_bytes())).collect();
    let root = folder(&files);
    let split = SplitSettings { validation_fraction: 0.4, ..SplitSettings::default() };
    let input = Input::Path(root.path().to_owned());
    let settings = ScanSettings { split, ..ScanSettings::new(vec![input]) };
    let scan = scan(settings, &mut quiet).unwrap();
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("corpus");
    let settings = BuildSettings { shard_tokens_max: 40, ..BuildSettings::new(target) };
    build(&scan, tokenizer(), &settings, &mut quiet).unwrap();
    out
}

fn file_names(folder: &Path) -> Vec<String> {
    let entry = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
    let names = std::fs::read_dir(folder).unwrap().map(entry);
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

/// Opens and, if that succeeds, verifies.
fn check(folder: &Path) -> Result<(), ReadError> {
    Corpus::open(folder).and_then(|corpus| corpus.verify())
}

#[test]
fn every_altered_file_is_refused_by_name_with_both_hashes() {
    let out = corpus();
    let folder = out.path().join("corpus");
    check(&folder).unwrap();
    let names = file_names(&folder);
    assert!(names.contains(&"validation-00000.tokens".to_owned()), "{names:?}");
    for name in names.iter().filter(|name| *name != MANIFEST_FILE) {
        let path = folder.join(name);
        let good = std::fs::read(&path).unwrap();
        // A file may be empty (nothing was skipped); it can still grow.
        let mut versions = vec![[good.as_slice(), b"x"].concat()];
        if !good.is_empty() {
            for at in [0, good.len() / 2, good.len() - 1] {
                let mut flipped = good.clone();
                flipped[at] ^= 0x10;
                versions.push(flipped);
            }
            versions.extend([vec![], good[..good.len() - 1].to_vec()]);
        }
        for bad in versions {
            std::fs::write(&path, &bad).unwrap();
            let error = check(&folder).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(name.as_str()), "{name}: {text}");
            if !matches!(error, ReadError::Malformed { .. }) {
                assert!(text.contains(&Hash::of_bytes(&good).to_string()), "{name}: {text}");
                assert!(text.contains(&Hash::of_bytes(&bad).to_string()), "{name}: {text}");
            }
        }
        std::fs::remove_file(&path).unwrap();
        let error = check(&folder).unwrap_err();
        assert!(matches!(error, ReadError::File(_)), "{name}: {error}");
        std::fs::write(&path, good).unwrap();
    }
    check(&folder).unwrap();
}

#[test]
fn opening_notices_truncation_and_damaged_indexes_without_reading_shards() {
    let out = corpus();
    let folder = out.path().join("corpus");
    let shard = folder.join("train-00000.tokens");
    let good = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &good[..good.len() - 2]).unwrap();
    let error = Corpus::open(&folder).unwrap_err();
    assert!(matches!(error, ReadError::Altered { .. }), "{error}");
    // A flipped token in a shard passes the cheap checks; one outside the vocabulary is refused
    // when it is read.
    let mut flipped = good.clone();
    let last = flipped.len() - 1;
    flipped[last] = 0xFF;
    std::fs::write(&shard, &flipped).unwrap();
    let corpus = Corpus::open(&folder).unwrap();
    let mut documents = crate::loader::read_documents(&corpus, Split::Train);
    assert!(documents.any(|document| matches!(document, Err(ReadError::Token { .. }))));
    assert!(matches!(corpus.verify().unwrap_err(), ReadError::Altered { .. }));
}

#[test]
fn manifest_must_agree_with_itself_and_its_files() {
    let out = corpus();
    let folder = out.path().join("corpus");
    let path = folder.join(MANIFEST_FILE);
    let good = std::fs::read_to_string(&path).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&good).unwrap();
    let train_hash = manifest["train"]["index"]["blake3"].as_str().unwrap();
    let end = "\"end_of_document\": 0";
    for (from, to) in [
        (train_hash, "0".repeat(64).as_str()),
        ("train.index", "../train.index"),
        ("train.index", "/etc/passwd"),
        ("\"name\": \"a\"", "\"name\": \"z\""),
        ("\"text_bytes\": 30", "\"text_bytes\": 31"),
        (end, "\"end_of_document\": 4000000000"),
        ("\"skipped\"", "\"dropped\""),
        ("{", "{ \"surprise\": 1,"),
        ("}", ""),
    ] {
        assert!(good.contains(from), "{from}");
        std::fs::write(&path, good.replace(from, to)).unwrap();
        let error = check(&folder).map(|()| format!("{from} -> {to} went unnoticed"));
        assert!(error.is_err() || from.contains("text_bytes"), "{error:?}");
    }
    std::fs::write(&path, good.replace("corpus/1", "corpus/7")).unwrap();
    let error = Corpus::open(&folder).unwrap_err();
    assert!(matches!(&error, ReadError::Schema { found, .. } if found == "corpus/7"), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = Corpus::open(&folder).unwrap_err();
    assert!(error.hints()[0].contains("cairn corpus build"), "{error}");
}

#[test]
fn split_totals_are_held_against_the_index() {
    let out = corpus();
    let folder = out.path().join("corpus");
    let path = folder.join(MANIFEST_FILE);
    let mut manifest = read_manifest(&path).unwrap();
    manifest.train.counts.text_bytes += 1;
    std::fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    let error = Corpus::open(&folder).unwrap_err();
    assert!(matches!(error, ReadError::Malformed { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is done to a manifest, opening answers.
    #[test]
    fn altered_manifest_never_panics(at: prop::sample::Index, value: u8, cut: prop::sample::Index, cuts: bool) {
        use std::sync::LazyLock;
        static CORPUS: LazyLock<tempfile::TempDir> = LazyLock::new(corpus);
        let folder = CORPUS.path().join("corpus");
        let good = std::fs::read(folder.join(MANIFEST_FILE)).unwrap();
        let mut json = good.clone();
        let at = at.index(json.len());
        json[at] = value;
        if cuts {
            json.truncate(cut.index(json.len()));
        }
        let path = folder.join(MANIFEST_FILE);
        if let Ok(manifest) = parse_manifest(&path, &json)
            && manifest.check(&path).is_ok()
        {
            for split in Split::ALL {
                let _ = Documents::open(&folder, &manifest, split);
            }
        }
    }
}

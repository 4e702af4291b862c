//! Corpora as files: the same for all threads, whole or absent, and complete.

use std::cell::Cell;
use std::io::{self, Write};
use std::rc::Rc;
use std::sync::LazyLock;

use super::super::scan::tests::folder;
use super::super::{Corpus, ScanSettings, SplitSettings, scan};
use super::*;
use crate::loader::read_documents;
use crate::tokenizer::{BpeSettings, train_bpe};

pub(crate) fn quiet(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let settings = BpeSettings { vocab_size: 280, ..BpeSettings::default() };
    train_bpe(&settings, (0..4).map(|_| Ok("text of a stone in a group".to_owned()))).unwrap()
});

static ANY_SCAN: LazyLock<(tempfile::TempDir, Scan)> = LazyLock::new(|| scanned(10));

pub(crate) fn tokenizer() -> &'static Tokenizer {
    &TOKENIZER
}

/// A scan of ten groups of `count / 10` documents; the folder must outlive it.
fn scanned(count: usize) -> (tempfile::TempDir, Scan) {
    let names: Vec<(String, String)> = (0..count)
        .map(|number| (format!("g{}/{number}.txt", number % 10), "stone ".repeat(1 + number)))
        .collect();
    let files: Vec<(&str, &[u8])> =
        names.iter().map(|(path, text)| (path.as_str(), text.as_bytes())).collect();
    let root = folder(&files);
    let split = SplitSettings { validation_fraction: 0.3, ..SplitSettings::default() };
    let input = Input::Path(root.path().to_owned());
    let settings = ScanSettings { split, ..ScanSettings::new(vec![input]) };
    let scan = scan(settings, &mut quiet).unwrap();
    (root, scan)
}

fn files_in(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[test]
fn files_do_not_depend_on_threads() {
    let (_root, scan) = scanned(40);
    let out = tempfile::tempdir().unwrap();
    let built = |threads: usize| {
        let folder = out.path().join(threads.to_string());
        let settings =
            BuildSettings { threads, shard_tokens_max: 300, ..BuildSettings::new(folder.clone()) };
        build(&scan, tokenizer(), &settings, &mut quiet).unwrap();
        files_in(&folder)
    };
    let one = built(1);
    assert!(one.iter().filter(|(name, _)| name.starts_with("train-")).count() > 2, "one shard");
    assert_eq!(one, built(5));
}

#[test]
fn documents_come_back_with_their_facts() {
    let (root, scan) = scanned(40);
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("deep").join("corpus");
    let settings = BuildSettings { shard_tokens_max: 300, ..BuildSettings::new(folder.clone()) };
    let report = build(&scan, tokenizer(), &settings, &mut quiet).unwrap();
    let corpus = Corpus::open(&folder).unwrap();
    corpus.verify().unwrap();
    assert_eq!(*corpus.manifest(), report.manifest);
    let tokenizer = corpus.load_tokenizer().unwrap();
    let mut groups = Vec::new();
    let mut num_documents = 0;
    for split in Split::ALL {
        let mut totals = Counts::default();
        for document in read_documents(&corpus, split) {
            let document = document.unwrap();
            let text = std::fs::read_to_string(root.path().join(&document.path)).unwrap();
            let (end, ids) = document.tokens.split_last().unwrap();
            assert_eq!(*end, corpus.end_of_document());
            assert_eq!(tokenizer.decode(ids).unwrap(), text);
            assert_eq!(usize::try_from(document.text_bytes).unwrap(), text.len());
            assert!(document.path.starts_with(&format!("{}/", document.group)));
            totals.add(u32::try_from(document.tokens.len()).unwrap(), document.text_bytes);
            groups.push((document.group, split));
            num_documents += 1;
        }
        assert_eq!(totals, corpus.manifest().split(split).counts);
        for shares in [&report.manifest.licenses, &report.manifest.groups] {
            let sum = shares.iter().fold(Counts::default(), |sum, share| {
                let part = if split == Split::Train { share.train } else { share.validation };
                Counts {
                    documents: sum.documents + part.documents,
                    tokens: sum.tokens + part.tokens,
                    text_bytes: sum.text_bytes + part.text_bytes,
                }
            });
            assert_eq!(sum, totals);
        }
    }
    assert_eq!(num_documents, 40);
    groups.sort();
    groups.dedup();
    assert_eq!(groups.len(), 10, "a group is on both sides");
}

#[test]
fn manifest_names_no_place_of_this_machine() {
    let (root, scan) = scanned(10);
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("corpus");
    build(&scan, tokenizer(), &BuildSettings::new(folder.clone()), &mut quiet).unwrap();
    let above = root.path().parent().unwrap().to_str().unwrap();
    for (name, bytes) in files_in(&folder) {
        let is_inside = bytes.windows(above.len()).any(|window| window == above.as_bytes());
        assert!(!is_inside, "{name} names {above}");
    }
}

#[test]
fn corpora_are_not_overwritten_unless_asked() {
    let (_root, scan) = scanned(10);
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("corpus");
    std::fs::create_dir(&folder).unwrap();
    let mut settings = BuildSettings::new(folder.clone());
    let first = build(&scan, tokenizer(), &settings, &mut quiet).unwrap();
    std::fs::write(folder.join("stray"), "from an earlier build").unwrap();
    let error = build(&scan, tokenizer(), &settings, &mut quiet).unwrap_err();
    assert!(matches!(error, CorpusError::Exists { .. }), "{error}");
    settings.existing = Existing::Replace;
    assert_eq!(build(&scan, tokenizer(), &settings, &mut quiet).unwrap(), first);
    assert!(!folder.join("stray").exists());
    // What is no corpus is never replaced.
    std::fs::write(folder.join(MANIFEST_FILE), "{\"schema\": \"album/1\"}").unwrap();
    let error = build(&scan, tokenizer(), &settings, &mut quiet).unwrap_err();
    assert!(matches!(error, CorpusError::Exists { .. }), "{error}");
    std::fs::write(folder.join(MANIFEST_FILE), "{\"schema\": \"corpus/0\"}").unwrap();
    build(&scan, tokenizer(), &settings, &mut quiet).unwrap();
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 1);
}

/// A disk with room for so many more bytes.
struct SmallDisk(Rc<Cell<usize>>);

impl Write for SmallDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.0.get();
        if room == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = bytes.len().min(room);
        self.0.set(room - written);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for SmallDisk {
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn full_disk_names_the_file_and_leaves_nothing() {
    let (_root, scan) = scanned(20);
    let tokenizer = tokenizer();
    let out = tempfile::tempdir().unwrap();
    let settings = BuildSettings::new(out.path().join("corpus"));
    let built = |room: usize| {
        let room = Rc::new(Cell::new(room));
        let create = |_: &Path| -> io::Result<Box<dyn DiskFile>> {
            Ok(Box::new(SmallDisk(Rc::clone(&room))))
        };
        let result = build_on(&create, &scan, tokenizer, &settings, &mut quiet);
        (result, room.get())
    };
    let (whole, left) = built(1 << 30);
    let needed = (1 << 30) - left;
    assert!(whole.is_ok());
    std::fs::remove_dir_all(out.path().join("corpus")).unwrap();
    let mut named = std::collections::BTreeSet::new();
    for room in (0..needed).step_by(needed / 97) {
        let error = built(room).0.unwrap_err();
        let CorpusError::File(error) = error else { panic!("{error}") };
        assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
        assert!(error.path.starts_with(out.path().join("corpus")), "{error}");
        named.insert(error.path.file_name().unwrap().to_str().unwrap().to_owned());
        assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0, "something is left");
    }
    for name in ["train-00000.tokens", "validation.index", "tokenizer.json", "manifest.json"] {
        assert!(named.contains(name), "{named:?}");
    }
}

#[test]
fn interrupted_build_leaves_nothing() {
    let (_root, scan) = scanned(10);
    let out = tempfile::tempdir().unwrap();
    let settings = BuildSettings::new(out.path().join("corpus"));
    let error = build(&scan, tokenizer(), &settings, &mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, CorpusError::Interrupted), "{error}");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn documents_that_vanish_are_skipped_and_listed() {
    let (root, scan) = scanned(10);
    let out = tempfile::tempdir().unwrap();
    std::fs::remove_file(root.path().join("g3/3.txt")).unwrap();
    let settings = BuildSettings::new(out.path().join("corpus"));
    let report = build(&scan, tokenizer(), &settings, &mut quiet).unwrap();
    assert_eq!(report.skips.summary(), "1 missing");
    let list = std::fs::read_to_string(out.path().join("corpus").join(SKIPPED_FILE)).unwrap();
    assert!(list.contains("\"g3/3.txt\""), "{list}");
    Corpus::open(&out.path().join("corpus")).unwrap();
    std::fs::remove_dir_all(root.path()).unwrap();
    let settings = BuildSettings::new(out.path().join("empty"));
    let error = build(&scan, tokenizer(), &settings, &mut quiet).unwrap_err();
    assert!(matches!(error, CorpusError::NoDocuments { .. }), "{error}");
}

#[test]
fn impossible_builds_are_refused() {
    let (_root, scan) = scanned(10);
    let out = tempfile::tempdir().unwrap();
    let good = BuildSettings::new(out.path().join("corpus"));
    for settings in [
        BuildSettings { threads: 0, ..good.clone() },
        BuildSettings { shard_tokens_max: 0, ..good.clone() },
    ] {
        let error = build(&scan, tokenizer(), &settings, &mut quiet).unwrap_err();
        assert!(matches!(error, CorpusError::Setting { .. }), "{error}");
    }
    let json = String::from_utf8(tokenizer().json().to_vec()).unwrap();
    let endless = json.replace("<|endoftext|>", "<|nothing|>").into_bytes();
    let endless = Tokenizer::parse(endless, Path::new("endless")).unwrap();
    let error = build(&scan, &endless, &good, &mut quiet).unwrap_err();
    assert!(matches!(error, CorpusError::NoEndOfDocument), "{error}");
}

/// A file that need not last: properties over many corpora would wait for the disk.
struct Fleeting(File);

impl Write for Fleeting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl DiskFile for Fleeting {
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a corpus of given tokens, past the tokenizer: train, then validation.
pub(crate) fn build_corpus_of_tokens(target: &Path, sides: [&[Vec<u32>]; 2]) {
    std::fs::create_dir(target).unwrap();
    let create = |path: &Path| {
        File::create_new(path).map(|file| Box::new(Fleeting(file)) as Box<dyn DiskFile>)
    };
    let disk = Disk { create: &create, draft: target, target };
    let [train, validation] = Split::ALL.map(|split| {
        // Small shards, so that reading crosses them.
        let mut side = SideWriter::new(&disk, split, TokenWidth::U32, 50);
        let index = if split == Split::Train { 0 } else { 1 };
        for tokens in sides[index] {
            let document = Document::of_test(split);
            side.push(&document, tokens, u32::try_from(tokens.len()).unwrap()).unwrap();
        }
        side.finish().unwrap()
    });
    let json = tokenizer().json().to_vec();
    let share = |name: &str| shares(std::iter::once(name.to_owned()));
    let scan = &ANY_SCAN.1;
    let mut manifest = Manifest {
        schema: SCHEMA.to_owned(),
        data_hash: tokenizer().hash(),
        tokenizer: TokenizerEntry {
            file: disk.write(TOKENIZER_FILE, &[json]).unwrap(),
            vocab_size: 1 << 20,
            end_of_document: 0,
        },
        token_width: TokenWidth::U32,
        train,
        validation,
        licenses: share("unknown"),
        groups: share("group"),
        skipped: skipped_entry(&Skips::default(), &disk).unwrap(),
        settings: settings_entry(scan, &BuildSettings::new(target.to_owned())),
    };
    manifest.data_hash = manifest.compute_data_hash();
    disk.write(MANIFEST_FILE, &[to_json(&manifest, true)]).unwrap();
}

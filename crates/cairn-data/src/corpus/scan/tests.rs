//! What is taken, what is left out and why, and who belongs to which group.

use std::path::PathBuf;

use super::super::input::Input;
use super::*;

/// Files below a fresh folder.
pub(crate) fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, bytes) in files {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    root
}

impl Document {
    /// A document for tests that bring their own tokens.
    pub(crate) fn of_test(split: Split) -> Self {
        Self {
            path: "path".into(),
            file: 0,
            line: None,
            hash: Hash::of_bytes(b""),
            text_bytes: 1,
            group: 0,
            license: 0,
            split,
        }
    }
}

fn settings(input: Input) -> ScanSettings {
    let split = SplitSettings { validation_fraction: 0.0, ..SplitSettings::default() };
    ScanSettings { split, threads: 2, ..ScanSettings::new(vec![input]) }
}

fn scan_of(settings: ScanSettings) -> Result<Scan, CorpusError> {
    scan(settings, &mut |_| ControlFlow::Continue(()))
}

/// Path, group and license of every document.
fn documents(scan: &Scan) -> Vec<(&str, &str, &str)> {
    let index = |number: u32| usize::try_from(number).unwrap();
    scan.documents
        .iter()
        .map(|document| {
            let group = scan.groups.list[index(document.group)].as_str();
            let license = scan.licenses.list[index(document.license)].as_str();
            (&*document.path, group, license)
        })
        .collect()
}

fn skipped(scan: &Scan) -> Vec<(&str, SkipReason)> {
    scan.skips().listed().iter().map(|skip| (skip.path.as_str(), skip.reason)).collect()
}

fn path(root: &tempfile::TempDir) -> Input {
    Input::Path(root.path().to_owned())
}

#[test]
fn bad_files_are_skipped_counted_and_listed() {
    let root = folder(&[
        ("good.txt", b"a stone"),
        ("copy.txt", b"a stone"),
        ("empty.txt", b""),
        ("blank.txt", b" \n\t"),
        ("binary.txt", b"a\0b"),
        ("latin1.txt", b"caf\xE9"),
        ("large.txt", &[b'x'; 200]),
        ("huge.txt", &[b'x'; 400]),
        (".hidden/text.txt", b"not seen"),
        ("build/CACHEDIR.TAG", b"Signature: 8a477f597d28d172789f06886806bc55"),
        ("build/output.txt", b"not seen"),
    ]);
    let mut settings = settings(path(&root));
    settings.limits =
        Limits { document_bytes_max: 100, file_bytes_max: 300, group_bytes_max: None };
    settings.inputs.push(Input::Path(root.path().join("nowhere.txt")));
    let scan = scan_of(settings).unwrap();
    assert_eq!(documents(&scan), [("copy.txt", "copy.txt", "unknown")]);
    use SkipReason as R;
    // What the walk skips comes first, then what reading finds, in the order of names.
    let expected = [
        (".hidden", R::Hidden),
        ("build", R::CacheFolder),
        ("nowhere.txt", R::Missing),
        ("binary.txt", R::Binary),
        ("blank.txt", R::Empty),
        ("empty.txt", R::Empty),
        ("good.txt", R::Duplicate),
        ("huge.txt", R::FileTooLarge),
        ("large.txt", R::DocumentTooLarge),
        ("latin1.txt", R::NotUtf8),
    ];
    assert_eq!(skipped(&scan), expected);
    assert_eq!(scan.skips().counts()[&R::Empty], 2);
    assert_eq!(scan.skips().counts().values().sum::<u64>(), 10);
    let detail = |name: &str| {
        let skip = scan.skips().listed().iter().find(|skip| skip.path == name).unwrap();
        skip.detail.clone().unwrap()
    };
    assert_eq!(detail("good.txt"), "same as copy.txt");
    assert_eq!(detail("large.txt"), "200 bytes, limit 100");
}

#[cfg(unix)]
#[test]
fn links_and_sockets_are_not_followed() {
    let root = folder(&[("a.txt", b"a stone")]);
    std::os::unix::fs::symlink(root.path(), root.path().join("loop")).unwrap();
    std::os::unix::fs::symlink("/no/such/file", root.path().join("dangling.txt")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.path().join("socket")).unwrap();
    let scan = scan_of(settings(path(&root))).unwrap();
    let not_files = ["dangling.txt", "loop", "socket"].map(|name| (name, SkipReason::NotAFile));
    assert_eq!(skipped(&scan), not_files);
}

#[test]
fn failed_reads_have_reasons() {
    let reason = |kind: io::ErrorKind| SkipReason::of_io(&io::Error::from(kind));
    assert_eq!(reason(io::ErrorKind::NotFound), SkipReason::Missing);
    assert_eq!(reason(io::ErrorKind::PermissionDenied), SkipReason::Unreadable);
    assert_eq!(reason(io::ErrorKind::UnexpectedEof), SkipReason::Unreadable);
}

#[test]
fn nothing_to_take_is_an_error_that_says_why() {
    let root = folder(&[("empty.txt", b""), ("binary", b"\0")]);
    let error = scan_of(settings(path(&root))).unwrap_err();
    assert_eq!(error.to_string(), "the inputs have no document to take (1 empty, 1 binary)");
}

#[test]
fn groups_are_packages_else_top_folders_else_files() {
    let root = folder(&[
        ("crates/a/Cargo.toml", b"[package]\nname = 'alpha'\nlicense = 'MIT'"),
        ("crates/a/src/lib.rs", b"fn a() {}"),
        ("crates/a/src/gpl.rs", b"// SPDX-License-Identifier: GPL-3.0-only\n"),
        ("crates/b.md", b"b"),
        ("top.md", b"top"),
    ]);
    let mut settings = settings(path(&root));
    settings.kinds = FileKinds::Extensions(["rs", "md"].map(str::to_owned).into());
    let scan = scan_of(settings.clone()).unwrap();
    assert_eq!(
        documents(&scan),
        [
            ("crates/a/src/gpl.rs", "alpha", "GPL-3.0-only"),
            ("crates/a/src/lib.rs", "alpha", "MIT"),
            ("crates/b.md", "crates", "unknown"),
            ("top.md", "top.md", "unknown"),
        ]
    );
    assert_eq!(skipped(&scan), [("crates/a/Cargo.toml", SkipReason::OtherKind)]);

    settings.license_allow = Some(LicenseFilter::parse(&["MIT".to_owned()]).unwrap());
    let scan = scan_of(settings).unwrap();
    assert_eq!(documents(&scan), [("crates/a/src/lib.rs", "alpha", "MIT")]);
    assert_eq!(scan.skips().counts()[&SkipReason::LicenseNotAllowed], 3);
}

#[test]
fn full_groups_take_no_more() {
    let root = folder(&[
        ("a/1.txt", b"four"),
        ("a/2.txt", b"fives"),
        ("a/3.txt", b"ab"),
        ("b/1.txt", b"eightlet"),
        ("c/1.txt", b"six..."),
    ]);
    let mut settings = settings(path(&root));
    settings.limits.group_bytes_max = Some(6);
    let scan = scan_of(settings).unwrap();
    let paths: Vec<&str> = documents(&scan).iter().map(|document| document.0).collect();
    assert_eq!(paths, ["a/1.txt", "a/3.txt", "c/1.txt"]);
    let full = |name| (name, SkipReason::GroupFull);
    assert_eq!(skipped(&scan), [full("a/2.txt"), full("b/1.txt")]);
    assert_eq!(scan.groups.list, ["a", "c"]);
}

#[test]
fn license_filter_comes_before_duplicates() {
    let root = folder(&[
        ("a/Cargo.toml", b"[package]\nname = 'a'\nlicense = 'GPL-3.0-only'"),
        ("a/x.rs", b"fn x() {}"),
        ("b/Cargo.toml", b"[package]\nname = 'b'\nlicense = 'MIT'"),
        ("b/x.rs", b"fn x() {}"),
    ]);
    let mut settings = settings(path(&root));
    settings.kinds = FileKinds::rust_sources();
    settings.license_allow = Some(LicenseFilter::parse(&["MIT".to_owned()]).unwrap());
    let scan = scan_of(settings).unwrap();
    assert_eq!(documents(&scan), [("b/Cargo.toml", "b", "MIT"), ("b/x.rs", "b", "MIT")]);
}

#[test]
fn registry_groups_versions_and_nested_packages() {
    let root = folder(&[
        ("src/index-1/stone-1.0.0/Cargo.toml", b"[package]\nname = 'stone'\nlicense = 'MIT'"),
        ("src/index-1/stone-1.0.0/src/lib.rs", b"v1"),
        ("src/index-1/stone-1.0.0/fuzz/Cargo.toml", b"[package]\nname = 'stone-fuzz'"),
        ("src/index-1/stone-1.0.0/fuzz/main.rs", b"fuzz"),
        ("src/index-1/stone-2.0.0/Cargo.toml", b"[package]\nname = 'stone'\nlicense = 'ISC'"),
        ("src/index-1/stone-2.0.0/src/lib.rs", b"v2"),
        ("src/index-1/stone-2.0.0/.cargo-ok", b"{}"),
        ("src/index-1/stray/lib.rs", b"no package"),
        ("cache/index-1/stone-1.0.0.crate", b"not text"),
    ]);
    let mut settings = settings(Input::CargoRegistry(root.path().to_owned()));
    settings.kinds = FileKinds::Extensions(["rs".to_owned()].into());
    let scan = scan_of(settings).unwrap();
    assert_eq!(
        documents(&scan),
        [
            ("stone-1.0.0/fuzz/main.rs", "stone", "MIT"),
            ("stone-1.0.0/src/lib.rs", "stone", "MIT"),
            ("stone-2.0.0/src/lib.rs", "stone", "ISC"),
        ]
    );
    assert!(skipped(&scan).contains(&("stray", SkipReason::NotAPackage)));
}

#[test]
fn missing_registry_asks_for_an_input() {
    use cairn_spec::Hint;
    let error = scan_of(settings(Input::CargoRegistry(PathBuf::from("/no/such")))).unwrap_err();
    assert_eq!(error.to_string(), "no package sources in /no/such/src");
    assert!(error.hints()[0].contains("--input"), "{:?}", error.hints());
}

#[test]
fn json_lines_bring_their_own_names() {
    let lines = concat!(
        r#"{"text": "one", "path": "/wiki/one.txt", "license": "CC-BY-SA-4.0"}"#,
        "\n",
        r#"{"text": "two", "path": "two.txt", "licence": "mine", "group": "pairs"}"#,
        "\n",
        "\n",
        r#"{"text": "three", "id": 3}"#,
        "\n",
        r#"{"text": "one"}"#,
        "\n",
        r#"{"text": ""}"#,
        "\n",
        r#"{"text": "nul \u0000"}"#,
        "\n",
        r#"{"body": "four"}"#,
        "\n",
        "not json",
    );
    let root = folder(&[("data.jsonl", lines.as_bytes()), ("empty.ndjson", b"\n")]);
    let scan = scan_of(settings(path(&root))).unwrap();
    let found = documents(&scan);
    assert_eq!(found[0], ("wiki/one.txt", "wiki", "CC-BY-SA-4.0"));
    assert_eq!(found[1], ("two.txt", "pairs", "unknown"));
    assert_eq!((found[2].0, found[2].2), ("data.jsonl:4", "unknown"));
    assert!(found[2].1.starts_with("data.jsonl#"), "{}", found[2].1);
    assert_eq!(found.len(), 3);
    assert_eq!(
        skipped(&scan),
        [
            ("data.jsonl:6", SkipReason::Empty),
            ("data.jsonl:7", SkipReason::Binary),
            ("data.jsonl:8", SkipReason::NoText),
            ("data.jsonl:9", SkipReason::InvalidJson),
            ("data.jsonl:5", SkipReason::Duplicate),
            ("empty.ndjson", SkipReason::Empty),
        ]
    );
    let texts: Vec<String> =
        scan.documents.iter().map(|document| scan.read(document).unwrap()).collect();
    assert_eq!(texts, ["one", "two", "three"]);
}

#[test]
fn texts_that_change_after_the_scan_are_noticed() {
    let root =
        folder(&[("a.txt", b"first"), ("b.txt", b"second"), ("c.jsonl", b"{\"text\": \"x\"}")]);
    let scan = scan_of(settings(path(&root))).unwrap();
    std::fs::write(root.path().join("a.txt"), "other").unwrap();
    std::fs::remove_file(root.path().join("b.txt")).unwrap();
    std::fs::write(root.path().join("c.jsonl"), "{\"text\": \"y\"}").unwrap();
    let reasons: Vec<SkipReason> =
        scan.documents.iter().map(|document| scan.read(document).unwrap_err().reason).collect();
    assert_eq!(reasons, [SkipReason::Changed, SkipReason::Missing, SkipReason::Changed]);
}

fn many(count: usize) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for number in 0..count {
        let group = root.path().join(format!("group-{}", number % 10));
        std::fs::create_dir_all(&group).unwrap();
        std::fs::write(group.join(format!("{number}.txt")), format!("text {number}")).unwrap();
    }
    root
}

#[test]
fn threads_do_not_change_the_scan() {
    let root = many(100);
    let scanned = |threads| {
        let mut settings = settings(path(&root));
        settings.split.validation_fraction = 0.3;
        settings.threads = threads;
        format!("{:?}", scan_of(settings).unwrap().documents)
    };
    assert_eq!(scanned(1), scanned(7));
}

#[test]
fn sample_is_bounded_training_text() {
    let root = many(100);
    let mut settings = settings(path(&root));
    settings.split.validation_fraction = 0.3;
    let scan = scan_of(settings).unwrap();
    let sample = |bytes| scan.sample(bytes).map(Result::unwrap).collect::<Vec<String>>();
    let all = sample(u64::MAX);
    let (documents, bytes) = scan.size(Split::Train);
    assert_eq!(
        (all.len() as u64, all.iter().map(|text| text.len() as u64).sum()),
        (documents, bytes)
    );
    let some = sample(100);
    assert!((1..=100).contains(&some.iter().map(String::len).sum::<usize>()), "{some:?}");
    assert_eq!(some, sample(100));
    assert_eq!(sample(0), Vec::<String>::new());
    for document in &scan.documents {
        let text = scan.read(document).unwrap();
        assert_eq!(all.contains(&text), document.split == Split::Train, "{text}");
    }
}

#[test]
fn splitting_by_document_cuts_through_groups() {
    let root = many(100);
    let mut settings = settings(path(&root));
    settings.split = SplitSettings { validation_fraction: 0.5, by: SplitBy::Document, seed: 0 };
    let scan = scan_of(settings.clone()).unwrap();
    let sides = |group| {
        let of_group = scan.documents.iter().filter(move |document| document.group == group);
        of_group.map(|document| document.split).collect::<std::collections::BTreeSet<_>>()
    };
    assert!((0..10).all(|group| sides(group).len() == 2));
    settings.split.by = SplitBy::Group;
    let scan = scan_of(settings).unwrap();
    let sides = |group| {
        let of_group = scan.documents.iter().filter(move |document| document.group == group);
        of_group.map(|document| document.split).collect::<std::collections::BTreeSet<_>>()
    };
    assert!((0..10).all(|group| sides(group).len() == 1), "a group is on both sides");
}

#[test]
fn impossible_settings_are_refused_and_breaks_are_heard() {
    let root = many(3);
    let refused = |change: &dyn Fn(&mut ScanSettings)| {
        let mut settings = settings(path(&root));
        change(&mut settings);
        scan_of(settings).unwrap_err().to_string()
    };
    assert!(refused(&|s| s.threads = 0).contains("threads is 0"));
    assert!(refused(&|s| s.limits.document_bytes_max = 1 << 32).contains("document_bytes_max"));
    assert!(refused(&|s| s.split.validation_fraction = 2.0).contains("validation_fraction is 2"));
    let one = refused(&|s| {
        s.inputs = vec![Input::Path(root.path().join("group-0"))];
        s.split.validation_fraction = 0.5;
    });
    assert!(one.contains("one group"), "{one}");
    let error = scan(settings(path(&root)), &mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, CorpusError::Interrupted), "{error}");
}

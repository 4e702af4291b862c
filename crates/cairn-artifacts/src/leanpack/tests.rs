//! Packs that are sound, and every way in which one can fail to be.

use super::header::is_safe;
use super::*;
use crate::hash::Hash;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of the first weight: more than one chunk.
const LARGE: u64 = CHUNK_BYTES as u64 + 640;

fn spec() -> cairn_spec::ModelSpec {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/llama");
    let text = fs::read_to_string(folder.join("config.json")).unwrap();
    cairn_spec::ModelSpec::from_hf_json(&text).unwrap()
}

fn weight(name: &str, dims: &[u64], encoding: &str, layout: &str) -> OutWeight {
    let (encoding, layout) = (encoding.to_owned(), layout.to_owned());
    OutWeight { name: name.to_owned(), dims: dims.to_vec(), encoding, layout }
}

fn contents() -> Contents {
    Contents {
        spec: spec(),
        policy: "f32/1".to_owned(),
        profile: Profile::portable(),
        plan: None,
        weights: vec![
            weight("large", &[LARGE / 4], "f32", "row_major"),
            weight("odd", &[17, 33], "f16", "panel"),
            weight("small", &[3], "f32", "row_major"),
        ],
        files: vec![
            ("config.json".to_owned(), b"{}".to_vec()),
            ("empty.txt".to_owned(), Vec::new()),
            ("tokenizer.json".to_owned(), vec![7; 1000]),
        ],
        source: Source {
            format: "safetensors".to_owned(),
            tensors: Vec::new(),
            left_out: Vec::new(),
            files: Vec::new(),
        },
        license: License::default(),
        lineage: None,
        assignment: None,
    }
}

/// The byte of a weight at a place.
fn byte(index: usize, at: usize) -> u8 {
    (at * 31 + index * 7 + at / 977).to_le_bytes()[0]
}

fn write_to(path: &Path, contents: Contents) -> WrittenPack {
    let weights = contents.weights.clone();
    let bytes = file_bytes(path, &contents).unwrap();
    let written = write(path, contents, &mut |index, out| {
        let OutWeight { dims, encoding, layout, .. } = &weights[index];
        let bytes = stored_bytes(encoding, layout, dims).unwrap();
        let bytes: Vec<u8> =
            (0..usize::try_from(bytes).unwrap()).map(|at| byte(index, at)).collect();
        // In pieces that are no divisor of a chunk.
        bytes.chunks(100_003).try_for_each(|piece| out.write_all(piece))?;
        Ok(index != 1)
    });
    let written = written.unwrap();
    assert_eq!(written.bytes, bytes, "told before it was written");
    written
}

fn packed() -> (tempfile::TempDir, PathBuf, WrittenPack) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.leanpack");
    let written = write_to(&path, contents());
    (folder, path, written)
}

fn kind(error: PackError) -> PackErrorKind {
    match error {
        PackError::Unsound { kind, .. } => kind,
        PackError::File(error) => panic!("{error}: {:?}", error.source),
    }
}

fn refusal(path: &Path) -> PackErrorKind {
    kind(PackFile::open(path).expect_err("the pack is not sound"))
}

fn verified(path: &Path) -> Result<(), PackErrorKind> {
    PackFile::open(path).and_then(|pack| pack.verify(&mut |_, _| ())).map_err(kind)
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn byte_at(path: &Path, at: u64) -> u8 {
    let mut byte = [0];
    fs::File::open(path).unwrap().read_exact_at(&mut byte, at).unwrap();
    byte[0]
}

#[test]
fn a_pack_reads_back_and_equal_contents_are_equal_bytes() {
    let (folder, path, written) = packed();
    let pack = PackFile::open(&path).unwrap();
    assert_eq!(pack.header(), &written.header);
    assert_eq!(pack.preamble().header_hash, written.hash);
    assert_eq!(fs::metadata(&path).unwrap().len(), written.bytes);
    assert!(pack.preamble().data_start.is_multiple_of(DATA_ALIGNMENT));
    let large = pack.tensor("large").unwrap();
    assert_eq!((large.offset, large.bytes, large.chunks.len()), (0, LARGE, 2));
    assert!(large.exact && !pack.tensor("odd").unwrap().exact);
    let mut bytes = vec![0; usize::try_from(LARGE).unwrap()];
    pack.read_checked_at(large, 0, &mut bytes).unwrap();
    assert!(bytes.iter().enumerate().all(|(at, &found)| found == byte(0, at)));
    pack.read_at(large, LARGE - 5, &mut bytes[..5]).unwrap();
    assert_eq!(bytes[4], byte(0, usize::try_from(LARGE - 1).unwrap()));
    assert_eq!(pack.read_file("tokenizer.json").unwrap().unwrap(), [7; 1000]);
    assert!(pack.read_file("empty.txt").unwrap().unwrap().is_empty());
    assert_eq!(pack.read_file("other").unwrap(), None);
    verified(&path).unwrap();
    let again = folder.path().join("again");
    write_to(&again, contents());
    assert!(fs::read(&again).unwrap() == fs::read(&path).unwrap());
}

#[test]
fn every_altered_byte_before_the_data_is_refused() {
    let (_folder, path, written) = packed();
    let end = PREAMBLE_BYTES as u64 + written.header.to_json().len() as u64;
    let start = PackFile::open(&path).unwrap().preamble().data_start;
    let gap = [end, end + 1, (end + start) / 2, start - 1];
    for at in (0..end).chain(gap) {
        let before = byte_at(&path, at);
        for flipped in [before ^ 1, before ^ 0x80] {
            patch(&path, at, &[flipped]);
            let found = refusal(&path);
            match at {
                0..8 => assert_eq!(found, PackErrorKind::NotAPack),
                8..12 => assert!(matches!(found, PackErrorKind::UnknownVersion { .. }), "{found}"),
                12..128 => assert!(found.to_string().starts_with("the preamble"), "{at}: {found}"),
                _ if at < end => assert!(found.to_string().starts_with("the header"), "{found}"),
                _ => assert!(matches!(found, PackErrorKind::Padding { .. }), "{at}: {found}"),
            }
        }
        patch(&path, at, &[before]);
    }
    verified(&path).unwrap();
}

#[test]
fn verifying_names_the_first_part_that_was_altered() {
    let (_folder, path, written) = packed();
    let start = PackFile::open(&path).unwrap().preamble().data_start;
    let check = |at: u64, part: &str| {
        let before = byte_at(&path, start + at);
        patch(&path, start + at, &[before ^ 4]);
        let found = verified(&path).unwrap_err().to_string();
        assert!(found.starts_with(part), "{at}: {found}");
        patch(&path, start + at, &[before]);
    };
    let tensors = &written.header.tensors;
    check(0, "large (MiB 0) was altered");
    check(LARGE - 1, "large (MiB 1) was altered");
    check(tensors[1].offset, "odd (MiB 0) was altered");
    check(tensors[2].offset + tensors[2].bytes, "the padding after small was altered: byte");
    check(written.header.files[2].offset + 999, "tokenizer.json (MiB 0) was altered");
    verified(&path).unwrap();
    let file = &written.header.files[2];
    patch(&path, start + file.offset, &[0]);
    let pack = PackFile::open(&path).unwrap();
    assert!(pack.read_file("tokenizer.json").is_err(), "small files are always checked");
}

#[test]
fn a_pack_of_another_length_is_refused() {
    let (_folder, path, written) = packed();
    let lengths = (0..200).chain([1 << 20, (2 << 20) - 1, 2 << 20, written.bytes - 1]);
    for actual in lengths.chain([written.bytes + 1]).rev() {
        // From long to short: a file does not get its bytes back.
        OpenOptions::new().write(true).open(&path).unwrap().set_len(actual).unwrap();
        let expected = written.bytes;
        match refusal(&path) {
            PackErrorKind::NotAPack => assert!(actual < 8),
            PackErrorKind::CutShort { .. } => assert!(actual < PREAMBLE_BYTES as u64),
            found => assert_eq!(found, PackErrorKind::Length { expected, actual }),
        }
    }
}

#[test]
fn a_pack_that_shrinks_while_it_is_open_is_an_error() {
    let (_folder, path, _) = packed();
    let pack = PackFile::open(&path).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(3 << 20).unwrap();
    let large = pack.tensor("large").unwrap();
    let mut bytes = vec![0; usize::try_from(LARGE).unwrap()];
    let error = pack.read_at(large, 0, &mut bytes).unwrap_err();
    assert_eq!(kind(error), PackErrorKind::CutShort { part: "large".to_owned() });
    assert!(matches!(
        kind(pack.verify(&mut |_, _| ()).unwrap_err()),
        PackErrorKind::CutShort { .. }
    ));
}

/// Writes another header into a pack, with hashes that fit.
fn with_header(path: &Path, header: &Value) {
    let json = header.to_string();
    let mut preamble = *PackFile::open(path).unwrap().preamble();
    let room = usize::try_from(preamble.data_start).unwrap() - PREAMBLE_BYTES;
    let mut bytes = json.clone().into_bytes();
    assert!(bytes.len() <= room, "the header still fits");
    bytes.resize(room, 0);
    preamble.header_bytes = json.len() as u64;
    preamble.header_hash = Hash::of_bytes(json.as_bytes());
    patch(path, PREAMBLE_BYTES as u64, &bytes);
    patch(path, 0, &preamble.to_bytes());
}

/// A header as JSON, for changing.
fn header_json() -> Value {
    let (_folder, _, written) = packed();
    serde_json::from_slice(&written.header.to_json()).unwrap()
}

#[test]
fn what_is_unknown_is_refused_by_name() {
    let check = |pointer: &str, value: Value, expected: &str| {
        let (_folder, path, written) = packed();
        let mut header = serde_json::from_slice(&written.header.to_json()).unwrap();
        *Value::pointer_mut(&mut header, pointer).unwrap() = value;
        with_header(&path, &header);
        assert_eq!(refusal(&path).to_string(), expected, "{pointer}");
    };
    check(
        "/schema",
        json!("leanpack/2"),
        "its header has schema 'leanpack/2'; this reader knows 'leanpack/1'",
    );
    check("/policy", json!("f64/1"), "it asks for the unknown numeric policy 'f64/1'");
    check("/profile/kind", json!("tpu"), "it is made for the unknown machine profile 'tpu'");
    check("/profile/panel_width", json!(32), "it is laid out for panels of 32; this reader has 16");
    check("/tensors/1/encoding", json!("q3"), "tensor odd has unknown encoding 'q3'");
    check("/tensors/1/layout", json!("spiral"), "tensor odd has unknown layout 'spiral'");
    let version = |path: &Path| patch(path, 8, &7_u32.to_le_bytes());
    let (_folder, path, _) = packed();
    version(&path);
    assert_eq!(refusal(&path), PackErrorKind::UnknownVersion { found: 7 });
}

/// Every number in a value, by its pointer.
fn numbers(value: &Value, pointer: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(pointer.to_owned()),
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                numbers(value, &format!("{pointer}/{index}"), found);
            }
        }
        Value::Object(fields) => {
            for (key, value) in fields {
                numbers(value, &format!("{pointer}/{key}"), found);
            }
        }
        _ => {}
    }
}

#[test]
fn offsets_counts_and_lengths_at_their_extremes_are_refused() {
    let (_folder, path, written) = packed();
    let data_bytes = written.bytes - PackFile::open(&path).unwrap().preamble().data_start;
    let header = header_json();
    let mut pointers = Vec::new();
    numbers(&header["tensors"], "/tensors", &mut pointers);
    numbers(&header["files"], "/files", &mut pointers);
    assert!(pointers.len() > 12, "{pointers:?}");
    let extremes = [0, 1, 63, 64, u64::from(u32::MAX), 1 << 40, 1 << 63, u64::MAX - 63, u64::MAX];
    for pointer in &pointers {
        for extreme in extremes {
            let mut changed = header.clone();
            let place = changed.pointer_mut(pointer).unwrap();
            if *place == json!(extreme) {
                continue;
            }
            *place = json!(extreme);
            let parsed = Header::parse(changed.to_string().as_bytes(), data_bytes);
            // A file that ends earlier or later before the next begins is found by its hash.
            let is_hashed = pointer.starts_with("/files") && pointer.ends_with("/bytes");
            assert!(parsed.is_err() || (is_hashed && extreme <= 64), "{pointer} = {extreme}");
        }
        for wrong in [json!(-1), json!(1.5), json!(1e300), json!("1"), Value::Null] {
            let mut changed = header.clone();
            *changed.pointer_mut(pointer).unwrap() = wrong;
            let parsed = Header::parse(changed.to_string().as_bytes(), data_bytes);
            assert!(matches!(parsed, Err(PackErrorKind::Header { .. })), "{pointer}");
        }
    }
    for extreme in extremes {
        assert_eq!(
            Header::parse(&written.header.to_json(), extreme).is_ok(),
            extreme == data_bytes
        );
    }
}

#[test]
fn preambles_at_their_extremes_are_refused() {
    let (_folder, path, _) = packed();
    let sound = *PackFile::open(&path).unwrap().preamble();
    let extremes =
        [0, 1, 127, 128, 1 << 21, 1 << 22, 1 << 26, (1 << 26) + 1, 1 << 40, 1 << 63, u64::MAX];
    for extreme in extremes {
        for field in 0..3 {
            let mut changed = sound;
            match field {
                0 => changed.header_bytes = extreme,
                1 => changed.data_start = extreme,
                _ => changed.file_bytes = extreme,
            }
            if changed == sound {
                continue;
            }
            patch(&path, 0, &changed.to_bytes());
            assert!(PackFile::open(&path).is_err(), "{changed:?}");
        }
    }
    patch(&path, 0, &sound.to_bytes());
    verified(&path).unwrap();
}

#[test]
fn hashes_that_contradict_each_other_are_refused() {
    let (_folder, path, written) = packed();
    let data_bytes = written.bytes - PackFile::open(&path).unwrap().preamble().data_start;
    let other = Hash::of_bytes(b"other").to_string();
    for pointer in ["/root", "/tensors/0/hash", "/tensors/0/chunks/1", "/files/2/hash"] {
        let mut header = header_json();
        *header.pointer_mut(pointer).unwrap() = json!(other);
        assert!(Header::parse(header.to_string().as_bytes(), data_bytes).is_err(), "{pointer}");
    }
    let mut header = header_json();
    let chunk = header["tensors"][0]["chunks"][0].clone();
    header["tensors"][0]["chunks"].as_array_mut().unwrap().push(chunk);
    assert!(Header::parse(header.to_string().as_bytes(), data_bytes).is_err());
    let mut header = header_json();
    header["tensors"][2]["name"] = json!("odd");
    assert!(Header::parse(header.to_string().as_bytes(), data_bytes).is_err(), "a name twice");
    let mut header = header_json();
    header["surprise"] = json!(1);
    assert!(Header::parse(header.to_string().as_bytes(), data_bytes).is_err());
}

#[test]
fn files_cannot_be_called_as_they_like() {
    for name in ["config.json", "LICENSE", "additional_chat_templates/tool_use.jinja", "a b.txt"] {
        assert!(is_safe(name), "{name}");
    }
    for name in [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a//b",
        "a/",
        "./a",
        ".bashrc",
        "a\\b",
        "additional_chat_templates/../x",
        "additional_chat_templates/.x",
        "additional_chat_templates/",
        "additional_chat_templates/a/b",
        "model.safetensors",
        "cairn.json",
    ] {
        assert!(!is_safe(name), "{name}");
    }
}

#[test]
fn a_weight_of_another_size_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.leanpack");
    let error = write(&path, contents(), &mut |_, out| out.write_all(&[0; 3]).map(|()| true));
    let PackError::File(error) = error.unwrap_err() else { panic!("an error of a file") };
    assert_eq!(error.source.to_string(), format!("large wrote 3 of {LARGE} bytes"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn contents_that_make_no_pack_are_refused_before_any_weight_is_asked_for() {
    let check = |change: &dyn Fn(&mut Contents), expected: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.leanpack");
        let mut contents = contents();
        change(&mut contents);
        let asked = std::cell::Cell::new(false);
        let written = write(&path, contents, &mut |_, _| {
            asked.set(true);
            Ok(true)
        });
        assert_eq!(kind(written.unwrap_err()).to_string(), expected);
        assert!(!asked.get(), "{expected}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{expected}");
    };
    check(
        &|contents| contents.files[2].0 = "../tokenizer.json".to_owned(),
        "../tokenizer.json: no file of a model may be called so",
    );
    check(
        &|contents| contents.files[1].0 = "config.json".to_owned(),
        "config.json: it is there twice",
    );
    check(
        &|contents| contents.weights[1].encoding = "q3".to_owned(),
        "tensor odd has unknown encoding 'q3'",
    );
    check(
        &|contents| contents.weights[1].dims = vec![17, 0],
        "odd: it cannot have the dimensions [17, 0]",
    );
    check(
        &|contents| contents.weights[2].encoding = "bf16".to_owned(),
        "small: a vector is f32 row_major, not bf16 row_major",
    );
    check(
        &|contents| contents.weights[1].dims = vec![1 << 60, 1 << 60],
        "odd: it cannot have the dimensions [1152921504606846976, 1152921504606846976]",
    );
    check(
        &|contents| contents.policy = "f64/1".to_owned(),
        "it asks for the unknown numeric policy 'f64/1'",
    );
}

#[test]
fn a_pipe_is_refused_without_waiting_for_a_writer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.leanpack");
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let PackError::File(error) = PackFile::open(&path).unwrap_err() else { panic!("of a file") };
    assert_eq!(error.source.to_string(), "it is not a regular file");
    assert!(!PackFile::is_pack(&path));
}

#[test]
fn vectors_are_plain_floats() {
    let (_folder, path, written) = packed();
    let data_bytes = written.bytes - PackFile::open(&path).unwrap().preamble().data_start;
    for (field, value) in [("encoding", "bf16"), ("layout", "panel")] {
        let mut header = header_json();
        header["tensors"][2][field] = json!(value);
        let error = Header::parse(header.to_string().as_bytes(), data_bytes).unwrap_err();
        assert!(error.to_string().starts_with("small: a vector is f32 row_major"), "{error}");
    }
}

proptest! {
    #[test]
    fn changed_headers_never_panic(
        at in any::<prop::sample::Index>(),
        replacement in prop::collection::vec(any::<u8>(), 0..12),
        removed in 0_usize..12,
        data_bytes in prop_oneof![Just(0), Just(u64::MAX), any::<u64>()],
    ) {
        let mut json = HEADER.with(Clone::clone);
        let at = at.index(json.len());
        let end = json.len().min(at + removed);
        json.splice(at..end, replacement);
        let _ = Header::parse(&json, data_bytes);
    }

    #[test]
    fn any_bytes_are_no_preamble(mut bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Preamble::parse(&bytes);
        let start = bytes.len().min(8);
        bytes[..start].copy_from_slice(&MAGIC[..start]);
        prop_assert!(Preamble::parse(&bytes).is_err());
    }
}

thread_local! {
    static HEADER: Vec<u8> = packed().2.header.to_json();
}

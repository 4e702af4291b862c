//! Files made by hand, sound and broken in one place each.

use super::cursor::Cursor;
use super::*;
use cairn_spec::Hint;
use proptest::prelude::*;
use std::path::PathBuf;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/gguf").join(name)
}

/// A file put together piece by piece, sound unless a piece is not.
#[derive(Clone)]
struct Pieces {
    version: u32,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
    counts: Option<(u64, u64)>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn pair(key: &str, value_type: u32, value: &[u8]) -> Vec<u8> {
    [&text(key), &value_type.to_le_bytes()[..], value].concat()
}

fn tensor(name: &str, dims: &[u64], id: u32, offset: u64) -> Vec<u8> {
    let mut entry = text(name);
    entry.extend(u32::try_from(dims.len()).unwrap().to_le_bytes());
    entry.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
    entry.extend(id.to_le_bytes());
    entry.extend(offset.to_le_bytes());
    entry
}

impl Pieces {
    /// Two keys and two tensors: `a` of 8 f32, `b` of 64 `Q8_0`.
    fn sound() -> Self {
        let list = [&8_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &text("x"), &text("yz")];
        Self {
            version: 3,
            keys: vec![
                pair("general.architecture", 8, &text("llama")),
                pair("tokens", 9, &list.concat()),
                pair("eps", 6, &1e-5_f32.to_le_bytes()),
            ],
            tensors: vec![tensor("a", &[4, 2], 0, 0), tensor("b", &[32, 2], 8, 32)],
            data: 32 + 68,
            counts: None,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let (tensors, keys) =
            self.counts.unwrap_or((self.tensors.len() as u64, self.keys.len() as u64));
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(tensors.to_le_bytes());
        file.extend(keys.to_le_bytes());
        file.extend(self.keys.concat());
        file.extend(self.tensors.concat());
        file.resize(file.len().next_multiple_of(32) + self.data, 1);
        file
    }

    fn error(&self) -> GgufError {
        Header::parse(&self.bytes()).unwrap_err()
    }
}

/// The sound file with one change is refused with this text.
fn check(change: impl FnOnce(&mut Pieces), expected: &str) {
    let mut pieces = Pieces::sound();
    change(&mut pieces);
    assert_eq!(pieces.error().to_string(), expected);
}

#[test]
fn a_sound_header_is_read_whole() {
    let pieces = Pieces::sound();
    for version in [2, 3] {
        let file = Pieces { version, ..pieces.clone() }.bytes();
        let header = Header::parse(&file).unwrap();
        assert_eq!((header.version(), header.alignment()), (version, 32));
        let Some(Value::List(list)) = header.value("tokens") else { panic!("a list") };
        assert_eq!((list.len(), list.element()), (2, ValueType::Text));
        assert_eq!(list.texts("tokens", &file).unwrap(), ["x", "yz"]);
        assert!(list.numbers("tokens", &file).is_err());
        assert_eq!(header.value("eps"), Some(&Value::Real(f64::from(1e-5_f32), ValueType::F32)));
        let b = header.tensor("b").unwrap();
        assert_eq!((b.shape.as_slice(), b.tensor_type.name()), (&[2, 32][..], "Q8_0"));
        assert_eq!((b.bytes, b.offset), (68, file.len() - 68));
        assert!(header.tensor("c").is_none() && header.value("none").is_none());
    }
}

#[test]
fn every_type_of_value_is_read() {
    let mut pieces = Pieces::sound();
    let values: [(u32, &[u8], Value); 12] = [
        (0, &[200], Value::Unsigned(200, ValueType::U8)),
        (1, &[200], Value::Signed(-56, ValueType::I8)),
        (2, &[1, 2], Value::Unsigned(513, ValueType::U16)),
        (3, &[0, 255], Value::Signed(-256, ValueType::I16)),
        (4, &[1, 0, 0, 1], Value::Unsigned(16_777_217, ValueType::U32)),
        (5, &[255; 4], Value::Signed(-1, ValueType::I32)),
        (6, &1.5_f32.to_le_bytes(), Value::Real(1.5, ValueType::F32)),
        (7, &[1], Value::Bool(true)),
        (8, &text("é"), Value::Text("é".into())),
        (10, &[255; 8], Value::Unsigned(u64::MAX, ValueType::U64)),
        (11, &[255; 8], Value::Signed(-1, ValueType::I64)),
        (12, &0.1_f64.to_le_bytes(), Value::Real(0.1, ValueType::F64)),
    ];
    for (id, bytes, _) in &values {
        pieces.keys.push(pair(&format!("v{id}"), *id, bytes));
    }
    let file = pieces.bytes();
    let header = Header::parse(&file).unwrap();
    for (id, _, value) in values {
        assert_eq!(header.value(&format!("v{id}")), Some(&value), "type {id}");
    }
    let nested = [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes()].concat();
    let numbers = [&5_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &[255; 8]].concat();
    pieces.keys.push(pair("nested", 9, &[&nested[..], &numbers].concat()));
    pieces.keys.push(pair("numbers", 9, &numbers));
    let file = pieces.bytes();
    let header = Header::parse(&file).unwrap();
    let Some(Value::List(list)) = header.value("numbers") else { panic!("a list") };
    assert_eq!(list.numbers("numbers", &file).unwrap(), [-1.0, -1.0]);
    assert!(matches!(header.value("nested"), Some(Value::List(list)) if list.len() == 1));
}

#[test]
fn what_is_wrong_in_front_is_named() {
    let refused = |file: &[u8]| Header::parse(file).unwrap_err().to_string();
    assert_eq!(refused(b""), "it begins with [] instead of 'GGUF'");
    assert_eq!(refused(b"GGMLxxxx"), "it begins with [47, 47, 4d, 4c] instead of 'GGUF'");
    check(|p| p.version = 1, "it has version 1; versions 2 and 3 are read");
    check(|p| p.version = 4, "it has version 4; versions 2 and 3 are read");
    let big = "it is big endian (version 3); only little endian files are read";
    check(|p| p.version = 3_u32.swap_bytes(), big);
    let mut pieces = Pieces::sound();
    let most = (pieces.bytes().len() - 24) / 13;
    pieces.counts = Some((2, 1 << 63));
    let count = 1_u64 << 63;
    assert_eq!(
        pieces.error().to_string(),
        format!("it announces {count} keys; at most {most} are possible")
    );
    pieces.counts = Some((u64::MAX, 3));
    assert!(pieces.error().to_string().starts_with("it announces 18446744073709551615 tensors"));
}

#[test]
fn what_is_wrong_with_a_value_is_named_with_its_key() {
    let long = u64::MAX.to_le_bytes();
    let end = |p: &mut Pieces| {
        p.tensors.clear();
        p.data = 0;
    };
    let with = |key: &'static str, id: u32, value: Vec<u8>| {
        move |p: &mut Pieces| p.keys[0] = pair(key, id, &value)
    };
    let error = |change: &dyn Fn(&mut Pieces)| {
        let mut pieces = Pieces::sound();
        change(&mut pieces);
        pieces.error()
    };
    let past = error(&with("k", 8, long.to_vec()));
    assert!(
        matches!(&past, GgufError::PastEnd { what, offset: 45, needed: u64::MAX, .. }
        if what == "the value of k"),
        "{past:?}"
    );
    assert!(!past.hints().is_empty());
    check(with("k", 13, vec![0]), "the value of k at byte 33 has the unknown type 13");
    check(with("k", 7, vec![2]), "the value of k at byte 37 is 2, neither true nor false");
    check(
        with("k", 8, [&1_u64.to_le_bytes()[..], &[255]].concat()),
        "the value of k at byte 37 is not UTF-8",
    );
    let deep: Vec<u8> = [9_u32.to_le_bytes().to_vec(), 1_u64.to_le_bytes().to_vec()].concat();
    check(with("k", 9, deep.repeat(9)), "the value of k holds lists more than 4 deep");
    let endless = [&0_u32.to_le_bytes()[..], &long].concat();
    assert!(matches!(error(&with("k", 9, endless)), GgufError::PastEnd { .. }));
    let endless = [&8_u32.to_le_bytes()[..], &long].concat();
    assert!(matches!(error(&with("k", 9, endless)), GgufError::PastEnd { .. }));
    let overflowing = [&12_u32.to_le_bytes()[..], &(1_u64 << 61).to_le_bytes()].concat();
    assert!(matches!(error(&with("k", 9, overflowing)), GgufError::PastEnd { .. }));
    check(with("eps", 7, vec![1]), "key 'eps' occurs twice");
    check(
        |p| p.keys[0] = long.to_vec(),
        &format!("a key at byte 24 is {} bytes long; at most 65535 are accepted", u64::MAX),
    );
    for alignment in [0_u32, 3, 33, 1 << 31] {
        check(
            with("general.alignment", 4, alignment.to_le_bytes().to_vec()),
            &format!(
                "general.alignment is {alignment}; it must be a power of two, 1048576 at most"
            ),
        );
    }
    check(
        with("general.alignment", 6, vec![0; 4]),
        "general.alignment is f32; it must be a power of two, 1048576 at most",
    );
    let mut pieces = Pieces::sound();
    end(&mut pieces);
    assert_eq!(Header::parse(&pieces.bytes()).unwrap().tensors().len(), 0);
}

#[test]
fn what_is_wrong_with_a_tensor_is_named() {
    let b = |dims: &'static [u64], id, offset| {
        move |p: &mut Pieces| p.tensors[1] = tensor("b", dims, id, offset)
    };
    check(b(&[32, 2], 99, 32), "tensor 'b' has the unknown type 99");
    check(b(&[32, 2], 4, 32), "tensor 'b' has the unknown type 4");
    check(b(&[1; 5], 0, 32), "tensor 'b' has impossible dimensions []");
    check(
        b(&[1 << 40, 1 << 40], 0, 32),
        "tensor 'b' has impossible dimensions [1099511627776, 1099511627776]",
    );
    check(
        b(&[u64::MAX, 0], 0, 32),
        "tensor 'b' has impossible dimensions [18446744073709551615, 0]",
    );
    check(b(&[31, 2], 8, 32), "rows of tensor 'b' have 31 elements, not a multiple of 32 (Q8_0)");
    check(b(&[32, 2], 8, 33), "tensor 'b' begins at byte 33 of the data, not a multiple of 32");
    check(b(&[32, 2], 8, 64), "tensor 'b' needs 68 bytes from byte 64 of the data, which has 100");
    let far = 1_u64 << 63;
    check(
        b(&[32, 2], 8, 1 << 63),
        &format!("tensor 'b' needs 68 bytes from byte {far} of the data, which has 100"),
    );
    let last = u64::MAX - 31;
    check(
        b(&[32, 2], 8, u64::MAX - 31),
        &format!("tensor 'b' needs 68 bytes from byte {last} of the data, which has 100"),
    );
    check(b(&[32, 2], 8, 0), "tensors 'a' and 'b' overlap");
    check(|p| p.tensors[1] = tensor("a", &[32, 2], 8, 32), "tensor 'a' occurs twice");
    check(
        |p| p.tensors[1] = tensor(&"x".repeat(256), &[32, 2], 8, 32),
        "the name of a tensor at byte 178 is 256 bytes long; at most 255 are accepted",
    );
    check(|p| p.data -= 1, "tensor 'b' needs 68 bytes from byte 32 of the data, which has 99");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let file = Pieces::sound().bytes();
    for length in 0..file.len() {
        assert!(Header::parse(&file[..length]).is_err(), "{length} of {} bytes", file.len());
    }
}

#[test]
fn every_format_decodes_as_the_gguf_package_does() {
    let file = GgufFile::open(&golden("blocks.gguf")).unwrap();
    for format in Format::ALL {
        let (mut decoded, mut expected) = (vec![0.0; 512], vec![0.0; 512]);
        let name = format.name();
        assert_eq!(file.header().tensor(name).unwrap().tensor_type.format(), Some(format));
        file.read_f32(name, 0..512, &mut decoded).unwrap();
        file.read_f32(&format!("{name}.decoded"), 0..512, &mut expected).unwrap();
        for (i, (a, b)) in decoded.iter().zip(&expected).enumerate() {
            assert_eq!(a.to_bits(), b.to_bits(), "{name} element {i}: {a} and {b}");
        }
        assert!(decoded.iter().any(|x| x.abs() > 1e-4), "{name} is not all zeros");
    }
}

#[test]
fn a_range_of_elements_is_that_part_of_the_whole() {
    let file = GgufFile::open(&golden("blocks.gguf")).unwrap();
    for format in Format::ALL {
        let mut all = vec![0.0; 512];
        file.read_f32(format.name(), 0..512, &mut all).unwrap();
        for range in [0..0, 3..10, 0..32, 30..34, 250..512, 255..257, 511..512, 512..512, 1..511] {
            let mut part = vec![f32::NAN; range.len()];
            file.read_f32(format.name(), range.clone(), &mut part).unwrap();
            assert_eq!(part, all[range.clone()], "{} {range:?}", format.name());
        }
    }
    let error = file.read_f32("Q8_0", 500..513, &mut [0.0; 13]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "elements 500 to 513 lie outside of tensor 'Q8_0', which has 512"
    );
    let error = file.read_f32("Q9_0", 0..0, &mut []).unwrap_err();
    assert_eq!(error.to_string(), "there is no tensor 'Q9_0'");
}

#[test]
fn q8_0_and_q4_0_are_read_as_they_are_stored() {
    let file = GgufFile::open(&golden("blocks.gguf")).unwrap();
    let (mut values, mut scales) = (vec![0; 64], vec![0.0; 2]);
    assert!(file.read_codes(Format::Q8_0, "Q8_0", 32..96, (&mut values, &mut scales)).unwrap());
    let mut decoded = vec![0.0; 64];
    file.read_f32("Q8_0", 32..96, &mut decoded).unwrap();
    for (i, value) in decoded.iter().enumerate() {
        assert_eq!((f32::from(values[i]) * scales[i / 32]).to_bits(), value.to_bits());
    }
    assert!(!file.read_codes(Format::Q8_0, "Q4_0", 0..64, (&mut values, &mut scales)).unwrap());
    assert!(file.read_codes(Format::Q4_0, "Q4_0", 32..96, (&mut values, &mut scales)).unwrap());
    file.read_f32("Q4_0", 32..96, &mut decoded).unwrap();
    for (i, value) in decoded.into_iter().enumerate() {
        assert!((-8..8).contains(&values[i]));
        assert_eq!((f32::from(values[i]) * scales[i / 32]).to_bits(), value.to_bits());
    }
    assert!(!file.read_codes(Format::Q4_0, "Q8_0", 0..64, (&mut values, &mut scales)).unwrap());
    assert!(!file.read_codes(Format::F32, "F32", 0..64, (&mut values, &mut scales)).unwrap());
}

#[test]
fn types_that_are_not_read_are_listed_and_refused_by_name() {
    let mut pieces = Pieces::sound();
    pieces.tensors[1] = tensor("b", &[256], 10, 32);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    pieces.data += 84;
    std::fs::write(&path, pieces.bytes()).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.header().tensor("b").unwrap().tensor_type.to_string(), "Q2_K");
    let error = file.read_f32("b", 0..1, &mut [0.0]).unwrap_err();
    assert_eq!(error.to_string(), "tensor 'b' is Q2_K, which is not read");
    assert_eq!(
        error.hints(),
        ["types that are read: F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K"]
    );
    let error = GgufFile::open(&folder.path().join("none.gguf")).unwrap_err();
    assert!(matches!(error, GgufReadError::File(_)));
}

/// The six-bit pairs of a K block, by the picture in the gguf package's source: for each of the
/// last four, four bits of byte 8 + i and the two high bits of byte i (scale) or 4 + i (offset).
fn pairs_by_picture(packed: &[u8; 12]) -> Vec<(u32, u32)> {
    let byte = |i: usize| u32::from(packed[i]);
    let plain = (0..4).map(|i| (byte(i) % 64, byte(4 + i) % 64));
    let split = (0..4)
        .map(|i| (byte(8 + i) % 16 + byte(i) / 64 * 16, byte(8 + i) / 16 + byte(4 + i) / 64 * 16));
    plain.chain(split).collect()
}

proptest! {
    #[test]
    fn k_blocks_mean_what_the_description_says(
        packed in any::<[u8; 12]>(),
        fifths in any::<[u8; 32]>(),
        nibbles in proptest::collection::vec(any::<u8>(), 128),
        has_fifths in any::<bool>(),
    ) {
        // d = 0.5 and m = 0.25 as halves: with them every step is exact.
        let mut block = vec![0, 0x38, 0, 0x34];
        block.extend(packed);
        if has_fifths {
            block.extend(fifths);
        }
        block.extend(&nibbles);
        let format = if has_fifths { Format::Q5K } else { Format::Q4K };
        let mut out = vec![0.0; 256];
        format.decode(&block, &mut out);
        let pairs = pairs_by_picture(&packed);
        for (i, value) in out.into_iter().enumerate() {
            let (scale, offset) = pairs[i / 32];
            let byte = nibbles[i / 64 * 32 + i % 32];
            let mut q = u32::from(if i / 32 % 2 == 0 { byte % 16 } else { byte / 16 });
            if has_fifths {
                q += u32::from(fifths[i % 32] >> (i / 32) & 1) * 16;
            }
            let expected = 0.5 * f64::from(scale) * f64::from(q) - 0.25 * f64::from(offset);
            prop_assert_eq!(f64::from(value).to_bits(), expected.to_bits());
        }
    }

    #[test]
    fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Header::parse(&bytes);
        let front = Pieces::sound().bytes();
        let kept = 24.min(bytes.len());
        bytes[..kept].copy_from_slice(&front[..kept]);
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn changed_files_are_sound_or_refused(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        length in any::<prop::sample::Index>(),
    ) {
        let mut file = Pieces::sound().bytes();
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        file.truncate(length.index(file.len() * 4).max(1));
        if let Ok(header) = Header::parse(&file) {
            for tensor in header.tensors() {
                prop_assert!(tensor.offset + tensor.bytes <= file.len());
                prop_assert_eq!(tensor.offset % header.alignment(), 0);
            }
        }
    }
}

#[test]
fn a_cursor_stops_at_the_end() {
    let mut cursor = Cursor::new(b"abc", 1);
    let what = || "it".to_owned();
    assert_eq!((cursor.offset(), cursor.remaining()), (1, 2));
    assert!(cursor.take(3, &what).is_err());
    assert_eq!(cursor.take(2, &what), Ok(&b"bc"[..]));
    assert_eq!(
        cursor.take(1, &what).unwrap_err().to_string(),
        "it at byte 3 needs 1 bytes, but the file ends after 0"
    );
}

//! Packs under a limit of bytes: encodings of several kinds, chosen by what they cost.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;

use cairn_artifacts::leanpack::WrittenPack;
use cairn_artifacts::safetensors::WeightFolder;
use cairn_convert::{
    ByteLimit, Chosen, ConvertError, PackJob, PackSettings, ProfileChoice, SensitivityJob,
    choose_encodings, other_bytes, pack,
};
use cairn_kernels::{Cpu, Encoding};
use cairn_model::{PackCheck, PackSource};

use crate::packs::{PLAIN, golden, mixed_logits, source, spec};

/// Packs a golden model into at most so many bytes beside what is no matrix.
fn packed_within(name: &str, room: u64, path: &Path) -> Result<WrittenPack, ConvertError> {
    packed_as(name, room, path, |_| ())
}

/// The same, with a change of what was chosen.
fn packed_as(
    name: &str,
    room: u64,
    path: &Path,
    change: impl FnOnce(&mut Chosen),
) -> Result<WrittenPack, ConvertError> {
    let folder = golden(name);
    let (spec, weights) = (spec(&folder), WeightFolder::open(&folder).unwrap());
    let cpu = Cpu::detect(2);
    let job = PackJob { folder: &folder, spec: &spec, weights: &weights, cpu: &cpu };
    let others = other_bytes(job)?;
    let limit = ByteLimit { file: others + room, others };
    let rows = [(3..19).collect(), (5..21).rev().collect()];
    let encodings = Encoding::ALL;
    let probe =
        SensitivityJob { spec: &spec, source: &weights, rows: &rows, encodings: &encodings };
    let mut chosen = choose_encodings(&probe, limit, Cpu::detect(1), &mut |_, _| true)?;
    change(&mut chosen);
    let profile = ProfileChoice::Portable;
    let settings = PackSettings { encoding: None, head: None, chosen: Some(chosen), profile };
    pack(job, &settings, path, &mut |_, _| ControlFlow::Continue(()))
}

fn bytes_of_matrices(written: &WrittenPack) -> u64 {
    let matrices = written.header.tensors.iter().filter(|tensor| tensor.dims.len() == 2);
    matrices.map(|tensor| tensor.bytes).sum()
}

fn kl(written: &WrittenPack) -> f64 {
    written.header.assignment.as_ref().unwrap().kl
}

#[test]
fn more_bytes_diverge_less_and_every_limit_is_kept() {
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("model.leanpack");
    let all = packed_within("qwen3", 1 << 30, &path).unwrap();
    assert!(kl(&all) == 0.0, "what is exact costs nothing: {}", kl(&all));
    let full = bytes_of_matrices(&all);
    let mut before = f64::INFINITY;
    for share in [4, 5, 6] {
        let room = full * share / 10;
        let written = packed_within("qwen3", room, &path).unwrap();
        let assignment = written.header.assignment.clone().unwrap();
        assert!(written.bytes <= assignment.limit_bytes, "{share}: {}", written.bytes);
        assert!(bytes_of_matrices(&written) <= room);
        let listed: u64 = assignment.classes.iter().map(|class| class.bytes).sum();
        assert_eq!(listed, bytes_of_matrices(&written));
        assert!(kl(&written) < before, "{share} tenths: {} after {before}", kl(&written));
        before = kl(&written);
    }
    match packed_within("qwen3", full / 100, &path) {
        Err(ConvertError::ByteLimit { limit, least }) => assert!(least > limit),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_lies_at_the_path_survives_a_pack_beyond_its_limit() {
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("model.leanpack");
    let all = packed_within("qwen3", 1 << 30, &path).unwrap();
    let (room, older) = (bytes_of_matrices(&all) + 4096, std::fs::read(&path).unwrap());
    let elsewhere = target.path().join("other.leanpack");
    assert!(packed_within("qwen3", room, &elsewhere).is_ok());
    assert!(packed_within("qwen3", room / 100, &path).is_err());
    assert!(std::fs::read(&path).unwrap() == older);
    // A header longer than was reckoned with: only the whole file's size tells.
    let refused = packed_as("qwen3", room, &path, |chosen| {
        chosen.assignment.classes[0].class = "x".repeat(4 << 20);
    });
    match refused {
        Err(ConvertError::ByteLimit { limit, least }) => assert!(least > limit),
        other => panic!("{other:?}"),
    }
    assert!(std::fs::read(&path).unwrap() == older);
}

#[test]
fn a_mixed_pack_computes_what_its_weights_say() {
    let target = tempfile::tempdir().unwrap();
    let (path, again) = (target.path().join("a.leanpack"), target.path().join("b.leanpack"));
    let full = bytes_of_matrices(&packed_within("qwen3", 1 << 30, &path).unwrap());
    packed_within("qwen3", full * 45 / 100, &path).unwrap();
    packed_within("qwen3", full * 45 / 100, &again).unwrap();
    assert!(std::fs::read(&path).unwrap() == std::fs::read(&again).unwrap(), "twice");
    let strict: PackSource = source(&path, PackCheck { verify: true, strict: true });
    let encodings = strict.encodings();
    let kinds: BTreeSet<&str> = encodings.values().map(|encoding| encoding.name()).collect();
    assert!(kinds.len() > 1, "{kinds:?}");
    let spec = &strict.pack().header().spec;
    let found = mixed_logits(spec, (strict.storage(), &encodings), &strict).unwrap();
    let plain = source(&path, PackCheck::default());
    let expected = mixed_logits(spec, (PLAIN, &std::collections::BTreeMap::new()), &plain).unwrap();
    assert!(found == expected);
}

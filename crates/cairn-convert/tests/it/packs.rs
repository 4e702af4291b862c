//! Models packed, run from their packs and unpacked again, for every family.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use cairn_artifacts::leanpack::{PackFile, Profile, TensorEntry, WrittenPack};
use cairn_artifacts::safetensors::{self, OutTensor, WeightFolder};
use cairn_convert::{ConvertError, PackJob, PackSettings, ProfileChoice, pack, unpack};
use cairn_kernels::{Cpu, Encoding, Layout, SeqSlot};
use cairn_model::{
    AdapterMap, BuildOptions, Head, LoadError, PackCheck, PackSource, TensorSource,
    build_stored_program, head_weight, load_weights,
};
use cairn_program::{
    Feed, KvPlacement, MemoryPlan, ProgramId, Run, Session, SessionProgram, Sizes,
};
use cairn_spec::{DType, ModelSpec};

const TOKENS: u32 = 12;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

/// One of the golden folders.
pub(crate) fn golden(name: &str) -> PathBuf {
    goldens().join(name)
}

/// The golden folders that hold a model.
fn families() -> Vec<PathBuf> {
    let entries = fs::read_dir(goldens()).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = entries
        .filter(|folder| folder.join("config.json").exists() && WeightFolder::open(folder).is_ok())
        .collect();
    found.sort();
    assert!(found.len() > 15, "{found:?}");
    found
}

pub(crate) fn spec(folder: &Path) -> ModelSpec {
    ModelSpec::from_hf_json(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap()
}

fn settings(encoding: Option<Encoding>) -> PackSettings {
    PackSettings { encoding, head: None, chosen: None, profile: ProfileChoice::Portable }
}

pub(crate) fn packed(folder: &Path, encoding: Option<Encoding>, path: &Path) -> WrittenPack {
    let (spec, weights) = (spec(folder), WeightFolder::open(folder).unwrap());
    let cpu = Cpu::detect(2);
    let job = PackJob { folder, spec: &spec, weights: &weights, cpu: &cpu };
    pack(job, &settings(encoding), path, &mut |_, _| ControlFlow::Continue(())).unwrap()
}

pub(crate) fn source(path: &Path, check: PackCheck) -> PackSource {
    PackSource::new(PackFile::open(path).unwrap(), check).unwrap()
}

/// Bits of the logits of some tokens, or of the last hidden states of a model without a head.
pub(crate) fn logits(
    spec: &ModelSpec,
    storage: (Encoding, Layout),
    source: &dyn TensorSource,
) -> Result<Vec<u32>, LoadError> {
    mixed_logits(spec, (storage, &BTreeMap::new()), source)
}

/// As [`logits`], with encodings of their own for some weights.
pub(crate) fn mixed_logits(
    spec: &ModelSpec,
    ((encoding, layout), encodings): ((Encoding, Layout), &BTreeMap<String, Encoding>),
    source: &dyn TensorSource,
) -> Result<Vec<u32>, LoadError> {
    let (head, output) = match spec.head {
        Some(_) => (Head::Logits, "logits".to_owned()),
        None => (Head::Hidden, format!("hidden_{}", spec.num_hidden_layers)),
    };
    let options = BuildOptions { encoding, layout, ..BuildOptions::new(head) };
    let adapters = AdapterMap::default();
    let program = build_stored_program(spec, &options, &adapters, encodings).unwrap();
    let tokens = TOKENS as usize;
    let program =
        SessionProgram { program, sizes: Sizes::dense(tokens, 1), kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::detect(2)).unwrap();
    load_weights(&mut session, spec, source)?;
    let ids: Vec<u32> = (3..3 + TOKENS).collect();
    let positions: Vec<u32> = (0..TOKENS).collect();
    let slots = [SeqSlot { start: 0, len: tokens, cached: 0, blocks: &[] }];
    let feeds = [Feed::u32("ids", &ids), Feed::u32("positions", &positions)];
    session.run(ProgramId(0), &Run::forward(&feeds, &slots)).unwrap();
    let logits = session.output(ProgramId(0), &output);
    Ok(logits.iter().map(|value| value.to_bits()).collect())
}

/// Every tensor of a folder: type, shape and bytes.
fn contents(folder: &Path) -> BTreeMap<String, (DType, Vec<usize>, Vec<u8>)> {
    let weights = WeightFolder::open(folder).unwrap();
    let read = |tensor: safetensors::TensorView<'_>| {
        let contents = (tensor.dtype, tensor.shape.to_vec(), tensor.bytes.to_vec());
        (tensor.name.to_owned(), contents)
    };
    weights.tensors().map(read).collect()
}

pub(crate) const PLAIN: (Encoding, Layout) = (Encoding::F32, Layout::RowMajor);

#[test]
fn every_family_computes_from_its_pack_what_it_computes_from_its_folder() {
    for folder in families() {
        let target = tempfile::tempdir().unwrap();
        let path = target.path().join("model.leanpack");
        let written = packed(&folder, None, &path);
        assert!(written.header.tensors.iter().all(|tensor| tensor.exact), "{folder:?}");
        let spec = spec(&folder);
        let expected = logits(&spec, PLAIN, &WeightFolder::open(&folder).unwrap()).unwrap();
        let strict = source(&path, PackCheck { verify: true, strict: true });
        assert_eq!(strict.pack().header().spec, spec);
        let found = logits(&spec, strict.storage(), &strict).unwrap();
        assert!(found == expected, "{folder:?} as it is stored");
        let converted = logits(&spec, PLAIN, &source(&path, PackCheck::default())).unwrap();
        assert!(converted == expected, "{folder:?} converted");
        let again = target.path().join("again.leanpack");
        packed(&folder, None, &again);
        assert!(fs::read(&again).unwrap() == fs::read(&path).unwrap(), "{folder:?} twice");
    }
}

#[test]
fn every_family_comes_back_bit_for_bit() {
    for folder in families() {
        let target = tempfile::tempdir().unwrap();
        let path = target.path().join("model.leanpack");
        packed(&folder, None, &path);
        let back = target.path().join("back");
        let report = unpack(&source(&path, PackCheck::default()), &back).unwrap();
        assert_eq!(report.rounded, [""; 0]);
        let (expected, found) = (contents(&folder), contents(&back));
        let left_out = PackFile::open(&path).unwrap().header().source.left_out.clone();
        for (name, tensor) in &expected {
            if left_out.contains(name) {
                assert!(!found.contains_key(name));
            } else {
                assert!(found.get(name) == Some(tensor), "{folder:?}: {name}");
            }
        }
        assert_eq!(found.len(), expected.len() - left_out.len(), "{folder:?}");
        let config = |folder: &Path| fs::read(folder.join("config.json")).unwrap();
        assert!(config(&back) == config(&folder), "{folder:?}");
    }
}

/// Copies a folder with its weights in another type.
fn narrowed(folder: &Path, dtype: DType, target: &Path) {
    fs::create_dir(target).unwrap();
    fs::copy(folder.join("config.json"), target.join("config.json")).unwrap();
    let weights = WeightFolder::open(folder).unwrap();
    let narrow = |value: f32| match dtype {
        // Exact in f16: a few bits of mantissa, small exponents.
        DType::F16 => {
            let rounded = f32::from_bits(value.to_bits() & 0xfff0_0000);
            let kept = if (1e-4..1e4).contains(&rounded.abs()) { rounded } else { 0.0 };
            let bits = kept.to_bits();
            let half = (bits >> 16 & 0x8000)
                | if kept == 0.0 {
                    0
                } else {
                    ((bits >> 13) & 0x3_ffff).wrapping_sub(112 << 10) & 0x7fff
                };
            u16::try_from(half).unwrap()
        }
        _ => safetensors::f32_to_bf16(value),
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = weights
        .tensors()
        .map(|tensor| {
            let values = tensor.to_f32().unwrap();
            let bytes = values.iter().flat_map(|&value| narrow(value).to_le_bytes()).collect();
            (tensor.name.to_owned(), tensor.shape.to_vec(), bytes)
        })
        .collect();
    let out = tensors
        .iter()
        .map(|(name, shape, bytes)| OutTensor::bytes(name.as_str(), dtype, shape, bytes));
    let mut file = fs::File::create(target.join("model.safetensors")).unwrap();
    safetensors::write(&mut file, out.collect(), &BTreeMap::new()).unwrap();
}

#[test]
fn narrow_sources_stay_narrow_where_they_can_and_come_back() {
    for (family, dtype) in
        [("qwen3", DType::Bf16), ("gpt2", DType::Bf16), ("gpt2", DType::F16), ("llama", DType::F16)]
    {
        let target = tempfile::tempdir().unwrap();
        let folder = target.path().join("narrow");
        narrowed(&goldens().join(family), dtype, &folder);
        let path = target.path().join("model.leanpack");
        let has_f16 = Encoding::ALL.iter().any(|encoding| encoding.name() == "f16");
        let encoding = (dtype == DType::F16 && !has_f16).then_some(Encoding::F32);
        let written = packed(&folder, encoding, &path);
        let matrix = written.header.tensors.iter().find(|tensor| tensor.dims.len() == 2).unwrap();
        let expected = encoding.map_or(dtype.name(), Encoding::name);
        assert_eq!((matrix.encoding.as_str(), matrix.exact), (expected, true), "{family}");
        let spec = spec(&folder);
        let source = source(&path, PackCheck::default());
        let packed = logits(&spec, source.storage(), &source).unwrap();
        let plain = logits(&spec, PLAIN, &WeightFolder::open(&folder).unwrap()).unwrap();
        assert!(packed == plain, "{family} {dtype}");
        let back = target.path().join("back");
        unpack(&source, &back).unwrap();
        assert!(contents(&back) == contents(&folder), "{family} {dtype}");
    }
}

#[test]
fn rounded_weights_are_said_to_be_and_unpack_to_what_was_computed_with() {
    for encoding in Encoding::ALL.into_iter().filter(|encoding| *encoding != Encoding::F32) {
        let target = tempfile::tempdir().unwrap();
        let folder = goldens().join("llama");
        let path = target.path().join("model.leanpack");
        let written = packed(&folder, Some(encoding), &path);
        let rounded = written.header.tensors.iter().filter(|tensor| !tensor.exact).count();
        assert!(rounded > 0 && rounded < written.header.tensors.len(), "{encoding}");
        let (spec, source) = (spec(&folder), source(&path, PackCheck::default()));
        let expected = logits(&spec, (encoding, Layout::Panel), &source).unwrap();
        let plain = logits(&spec, (encoding, Layout::RowMajor), &source).unwrap();
        assert!(plain == expected, "{encoding}: another layout changes no value");
        let back = target.path().join("back");
        let report = unpack(&source, &back).unwrap();
        assert_eq!(report.rounded.len(), rounded, "{encoding}");
        let found = logits(&spec, PLAIN, &WeightFolder::open(&back).unwrap()).unwrap();
        assert!(found == expected, "{encoding}");
        let config = fs::read_to_string(back.join("config.json")).unwrap();
        assert_eq!(ModelSpec::from_hf_json(&config).unwrap().dtype, DType::F32);
        let direct =
            logits(&spec, (encoding, Layout::Panel), &WeightFolder::open(&folder).unwrap());
        assert!(direct.unwrap() == expected, "{encoding}: packed as it is loaded");
    }
}

#[test]
fn strict_sources_refuse_conversions_and_checked_ones_altered_bytes() {
    let target = tempfile::tempdir().unwrap();
    let (folder, path) = (goldens().join("qwen3"), target.path().join("model.leanpack"));
    packed(&folder, None, &path);
    let spec = spec(&folder);
    let strict = source(&path, PackCheck { verify: false, strict: true });
    let error = logits(&spec, PLAIN, &strict).unwrap_err().to_string();
    let refused = "it is stored as f32 panel and would be converted, which a strict source refuses";
    assert!(error.ends_with(refused), "{error}");
    let mut bytes = fs::read(&path).unwrap();
    let start = usize::try_from(strict.pack().preamble().data_start).unwrap();
    bytes[start + 1000] ^= 1;
    fs::write(&path, bytes).unwrap();
    let checked = source(&path, PackCheck { verify: true, strict: false });
    let error = logits(&spec, checked.storage(), &checked).unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight (MiB 0) was altered"), "{error}");
    let unchecked = source(&path, PackCheck::default());
    assert!(logits(&spec, unchecked.storage(), &unchecked).is_ok(), "weights are not checked then");
}

#[test]
fn license_lineage_and_files_are_those_of_the_folder() {
    let target = tempfile::tempdir().unwrap();
    let folder = target.path().join("model");
    fs::create_dir(&folder).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(goldens().join("llama").join(name), folder.join(name)).unwrap();
    }
    fs::write(folder.join("README.md"), "---\nlicense: apache-2.0\n---\n# A model\n").unwrap();
    fs::write(folder.join("LICENSE"), "terms").unwrap();
    fs::write(folder.join("notes.bin"), "none of it").unwrap();
    fs::create_dir(folder.join("additional_chat_templates")).unwrap();
    fs::write(folder.join("additional_chat_templates/tool_use.jinja"), "{{ x }}").unwrap();
    let path = target.path().join("model.leanpack");
    let header = packed(&folder, None, &path).header;
    let names: Vec<&str> = header.files.iter().map(|file| file.name.as_str()).collect();
    let expected =
        ["LICENSE", "README.md", "additional_chat_templates/tool_use.jinja", "config.json"];
    assert_eq!(names, expected);
    assert_eq!(header.license.id.as_deref(), Some("apache-2.0"));
    assert_eq!(header.license.stated_in.as_deref(), Some("README.md"));
    assert_eq!(header.license.files, ["LICENSE"]);
    assert!(header.lineage.is_none());
    let sources: Vec<&str> = header.source.files.iter().map(|file| file.name.as_str()).collect();
    assert!(sources.contains(&"model.safetensors") && !sources.contains(&"notes.bin"));
    let plan = header.plan.unwrap();
    assert_eq!(plan.token_buckets, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    let back = target.path().join("back");
    unpack(&source(&path, PackCheck::default()), &back).unwrap();
    let template = fs::read(back.join("additional_chat_templates/tool_use.jinja")).unwrap();
    assert_eq!(template, b"{{ x }}");
    fs::remove_file(folder.join("README.md")).unwrap();
    assert_eq!(packed(&folder, None, &path).header.license.id, None, "unknown is unknown");
}

#[test]
fn a_head_may_have_an_encoding_of_its_own() {
    // Tied to the embedding, and one of its own.
    for (name, head) in [("qwen3", "model.embed_tokens.weight"), ("llama", "lm_head.weight")] {
        let target = tempfile::tempdir().unwrap();
        let (folder, path) = (golden(name), target.path().join("model.leanpack"));
        let (spec, weights) = (spec(&folder), WeightFolder::open(&folder).unwrap());
        assert_eq!(head_weight(&spec), Some(head), "{name}");
        let cpu = Cpu::detect(2);
        let job = PackJob { folder: &folder, spec: &spec, weights: &weights, cpu: &cpu };
        let settings = PackSettings { head: Some(Encoding::Q8), ..settings(Some(Encoding::Q4)) };
        let written = pack(job, &settings, &path, &mut |_, _| ControlFlow::Continue(()));
        for tensor in &written.unwrap().header.tensors {
            let expected = match tensor.dims.len() {
                1 => "f32",
                _ if tensor.name == head => "q8",
                _ => "q4",
            };
            assert_eq!(tensor.encoding, expected, "{name} {}", tensor.name);
        }
        let strict = source(&path, PackCheck { verify: true, strict: true });
        let (storage, own) = (strict.storage(), strict.encodings());
        let found = mixed_logits(&spec, (storage, &own), &strict).unwrap();
        let plain = source(&path, PackCheck::default());
        let expected = mixed_logits(&spec, (PLAIN, &BTreeMap::new()), &plain).unwrap();
        assert!(found == expected, "{name}");
    }
}

/// Where the list of exceptions of a weight's first panel begins in its bytes.
fn list_start(columns: u64) -> u64 {
    columns.div_ceil(8) * 192 + 32
}

#[test]
fn a_damaged_list_of_exceptions_is_refused_however_it_is_read() {
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("model.leanpack");
    let written = packed(&golden("qwen3"), Some(Encoding::Bf16z), &path);
    let file = PackFile::open(&path).unwrap();
    let is_list = |tensor: &&TensorEntry| tensor.encoding == "bf16z";
    let tensors: Vec<_> = written.header.tensors.iter().filter(is_list).collect();
    assert!(!tensors.is_empty());
    let bytes = fs::read(&path).unwrap();
    let (spec, cpu) = (&written.header.spec, Cpu::detect(2));
    for (number, tensor) in (0_u64..).zip(tensors) {
        // Another panel of each, and another byte of its first position.
        let panels = tensor.dims[0].div_ceil(16);
        let panel = number % panels * (tensor.bytes / panels);
        let at = file.preamble().data_start + tensor.offset + panel;
        let at = usize::try_from(at + list_start(tensor.dims[1]) + number % 4).unwrap();
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x55;
        fs::write(&path, &damaged).unwrap();
        let pack = || source(&path, PackCheck::default());
        let check = |error: LoadError| {
            let is_named =
                matches!(&error, LoadError::Unreadable { name, .. } if *name == tensor.name);
            assert!(is_named && error.to_string().contains("list of exceptions"), "{error}");
        };
        // Where packs are mapped; then copied as they are, and converted.
        if file.map_weights().is_ok() {
            check(pack().map(&cpu).unwrap_err());
        }
        let own = pack().encodings();
        check(mixed_logits(spec, (pack().storage(), &own), &pack()).unwrap_err());
        check(logits(spec, PLAIN, &pack()).unwrap_err());
    }
}

#[test]
fn a_stopped_pack_leaves_nothing_and_a_host_is_recorded() {
    let target = tempfile::tempdir().unwrap();
    let (folder, path) = (goldens().join("llama"), target.path().join("model.leanpack"));
    let (spec, weights) = (spec(&folder), WeightFolder::open(&folder).unwrap());
    let cpu = Cpu::detect(2);
    let job = PackJob { folder: &folder, spec: &spec, weights: &weights, cpu: &cpu };
    let stopped = pack(job, &settings(None), &path, &mut |done, _| match done {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    });
    assert!(matches!(stopped, Err(ConvertError::Stopped)));
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
    let profile = Profile::host("avx2", 64, Some("a processor".to_owned()));
    let host = PackSettings {
        encoding: None,
        head: None,
        chosen: None,
        profile: ProfileChoice::Host(profile.clone()),
    };
    pack(job, &host, &path, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!(PackFile::open(&path).unwrap().header().profile, profile);
}

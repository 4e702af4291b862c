//! Engines that read weights where they lie, in a pack or a folder: same tokens, less memory, and nobody's
//! prey.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cairn_artifacts::leanpack::PackFile;
use cairn_artifacts::safetensors::{OutTensor, WeightFolder, f32_to_bf16, write};
use cairn_engine::{Engine, EngineOptions, EnginePlan, Request, SamplingParams};
use cairn_kernels::{Cpu, Encoding};
use cairn_model::{FolderSource, PackCheck, PackSource, TensorSource};

use crate::packs::{golden, packed, source};

const NEW_TOKENS: usize = 5;

fn tokens(engine: &mut Engine) -> Vec<u32> {
    let request = Request::new(vec![5, 6, 7], SamplingParams::greedy(), NEW_TOKENS);
    engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap().tokens
}

fn pack_of(path: &Path) -> PackSource {
    source(path, PackCheck { verify: true, strict: true })
}

fn engine(path: &Path) -> Engine {
    engine_of(&pack_of(path))
}

/// An engine as the pack was planned for.
fn engine_of(pack: &PackSource) -> Engine {
    let header = pack.pack().header();
    let context = usize::try_from(header.plan.as_ref().unwrap().max_context).unwrap();
    let (encoding, layout) = pack.storage();
    let options = EngineOptions { encoding, layout, ..EngineOptions::new(1, context) };
    let plan = EnginePlan::new(&header.spec, options).unwrap();
    Engine::load(plan, Cpu::detect(2), pack).unwrap()
}

/// Whether the system lets packs be mapped; these tests cannot change that.
#[expect(clippy::print_stdout, reason = "a test that cannot run says so")]
fn maps(path: &Path) -> bool {
    let mapped = PackFile::open(path).unwrap().map_weights();
    mapped.inspect_err(|error| println!("skipped: {error}")).is_ok()
}

#[test]
fn resident_bytes_are_those_that_the_pack_predicts() {
    for encoding in [Encoding::F32, Encoding::Bf16, Encoding::Q8] {
        let target = tempfile::tempdir().unwrap();
        let path = target.path().join("model.leanpack");
        let written = packed(&golden("qwen3"), Some(encoding), &path);
        let engine = engine(&path);
        let session = engine.session();
        let predicted = written.header.plan.unwrap().bytes;
        let predicted = predicted.weights + predicted.cache + predicted.arena;
        let resident = session.allocated_bytes() + session.lent_weight_bytes();
        assert_eq!(resident as u64, predicted, "{encoding}");
        assert_eq!(session.bytes().total() as u64, predicted, "{encoding}");
        if maps(&path) {
            assert_eq!(session.lent_weight_bytes(), session.bytes().weights, "{encoding}");
        }
    }
}

#[test]
fn a_pack_that_somebody_truncates_is_copied_first() {
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("model.leanpack");
    packed(&golden("qwen3"), Some(Encoding::Bf16), &path);
    let notices = Arc::new(AtomicUsize::new(0));
    let told = notices.clone();
    let pack = pack_of(&path).with_notice(move || _ = told.fetch_add(1, Ordering::Relaxed));
    let (mut engine, mut other) = (engine_of(&pack), engine(&path));
    let expected = tokens(&mut other);
    if !maps(&path) {
        return;
    }
    drop(other);
    let planned = engine.session().bytes().total();
    assert!(engine.session().allocated_bytes() < planned);
    let writer = std::thread::spawn(move || {
        OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
    });
    // Whether the writer waits already when a step begins, or comes in the midst of one: the tokens
    // are the same, and in the end it is served.
    while !writer.is_finished() {
        assert_eq!(tokens(&mut engine), expected);
    }
    writer.join().unwrap();
    assert_eq!(tokens(&mut engine), expected);
    assert_eq!(engine.session().allocated_bytes(), planned);
    assert_eq!(engine.session().lent_weight_bytes(), 0);
    assert_eq!(notices.load(Ordering::Relaxed), 1, "it is told once");
}

#[test]
fn a_pack_that_somebody_may_write_to_is_copied() {
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("model.leanpack");
    packed(&golden("qwen3"), Some(Encoding::Bf16), &path);
    let expected = tokens(&mut engine(&path));
    let writer = OpenOptions::new().append(true).open(&path).unwrap();
    let mut copied = engine(&path);
    let session = copied.session();
    assert_eq!(session.lent_weight_bytes(), 0);
    assert_eq!(session.allocated_bytes(), session.bytes().total());
    // Nobody is held back, and nothing that comes now matters.
    writer.set_len(0).unwrap();
    assert_eq!(tokens(&mut copied), expected);
}

#[test]
fn an_altered_weight_is_named_also_where_it_is_mapped() {
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("model.leanpack");
    let written = packed(&golden("qwen3"), Some(Encoding::Bf16), &path);
    let tensor = &written.header.tensors[3];
    let at = PackFile::open(&path).unwrap().preamble().data_start + tensor.offset + 7;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[usize::try_from(at).unwrap()] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let pack = source(&path, PackCheck { verify: true, strict: false });
    if maps(&path) {
        let error = pack.map(&Cpu::detect(2)).unwrap_err().to_string();
        assert!(error.contains(&tensor.name), "{error}");
    }
    let unchecked = source(&path, PackCheck::default());
    assert!(unchecked.map(&Cpu::detect(2)).unwrap().is_some() || !maps(&path));
}

/// An engine over a folder's weights.
fn folder_engine(source: &dyn TensorSource, folder: &Path, encoding: Encoding) -> Engine {
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let spec = cairn_spec::model::hf::HfConfig::from_json(&config).unwrap().spec;
    let options = EngineOptions { encoding, ..EngineOptions::new(1, 64) };
    let plan = EnginePlan::new(&spec, options).unwrap();
    Engine::load(plan, Cpu::detect(2), source).unwrap()
}

/// A copy of a golden folder.
fn folder_of(name: &str) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, target.path().join(path.file_name().unwrap())).unwrap();
    }
    target
}

/// A copy of a golden folder with its values as bf16.
fn narrow_folder_of(name: &str) -> tempfile::TempDir {
    let target = folder_of(name);
    let weights = WeightFolder::open(&golden(name)).unwrap();
    let bits: Vec<(String, Vec<usize>, Vec<u16>)> = weights
        .tensors()
        .map(|tensor| {
            let mut values = vec![0.0; tensor.shape.iter().product()];
            tensor.copy_to_f32(&mut values).unwrap();
            let bits = values.into_iter().map(f32_to_bf16).collect();
            (tensor.name.to_owned(), tensor.shape.to_vec(), bits)
        })
        .collect();
    let tensors: Vec<OutTensor<'_>> =
        bits.iter().map(|(name, shape, bits)| OutTensor::bf16(name, shape, bits)).collect();
    let mut file = std::fs::File::create(target.path().join("model.safetensors")).unwrap();
    write(&mut file, tensors, &BTreeMap::new()).unwrap();
    target
}

/// Whether the system leases the files of a folder.
fn leases(folder: &WeightFolder) -> bool {
    folder.files().iter().all(|file| file.file().leased().is_ok())
}

#[test]
fn what_lies_in_a_folder_is_what_is_loaded_from_it() {
    let folders = [
        (folder_of("qwen3"), Encoding::F32),
        (folder_of("llama_sharded"), Encoding::F32),
        (folder_of("gemma3_text"), Encoding::F32),
        (folder_of("deepseek_v3"), Encoding::F32),
        (narrow_folder_of("qwen3"), Encoding::Bf16),
        (narrow_folder_of("qwen3_moe"), Encoding::Bf16),
    ];
    for (folder, encoding) in &folders {
        let path = folder.path();
        let weights = WeightFolder::open(path).unwrap();
        let mut copied = folder_engine(&weights, path, *encoding);
        let source = FolderSource::new(weights.clone());
        let mut lent = folder_engine(&source, path, *encoding);
        let session = lent.session();
        let bytes = session.lent_weight_bytes();
        assert_eq!(copied.session().lent_weight_bytes(), 0);
        assert_eq!(session.bytes().total(), bytes + session.allocated_bytes());
        let config = std::fs::read_to_string(path.join("config.json")).unwrap();
        if leases(&weights) && config.contains("\"qwen3\"") {
            assert!(bytes > session.bytes().weights / 2, "{bytes}");
        }
        let bits = |engine: &mut Engine| -> Vec<u32> {
            let logprobs = engine.next_logprobs(&[5, 6, 7, 8, 9]).unwrap();
            logprobs.into_iter().map(f32::to_bits).collect()
        };
        assert_eq!(tokens(&mut lent), tokens(&mut copied));
        assert_eq!(bits(&mut lent), bits(&mut copied));
        // In another encoding nothing is wanted as it lies.
        let other = folder_engine(&source, path, Encoding::Q8);
        assert_eq!(other.session().lent_weight_bytes(), 0);
        assert_eq!(source.copied_because().is_some(), !leases(&weights));
    }
}

#[test]
fn a_folder_that_somebody_writes_to_is_copied_first() {
    let folder = folder_of("qwen3");
    let path = folder.path().join("model.safetensors");
    let weights = WeightFolder::open(folder.path()).unwrap();
    if !leases(&weights) {
        return;
    }
    let notices = Arc::new(AtomicUsize::new(0));
    let told = notices.clone();
    let source =
        FolderSource::new(weights).with_notice(move || _ = told.fetch_add(1, Ordering::Relaxed));
    let mut engine = folder_engine(&source, folder.path(), Encoding::F32);
    let planned = engine.session().bytes().total();
    let expected = tokens(&mut engine);
    let writer = std::thread::spawn(move || {
        OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
    });
    while !writer.is_finished() {
        assert_eq!(tokens(&mut engine), expected);
    }
    writer.join().unwrap();
    assert_eq!(tokens(&mut engine), expected);
    let session = engine.session();
    assert_eq!((session.lent_weight_bytes(), notices.load(Ordering::Relaxed)), (0, 1));
    // What was copied is the file, whose header is the rest.
    let allocated = session.allocated_bytes();
    assert!((planned..planned + planned / 8).contains(&allocated), "{allocated} of {planned}");
}

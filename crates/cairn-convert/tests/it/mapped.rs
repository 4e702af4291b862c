//! Engines that read a pack's weights where they lie: same tokens, less memory, and nobody's prey.

use std::fs::OpenOptions;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cairn_artifacts::leanpack::PackFile;
use cairn_engine::{Engine, EngineOptions, EnginePlan, Request, SamplingParams};
use cairn_kernels::{Cpu, Encoding};
use cairn_model::{PackCheck, PackSource, TensorSource};

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
        let error = pack.lend(&Cpu::detect(2)).unwrap_err().to_string();
        assert!(error.contains(&tensor.name), "{error}");
    }
    let unchecked = source(&path, PackCheck::default());
    assert!(unchecked.lend(&Cpu::detect(2)).unwrap().is_some() || !maps(&path));
}

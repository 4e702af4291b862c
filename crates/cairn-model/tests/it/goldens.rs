//! Logits and hidden states of the golden folders.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_kernels::{Cpu, Isa, SeqSlot};
use cairn_model::{BuildOptions, Head, TensorSource, build_program, load_weights};
use cairn_program::{
    Feed, KvPlacement, MemoryPlan, ProgramId, Run, Session, SessionProgram, Sizes,
};
use cairn_spec::ModelSpec;
use cairn_spec::model::Family;

/// Against transformers in f32, per element: 1e-4 · max(1, max|reference|).
const TOLERANCE: f32 = 1e-4;

/// Tensors in memory, by name.
#[derive(Clone)]
pub(crate) struct Tensors(pub(crate) BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl TensorSource for Tensors {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|(shape, _)| shape.clone())
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        out.copy_from_slice(&self.0[name].1[elements]);
        Ok(())
    }
}

pub(crate) fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

pub(crate) fn spec(name: &str) -> ModelSpec {
    let text = std::fs::read_to_string(folder(name).join("config.json")).unwrap();
    ModelSpec::from_hf_json(&text).unwrap()
}

pub(crate) fn tokens(file: &SafetensorsFile, name: &str) -> (Vec<usize>, Vec<u32>) {
    let tensor = file.tensor(name).unwrap();
    let ids = tensor.to_i64().unwrap().into_iter().map(|id| u32::try_from(id).unwrap()).collect();
    (tensor.shape.to_vec(), ids)
}

/// `rows` sequences of `length` tokens laid end to end.
pub(crate) fn slots(rows: usize, length: usize) -> Vec<SeqSlot<'static>> {
    (0..rows)
        .map(|row| SeqSlot { start: row * length, len: length, cached: 0, blocks: &[] })
        .collect()
}

pub(crate) fn positions(rows: usize, length: usize) -> Vec<u32> {
    (0..rows).flat_map(|_| 0..u32::try_from(length).unwrap()).collect()
}

pub(crate) fn assert_close(what: &str, actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1.0_f32, |largest, x| largest.max(x.abs()));
    let worst = actual.iter().zip(expected).fold(0.0_f32, |worst, (a, e)| worst.max((a - e).abs()));
    assert!(worst <= TOLERANCE * largest, "{what}: off by {worst} of {largest}");
}

pub(crate) fn check_logits(name: &str) {
    let spec = spec(name);
    let golden = SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap();
    let (shape, ids) = tokens(&golden, "input_ids");
    let (rows, length) = (shape[0], shape[1]);
    let options = BuildOptions {
        keep_hidden: true,
        text_len: Some(length),
        ..BuildOptions::new(Head::Logits)
    };
    let program = build_program(&spec, &options).unwrap();
    let sizes = Sizes::dense(rows * length, rows);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::new(Isa::best(), 2)).unwrap();
    load_weights(&mut session, &spec, &WeightFolder::open(&folder(name)).unwrap()).unwrap();
    let positions = positions(rows, length);
    let feeds = [Feed::u32("ids", &ids), Feed::u32("positions", &positions)];
    let sequences = slots(rows, length);
    let id = ProgramId(0);
    session.run(id, &Run::forward(&feeds, &sequences)).unwrap();
    for layer in 0..=spec.num_hidden_layers {
        let hidden = format!("hidden_{layer}");
        let expected = golden.tensor(&hidden).unwrap().to_f32().unwrap();
        assert_close(&format!("{name} {hidden}"), session.output(id, &hidden), &expected);
    }
    let expected = golden.tensor("logits").unwrap().to_f32().unwrap();
    assert_close(&format!("{name} logits"), session.output(id, "logits"), &expected);
}

/// Every golden folder: one for each family, and variants of rotation and window.
pub(crate) fn folders() -> Vec<String> {
    let entries = std::fs::read_dir(folder(".")).unwrap().map(Result::unwrap);
    let folders = entries.filter(|entry| entry.path().join("config.json").exists());
    let mut names: Vec<String> =
        folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn logits_and_hidden_states_are_those_of_transformers() {
    let folders = folders();
    for family in Family::ALL {
        let has_golden = folders.iter().any(|name| spec(name).family == family);
        assert!(has_golden, "no golden folder of family {family}");
    }
    for name in folders {
        check_logits(&name);
    }
}

#[test]
fn a_large_quantized_weight_loads() {
    // More rows than are encoded at a time.
    let spec = spec("llama");
    assert!(spec.vocab_size > 256, "the embedding has rows to spare");
    let options = BuildOptions {
        encoding: cairn_kernels::Encoding::Q8,
        layout: cairn_kernels::Layout::Panel,
        ..BuildOptions::new(Head::Logits)
    };
    let program = build_program(&spec, &options).unwrap();
    let program = SessionProgram { program, sizes: Sizes::dense(8, 1), kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::new(Isa::best(), 1)).unwrap();
    let folder = WeightFolder::open(&folder("llama")).unwrap();
    load_weights(&mut session, &spec, &folder).unwrap();
    let name = "model.embed_tokens.weight";
    let original = folder.tensor(name).unwrap().to_f32().unwrap();
    let mut decoded = vec![0.0; original.len()];
    cairn_kernels::Weight {
        encoding: options.encoding,
        layout: options.layout,
        n: spec.vocab_size,
        k: spec.hidden_size,
        bytes: session.stored(name).unwrap(),
    }
    .decode(&mut decoded);
    for (block, values) in original.chunks(32).zip(decoded.chunks(32)) {
        let largest = block.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        for (value, decoded) in block.iter().zip(values) {
            // Half a step of the group's scale, which is rounded up to an f16 number.
            assert!((value - decoded).abs() <= largest / 253.0, "{value} as {decoded}");
        }
    }
}

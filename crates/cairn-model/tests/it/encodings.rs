//! Weights kept as they are stored, and weights that are narrowed when they are loaded: what that does
//! to the logits of every family.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use cairn_artifacts::gguf::GgufFile;
use cairn_artifacts::leanpack::stored_bytes;
use cairn_artifacts::safetensors::{self, OutTensor, WeightFolder};
use cairn_kernels::encoding::encode;
use cairn_kernels::{Compute, Cpu, Encoding, Isa, Layout, Weight};
use cairn_model::{
    AdapterMap, BuildError, BuildOptions, Head, LoadError, TensorMap, TensorSource, build_program,
    build_stored_program, gguf, load_weights, stored_weights,
};
use cairn_program::{KvPlacement, MemoryPlan, Op, Program, Session, SessionProgram, Sizes};
use cairn_spec::model::{Family, Mlp};
use cairn_spec::{DType, Hint as _, LoraSpec, ModelSpec, TargetModules};

use crate::families::{bits, golden_rows, logits, source_of};
use crate::goldens::{Tensors, folder, folders, spec};

/// How far logits may move when weights are rounded to bf16, to f16 and to q8, relative to the largest
/// logit: twice what the family's goldens show, as `docs/numerics.md` lists and explains.
const BOUNDS: [(Family, [f32; 3]); 16] = [
    (Family::Llama, [0.029, 0.0044, 0.13]),
    (Family::Gpt2, [0.0087, 0.0014, 0.03]),
    (Family::Mistral, [0.018, 0.0022, 0.072]),
    (Family::Qwen2, [0.032, 0.0047, 0.14]),
    (Family::Qwen3, [0.014, 0.002, 0.053]),
    (Family::GptNeox, [0.012, 0.0021, 0.057]),
    (Family::Phi3, [0.037, 0.0038, 0.11]),
    (Family::Olmo2, [0.025, 0.0035, 0.073]),
    (Family::Gemma2, [0.029, 0.0031, 0.076]),
    (Family::Gemma3Text, [0.025, 0.0023, 0.052]),
    (Family::Bert, [0.0069, 0.00098, 0.023]),
    (Family::ModernBert, [0.0076, 0.0011, 0.036]),
    (Family::Mixtral, [0.017, 0.0023, 0.62]),
    (Family::Qwen3Moe, [0.018, 0.0017, 0.13]),
    (Family::DeepseekV2, [0.026, 0.0027, 0.14]),
    (Family::DeepseekV3, [0.028, 0.0029, 0.65]),
];
const NARROW: [Encoding; 3] = [Encoding::Bf16, Encoding::F16, Encoding::Q8];

/// The largest distance of logits from those of f32 weights, relative to the largest of those.
fn distance(name: &str, encoding: Encoding) -> f32 {
    let (spec, rows) = (spec(name), golden_rows(name));
    let exact = logits(&spec, Encoding::F32, &folder(name), &[&rows[0], &rows[1]]);
    let narrow = logits(&spec, encoding, &folder(name), &[&rows[0], &rows[1]]);
    let largest = exact.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let pairs = exact.iter().zip(&narrow);
    pairs.fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs())) / largest
}

#[test]
fn narrow_weights_stay_within_the_bound_of_their_family() {
    let mut measured = BTreeMap::new();
    for name in folders() {
        let found: &mut [f32; 3] = measured.entry(spec(&name).family.to_string()).or_default();
        for (found, encoding) in found.iter_mut().zip(NARROW) {
            *found = found.max(distance(&name, encoding));
        }
    }
    let mut wrong = Vec::new();
    for (family, bounds) in BOUNDS {
        let found = measured[&family.to_string()];
        // A bound that nothing comes near says nothing, so it is at most four times what is there.
        let holds = |(found, bound): (f32, f32)| (bound / 4.0..=bound).contains(&found);
        if !found.into_iter().zip(bounds).all(holds) {
            let found = found.map(|share| format!("{share:.2e}")).join(", ");
            wrong.push(format!("{family}: {found} of {bounds:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_bounds_are_those_of_the_documentation() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/numerics.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    for (family, bounds) in BOUNDS {
        let begin = format!("| {family} |");
        let row = docs.lines().find(|line| line.starts_with(&begin)).unwrap_or(&begin);
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let stated: Vec<f32> =
            [3, 5, 7].iter().filter_map(|i| cells.get(*i)?.parse().ok()).collect();
        assert_eq!(stated, bounds, "{row}");
    }
}

/// A tensor's name, shape, bytes in two bytes an element, and values.
type Narrowed = (String, Vec<usize>, Vec<u8>, Vec<f32>);

/// Writes a golden folder's tensors in two bytes an element, and as f32 with the same values.
fn narrowed(name: &str, encoding: Encoding, (narrow, wide): (&Path, &Path)) {
    let source = WeightFolder::open(&folder(name)).unwrap();
    let tensors: Vec<Narrowed> = source
        .tensors()
        .map(|tensor| {
            let mut values = tensor.to_f32().unwrap();
            let form = (encoding, Layout::RowMajor);
            let (n, k) = (1, values.len());
            let mut storage = vec![0.0_f32; k.div_ceil(2)];
            let bytes = cairn_kernels::memory::bytes_of_mut(&mut storage);
            encode(form, (n, k), &values, &mut bytes[..2 * k]);
            let weight =
                Weight { encoding, layout: Layout::RowMajor, n, k, bytes: &bytes[..2 * k] };
            weight.decode(&mut values);
            (tensor.name.to_owned(), tensor.shape.to_vec(), bytes[..2 * k].to_vec(), values)
        })
        .collect();
    let dtype = if encoding == Encoding::F16 { DType::F16 } else { DType::Bf16 };
    let file = |folder: &Path| File::create(folder.join(safetensors::SINGLE_FILE)).unwrap();
    let half = tensors
        .iter()
        .map(|(name, shape, bytes, _)| OutTensor::bytes(name.as_str(), dtype, shape, bytes));
    safetensors::write(&mut file(narrow), half.collect(), &BTreeMap::new()).unwrap();
    let whole =
        tensors.iter().map(|(name, shape, _, values)| OutTensor::f32(name.as_str(), shape, values));
    safetensors::write(&mut file(wide), whole.collect(), &BTreeMap::new()).unwrap();
}

#[test]
fn weights_kept_as_stored_compute_the_bits_of_f32() {
    for name in folders() {
        for encoding in [Encoding::Bf16, Encoding::F16] {
            let (narrow, wide) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            narrowed(&name, encoding, (narrow.path(), wide.path()));
            let (spec, rows) = (spec(&name), golden_rows(&name));
            let stored = |folder: &Path| {
                stored_weights(&spec, &WeightFolder::open(folder).unwrap()).unwrap()
            };
            let (narrow_stored, wide_stored) = (stored(narrow.path()), stored(wide.path()));
            assert_eq!(narrow_stored.encodings(), [Some(encoding)], "{name}");
            assert_eq!(narrow_stored.most(), encoding, "{name}");
            assert_eq!(wide_stored.most(), Encoding::F32, "{name}");
            assert!(narrow_stored.others().is_empty() && wide_stored.others().is_empty());
            let run = |encoding, source: &Path| bits(&logits(&spec, encoding, source, &[&rows[0]]));
            let kept = run(encoding, narrow.path());
            assert!(kept == run(Encoding::F32, narrow.path()), "{name} {encoding} widened");
            assert!(kept == run(Encoding::F32, wide.path()), "{name} {encoding} in a wide file");
            assert!(kept == run(encoding, wide.path()), "{name} {encoding} rounded when loaded");
        }
    }
}

#[test]
fn a_source_of_several_types_is_held_as_f32() {
    struct Mixed(Tensors, &'static str);
    impl TensorSource for Mixed {
        fn names(&self) -> Vec<String> {
            self.0.names()
        }
        fn shape(&self, name: &str) -> Option<Vec<usize>> {
            self.0.shape(name)
        }
        fn read_f32(
            &self,
            name: &str,
            elements: std::ops::Range<usize>,
            out: &mut [f32],
        ) -> Result<(), String> {
            self.0.read_f32(name, elements, out)
        }
        fn encoding(&self, name: &str) -> Option<Encoding> {
            Some(if name.contains(self.1) { Encoding::F16 } else { Encoding::Bf16 })
        }
    }
    let up = "model.layers.2.mlp.up_proj.weight";
    for (other, expected) in [
        ("nowhere", vec![]),
        ("layers.2.mlp.up_proj", vec![(up.to_owned(), Encoding::F16)]),
        // Norms are f32 in any program, so theirs is not asked.
        ("norm", vec![]),
    ] {
        let mixed = Mixed(source_of("llama"), other);
        let stored = stored_weights(&spec("llama"), &mixed).unwrap();
        assert_eq!(stored.most(), Encoding::Bf16, "{other}");
        assert_eq!(stored.others(), expected.into_iter().collect(), "{other}");
    }
}

#[test]
fn a_gguf_file_of_q8_0_is_kept() {
    let cases = [
        ("llama", None),
        ("qwen3_moe", None),
        ("gemma3_text", None),
        // Its positions are a table too, and in f32.
        ("gpt2", Some("model.embed_positions.weight")),
    ];
    for (family, expected) in cases {
        let file = GgufFile::open(&folder("gguf").join(format!("{family}.gguf"))).unwrap();
        let spec = gguf::spec(&file).unwrap();
        let stored = stored_weights(&spec, &file).unwrap();
        assert_eq!(stored.most(), Encoding::Q8, "{family}");
        let others = expected.map(|weight| (weight.to_owned(), Encoding::F32));
        assert_eq!(stored.others(), others.into_iter().collect(), "{family}");
    }
}

/// A mixture whose experts have rows that fill no panels.
fn odd_mixtral() -> ModelSpec {
    let mut fields = cairn_spec::ModelFields::clone(&spec("mixtral"));
    if let Mlp::Moe(moe) = &mut fields.mlp {
        (moe.intermediate_size, moe.moe_intermediate_size) = (40, 40);
    }
    ModelSpec::new(fields).unwrap()
}

#[test]
fn what_no_kernel_multiplies_by_is_refused_by_the_weights_name() {
    let spec = odd_mixtral();
    let (encoding, layout) = (Encoding::Bf16, Layout::Panel);
    let options = BuildOptions { encoding, layout, ..BuildOptions::new(Head::Logits) };
    let stored = |weight: &str, encoding| {
        let encodings = [(weight.to_owned(), encoding)].into_iter().collect();
        build_stored_program(&spec, &options, &AdapterMap::default(), &encodings)
    };
    let gate = "model.layers.1.mlp.experts.gate_proj.weight";
    for encoding in Encoding::ALL {
        let is_in_panels_only = !encoding.layouts().contains(&Layout::RowMajor);
        let built = stored(gate, encoding);
        let refused = matches!(&built, Err(BuildError::Stored { weight, .. }) if weight == gate);
        // Twelve bits are only taken where they are fewer.
        let expected = is_in_panels_only && encoding.for_shape(160, 64) == encoding;
        assert_eq!((refused, built.is_ok()), (expected, !expected), "{encoding}");
        // Rows of the other matrices fill panels, and what there is no weight of counts for nothing.
        assert!(stored("model.layers.1.mlp.experts.down_proj.weight", encoding).is_ok());
        assert!(stored("model.layers.9.nothing.weight", encoding).is_ok());
    }
    let error = stored(gate, Encoding::Q8).unwrap_err().to_string();
    assert!(error.starts_with(&format!("weight {gate} cannot be stored as q8")), "{error}");
}

#[test]
fn experts_that_fill_no_panels_are_not_kept_in_codes() {
    struct Codes(ModelSpec);
    impl TensorSource for Codes {
        fn names(&self) -> Vec<String> {
            TensorMap::new(&self.0).by_tensor().into_keys().map(str::to_owned).collect()
        }
        fn shape(&self, name: &str) -> Option<Vec<usize>> {
            let map = TensorMap::new(&self.0);
            map.by_tensor().get(name).map(|slices| slices[0].shape.clone())
        }
        fn read_f32(
            &self,
            _: &str,
            _: std::ops::Range<usize>,
            _: &mut [f32],
        ) -> Result<(), String> {
            Err("shapes only".to_owned())
        }
        fn encoding(&self, _: &str) -> Option<Encoding> {
            Some(Encoding::Q8)
        }
    }
    let spec = odd_mixtral();
    let stored = stored_weights(&spec, &Codes(spec.clone())).unwrap();
    assert_eq!(stored.most(), Encoding::Q8);
    // Forty rows are no panels, forty columns no whole groups.
    let others = stored.others();
    assert_eq!(others.len(), 3 * spec.num_hidden_layers, "{others:?}");
    assert!(
        others.iter().all(|(weight, encoding)| {
            weight.contains(".experts.") && *encoding == Encoding::F32
        })
    );
    let options = BuildOptions { encoding: Encoding::Q8, ..BuildOptions::new(Head::Logits) };
    let program = build_stored_program(&spec, &options, &AdapterMap::default(), &others).unwrap();
    let held = |weight: &str| program.value(program.find(weight).unwrap()).value_type.encoding();
    assert_eq!(held("model.layers.0.mlp.experts.gate_proj.weight"), Some(Encoding::F32));
    assert_eq!(held("model.layers.0.self_attn.q_proj.weight"), Some(Encoding::Q8));
}

/// The products of a program by the weight in their own slot, with their arithmetic.
fn products(program: &Program) -> BTreeMap<String, Compute> {
    let instrs = program
        .instrs
        .iter()
        .filter(|instr| matches!(instr.op, Op::Matmul | Op::ExpertMatmul | Op::TokenLogprob(_)));
    let named = instrs.filter_map(|instr| {
        let weight = program.value(instr.inputs[1]?);
        Some((weight.name.clone(), instr.compute))
    });
    named.collect()
}

#[test]
fn the_arithmetic_follows_each_products_own_weight() {
    let spec = spec("llama");
    let lora = LoraSpec::new(4, TargetModules::Named(vec!["lm_head".to_owned()]));
    let adapters = AdapterMap::new(&spec, &lora).unwrap();
    let (q, gate) =
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight");
    let built = |encoding, compute, own: &[(&str, Encoding)]| {
        let own = own.iter().map(|&(weight, encoding)| (weight.to_owned(), encoding)).collect();
        let head = Head::TokenLogprob;
        let options = BuildOptions { encoding, compute, ..BuildOptions::new(head) };
        build_stored_program(&spec, &options, &adapters, &own)
    };
    // Most is bf16, which int8 does not multiply; two matrices are q8.
    let own = [(q, Encoding::Q8), (gate, Encoding::Q8)];
    let program = built(Encoding::Bf16, Compute::Int8, &own).unwrap();
    for (weight, compute) in products(&program) {
        let expected = if weight == q || weight == gate { Compute::Int8 } else { Compute::F32 };
        assert_eq!(compute, expected, "{weight}");
    }
    // Most is q8; the head's product has its adapter's matrices beside it, which are f32.
    let program = built(Encoding::Q8, Compute::Int8, &[(q, Encoding::F32)]).unwrap();
    let found = products(&program);
    assert_eq!(found[q], Compute::F32);
    assert_eq!((found[gate], found["lm_head.weight"]), (Compute::Int8, Compute::Int8));
    // What nothing is stored as stays an error.
    let refused = built(Encoding::Bf16, Compute::Int8, &[(q, Encoding::F32)]);
    assert!(matches!(refused, Err(BuildError::Compute { .. })), "{refused:?}");
}

fn load(spec: &ModelSpec, encoding: Encoding, source: &Tensors) -> Result<(), LoadError> {
    let options = BuildOptions { encoding, ..BuildOptions::new(Head::Logits) };
    let program = build_program(spec, &options).unwrap();
    let program = SessionProgram { program, sizes: Sizes::dense(1, 1), kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::new(Isa::best(), 2)).unwrap();
    load_weights(&mut session, spec, source)
}

#[test]
fn what_an_encoding_cannot_hold_is_refused_by_name_and_number() {
    let spec = spec("llama");
    let mut source = source_of("llama");
    let name = "model.layers.1.mlp.up_proj.weight";
    let values = &mut source.0.get_mut(name).unwrap().1;
    // 65519 rounds to the largest f16; an infinity in the file is what the file says.
    (values[0], values[7], values[8], values[9]) = (70000.0, -65520.0, 65519.0, f32::INFINITY);
    source.0.get_mut("model.norm.weight").unwrap().1[0] = 1e6;
    let error = load(&spec, Encoding::F16, &source).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("as f16 these would be infinite: 2 of {name}, up to 7e4")
    );
    assert_eq!(error.hints(), ["bf16 has the range of f32 and takes as many bytes as f16"]);
    for encoding in [Encoding::F32, Encoding::Bf16] {
        load(&spec, encoding, &source).unwrap();
    }
    source.0.get_mut(name).unwrap().1[1] = f32::MAX;
    let error = load(&spec, Encoding::Bf16, &source).unwrap_err();
    assert_eq!(error.hints(), ["f32 holds them"]);
}

/// Packs and sessions agree on the bytes of every form.
#[test]
fn packs_know_the_size_of_every_form() {
    for (encoding, layout) in Encoding::forms() {
        for (n, k) in [(1, 1), (16, 8), (17, 33), (40, 100), (160, 1024), (96, 4097)] {
            let dims = [u64::try_from(n).unwrap(), u64::try_from(k).unwrap()];
            let packed = stored_bytes(encoding.name(), layout.name(), &dims);
            let held = Weight::stored_bytes(encoding, layout, n, k);
            assert_eq!(packed, u64::try_from(held).ok(), "{encoding} {} {n}×{k}", layout.name());
        }
    }
    assert_eq!(stored_bytes("bf16z", "row_major", &[16, 64]), None);
}

/// bf16z holds what bf16 holds: the same logits, and less memory where the model is wide enough.
#[test]
fn bf16z_has_the_logits_of_bf16() {
    for name in folders() {
        let (spec, rows) = (spec(&name), golden_rows(&name));
        let of = |encoding| bits(&logits(&spec, encoding, &folder(&name), &[&rows[0], &rows[1]]));
        assert_eq!(of(Encoding::Bf16z), of(Encoding::Bf16), "{name}");
    }
}

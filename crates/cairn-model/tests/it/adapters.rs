//! Low-rank adapters against PEFT: beside the projections, merged into them, and in training.

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_kernels::{Cpu, Encoding};
use cairn_model::{
    AdapterMap, BuildOptions, Head, Merge, MergedSource, TensorSource, build_adapted_program,
    init_adapter, load_adapter, load_weights,
};
use cairn_program::{
    Class, Feed, KvPlacement, Loss, MemoryPlan, ProgramId, Recompute, Run, Session, SessionProgram,
    Sizes, differentiate, recompute,
};
use cairn_spec::model::Family;
use cairn_spec::{Hint, LoraSpec, ModelSpec, TargetModules};

use crate::goldens::{Tensors, assert_close, folder, folders, positions, slots, spec, tokens};

const CASES: [(&str, &str); 2] = [("lora_llama", "llama"), ("lora_gpt2", "gpt2")];

struct Case {
    spec: ModelSpec,
    adapters: AdapterMap,
    base: WeightFolder,
    adapter: Box<dyn TensorSource>,
    shape: Vec<usize>,
    ids: Vec<u32>,
    logits: Vec<f32>,
}

impl Case {
    fn open((name, base): (&str, &str)) -> Self {
        let config = std::fs::read_to_string(folder(name).join("adapter_config.json")).unwrap();
        let lora = LoraSpec::from_peft_json(&config).unwrap();
        let golden = SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap();
        let (shape, ids) = tokens(&golden, "input_ids");
        let spec = spec(base);
        Self {
            adapters: AdapterMap::new(&spec, &lora).unwrap(),
            spec,
            base: WeightFolder::open(&folder(base)).unwrap(),
            adapter: Box::new(
                SafetensorsFile::open(&folder(name).join("adapter_model.safetensors")).unwrap(),
            ),
            shape,
            ids,
            logits: golden.tensor("logits").unwrap().to_f32().unwrap(),
        }
    }

    /// A golden folder with a made-up adapter on every projection of its model.
    fn made_up(name: &str) -> Self {
        let golden = SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap();
        let (shape, ids) = tokens(&golden, "input_ids");
        let spec = spec(name);
        let lora = LoraSpec::new(4, TargetModules::AllLinear);
        let adapters = AdapterMap::new(&spec, &lora).unwrap();
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 * 0.1 - 0.05
        };
        let tensors = adapters.tensor_map();
        let made = tensors.tensors().into_iter().map(|(name, shape)| {
            let values = (0..shape.iter().product()).map(|_| next()).collect();
            (name.to_owned(), (shape.to_vec(), values))
        });
        Self {
            adapter: Box::new(Tensors(made.collect())),
            adapters,
            spec,
            base: WeightFolder::open(&folder(name)).unwrap(),
            shape,
            ids,
            logits: golden.tensor("logits").unwrap().to_f32().unwrap(),
        }
    }

    /// Logits of the golden's ids, with the adapters as instructions if `beside`.
    fn run(&self, source: &dyn TensorSource, beside: bool) -> Vec<f32> {
        let none = AdapterMap::default();
        let adapters = if beside { &self.adapters } else { &none };
        let options = BuildOptions::new(Head::Logits);
        let program = build_adapted_program(&self.spec, &options, adapters).unwrap();
        let (rows, length) = (self.shape[0], self.shape[1]);
        let sizes = Sizes::dense(rows * length, rows);
        let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
        let plan = MemoryPlan::new(vec![program], None).unwrap();
        let mut session = Session::new(plan, Cpu::detect(2)).unwrap();
        load_weights(&mut session, &self.spec, source).unwrap();
        if beside {
            load_adapter(&mut session, &self.spec, adapters, &*self.adapter).unwrap();
        }
        let positions = positions(rows, length);
        let feeds = [Feed::u32("ids", &self.ids), Feed::u32("positions", &positions)];
        let sequences = slots(rows, length);
        session.run(ProgramId(0), &Run::forward(&feeds, &sequences)).unwrap();
        session.output(ProgramId(0), "logits").to_vec()
    }

    fn merged<'a>(&'a self, base: &'a dyn TensorSource, merge: Merge) -> MergedSource<'a> {
        MergedSource::new(&self.spec, &self.adapters, (base, &*self.adapter), merge).unwrap()
    }
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |worst, (a, b)| worst.max((a - b).abs()))
}

#[test]
fn beside_the_projections_they_compute_what_peft_does() {
    for case in CASES {
        let opened = Case::open(case);
        assert_close(case.0, &opened.run(&opened.base, true), &opened.logits);
        // The adapter matters: without it the logits are others.
        assert!(worst(&opened.run(&opened.base, false), &opened.logits) > 0.1, "{}", case.0);
    }
}

#[test]
fn merged_equals_unmerged_and_comes_out_again() {
    for case in CASES {
        let opened = Case::open(case);
        let merged = opened.merged(&opened.base, Merge::Merge);
        let off = worst(&opened.run(&merged, false), &opened.run(&opened.base, true));
        assert!(off <= 1e-5, "{}: {off}", case.0);
        let back = opened.merged(&merged, Merge::Unmerge);
        let off = worst(&opened.run(&back, false), &opened.run(&opened.base, false));
        assert!(off <= 1e-5, "{}: {off}", case.0);
    }
}

#[test]
fn merged_equals_unmerged_in_every_family() {
    let folders = folders();
    for family in Family::ALL {
        assert!(folders.iter().any(|name| spec(name).family == family), "{family}");
    }
    for name in folders {
        let case = Case::made_up(&name);
        let (merged, beside) = (case.merged(&case.base, Merge::Merge), case.run(&case.base, true));
        let off = worst(&case.run(&merged, false), &beside);
        let largest = beside.iter().fold(1.0_f32, |largest, x| largest.max(x.abs()));
        assert!(off <= 1e-5 * largest, "{name}: off by {off} of {largest}");
        // The adapters matter.
        let effect = worst(&beside, &case.logits);
        assert!(effect > 1e-2, "{name}: {effect}");
    }
}

#[test]
fn what_no_program_runs_beside_its_weights_is_merged_all_the_same() {
    let (spec, base) = (spec("deepseek_v2"), WeightFolder::open(&folder("deepseek_v2")).unwrap());
    let targets = ["q_proj", "kv_b_proj", "experts.3.up_proj", "mlp.gate", "lm_head"];
    let named = targets.iter().map(|name| (*name).to_owned()).collect();
    let lora = LoraSpec::new(4, TargetModules::Named(named));
    let hints = AdapterMap::new(&spec, &lora).unwrap_err().hints();
    assert!(hints[0].starts_with("merge it into the model: cairn adapter merge"), "{hints:?}");
    let adapters = AdapterMap::to_merge(&spec, &lora).unwrap();
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let map = adapters.tensor_map();
    let made = map.tensors().into_iter().map(|(name, shape)| {
        let values = (0..shape.iter().product()).map(|_| next()).collect();
        (name.to_owned(), (shape.to_vec(), values))
    });
    let adapter = Tensors(made.collect());
    let merged = MergedSource::new(&spec, &adapters, (&base, &adapter), Merge::Merge).unwrap();
    let back = MergedSource::new(&spec, &adapters, (&merged, &adapter), Merge::Unmerge).unwrap();
    let read = |source: &dyn TensorSource, name: &str| {
        let mut values = vec![0.0; source.shape(name).unwrap().iter().product()];
        source.read_f32(name, 0..values.len(), &mut values).unwrap();
        values
    };
    let mut changed = 0;
    for name in base.names() {
        let before = read(&base, &name);
        let module = name.strip_suffix(".weight").unwrap_or(&name);
        let of = |part: &str| format!("base_model.model.{module}.lora_{part}.weight");
        assert_eq!(merged.changes(&name), adapter.0.contains_key(&of("A")), "{name}");
        let (Some((_, a)), Some((_, b))) = (adapter.0.get(&of("A")), adapter.0.get(&of("B")))
        else {
            assert_eq!(read(&merged, &name), before, "{name}");
            continue;
        };
        let inputs = a.len() / 4;
        #[expect(clippy::cast_possible_truncation, reason = "applied to f32 values")]
        let scale = lora.scale(module, 4) as f32;
        let expected: Vec<f32> = (0..before.len())
            .map(|i| {
                let product: f32 =
                    (0..4).map(|r| b[i / inputs * 4 + r] * a[r * inputs + i % inputs]).sum();
                before[i] + scale * product
            })
            .collect();
        assert!(worst(&read(&merged, &name), &expected) < 1e-5, "{name}");
        assert!(worst(&read(&back, &name), &before) < 1e-6, "{name}");
        changed += 1;
    }
    // Two layers, the second with experts; the head.
    assert_eq!(changed, 2 * 2 + 2 + 1);
}

/// One training step of the adapters on a base in `encoding`: what the step returns as gradients.
fn gradients(name: &str, encoding: Encoding) -> Vec<(String, f64)> {
    let spec = spec(name);
    let lora = LoraSpec::new(4, TargetModules::AllLinear);
    let adapters = AdapterMap::new(&spec, &lora).unwrap();
    let options = BuildOptions { encoding, ..BuildOptions::new(Head::TokenLogprob) };
    let forward = build_adapted_program(&spec, &options, &adapters).unwrap();
    let training = differentiate(&forward, &adapters.weights(), &Loss::CrossEntropy).unwrap();
    let training = recompute(&training, Recompute::ALL_BLOCKS);
    let sizes = Sizes::dense(16, 1);
    let program = SessionProgram { program: training, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::detect(2)).unwrap();
    load_weights(&mut session, &spec, &WeightFolder::open(&folder(name)).unwrap()).unwrap();
    init_adapter(&mut session, &spec, 3);
    let before: Vec<Vec<u8>> = stored(&session, Class::Weight);
    let ids: Vec<u32> = (0..16).map(|i| 7 * i % 90).collect();
    let targets: Vec<u32> = ids.iter().map(|id| (id + 5) % 90).collect();
    let weights = [1.0 / 16.0; 16];
    let positions = positions(1, 16);
    let feeds = [
        Feed::u32("ids", &ids),
        Feed::u32("positions", &positions),
        Feed::u32("targets", &targets),
        Feed::f32("loss_weights", &weights),
    ];
    session.run(ProgramId(0), &Run::forward(&feeds, &slots(1, 16))).unwrap();
    assert!(before == stored(&session, Class::Weight), "a step writes no weight");
    let names: Vec<String> = session
        .persistent()
        .filter(|(_, class, ..)| *class == Class::Gradient)
        .map(|(name, ..)| name.to_owned())
        .collect();
    let norm = |name: &String| {
        let values = session.stored_f32(name).unwrap();
        values.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt()
    };
    names.iter().map(|name| (name.clone(), norm(name))).collect()
}

fn stored(session: &Session, class: Class) -> Vec<Vec<u8>> {
    let of_class = session.persistent().filter(|(_, found, ..)| *found == class);
    of_class.map(|(name, ..)| session.stored(name).unwrap().to_vec()).collect()
}

#[test]
fn only_adapters_have_gradients_whatever_the_base_is_stored_in() {
    let every = [
        "mistral",
        "qwen2",
        "qwen3",
        "mixtral",
        "qwen3_moe",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_neox",
        "phi3",
        "olmo2",
        "gemma2",
        "gemma3_text",
        "bert",
        "modernbert",
    ];
    let every = every.into_iter().map(|name| (name, &[Encoding::F32, Encoding::Q8][..]));
    let all = &[Encoding::F32, Encoding::Bf16, Encoding::Q8][..];
    for (name, encodings) in [("llama", all), ("gpt2", all)].into_iter().chain(every) {
        for &encoding in encodings {
            let gradients = gradients(name, encoding);
            assert!(!gradients.is_empty());
            for (weight, norm) in gradients {
                // B starts at zero: nothing reaches A in the first step, everything reaches B.
                let expected = weight.ends_with(".lora_B.weight");
                assert!(weight.contains(".lora_"), "{weight}");
                assert_eq!(norm > 0.0, expected, "{name} {encoding:?} {weight} {norm}");
            }
        }
    }
}

//! Training low-rank adapters on every projection of every family: what has a gradient, what it is, and
//! what is saved of it.

use std::collections::BTreeMap;

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder, write};
use cairn_kernels::{Cpu, Encoding};
use cairn_model::{
    AdapterMap, BuildOptions, Head, build_adapted_program, build_program, init_adapter,
    init_weights, load_adapter, load_weights, out_tensors, out_tensors_of, tensors,
};
use cairn_program::{
    Class, Feed, KvPlacement, Loss, MemoryPlan, ProgramId, Recompute, Run, Session, SessionProgram,
    Sizes, differentiate, recompute,
};
use cairn_spec::model::Mlp;
use cairn_spec::{LoraSpec, ModelSpec};

use crate::adapters::{everywhere, made_up, stacked};
use crate::goldens::{folder, folders, positions, slots, spec};

const TRAIN: ProgramId = ProgramId(0);
/// Tokens of the one sequence.
const TOKENS: usize = 16;

/// Every golden folder with adapters everywhere, and the mixtures with adapters of stacked experts too.
fn subjects() -> Vec<(String, LoraSpec)> {
    let subjects = folders().into_iter().flat_map(|name| {
        let spec = spec(&name);
        let stacked = matches!(spec.mlp, Mlp::Moe(_)).then(stacked);
        [Some(everywhere(&spec)), stacked]
            .into_iter()
            .flatten()
            .map(move |lora| (name.clone(), lora))
    });
    subjects.collect()
}

/// A session that trains adapters beside a golden model held in `encoding`.
fn session(
    (name, lora): (&str, &LoraSpec),
    encoding: Encoding,
    recomputed: Recompute,
) -> (Session, AdapterMap) {
    let spec = spec(name);
    let adapters = AdapterMap::new(&spec, lora).unwrap();
    let options = BuildOptions { encoding, ..BuildOptions::new(Head::TokenLogprob) };
    let forward = build_adapted_program(&spec, &options, &adapters).unwrap();
    let training = differentiate(&forward, &adapters.weights(), &Loss::CrossEntropy).unwrap();
    let program = recompute(&training, recomputed);
    let sizes = Sizes::dense(TOKENS, 1);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::detect(2)).unwrap();
    load_weights(&mut session, &spec, &WeightFolder::open(&folder(name)).unwrap()).unwrap();
    (session, adapters)
}

/// One pass forward and backward; the loss.
fn step(session: &mut Session) -> f64 {
    let ids: Vec<u32> = (0..16).map(|i| 7 * i % 90).collect();
    let targets: Vec<u32> = ids.iter().map(|id| (id + 5) % 90).collect();
    let weights = [1.0; TOKENS];
    let positions = positions(1, TOKENS);
    let feeds = [
        Feed::u32("ids", &ids),
        Feed::u32("positions", &positions),
        Feed::u32("targets", &targets),
        Feed::f32("loss_weights", &weights),
    ];
    session.run(TRAIN, &Run::forward(&feeds, &slots(1, TOKENS))).unwrap();
    -session.output(TRAIN, "logprob").iter().map(|&logprob| f64::from(logprob)).sum::<f64>()
}

fn stored(session: &Session, class: Class) -> Vec<Vec<u8>> {
    let of_class = session.persistent().filter(|(_, found, ..)| *found == class);
    of_class.map(|(name, ..)| session.stored(name).unwrap().to_vec()).collect()
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

/// Names of the gradients and their norms after one step of adapters that change nothing yet.
fn first_gradients(subject: (&str, &LoraSpec), encoding: Encoding) -> Vec<(String, f64)> {
    let (mut session, adapters) = session(subject, encoding, Recompute::ALL_BLOCKS);
    init_adapter(&mut session, &adapters, 3);
    let before = stored(&session, Class::Weight);
    step(&mut session);
    assert!(before == stored(&session, Class::Weight), "a step writes no weight");
    let gradients = session.persistent().filter(|(_, class, ..)| *class == Class::Gradient);
    gradients.map(|(name, ..)| (name.to_owned(), norm(session.stored_f32(name).unwrap()))).collect()
}

#[test]
fn only_adapters_have_gradients_whatever_the_base_is_stored_in() {
    for (name, lora) in subjects() {
        for encoding in [Encoding::F32, Encoding::Bf16, Encoding::Q8, Encoding::Nf4] {
            let gradients = first_gradients((&name, &lora), encoding);
            let adapters = AdapterMap::new(&spec(&name), &lora).unwrap();
            assert_eq!(gradients.len(), adapters.weights().len(), "{name}");
            for (weight, norm) in gradients {
                // B starts at zero: nothing reaches A in the first step, everything reaches B.
                let expected = weight.ends_with(".lora_B.weight");
                assert!(weight.contains(".lora_"), "{weight}");
                assert_eq!(norm > 0.0, expected, "{name} {encoding:?} {weight} {norm}");
            }
        }
    }
}

/// How far an adapter's weight goes along its gradient, in both directions.
const STEP: f64 = 4e-3;
/// What the difference of two losses of 16 tokens rounds to, and the curvature along the step, of the
/// gradient's norm.
const NOISE: f64 = 1e-5;
const TOLERANCE: f64 = 2e-2;

/// Along its own gradient each weight's loss falls as fast as the gradient is long.
#[test]
fn gradients_of_every_adapter_are_slopes() {
    let mut compared = 0;
    for (name, lora) in subjects() {
        let (mut session, adapters) = session((&name, &lora), Encoding::F32, Recompute::None);
        let spec = spec(&name);
        let is_mixture = matches!(spec.mlp, Mlp::Moe(_));
        load_adapter(&mut session, &spec, &adapters, &made_up(&adapters, 0.1)).unwrap();
        step(&mut session);
        let gradients: Vec<(String, Vec<f32>)> = adapters
            .weights()
            .into_iter()
            .map(|weight| {
                let gradient = session.stored_f32(&format!("grad.{weight}")).unwrap().to_vec();
                (weight, gradient)
            })
            .collect();
        for (weight, gradient) in gradients {
            let expected = norm(&gradient);
            assert!(expected > 0.0, "{name} {weight}");
            let original = session.stored_f32(&weight).unwrap().to_vec();
            let mut slope = |step_len: f64| {
                let [high, low] = [step_len, -step_len].map(|step_len| {
                    let moved = session.stored_f32_mut(&weight).unwrap().iter_mut();
                    for ((moved, &from), &along) in moved.zip(&original).zip(&gradient) {
                        #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
                        let by = (step_len / expected * f64::from(along)) as f32;
                        *moved = from + by;
                    }
                    step(&mut session)
                });
                (high - low) / (2.0 * step_len)
            };
            // A step may change which experts a token goes to: then a shorter one, if the slope is still
            // well above what its losses round to.
            let tells = |length: f64| NOISE / length < 0.1 * expected;
            let shorter: &[f64] = if is_mixture { &[STEP / 8.0, STEP / 32.0] } else { &[] };
            let shorter = shorter.iter().copied().filter(|&length| tells(length));
            let length = std::iter::once(STEP).chain(shorter).find(|&length| {
                (slope(length) - expected).abs() <= TOLERANCE * expected + NOISE / length
            });
            let Some(length) = length else {
                panic!("{name} {weight}: the gradient is {expected}, the slope {}", slope(STEP));
            };
            session.stored_f32_mut(&weight).unwrap().copy_from_slice(&original);
            compared += usize::from(tells(length));
        }
    }
    // Nearly all of them are well above what losses round to.
    assert!(compared > 1000, "{compared}");
}

/// A few steps down the gradients: adapters everywhere learn beside four bits, and nothing else changes.
#[test]
fn training_changes_adapters_alone() {
    for (name, lora) in subjects() {
        let (mut session, adapters) = session((&name, &lora), Encoding::Nf4, Recompute::Cheap);
        init_adapter(&mut session, &adapters, 3);
        let trained = adapters.weights();
        let rest = |session: &Session| -> Vec<Vec<u8>> {
            let weights = session.persistent().filter(|(_, class, ..)| *class == Class::Weight);
            let frozen = weights.filter(|(name, ..)| !trained.contains(*name));
            frozen.map(|(name, ..)| session.stored(name).unwrap().to_vec()).collect()
        };
        let before = rest(&session);
        let first = step(&mut session);
        for _ in 0..4 {
            for weight in &trained {
                let gradient = session.stored_f32(&format!("grad.{weight}")).unwrap().to_vec();
                let values = session.stored_f32_mut(weight).unwrap().iter_mut();
                values.zip(&gradient).for_each(|(value, gradient)| *value -= 1e-3 * gradient);
            }
            step(&mut session);
        }
        let last = step(&mut session);
        assert!(last < first - 0.01, "{name}: from {first} to {last}");
        assert!(rest(&session) == before, "{name}: the model itself stays");
    }
}

/// What is saved in PEFT's layout is loaded again, bit for bit.
#[test]
fn saved_adapters_are_loaded_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    for (name, lora) in subjects() {
        let spec: ModelSpec = spec(&name);
        let (mut first, adapters) = session((&name, &lora), Encoding::F32, Recompute::None);
        let source = made_up(&adapters, 0.5);
        load_adapter(&mut first, &spec, &adapters, &source).unwrap();
        let map = adapters.tensor_map();
        let path = folder.path().join(&name);
        let mut file = std::fs::File::create(&path).unwrap();
        let written = out_tensors_of(&first, &map, "");
        write(&mut file, written, &BTreeMap::new()).unwrap();
        let saved = SafetensorsFile::open(&path).unwrap();
        assert_eq!(saved.tensors().count(), source.0.len(), "{name}");
        for (tensor, (shape, values)) in &source.0 {
            let found = saved.tensor(tensor).unwrap();
            assert_eq!((found.shape, found.to_f32().unwrap()), (&shape[..], values.clone()));
        }
        let (mut second, _) = session((&name, &lora), Encoding::F32, Recompute::None);
        load_adapter(&mut second, &spec, &adapters, &saved).unwrap();
        assert!(stored(&first, Class::Weight) == stored(&second, Class::Weight), "{name}");
    }
}

/// transformers ties the bias that BERT's files have by two names only where it ties the head.
#[test]
fn a_head_of_its_own_is_saved_with_its_bias_by_both_names() {
    for (spec, expected) in [(spec("bert"), 0), (spec("bert").untied(), 1), (spec("llama"), 0)] {
        let program = build_program(&spec, &BuildOptions::new(Head::Logits)).unwrap();
        let program = SessionProgram { program, sizes: Sizes::dense(4, 1), kv: KvPlacement::Arena };
        let plan = MemoryPlan::new(vec![program], None).unwrap();
        let mut session = Session::new(plan, Cpu::detect(1)).unwrap();
        init_weights(&mut session, &spec, 1);
        if let Some(bias) = session.stored_f32_mut("lm_head.bias") {
            bias.iter_mut().enumerate().for_each(|(i, bias)| *bias = i as f32);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mut file = std::fs::File::create(&path).unwrap();
        write(&mut file, out_tensors(&session, &spec, ""), &BTreeMap::new()).unwrap();
        let saved = SafetensorsFile::open(&path).unwrap();
        let values = |name: &str| saved.tensor(name).map(|tensor| tensor.to_f32().unwrap());
        assert_eq!(saved.tensors().count(), tensors(&spec).len() + expected);
        let copy = values("cls.predictions.decoder.bias");
        assert_eq!(copy.is_some(), expected == 1);
        assert!(copy.is_none() || copy == values("cls.predictions.bias"));
        let mut again = session;
        load_weights(&mut again, &spec, &saved).unwrap();
    }
}

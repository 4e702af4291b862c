//! Training low-rank adapters on every projection of every family: what has a gradient, what it is, and
//! what is saved of it.

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder, write};
use cairn_kernels::{Cpu, Encoding};
use cairn_model::{
    AdapterMap, BuildOptions, Head, build_adapted_program, init_adapter, load_adapter,
    load_weights, out_tensors_of,
};
use cairn_program::{
    Class, Feed, KvPlacement, Loss, MemoryPlan, ProgramId, Recompute, Run, Session, SessionProgram,
    Sizes, differentiate, recompute,
};
use cairn_spec::ModelSpec;

use crate::adapters::{everywhere, made_up};
use crate::goldens::{folder, folders, positions, slots, spec};

const TRAIN: ProgramId = ProgramId(0);
/// Tokens of the one sequence.
const TOKENS: usize = 16;

/// A session that trains adapters everywhere beside a golden model held in `encoding`.
fn session(name: &str, encoding: Encoding, recomputed: Recompute) -> (Session, AdapterMap) {
    let spec = spec(name);
    let adapters = AdapterMap::new(&spec, &everywhere(&spec)).unwrap();
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
fn first_gradients(name: &str, encoding: Encoding) -> Vec<(String, f64)> {
    let (mut session, adapters) = session(name, encoding, Recompute::ALL_BLOCKS);
    init_adapter(&mut session, &adapters, 3);
    let before = stored(&session, Class::Weight);
    step(&mut session);
    assert!(before == stored(&session, Class::Weight), "a step writes no weight");
    let gradients = session.persistent().filter(|(_, class, ..)| *class == Class::Gradient);
    gradients.map(|(name, ..)| (name.to_owned(), norm(session.stored_f32(name).unwrap()))).collect()
}

#[test]
fn only_adapters_have_gradients_whatever_the_base_is_stored_in() {
    for name in folders() {
        for encoding in [Encoding::F32, Encoding::Bf16, Encoding::Q8, Encoding::Nf4] {
            let gradients = first_gradients(&name, encoding);
            let spec = spec(&name);
            let adapters = AdapterMap::new(&spec, &everywhere(&spec)).unwrap();
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
    for name in folders() {
        let (mut session, adapters) = session(&name, Encoding::F32, Recompute::None);
        let spec = spec(&name);
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
            let [high, low] = [STEP, -STEP].map(|step_len| {
                let moved = session.stored_f32_mut(&weight).unwrap().iter_mut();
                for ((moved, &from), &along) in moved.zip(&original).zip(&gradient) {
                    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
                    let by = (step_len / expected * f64::from(along)) as f32;
                    *moved = from + by;
                }
                step(&mut session)
            });
            session.stored_f32_mut(&weight).unwrap().copy_from_slice(&original);
            let measured = (high - low) / (2.0 * STEP);
            let bound = TOLERANCE * expected + NOISE / STEP;
            assert!(
                (measured - expected).abs() <= bound,
                "{name} {weight}: the gradient is {expected}, the slope {measured}"
            );
            compared += usize::from(NOISE / STEP < 0.1 * expected);
        }
    }
    // Nearly all of them are well above what losses round to.
    assert!(compared > 1000, "{compared}");
}

/// A few steps down the gradients: adapters everywhere learn beside four bits, and nothing else changes.
#[test]
fn training_changes_adapters_alone() {
    for name in folders() {
        let (mut session, adapters) = session(&name, Encoding::Nf4, Recompute::Cheap);
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
    for name in folders() {
        let spec: ModelSpec = spec(&name);
        let (mut first, adapters) = session(&name, Encoding::F32, Recompute::None);
        let source = made_up(&adapters, 0.5);
        load_adapter(&mut first, &spec, &adapters, &source).unwrap();
        let map = adapters.tensor_map();
        let path = folder.path().join(&name);
        let mut file = std::fs::File::create(&path).unwrap();
        let tensors = out_tensors_of(&first, &map, "");
        write(&mut file, tensors, &std::collections::BTreeMap::new()).unwrap();
        let saved = SafetensorsFile::open(&path).unwrap();
        assert_eq!(saved.tensors().count(), source.0.len(), "{name}");
        for (tensor, (shape, values)) in &source.0 {
            let found = saved.tensor(tensor).unwrap();
            assert_eq!((found.shape, found.to_f32().unwrap()), (&shape[..], values.clone()));
        }
        let (mut second, _) = session(&name, Encoding::F32, Recompute::None);
        load_adapter(&mut second, &spec, &adapters, &saved).unwrap();
        assert!(stored(&first, Class::Weight) == stored(&second, Class::Weight), "{name}");
    }
}

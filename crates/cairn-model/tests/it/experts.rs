//! Mixtures of experts and latent attention: against transformers, in both layouts of expert tensors,
//! and in training.

use std::collections::BTreeSet;

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_kernels::{Cpu, Encoding, Isa, Layout};
use cairn_model::{
    BuildOptions, Head, TensorMap, build_program, init_weights, load_weights, tensor_f32,
};
use cairn_program::{
    Class, Feed, KvPlacement, Loss, MemoryPlan, ProgramId, Recompute, Run, Session, SessionProgram,
    Sizes, differentiate, recompute,
};
use cairn_spec::ModelSpec;
use cairn_spec::model::{AttentionForm, Position};

use crate::goldens::{Tensors, check_logits, folder, positions, slots, spec};
use crate::training::{BALANCED_STEPS, check_training};

const FAMILIES: [&str; 4] = ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"];
const TRAIN: ProgramId = ProgramId(0);

#[test]
fn mixtral_matches_transformers() {
    check_logits("mixtral");
}

#[test]
fn qwen3_moe_matches_transformers() {
    check_logits("qwen3_moe");
}

#[test]
fn deepseek_v2_matches_transformers() {
    check_logits("deepseek_v2");
}

#[test]
fn deepseek_v3_matches_transformers() {
    check_logits("deepseek_v3");
}

fn fresh_session(spec: &ModelSpec, options: &BuildOptions) -> Session {
    let program = build_program(spec, options).unwrap();
    let program = SessionProgram { program, sizes: Sizes::dense(8, 1), kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    Session::new(plan, Cpu::new(Isa::best(), 1)).unwrap()
}

/// The session's weights as the tensors of `map`.
fn saved(session: &Session, map: &TensorMap) -> Tensors {
    let value = |weight: &str| session.stored_f32(weight);
    let tensors = map.tensors().into_iter();
    Tensors(tensors.map(|(name, _)| (name.to_owned(), tensor_f32(map, name, &value))).collect())
}

#[test]
fn both_layouts_of_expert_tensors_load_and_save_bit_for_bit() {
    for name in FAMILIES {
        let spec = spec(name);
        let options = BuildOptions::new(Head::Logits);
        let mut session = fresh_session(&spec, &options);
        let files = WeightFolder::open(&folder(name)).unwrap();
        load_weights(&mut session, &spec, &files).unwrap();
        let separate = TensorMap::new(&spec);
        let stacked = TensorMap::of_tensors(&spec, |_| true);
        assert!(stacked.tensors().len() < separate.tensors().len(), "{name}");
        for map in [&separate, &stacked] {
            let tensors = saved(&session, map);
            let mut again = fresh_session(&spec, &options);
            load_weights(&mut again, &spec, &tensors).unwrap();
            for (weight, ..) in session.persistent() {
                assert!(session.stored(weight) == again.stored(weight), "{name} {weight}");
            }
        }
        // What is saved is what was in the files.
        for tensor in files.tensors() {
            let (shape, values) = &saved(&session, &separate).0[tensor.name];
            assert_eq!(shape[..], tensor.shape[..], "{name} {}", tensor.name);
            assert_eq!(values, &tensor.to_f32().unwrap(), "{name} {}", tensor.name);
        }
    }
}

#[test]
fn stacked_tensors_are_named_as_transformers_names_them() {
    let map = TensorMap::of_tensors(&spec("mixtral"), |_| true);
    let tensors = map.tensors();
    let shape = |name: &str| tensors.iter().find(|(n, _)| *n == name).map(|(_, s)| s.to_vec());
    let gate_up = "model.layers.1.mlp.experts.gate_up_proj";
    assert_eq!(shape(gate_up), Some(vec![4, 320, 64]));
    assert_eq!(shape("model.layers.1.mlp.experts.down_proj"), Some(vec![4, 64, 160]));
    assert_eq!(shape("model.layers.1.mlp.gate.weight"), Some(vec![4, 64]));
}

#[test]
fn a_missing_expert_is_named() {
    let spec = spec("qwen3_moe");
    let mut session = fresh_session(&spec, &BuildOptions::new(Head::Logits));
    init_weights(&mut session, &spec, 1);
    let mut tensors = saved(&session, &TensorMap::new(&spec));
    let name = "model.layers.1.mlp.experts.2.up_proj.weight";
    tensors.0.remove(name).unwrap();
    let error = load_weights(&mut session, &spec, &tensors).unwrap_err().to_string();
    assert!(error.contains(&format!("{name} [48, 64] is missing")), "{error}");
}

#[test]
fn layers_that_predict_further_tokens_are_left_out() {
    let spec = spec("deepseek_v3");
    let mut session = fresh_session(&spec, &BuildOptions::new(Head::Logits));
    init_weights(&mut session, &spec, 1);
    let mut tensors = saved(&session, &TensorMap::new(&spec));
    let further = "model.layers.2.eh_proj.weight".to_owned();
    tensors.0.insert(further, (vec![1], vec![0.0]));
    load_weights(&mut session, &spec, &tensors).unwrap();
    tensors.0.insert("model.layers.1.eh_proj.weight".to_owned(), (vec![1], vec![0.0]));
    load_weights(&mut session, &spec, &tensors).unwrap_err();
}

/// Encoded weights: the same model, off by what the encoding rounds.
#[test]
fn encoded_experts_stay_close() {
    for name in FAMILIES {
        let spec = spec(name);
        let logits = |encoding, layout| {
            let options = BuildOptions { encoding, layout, ..BuildOptions::new(Head::Logits) };
            let mut session = fresh_session(&spec, &options);
            load_weights(&mut session, &spec, &WeightFolder::open(&folder(name)).unwrap()).unwrap();
            let ids = [3, 1, 4, 1, 5, 9, 2, 6];
            let positions = positions(1, 8);
            let feeds = [Feed::u32("ids", &ids), Feed::u32("positions", &positions)];
            session.run(ProgramId(0), &Run::forward(&feeds, &slots(1, 8))).unwrap();
            session.output(ProgramId(0), "logits").to_vec()
        };
        let exact = logits(Encoding::F32, Layout::RowMajor);
        assert_eq!(logits(Encoding::F32, Layout::Panel), exact, "{name}");
        let largest = exact.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        for (encoding, share) in [(Encoding::Bf16, 0.05), (Encoding::Q8, 0.1)] {
            let panel = logits(encoding, Layout::Panel);
            assert_eq!(logits(encoding, Layout::RowMajor), panel, "{name} {encoding}");
            let worst =
                panel.iter().zip(&exact).fold(0.0_f32, |worst, (a, e)| worst.max((a - e).abs()));
            assert!(worst <= share * largest, "{name} {encoding}: off by {worst} of {largest}");
        }
    }
}

/// Norm, and the sums of elements times cos(i) and sin(0.7 i).
fn sketch(values: &[f32]) -> [f64; 3] {
    let sum = |by: &dyn Fn(f64) -> f64| -> f64 {
        values.iter().enumerate().map(|(i, &x)| f64::from(x) * by(i as f64)).sum()
    };
    let norm = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    [norm, sum(&|i| i.cos()), sum(&|i| (0.7 * i).sin())]
}

/// Compares every tensor that PyTorch trains with the session's values.
fn check_sketches(name: &str, session: &Session, golden: &SafetensorsFile, prefix: [&str; 2]) {
    let map = TensorMap::of_tensors(&spec(name), |_| true);
    for (tensor, _) in map.tensors() {
        if tensor.ends_with("e_score_correction_bias") {
            continue;
        }
        let value = |weight: &str| session.stored_f32(&format!("{}{weight}", prefix[1]));
        let (_, actual) = tensor_f32(&map, tensor, &value);
        let expected = golden.tensor(&format!("{}{tensor}", prefix[0])).unwrap().to_f32().unwrap();
        let actual = sketch(&actual);
        assert!(actual[0] > 0.0, "{name} {}{tensor} is zero", prefix[0]);
        let norm = expected[0];
        for (actual, expected) in actual.iter().zip(&expected) {
            let error = (actual - f64::from(*expected)).abs();
            let norm = f64::from(norm);
            // Far less than a step's weight decay leaves behind.
            assert!(error < 1e-4 * norm, "{name} {}{tensor}: {actual}, {expected}", prefix[0]);
        }
    }
}

const SIX_STEPS: &str = "experts.safetensors";

#[test]
fn mixtral_trains_as_pytorch_does() {
    check_training(("mixtral", SIX_STEPS), check_sketches);
}

#[test]
fn qwen3_moe_trains_as_pytorch_does() {
    check_training(("qwen3_moe", SIX_STEPS), check_sketches);
}

#[test]
fn experts_are_balanced_as_transformers_does() {
    check_training(("mixtral", BALANCED_STEPS), check_sketches);
    check_training(("qwen3_moe", BALANCED_STEPS), check_sketches);
}

#[test]
fn deepseek_trains_as_pytorch_does() {
    check_training(("deepseek_v2", SIX_STEPS), check_sketches);
    check_training(("deepseek_v3", SIX_STEPS), check_sketches);
}

/// Losses and gradients of one training run over the first `length` tokens of a fixed text.
fn one_step(spec: &ModelSpec, policy: Recompute, length: usize) -> (Vec<f32>, Session) {
    let forward = build_program(spec, &BuildOptions::new(Head::TokenLogprob)).unwrap();
    let trainable: BTreeSet<String> =
        forward.of_class(Class::Weight).map(|(_, weight)| weight.name.clone()).collect();
    let training = differentiate(&forward, &trainable, &Loss::CrossEntropy).unwrap();
    let program = recompute(&training, policy);
    program.verify().unwrap();
    let sizes = Sizes::dense(length, 1);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::new(Isa::best(), 2)).unwrap();
    init_weights(&mut session, spec, 5);
    let vocab = u32::try_from(spec.vocab_size).unwrap();
    let last = u32::try_from(length).unwrap();
    let text: Vec<u32> = (0..=last).map(|i| (i * i + 3 * i) % vocab).collect();
    let weights = vec![1.0 / length as f32; length];
    let positions = positions(1, length);
    let feeds = [
        Feed::u32("ids", &text[..length]),
        Feed::u32("positions", &positions),
        Feed::u32("targets", &text[1..]),
        Feed::f32("loss_weights", &weights),
    ];
    let sequences = slots(1, length);
    let run = Run { row_tokens: length, ..Run::forward(&feeds, &sequences) };
    session.run(TRAIN, &run).unwrap();
    (session.output(TRAIN, "logprob").to_vec(), session)
}

#[test]
fn recomputed_routes_are_the_same() {
    for name in ["mixtral", "deepseek_v3"] {
        let spec = spec(name);
        let (logprob, session) = one_step(&spec, Recompute::None, 40);
        let (again, other) = one_step(&spec, Recompute::ALL_BLOCKS, 40);
        assert_eq!(logprob, again, "{name}");
        for (weight, class, ..) in session.persistent() {
            assert!(session.stored(weight) == other.stored(weight), "{name} {class:?} {weight}");
        }
    }
}

/// The widths of DeepSeek-V2-Lite's attention: 16 heads against one cached row of 512 + 64.
#[test]
fn latents_of_real_width_run_and_train() {
    let mut fields = spec("deepseek_v2").into_fields();
    let AttentionForm::Mla(mla) = &mut fields.attention.form else { panic!("not latent") };
    (mla.num_attention_heads, mla.kv_lora_rank) = (16, 512);
    (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) = (128, 64, 128);
    let Position::Rope(rope) = &mut fields.position else { panic!("no rotation") };
    rope.rotary_dim = 64;
    let spec = ModelSpec::new(fields).unwrap();
    // Beyond one tile of keys; what is seen first does not change with what follows.
    let (long, session) = one_step(&spec, Recompute::None, 100);
    let (short, _) = one_step(&spec, Recompute::None, 90);
    assert_eq!(long[..90], short);
    for (name, class, ..) in session.persistent().filter(|(_, class, ..)| *class == Class::Gradient)
    {
        let gradient = session.stored_f32(name).unwrap();
        assert!(gradient.iter().all(|g| g.is_finite()), "{class:?} {name}");
        assert!(gradient.iter().any(|&g| g != 0.0), "{class:?} {name}");
    }
}

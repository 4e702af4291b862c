//! The steps of a learner against PyTorch's, and against themselves under other conditions.

use std::path::PathBuf;

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_kernels::Isa;
use cairn_model::{TensorMap, init_weights, load_weights, tensor_f32};
use cairn_program::{AdamWAttrs, Recompute, UpdateOptions};
use cairn_spec::ModelSpec;
use cairn_spec::model::Dropout;
use cairn_spec::recipe::Decay;

use cairn_data::loader::{LoaderBatch, Sequence};

use super::*;
use crate::programs::{ProgramOptions, Programs};

/// Relative, by norm: PyTorch sums in another order.
const GRADIENT_TOLERANCE: f64 = 1e-3;
/// Absolute, in nats.
const LOSS_TOLERANCE: f64 = 1e-4;

fn golden(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(family)
}

fn spec(family: &str) -> ModelSpec {
    let config = std::fs::read_to_string(golden(family).join("config.json")).unwrap();
    let mut fields = ModelSpec::from_hf_json(&config).unwrap().into_fields();
    // The goldens were made without.
    fields.dropout = Dropout::default();
    ModelSpec::new(fields).unwrap()
}

fn options(recompute: Recompute) -> ProgramOptions {
    ProgramOptions {
        encoding: Encoding::F32,
        adapters: cairn_model::AdapterMap::default(),
        trainable: None,
        recompute,
        update: UpdateOptions {
            adamw: AdamWAttrs { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 },
            max_grad_norm: Some(1.0),
            ema_decay: None,
        },
        decay: Decay::Matrices,
    }
}

/// Appends a row of one sequence in which every token predicts the next: `tokens` holds one more
/// than a row.
fn push_row(batch: &mut LoaderBatch, tokens: &[u32]) {
    let length = tokens.len() - 1;
    batch.row_tokens = length;
    batch.sequences.push(Sequence { start: batch.ids.len(), len: length });
    batch.ids.extend_from_slice(&tokens[..length]);
    batch.targets.extend_from_slice(&tokens[1..]);
    batch.positions.extend(0..u32::try_from(length).unwrap());
    batch.loss_weights.resize(batch.ids.len(), 1.0);
}

fn learner(spec: &ModelSpec, options: &ProgramOptions, cpu: Cpu, tokens: usize) -> Learner {
    let plan = Programs::new(spec, options).unwrap().memory_plan(tokens).unwrap();
    Learner::new(plan, cpu).unwrap()
}

/// The batches of a golden: rows of token ids, one more than a row's length.
fn batches(file: &SafetensorsFile) -> Vec<LoaderBatch> {
    let tokens = file.tensor("tokens").unwrap();
    let [steps, rows, width] = *tokens.shape else { panic!("{:?}", tokens.shape) };
    let ids: Vec<u32> =
        tokens.to_i64().unwrap().into_iter().map(|id| u32::try_from(id).unwrap()).collect();
    (0..steps)
        .map(|step| {
            let mut batch = LoaderBatch::default();
            for row in 0..rows {
                push_row(&mut batch, &ids[(step * rows + row) * width..][..width]);
            }
            batch
        })
        .collect()
}

/// Relative distance by norm.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let differences = &mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b));
    norm(differences) / norm(&mut expected.iter().map(|x| f64::from(*x)))
}

/// GPT-2's key bias has a gradient of zero but for rounding (a constant added to every score of a
/// row leaves its softmax alone), so it is left out of comparisons.
fn without_key_bias(tensor: &str, values: Vec<f32>) -> Vec<f32> {
    let third = values.len() / 3;
    if tensor.ends_with("c_attn.bias") {
        [&values[..third], &values[2 * third..]].concat()
    } else {
        values
    }
}

/// Compares `prefix`ed weights of the session with the golden's tensors named `what.<tensor>`.
fn compare(learner: &Learner, spec: &ModelSpec, prefix: &str, file: &SafetensorsFile, what: &str) {
    let map = TensorMap::new(spec);
    for (tensor, _) in map.tensors() {
        let value = |weight: &str| learner.session().stored_f32(&format!("{prefix}{weight}"));
        let (shape, found) = tensor_f32(&map, tensor, &value);
        let expected = file.tensor(&format!("{what}.{tensor}")).unwrap();
        assert_eq!(shape, expected.shape, "{tensor}");
        let found = without_key_bias(tensor, found);
        let expected = without_key_bias(tensor, expected.to_f32().unwrap());
        let distance = distance(&found, &expected);
        assert!(distance < GRADIENT_TOLERANCE, "{what} {tensor}: {distance}");
    }
}

/// Ten steps against PyTorch's.
fn check_golden(family: &str) {
    let spec = spec(family);
    let folder = WeightFolder::open(&golden(family)).unwrap();
    let file = SafetensorsFile::open(&golden(family).join("train.safetensors")).unwrap();
    let batches = batches(&file);
    let cpu = Cpu::detect(2);
    let mut learner = learner(&spec, &options(Recompute::Cheap), cpu, batches[0].num_tokens());
    load_weights(learner.session_mut(), &spec, &folder).unwrap();
    learner.start_states();
    let losses = file.tensor("losses").unwrap().to_f32().unwrap();
    let norms = file.tensor("grad_norms").unwrap().to_f32().unwrap();
    for (step, batch) in (0..).zip(&batches) {
        let place = Place { seed: 0, step, first_token: 0 };
        let targets = batch.num_targets() as f64;
        assert!((targets - 128.0).abs() < 0.5);
        let mut loss = 0.0;
        let micro = MicroBatch::whole(batch);
        learner.accumulate(&micro, 1.0 / 128.0, place, &mut loss).unwrap();
        if step == 0 {
            compare(&learner, &spec, "grad.", &file, "grad0");
        }
        let norm = learner.update(1e-3, step).unwrap();
        let index = usize::try_from(step).unwrap();
        let (expected, expected_norm) = (f64::from(losses[index]), f64::from(norms[index]));
        let loss = loss / targets;
        assert!((loss - expected).abs() < LOSS_TOLERANCE, "loss {step}: {loss} {expected}");
        let relative = (norm / expected_norm - 1.0).abs();
        assert!(relative < GRADIENT_TOLERANCE, "norm {step}: {norm} {expected_norm}");
    }
    compare(&learner, &spec, "", &file, "final");
}

#[test]
fn ten_steps_of_llama_are_those_of_pytorch() {
    check_golden("llama");
}

#[test]
fn ten_steps_of_gpt2_are_those_of_pytorch() {
    check_golden("gpt2");
}

/// Three steps on rows of random ids; returns the losses and the hash of the state.
fn train(options: &ProgramOptions, cpu: Cpu, rows_per_batch: usize) -> (Vec<f64>, Hash) {
    const ROWS: usize = 4;
    const ROW_TOKENS: usize = 24;
    let spec = spec("llama");
    let mut learner = learner(&spec, options, cpu, rows_per_batch * ROW_TOKENS);
    init_weights(learner.session_mut(), &spec, 7);
    learner.start_states();
    let mut losses = Vec::new();
    for step in 0..3_u64 {
        let rows: Vec<Vec<u32>> = (0..ROWS as u64)
            .map(|row| {
                let id = |token: u64| (31 * step + 17 * row + token * token + 3 * token) % 320;
                (0..=ROW_TOKENS as u64).map(|token| u32::try_from(id(token)).unwrap()).collect()
            })
            .collect();
        let mut loss = 0.0;
        for (index, rows) in rows.chunks(rows_per_batch).enumerate() {
            let mut batch = LoaderBatch::default();
            rows.iter().for_each(|row| push_row(&mut batch, row));
            let first_token = (index * rows_per_batch * ROW_TOKENS) as u64;
            let place = Place { seed: 3, step, first_token };
            let weight = 1.0 / (ROWS * ROW_TOKENS) as f32;
            learner.accumulate(&MicroBatch::whole(&batch), weight, place, &mut loss).unwrap();
        }
        losses.push(loss);
        learner.update(1e-3, step).unwrap();
    }
    (losses, learner.hash())
}

fn check_same(left: (Vec<f64>, Hash), right: (Vec<f64>, Hash)) {
    let bits = |losses: &[f64]| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&left.0), bits(&right.0), "{:?} {:?}", left.0, right.0);
    assert_eq!(left.1, right.1);
}

#[test]
fn threads_and_instruction_sets_do_not_change_a_bit() {
    let options = options(Recompute::None);
    let expected = train(&options, Cpu::new(Isa::Scalar, 1), 4);
    for isa in Isa::supported() {
        for threads in [1, 2] {
            check_same(expected.clone(), train(&options, Cpu::new(isa, threads), 4));
        }
    }
}

#[test]
fn recomputation_does_not_change_a_bit() {
    let expected = train(&options(Recompute::None), Cpu::detect(1), 4);
    for recompute in [Recompute::Cheap, Recompute::Blocks(1), Recompute::ALL_BLOCKS] {
        check_same(expected.clone(), train(&options(recompute), Cpu::detect(1), 4));
    }
}

#[test]
fn accumulation_does_not_change_a_bit() {
    let one = train(&options(Recompute::None), Cpu::detect(2), 4);
    check_same(one, train(&options(Recompute::None), Cpu::detect(2), 1));
}

#[test]
fn bf16_weights_follow_their_masters() {
    let mut options = options(Recompute::None);
    options.encoding = Encoding::Bf16;
    options.update.ema_decay = Some(0.5);
    let spec = spec("llama");
    let mut learner = learner(&spec, &options, Cpu::detect(1), 24);
    init_weights(learner.session_mut(), &spec, 7);
    learner.start_states();
    let mut batch = LoaderBatch::default();
    push_row(&mut batch, &(0..25).collect::<Vec<u32>>());
    let before = learner.hash();
    for step in 0..2 {
        let place = Place { seed: 0, step, first_token: 0 };
        learner.accumulate(&MicroBatch::whole(&batch), 1.0 / 24.0, place, &mut 0.0).unwrap();
        learner.update(1e-3, step).unwrap();
    }
    assert_ne!(before, learner.hash());
    assert_eq!(learner.encoding(), Encoding::Bf16);
    let name = "model.layers.1.mlp.up_proj.weight";
    let weight = learner.weight_f32(name);
    let master = learner.session().stored_f32(&format!("master.{name}")).unwrap();
    assert!(weight.iter().zip(master).any(|(w, m)| w.to_bits() != m.to_bits()));
    for (w, m) in weight.iter().zip(master) {
        assert!((w - m).abs() <= m.abs() / 256.0, "{w} {m}");
    }
}

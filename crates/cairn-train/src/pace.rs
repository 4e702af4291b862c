//! How fast this machine trains a model: measured on the first blocks of it.
//!
//! One block and two blocks of the model are run forward and backward over a few rows. Their
//! difference is the time of a block, the rest that of embedding and head; the whole model's time
//! is put together from the two, so that a wide vocabulary on few blocks does not mislead.

use cairn_data::loader::{LoaderBatch, Sequence};
use cairn_kernels::{Cpu, CpuError};
use cairn_model::{AdapterMap, TensorMap};
use cairn_program::{Recompute, RunError, Workload};
use cairn_spec::lora::TargetModules;
use cairn_spec::model::moe::DenseLayers;
use cairn_spec::model::{Mlp, WindowedLayers};
use cairn_spec::recipe::TrainRecipe;
use cairn_spec::{LoraSpec, ModelSpec};

use crate::batch::MicroBatch;
use crate::host::Host;
use crate::learner::{Learner, Place};
use crate::plan::{Pace, options_of};
use crate::programs::{Programs, ProgramsError};

/// Rows are added until a run has so many tokens, or the micro-batch is full.
const TOKENS_WISHED: usize = 1024;
/// Runs measured; the fastest counts, since everything that disturbs makes one slower.
const RUNS: usize = 3;

/// Why the pace cannot be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PaceError {
    /// There is no handle on the processor.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The model cannot be trained.
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    /// The probe does not run, which is a bug.
    #[error("the probe does not run")]
    Run(#[from] RunError),
}

/// Time and arithmetic of a part of the model.
#[derive(Clone, Copy, Debug)]
struct Cost {
    seconds: f64,
    flops: f64,
}

/// Measures the pace of a recipe's model with the threads and instructions of `cpu`, which the
/// probe takes over. Takes a few seconds for a large model, and the memory of two of its blocks.
///
/// # Errors
///
/// [`PaceError::Programs`] if the model cannot be trained.
pub fn measure_pace(
    recipe: &TrainRecipe,
    cpu: impl Fn() -> Result<Cpu, CpuError>,
    host: &dyn Host,
) -> Result<Pace, PaceError> {
    let layers = recipe.model.num_hidden_layers;
    let (one, update) = probe(recipe, 1, cpu()?, host)?;
    if layers == 1 {
        return Ok(Pace { flops_per_s: one.flops / one.seconds, update_s_per_parameter: update });
    }
    let (two, update) = probe(recipe, 2, cpu()?, host)?;
    let block = Cost { seconds: two.seconds - one.seconds, flops: two.flops - one.flops };
    let others = (layers - 1) as f64;
    let seconds = one.seconds + others * block.seconds;
    let flops = one.flops + others * block.flops;
    // A disturbed probe may make one block slower than two; then two blocks stand for all.
    let disturbed = block.seconds <= 0.0;
    let flops_per_s = if disturbed { two.flops / two.seconds } else { flops / seconds };
    Ok(Pace { flops_per_s, update_s_per_parameter: update })
}

/// What a module is called within its block: `model.layers.5.mlp.up_proj` is `mlp.up_proj`.
fn within_block(name: &str) -> String {
    let (_, inside) = name.rsplit_once(".layers.").unwrap_or(("", name));
    match inside.split_once('.') {
        Some((number, rest)) if number.parse::<usize>().is_ok() => rest.to_owned(),
        _ => name.to_owned(),
    }
}

/// Adapters in a block, whichever blocks have them, of a model of which `probed` are some: its modules by
/// their names within the block.
fn in_every_block(spec: &ModelSpec, probed: &ModelSpec, lora: LoraSpec) -> LoraSpec {
    let inside = |mut names: Vec<String>| {
        names.iter_mut().for_each(|name| *name = within_block(name));
        names.sort_unstable();
        names.dedup();
        names
    };
    let names = match &lora.target_modules {
        TargetModules::AllLinear => None,
        TargetModules::Named(names) if lora.exclude_modules.is_none() => Some(names.clone()),
        TargetModules::Named(_) | TargetModules::Matching(_) => {
            let modules = LoraSpec { target_parameters: Vec::new(), ..lora.clone() };
            // Where nothing but parameters has adapters there are no modules.
            let adapted = AdapterMap::new(spec, &modules).unwrap_or_default();
            Some(adapted.modules().into_iter().map(str::to_owned).collect())
        }
    };
    let map = TensorMap::new(probed);
    let is_there = |name: &String| {
        let name = format!("{name}.weight");
        map.slices.iter().any(|slice| slice.tensor.ends_with(&name))
    };
    let names = names.map(inside).map(|names| names.into_iter().filter(is_there));
    let names: Option<Vec<String>> = names.map(Iterator::collect);
    // Modules that only other blocks have are taken for as many as there are.
    let has_some = |names: &Vec<String>| !names.is_empty() || !lora.target_parameters.is_empty();
    let target_modules =
        names.filter(has_some).map_or(TargetModules::AllLinear, TargetModules::Named);
    LoraSpec {
        target_modules,
        target_parameters: inside(lora.target_parameters),
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: Vec::new(),
        ..lora
    }
}

/// Runs `layers` blocks of the model with its embedding and head. Returns what forward and backward
/// cost, and the seconds of the update per parameter.
fn probe(
    recipe: &TrainRecipe,
    layers: usize,
    cpu: Cpu,
    host: &dyn Host,
) -> Result<(Cost, f64), PaceError> {
    let spec = last_blocks(&recipe.model, layers);
    let adapter = recipe.adapter.clone().map(|mut adapter| {
        adapter.lora = in_every_block(&recipe.model, &spec, adapter.lora);
        adapter
    });
    let options = options_of((&spec, adapter.as_ref()), recipe, Recompute::None)?;
    let programs = Programs::new(&spec, &options)?;
    let parameters = programs.train.num_parameters() as f64;
    let seq_len = recipe.data.seq_len;
    let rows_max = usize::try_from(recipe.batch.micro_batch_size).unwrap_or(usize::MAX);
    let rows = TOKENS_WISHED.div_ceil(seq_len).clamp(1, rows_max);
    let flops = programs.train.total_cost(&Workload::causal(rows, seq_len)).flops;
    let plan = programs.memory_plan(rows * seq_len).map_err(ProgramsError::from)?;
    let mut learner = Learner::new(plan, cpu).map_err(ProgramsError::from)?;
    cairn_model::init_weights(learner.session_mut(), &spec, 0);
    learner.start_states();
    let batch = pattern(rows, seq_len, spec.vocab_size);
    let (micro, weight) = (MicroBatch::whole(&batch), 1e-6);
    let (mut training, mut updating) = (f64::INFINITY, f64::INFINITY);
    for step in 0..=RUNS as u64 {
        let start = host.monotonic_s();
        let place = Place { seed: 0, step, first_token: 0 };
        learner.accumulate(&micro, weight, place, &mut 0.0)?;
        let middle = host.monotonic_s();
        learner.update(1e-6, step)?;
        let end = host.monotonic_s();
        // The first run pays for what is touched the first time.
        if step != 0 {
            training = training.min(middle - start);
            updating = updating.min(end - middle);
        }
    }
    Ok((Cost { seconds: training, flops }, updating / parameters))
}

/// The last blocks of a model: the first ones may be the only ones without experts.
fn last_blocks(spec: &ModelSpec, count: usize) -> ModelSpec {
    let mut fields = spec.clone().into_fields();
    let dropped = fields.num_hidden_layers - count;
    fields.num_hidden_layers = count;
    if let Some(window) = &mut fields.attention.sliding_window
        && let WindowedLayers::Listed(layers) = &mut window.layers
    {
        layers.drain(..dropped);
    }
    if let Mlp::Moe(moe) = &mut fields.mlp {
        match &mut moe.dense_layers {
            DenseLayers::None => {}
            DenseLayers::First(first) => *first = first.saturating_sub(dropped),
            DenseLayers::Listed(layers) => {
                layers.drain(..dropped);
            }
        }
    }
    ModelSpec::new(fields).expect("fewer blocks of a valid model are valid")
}

/// Rows of one sequence each, over all of the vocabulary.
pub(crate) fn pattern(rows: usize, seq_len: usize, vocab_size: usize) -> LoaderBatch {
    let id = |token: usize| u32::try_from(token * 7919 % vocab_size).unwrap_or(0);
    let position = |token: usize| u32::try_from(token % seq_len).unwrap_or(0);
    let tokens = rows * seq_len;
    LoaderBatch {
        ids: (0..tokens).map(id).collect(),
        positions: (0..tokens).map(position).collect(),
        targets: (1..=tokens).map(id).collect(),
        loss_weights: vec![1.0; tokens],
        sequences: (0..rows).map(|row| Sequence { start: row * seq_len, len: seq_len }).collect(),
        row_tokens: seq_len,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::FakeHost;
    use crate::trainer::tests::recipe;

    #[test]
    fn a_module_has_a_name_within_its_block() {
        assert_eq!(within_block("model.layers.5.self_attn.q_proj"), "self_attn.q_proj");
        assert_eq!(within_block("mlp.up_proj"), "mlp.up_proj");
        assert_eq!(within_block("lm_head"), "lm_head");
    }

    #[test]
    fn adapters_of_some_blocks_are_probed_in_any() {
        let golden = |name: &str| {
            let goldens = format!("{}/../../tests/goldens", env!("CARGO_MANIFEST_DIR"));
            let config = std::fs::read_to_string(format!("{goldens}/{name}/config.json")).unwrap();
            ModelSpec::from_hf_json(&config).unwrap()
        };
        let lora = |json: &str| LoraSpec::from_peft_json(json).unwrap();
        for (name, text, expected) in [
            (
                "llama",
                r#""target_modules": "model\\.layers\\.0\\..*q_proj""#,
                vec!["self_attn.q_proj"],
            ),
            (
                "llama",
                r#""target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0],
                   "exclude_modules": "lm_head|.*v_proj""#,
                vec!["self_attn.q_proj"],
            ),
            (
                "deepseek_v2",
                r#""target_modules": ["model.layers.0.mlp.up_proj", "q_proj"]"#,
                vec!["q_proj"],
            ),
        ] {
            let spec = golden(name);
            let probed = last_blocks(&spec, 1);
            let text = format!(r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 2, {text}}}"#);
            let found = in_every_block(&spec, &probed, lora(&text));
            let expected = expected.into_iter().map(str::to_owned).collect();
            assert_eq!(found.target_modules, TargetModules::Named(expected), "{text}");
            assert!(AdapterMap::new(&probed, &found).is_ok(), "{text}");
        }
        let dense =
            r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["mlp.up_proj"]}"#;
        let spec = golden("deepseek_v2");
        let found = in_every_block(&spec, &last_blocks(&spec, 1), lora(dense));
        assert_eq!(found.target_modules, TargetModules::AllLinear);
    }

    #[test]
    fn a_pace_is_positive() {
        let pace = measure_pace(&recipe(&[]), || Ok(Cpu::detect(1)), &FakeHost::new()).unwrap();
        assert!(pace.flops_per_s > 0.0 && pace.update_s_per_parameter > 0.0, "{pace:?}");
    }
}

//! Golden models to measure.

use std::path::PathBuf;

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_eval::{ModelScorer, ModelScorerOptions, ModelScorerPlan};
use cairn_kernels::Cpu;
use cairn_spec::ModelSpec;

pub(crate) fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

pub(crate) fn spec(name: &str) -> ModelSpec {
    let text = std::fs::read_to_string(folder(name).join("config.json")).unwrap();
    ModelSpec::from_hf_json(&text).unwrap()
}

pub(crate) fn weights(name: &str) -> WeightFolder {
    WeightFolder::open(&folder(name)).unwrap()
}

pub(crate) fn golden(name: &str) -> SafetensorsFile {
    SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap()
}

pub(crate) fn scorer(name: &str, context: usize, tokens: usize) -> ModelScorer {
    let options = ModelScorerOptions::new(context, tokens);
    let plan = ModelScorerPlan::new(&spec(name), options).unwrap();
    ModelScorer::load(plan, Cpu::detect(2), &weights(name)).unwrap()
}

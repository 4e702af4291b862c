//! A training run's state as a checkpoint, and back.
//!
//! The folder is [`cairn_artifacts::checkpoint`]'s: a model that transformers loads unmodified, the
//! optimizer's tensors by the program's names (`adamw.m.<weight>`, `master.<weight>`, …), and in
//! `cairn.json` the [`TrainState`]. Nothing in it depends on time, threads, memory or paths: equal
//! training states are equal folders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cairn_artifacts::checkpoint::{self, Contents, Kind, Manifest, Verify};
use cairn_artifacts::safetensors::{OutTensor, SafetensorsFile, WeightsError};
use cairn_artifacts::{Checkpoint, CheckpointError, Hash};
use cairn_data::loader::LoaderState;
use cairn_data::tokenizer::Tokenizer;
use cairn_model::{AdapterMap, LoadError, load_adapter, load_weights, out_tensors, out_tensors_of};
use cairn_program::{Class, Session, Shape};
use cairn_spec::model::MaskKind;
use cairn_spec::{Hint, LoraSpec, ModelSpec, SpecError, TargetModules};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::learner::Learner;
use crate::progress::Progress;

/// What of a run's state is not a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Steps of the whole run, as planned.
    pub total_steps: u64,
    /// Where the data stands.
    pub loader: LoaderState,
    /// Keys dropout, with the step.
    pub seed: u64,
    /// Best validation and patience.
    pub progress: Progress,
    /// The keys of the resolved recipe that decide numbers.
    pub recipe: Value,
    /// Hash of the tokenizer's file.
    pub tokenizer_hash: Hash,
    /// Hash of parameters, optimizer, loader and random state.
    pub state_hash: Hash,
    /// Hash of the frozen weights that an adapter is trained beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_hash: Option<Hash>,
}

/// A training state that cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The folder or one of its files cannot be written, or is damaged.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The folder is a model without training state.
    #[error("{} holds no training state: {problem}", folder.display())]
    NoState {
        /// The folder.
        folder: PathBuf,
        /// What is missing or wrong.
        problem: String,
    },
    /// The weights are not those of the model.
    #[error("the weights in {} do not fit the recipe's model", folder.display())]
    Weights {
        /// The folder.
        folder: PathBuf,
        /// What does not fit.
        source: LoadError,
    },
    /// The optimizer's tensors are not those of the run.
    #[error("the optimizer in {} does not fit this run: {}", folder.display(), problems.join("; "))]
    Optimizer {
        /// The folder.
        folder: PathBuf,
        /// Every tensor that is missing, extra or misshaped.
        problems: Vec<String>,
    },
    /// A tensor of the optimizer cannot be read.
    #[error("the optimizer's tensors cannot be read")]
    Tensor(#[from] WeightsError),
    /// What was read is not what was saved.
    #[error("{} was read as state {actual}, but saved as {expected}", folder.display())]
    OtherState {
        /// The folder.
        folder: PathBuf,
        /// State hash in the checkpoint.
        expected: Hash,
        /// State hash after reading it.
        actual: Hash,
    },
    /// The model has no `config.json`.
    #[error("the model cannot be described in config.json")]
    Config(#[from] SpecError),
}

impl Hint for StateError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Checkpoint(error) => error.hints(),
            Self::Weights { .. } | Self::Optimizer { .. } | Self::NoState { .. } => vec![
                "resume with the recipe the run was started with, or start a new run".to_owned(),
            ],
            _ => Vec::new(),
        }
    }
}

/// An adapter that is trained, and the model beside it.
#[derive(Clone, Debug)]
pub(crate) struct TrainedAdapter {
    pub(crate) lora: LoraSpec,
    pub(crate) map: AdapterMap,
    /// Hash of the frozen weights.
    pub(crate) base_hash: Hash,
}

impl TrainedAdapter {
    /// Its `adapter_config.json`.
    fn config(&self, spec: &ModelSpec) -> Value {
        let mut config = self.lora.to_peft_json();
        if self.lora.target_modules == TargetModules::AllLinear {
            // The modules themselves: PEFT's idea of all of them may be another.
            config["target_modules"] = self.map.modules().into();
        }
        if self.map.has_parameters() {
            // PEFT opens no adapter of experts or routers that had dropout. It changes nothing that has
            // been trained; the run's recipe says what it was.
            config["lora_dropout"] = 0.0.into();
        }
        if spec.attention.mask != MaskKind::Causal {
            // PEFT has no name for masked-LM models, and wraps them as they are without one.
            config["task_type"] = Value::Null;
        }
        config
    }
}

/// The model and its tokenizer, as they are written into every checkpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ModelFiles<'a> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) adapter: Option<&'a TrainedAdapter>,
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) data_hash: Hash,
}

impl ModelFiles<'_> {
    /// The parts of a checkpoint that do not change while training.
    fn contents<'b>(&self) -> Result<Contents<'b>, StateError> {
        let (kind, config, generation_config) = match self.adapter {
            Some(adapter) => (Kind::Adapter, adapter.config(self.spec), Value::Null),
            None => {
                let generation = self.spec.to_hf_generation_config();
                (Kind::Model, self.spec.to_hf_config()?, generation)
            }
        };
        Ok(Contents {
            kind,
            data_hash: Some(self.data_hash),
            config,
            generation_config,
            files: vec![
                (checkpoint::TOKENIZER_FILE.to_owned(), self.tokenizer.json().to_vec()),
                ("tokenizer_config.json".to_owned(), self.tokenizer.hf_config().into_bytes()),
            ],
            ..Contents::default()
        })
    }

    /// What is trained, or under `ema.` its average.
    fn weights<'b>(&self, session: &'b Session, prefix: &'b str) -> Vec<OutTensor<'b>> {
        match self.adapter {
            Some(adapter) => out_tensors_of(session, &adapter.map.tensor_map(), prefix),
            None => out_tensors(session, self.spec, prefix),
        }
    }
}

/// Writes a checkpoint of `step`.
pub(crate) fn save(
    folder: &Path,
    session: &Session,
    model: ModelFiles<'_>,
    (step, validation_loss, state): (u64, Option<f64>, &TrainState),
) -> Result<(), StateError> {
    let recipe_hash = Hash::of_bytes(state.recipe.to_string().as_bytes());
    let Ok(Value::Object(state)) = serde_json::to_value(state) else {
        unreachable!("a state is plain data with named fields")
    };
    let contents = Contents {
        step,
        validation_loss,
        recipe_hash: Some(recipe_hash),
        state,
        weights: model.weights(session, ""),
        optimizer: optimizer_tensors(session),
        ..model.contents()?
    };
    checkpoint::write(folder, contents)?;
    Ok(())
}

/// Writes the averaged weights as a model folder of their own.
pub(crate) fn save_average(
    folder: &Path,
    session: &Session,
    model: ModelFiles<'_>,
    step: u64,
) -> Result<(), StateError> {
    let weights = model.weights(session, "ema.");
    checkpoint::write(folder, Contents { step, weights, ..model.contents()? })?;
    Ok(())
}

fn optimizer_tensors(session: &Session) -> Vec<OutTensor<'_>> {
    let states = session.persistent().filter(|(_, class, ..)| *class == Class::State);
    let tensor = |(name, _, _, shape): (&str, _, _, &Shape)| {
        let values = session.stored_f32(name).expect("optimizer states are f32");
        OutTensor::f32(name, &sizes(shape), values)
    };
    states.map(tensor).collect()
}

fn sizes(shape: &Shape) -> Vec<usize> {
    shape.0.iter().filter_map(|dim| dim.size).collect()
}

/// The training state in a manifest.
pub(crate) fn train_state(folder: &Path, manifest: &Manifest) -> Result<TrainState, StateError> {
    serde_json::from_value(Value::Object(manifest.state.clone())).map_err(|error| {
        StateError::NoState { folder: folder.to_owned(), problem: error.to_string() }
    })
}

/// Fills what is trained of a learner from a checkpoint; the hash of every file is checked first.
pub(crate) fn load(
    folder: &Path,
    (spec, adapter): (&ModelSpec, Option<&TrainedAdapter>),
    learner: &mut Learner,
) -> Result<(), StateError> {
    let saved = Checkpoint::open(folder, Verify::Hashes)?;
    let (session, weights) = (learner.session_mut(), saved.weights());
    let loaded = match adapter {
        Some(adapter) => load_adapter(session, spec, &adapter.map, weights),
        None => load_weights(session, spec, weights),
    };
    loaded.map_err(|source| StateError::Weights { folder: folder.to_owned(), source })?;
    let optimizer = saved.optimizer().ok_or_else(|| StateError::NoState {
        folder: folder.to_owned(),
        problem: format!("{} is missing", checkpoint::OPTIMIZER_FILE),
    })?;
    load_states(folder, optimizer, learner.session_mut())
}

fn load_states(
    folder: &Path,
    file: &SafetensorsFile,
    session: &mut Session,
) -> Result<(), StateError> {
    let expected: BTreeMap<String, Vec<usize>> = session
        .persistent()
        .filter(|(_, class, ..)| *class == Class::State)
        .map(|(name, _, _, shape)| (name.to_owned(), sizes(shape)))
        .collect();
    let mut problems = Vec::new();
    for (name, shape) in &expected {
        match file.tensor(name) {
            None => problems.push(format!("{name} is missing")),
            Some(tensor) if tensor.shape != shape => {
                problems.push(format!("{name} is {:?}, expected {shape:?}", tensor.shape));
            }
            Some(_) => {}
        }
    }
    let extra = file.tensors().filter(|tensor| !expected.contains_key(tensor.name));
    problems.extend(extra.map(|tensor| format!("{} has no place in this run", tensor.name)));
    if !problems.is_empty() {
        return Err(StateError::Optimizer { folder: folder.to_owned(), problems });
    }
    for name in expected.keys() {
        let tensor = file.tensor(name).expect("checked above");
        tensor.copy_to_f32(session.stored_f32_mut(name).expect("optimizer states are f32"))?;
    }
    Ok(())
}

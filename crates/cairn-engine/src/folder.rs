//! A model folder → an engine: `config.json` and safetensors, as transformers saves them.

use std::path::{Path, PathBuf};

use cairn_artifacts::FileError;
use cairn_artifacts::bounded::{CONFIG_BYTES_MAX, read_text};
use cairn_artifacts::safetensors::{WeightFolder, WeightsError};
use cairn_kernels::Cpu;
use cairn_spec::model::SpecError;
use cairn_spec::{Hint, ModelSpec};

use crate::engine::Engine;
use crate::error::EngineError;
use crate::options::{EngineOptions, EnginePlan};

/// Name of the description beside the weights.
const CONFIG_FILE: &str = "config.json";

/// Why a folder is no model that generates.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// The description cannot be read.
    #[error("the description of the model cannot be read")]
    File(#[from] FileError),
    /// The description describes no model.
    #[error("{} does not describe a model", .path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<SpecError>,
    },
    /// The weights cannot be opened.
    #[error("the weights cannot be opened")]
    Weights(#[from] Box<WeightsError>),
    /// The model has no engine.
    #[error("the model cannot be loaded")]
    Engine(#[from] EngineError),
}

impl Hint for FolderError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Spec { source, .. } => source.hints(),
            Self::Engine(error) => error.hints(),
            Self::File(_) => {
                vec![format!("a model is a folder with {CONFIG_FILE} and safetensors")]
            }
            Self::Weights(_) => Vec::new(),
        }
    }
}

/// Opens a model folder and loads it for generation; `options` is chosen with the model at hand.
///
/// # Errors
///
/// [`FolderError`] says which file is missing or wrong, and why.
///
/// ```
/// use cairn_engine::{EngineOptions, Request, SamplingParams, load_model_from_safetensors};
/// use cairn_kernels::Cpu;
/// use std::ops::ControlFlow;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/qwen3");
/// let options = |spec: &cairn_spec::ModelSpec| EngineOptions::new(1, spec.context_limit().min(64));
/// let mut engine = load_model_from_safetensors(folder.as_ref(), options, Cpu::detect(1))?;
/// let request = Request::new(vec![5, 6, 7], SamplingParams::greedy(), 4);
/// let output = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
/// assert_eq!(output.tokens.len(), 4);
/// # Ok::<(), cairn_engine::FolderError>(())
/// ```
pub fn load_model_from_safetensors(
    folder: &Path,
    options: impl FnOnce(&ModelSpec) -> EngineOptions,
    cpu: Cpu,
) -> Result<Engine, FolderError> {
    let path = folder.join(CONFIG_FILE);
    let text = read_text(&path, CONFIG_BYTES_MAX)?;
    let spec = ModelSpec::from_hf_json(&text)
        .map_err(|error| FolderError::Spec { path, source: Box::new(error) })?;
    let weights = WeightFolder::open(folder).map_err(Box::new)?;
    let plan = EnginePlan::new(&spec, options(&spec))?;
    Ok(Engine::load(plan, cpu, &weights)?)
}

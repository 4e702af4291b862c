//! Where a run's weights began: fresh, or from a model folder, which the record remembers.
//!
//! A run is the same run only from the same beginning, so a resumed one is held to it: other weights
//! than those it began with would be ignored without a word.

use std::path::Path;

use cairn_artifacts::Hash;
use cairn_artifacts::bounded::{CONFIG_BYTES_MAX, read_text};
use cairn_artifacts::checkpoint::CONFIG_FILE;
use cairn_artifacts::hash::Hasher;
use cairn_artifacts::run::{RunFolder, RunRecord};
use cairn_artifacts::safetensors::WeightFolder;
use cairn_spec::ModelSpec;
use cairn_spec::model::Mlp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::TrainError;
use crate::learner::hash_part;
use crate::resume::ResumeError;

/// Where it stands in the settings of a run's record.
pub(crate) const INITIAL_WEIGHTS: &str = "initial_weights";

/// The model folder that a run's weights come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct InitialWeights {
    /// The folder, as it was given.
    pub(crate) folder: String,
    /// Hash of the tensors by name; how they are cut into files does not matter.
    pub(crate) hash: Hash,
}

impl InitialWeights {
    /// The weights of a model folder, opened and hashed.
    pub(crate) fn open(path: &Path) -> Result<(Self, WeightFolder), TrainError> {
        let weights = WeightFolder::open(path).map_err(|source| TrainError::InitialWeights {
            folder: path.to_owned(),
            source: Box::new(source),
        })?;
        let mut hasher = Hasher::new();
        for tensor in weights.tensors() {
            hash_part(&mut hasher, tensor.name, tensor.bytes);
        }
        Ok((Self { folder: path.display().to_string(), hash: hasher.finish() }, weights))
    }

    /// Refuses weights whose own `config.json` says that they mean another model than `spec`: the
    /// tensors may fit all the same.
    pub(crate) fn check_model(path: &Path, spec: &ModelSpec) -> Result<(), TrainError> {
        let config = path.join(CONFIG_FILE);
        if !config.exists() {
            return Ok(());
        }
        let text = read_text(&config, CONFIG_BYTES_MAX)?;
        let folder = || path.to_owned();
        let own = ModelSpec::from_hf_json(&text).map_err(|source| TrainError::InitialConfig {
            folder: folder(),
            source: Box::new(source),
        })?;
        let differences = differences(&own, spec);
        if differences.is_empty() {
            return Ok(());
        }
        Err(TrainError::InitialSpec { folder: folder(), differences })
    }

    /// What the record of a run that began earlier says.
    fn recorded(folder: &RunFolder) -> Recorded {
        let Ok(record) = RunRecord::load(&folder.record()) else { return Recorded::Unknown };
        match record.settings.get(INITIAL_WEIGHTS) {
            None => Recorded::Fresh,
            Some(value) => {
                serde_json::from_value(value.clone()).map_or(Recorded::Unknown, Recorded::From)
            }
        }
    }
}

/// What two specs compute differently with the same tensors, as `key is X, the recipe says Y`.
fn differences(own: &ModelSpec, recipe: &ModelSpec) -> Vec<String> {
    /// What a recipe may choose anew: how to train on, and for how long a sequence.
    const FREE: [&str; 5] =
        ["initializer_range", "dropout", "tokens", "dtype", "max_position_embeddings"];
    let fields = |spec: &ModelSpec| {
        let mut fields = spec.clone().into_fields();
        if let Mlp::Moe(moe) = &mut fields.mlp {
            // How to train on, too.
            moe.router.aux_loss_coef = None;
        }
        serde_json::to_value(fields).expect("a spec is plain data")
    };
    let (own, recipe) = (fields(own), fields(recipe));
    let mut found = Vec::new();
    different("", &own, &recipe, &mut found);
    found.retain(|(key, _)| !FREE.iter().any(|free| key.split('.').next() == Some(free)));
    found.into_iter().map(|(_, text)| text).collect()
}

fn different(key: &str, own: &Value, recipe: &Value, found: &mut Vec<(String, String)>) {
    match (own, recipe) {
        (Value::Object(own), Value::Object(recipe)) if own.keys().eq(recipe.keys()) => {
            for (name, value) in own {
                let inner = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                different(&inner, value, &recipe[name], found);
            }
        }
        _ if own == recipe => {}
        _ => found.push((key.to_owned(), format!("{key} is {own}, the recipe says {recipe}"))),
    }
}

/// What is known of a run's beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Recorded {
    /// There is no record that could be read.
    Unknown,
    /// Fresh weights.
    Fresh,
    /// Those of a model folder.
    From(InitialWeights),
}

/// Refuses a run that would not go on from where the folder's run began; returns the beginning to
/// record. `given` is what this call asks for, `has_begun` whether a step has been saved.
pub(crate) fn check_beginning(
    folder: &RunFolder,
    given: Option<&InitialWeights>,
    has_begun: bool,
) -> Result<Option<InitialWeights>, ResumeError> {
    let recorded = InitialWeights::recorded(folder);
    match (recorded, given) {
        (Recorded::From(began), None) if !has_begun => {
            Err(ResumeError::InitialWeightsMissing { folder: began.folder })
        }
        (_, given) if !has_begun => Ok(given.cloned()),
        (Recorded::From(began), Some(given)) if began.hash == given.hash => Ok(Some(began)),
        (Recorded::From(began), None) => Ok(Some(began)),
        (Recorded::Fresh | Recorded::Unknown, None) => Ok(None),
        (recorded, Some(given)) => Err(ResumeError::OtherInitialWeights {
            given: given.folder.clone(),
            began: match recorded {
                Recorded::From(began) => format!("those of {} ({})", began.folder, began.hash),
                Recorded::Fresh => "fresh ones".to_owned(),
                Recorded::Unknown => "ones that its record does not name".to_owned(),
            },
        }),
    }
}

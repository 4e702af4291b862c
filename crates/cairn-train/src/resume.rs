//! What may change between the sessions of one run, and what may not.
//!
//! Resuming is bitwise only if everything that decides a number stays. Threads, memory,
//! recomputation and how often to validate or save decide none; another length changes the learning
//! rates to come, so it is allowed and said.
//!
//! How a batch is cut into micro-batches decides no number either, unless a weight is used twice (the
//! embedding is the head as well; projections of one module share an adapter's `A`): the uses then
//! add to one gradient by turns, so their order is that of the cuts.

use cairn_model::AdapterMap;
use cairn_spec::Hint;
use cairn_spec::recipe::TrainRecipe;
use serde_json::{Map, Value};

/// Why a run cannot go on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// The recipe decides other numbers.
    #[error("the run was started with another recipe: {}", differences.join(", "))]
    OtherRecipe {
        /// Each key that differs, with both values.
        differences: Vec<String>,
    },
    /// The data is tokenized by another tokenizer.
    #[error("the run was started with tokenizer {started}, the corpus now has {now}")]
    OtherTokenizer {
        /// Hash in the checkpoint.
        started: String,
        /// Hash in the corpus.
        now: String,
    },
    /// The frozen model is not the one that the adapter was trained beside.
    #[error("the run trains an adapter beside a model with hash {started}, {folder} now has {now}")]
    OtherBase {
        /// The model's folder.
        folder: String,
        /// Hash in the checkpoint.
        started: String,
        /// Hash of the folder.
        now: String,
    },
    /// The run began with other weights, so those given would be ignored.
    #[error("the run has begun, with other weights than those of {given}: with {began}")]
    OtherInitialWeights {
        /// The model folder given now.
        given: String,
        /// What it began with.
        began: String,
    },
    /// The run was to begin with a model's weights and has saved no step; without them it would
    /// begin with fresh ones.
    #[error("the run was to begin with the weights of {folder}, and no step of it is saved yet")]
    InitialWeightsMissing {
        /// The model folder.
        folder: String,
    },
    /// The recipe ends before the checkpoint.
    #[error("the checkpoint stands at step {step}, the recipe ends at step {total_steps}")]
    AlreadyPast {
        /// Steps of the checkpoint.
        step: u64,
        /// Steps of the recipe.
        total_steps: u64,
    },
}

impl Hint for ResumeError {
    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::OtherInitialWeights { .. } => {
                "leave the initial weights out to go on with the run, or give the new run another \
                 folder (--output, or run.name)"
                    .to_owned()
            }
            Self::InitialWeightsMissing { folder } => format!(
                "begin it with them (--initial {folder}), or give the new run another folder"
            ),
            Self::AlreadyPast { step, .. } => format!(
                "give it a budget of more than {step} steps, or give the new run another folder"
            ),
            Self::OtherBase { .. } => {
                "restore the model as it was, or give the new run another folder".to_owned()
            }
            Self::OtherRecipe { .. } | Self::OtherTokenizer { .. } => {
                "resume with the recipe the run was started with, or give the new run another \
                 folder"
                    .to_owned()
            }
        };
        vec![hint]
    }
}

/// The sections all of whose keys decide numbers.
const SECTIONS: [&str; 6] = ["model", "objective", "adapter", "dropout", "optimizer", "schedule"];
/// A key among them that decides none: what the weights are, and not where, is recorded of them.
const FOLDER: (&str, &str) = ("model", "initial");
/// Keys of other sections that do.
const KEYS: [(&str, &str); 4] =
    [("run", "seed"), ("run", "weights"), ("data", "seq_len"), ("batch", "global_batch_size")];

/// The keys of a recipe that decide numbers, as `section.key`.
pub(crate) fn deciding_keys(recipe: &TrainRecipe) -> Value {
    let file = serde_json::to_value(recipe.to_file()).expect("a recipe is plain data");
    let mut deciding = Map::new();
    for section in SECTIONS {
        let Some(Value::Object(keys)) = file.get(section) else { continue };
        for (key, value) in keys.iter().filter(|(key, _)| (section, key.as_str()) != FOLDER) {
            insert(&mut deciding, format!("{section}.{key}"), value);
        }
    }
    for (section, key) in KEYS {
        if let Some(value) = file.get(section).and_then(|section| section.get(key)) {
            deciding.insert(format!("{section}.{key}"), value.clone());
        }
    }
    if cuts_decide_bits(recipe) {
        let rows = recipe.batch.micro_batch_size;
        deciding.insert("batch.micro_batch_size".to_owned(), rows.into());
    }
    deciding.sort_keys();
    Value::Object(deciding)
}

/// Inserts what is set of a value, key by key, so that a difference is said by name.
fn insert(deciding: &mut Map<String, Value>, key: String, value: &Value) {
    match value {
        Value::Null => {}
        Value::Object(keys) => {
            for (inner, value) in keys {
                insert(deciding, format!("{key}.{inner}"), value);
            }
        }
        value => {
            deciding.insert(key, value.clone());
        }
    }
}

/// Whether a weight is used twice, so that its gradient depends on how the batch is cut.
pub(crate) fn cuts_decide_bits(recipe: &TrainRecipe) -> bool {
    match &recipe.adapter {
        None => recipe.model.tie_word_embeddings,
        Some(adapter) => AdapterMap::new(&recipe.model, &adapter.lora)
            .is_ok_and(|adapters| adapters.shares_weights()),
    }
}

/// Refuses a recipe that would not continue the numbers of one with the deciding keys `started`.
pub(crate) fn check_recipe(started: &Value, recipe: &TrainRecipe) -> Result<(), ResumeError> {
    let now = deciding_keys(recipe);
    let empty = Map::new();
    let (before, after) =
        (started.as_object().unwrap_or(&empty), now.as_object().unwrap_or(&empty));
    let mut keys: Vec<&String> = before.keys().chain(after.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let shown = |value: Option<&Value>| value.map_or("unset".to_owned(), Value::to_string);
    let differences: Vec<String> = keys
        .into_iter()
        .filter(|key| before.get(*key) != after.get(*key))
        .map(|key| format!("{key} was {}, is {}", shown(before.get(key)), shown(after.get(key))))
        .collect();
    if differences.is_empty() { Ok(()) } else { Err(ResumeError::OtherRecipe { differences }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_spec::recipe::{Facts, Format, RecipeFile};

    fn recipe(overrides: &[&str]) -> TrainRecipe {
        let text = r#"
            schema = "train/2"
            [model]
            family = "llama"
            hidden_size = 32
            num_hidden_layers = 1
            num_attention_heads = 2
            intermediate_size = 64
            vocab_size = 300
            [data]
            corpus = "corpus"
            seq_len = 16
            [batch]
            micro_batch_size = 4
            [budget]
            steps = 10
        "#;
        let file = RecipeFile::parse(text, Format::Toml).unwrap().with_overrides(overrides);
        let facts = Facts { available_threads: 2, tokenizer_vocab_size: None };
        file.unwrap().resolve(&facts).unwrap()
    }

    #[test]
    fn what_decides_no_number_may_change() {
        let untied = "model.tie_word_embeddings=false";
        let started = deciding_keys(&recipe(&[untied]));
        let other = recipe(&[
            untied,
            "run.threads=1",
            "run.recompute=blocks",
            "run.memory_limit=8GiB",
            "run.name=other",
            "batch.micro_batch_size=2",
            "batch.grad_accum_steps=2",
            "eval.every=3",
            "checkpoint.every=1",
            "budget.steps=20",
            "data.corpus=elsewhere",
        ]);
        assert_eq!(check_recipe(&started, &other), Ok(()));
    }

    #[test]
    fn what_does_is_named_with_both_values() {
        let started = deciding_keys(&recipe(&[]));
        let other = recipe(&["optimizer.learning_rate=0.5", "model.num_hidden_layers=2"]);
        let error = check_recipe(&started, &other).unwrap_err().to_string();
        assert!(error.contains("model.num_hidden_layers was 1, is 2"), "{error}");
        assert!(error.contains("optimizer.learning_rate was 0.001, is 0.5"), "{error}");
        let cut = recipe(&["batch.micro_batch_size=2", "batch.grad_accum_steps=2"]);
        let error = check_recipe(&started, &cut).unwrap_err().to_string();
        assert!(error.ends_with("batch.micro_batch_size was 4, is 2"), "tied: {error}");
        for key in ["run.seed=9", "run.weights=bf16", "data.seq_len=8", "batch.grad_accum_steps=2"]
        {
            assert!(check_recipe(&started, &recipe(&[key])).is_err(), "{key}");
        }
    }
}

//! Recipes: what a training run does, as a file.
//!
//! Two stages. A [`RecipeFile`] is what people write, in TOML, YAML or JSON: sections with
//! optional keys, of any schema version, changed by overrides. [`RecipeFile::resolve`] makes it a
//! [`TrainRecipe`], in which everything is decided and checked, and which prints as a file that
//! resolves to itself.
//!
//! ```
//! use cairn_spec::recipe::{Format, Facts, RecipeFile};
//!
//! let text = r#"
//! schema = "train/2"
//! [model]
//! family = "llama"
//! hidden_size = 64
//! num_hidden_layers = 2
//! num_attention_heads = 4
//! intermediate_size = 160
//! vocab_size = 512
//! [data]
//! corpus = "data/shards"
//! seq_len = 128
//! [budget]
//! tokens = "2M"
//! "#;
//! let mut file = RecipeFile::parse(text, Format::Toml)?;
//! file = file.with_overrides(&["optimizer.learning_rate=1e-3"])?;
//! let recipe = file.resolve(&Facts { available_threads: 2, tokenizer_vocab_size: None })?;
//! assert_eq!(recipe.tokens_per_step(), 8 * 128);
//! # Ok::<(), cairn_spec::recipe::RecipeError>(())
//! ```

mod adapter;
mod error;
mod file;
mod migrate;
mod model;
mod objective;
mod overrides;
mod resolve;
#[cfg(test)]
mod tests;
mod written;

pub use adapter::{Adapter, AdapterSection, BaseEncoding, TargetModulesKey};
pub use error::RecipeError;
pub use file::{
    BatchSection, BudgetSection, CheckpointSection, DataSection, Decay, DropoutSection,
    EarlyStopSection, EvalSection, Format, ModelSection, OptimizerSection, RECIPE_BYTES_MAX,
    RecipeFile, Recompute, RunSection, ScheduleKind, ScheduleSection,
};
pub use migrate::SCHEMA;
pub use objective::{MaskedLm, Objective, ObjectiveKind, ObjectiveSection};
pub use overrides::{SWEEP_RUNS_MAX, expand_sweep};
pub use resolve::{
    Batch, Budget, Checkpoint, Data, EarlyStop, Eval, Facts, Optimizer, Run, Schedule, THREADS_MAX,
    TrainFields, TrainRecipe, check_run_name,
};

//! What can be wrong with a recipe, and what to do about it.

use super::SCHEMA;
use crate::model::Family;
use crate::{Hint, LoraError, SpecError};
use thiserror::Error;

/// A recipe that cannot be read or cannot be run.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// The file's ending names no known format.
    #[error("{} is not a recipe format", if extension.is_empty() {
        "a name without an ending".to_owned()
    } else {
        format!("'{extension}'")
    })]
    UnknownFormat {
        /// The ending, without the dot.
        extension: String,
    },
    /// The text is longer than any recipe.
    #[error("the recipe has {bytes} bytes; at most {max} are read")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// `RECIPE_BYTES_MAX`.
        max: usize,
    },
    /// The text is not of its format.
    #[error("the recipe is not valid {format}: {reason}")]
    Parse {
        /// `TOML`, `YAML` or `JSON`.
        format: &'static str,
        /// The parser's words, with the place.
        reason: String,
    },
    /// The file does not say which schema it follows.
    #[error("the recipe does not name its schema")]
    MissingSchema,
    /// The file follows a schema from elsewhere or from the future.
    #[error("unknown recipe schema '{schema}'; this version reads up to {SCHEMA}")]
    UnknownSchema {
        /// The name found.
        schema: String,
    },
    /// There is no such section.
    #[error("unknown section [{section}]")]
    UnknownSection {
        /// The name found.
        section: String,
        /// The nearest existing name, if any is near.
        nearest: Option<String>,
    },
    /// There is no such key.
    #[error("unknown key '{key}' in section [{section}]")]
    UnknownKey {
        /// Where it was found.
        section: String,
        /// The name found.
        key: String,
        /// The nearest existing key, with its section, if any is near.
        nearest: Option<String>,
    },
    /// A value has the wrong type or form.
    #[error("'{key}' is wrong: {reason}")]
    WrongType {
        /// Section and key.
        key: String,
        /// What was found, what was expected.
        reason: String,
    },
    /// Recipes do not describe models of this family.
    #[error("a recipe cannot describe a {family} model")]
    Family {
        /// The family asked for.
        family: Family,
    },
    /// A value that has no default is absent.
    #[error("'{key}' is missing")]
    Missing {
        /// Section and key.
        key: &'static str,
    },
    /// A value is outside its limits.
    #[error("'{key}' must be {expected}, not {actual}")]
    OutOfRange {
        /// Section and key.
        key: &'static str,
        /// The limits in words.
        expected: String,
        /// The value given.
        actual: String,
    },
    /// Not exactly one of several keys is set.
    #[error("set exactly one of {}; {}", keys.join(", "), which(set))]
    NotExactlyOne {
        /// The keys to choose from.
        keys: &'static [&'static str],
        /// Those that are set.
        set: Vec<&'static str>,
    },
    /// Batch sizes do not fit together.
    #[error(
        "batch.global_batch_size {global_batch_size} is not a multiple of batch.micro_batch_size \
         {micro_batch_size}"
    )]
    UnevenBatch {
        /// Sequences in a step.
        global_batch_size: u64,
        /// Sequences at a time.
        micro_batch_size: u64,
    },
    /// The model section does not describe a model.
    #[error("the [model] section does not describe a model")]
    Model(#[source] SpecError),
    /// A file describes the model, and nobody has read it.
    #[error("the model is described in {path}, which has not been read")]
    UnreadConfig {
        /// The file, or its folder.
        path: String,
    },
    /// The model is described twice.
    #[error("'{key}' is set, and a config.json describes the model")]
    KeyBeside {
        /// Section and key.
        key: String,
    },
    /// A `config.json` asks for something in training that there is not.
    #[error("the model's '{field}' is {value}, and there is no such thing in training here")]
    TrainingField {
        /// The field.
        field: &'static str,
        /// Its value.
        value: f64,
    },
    /// The objective is not one that the model can learn by.
    #[error("a model whose attention is {attention} cannot learn by {objective}")]
    Objective {
        /// `causal` or `bidirectional`.
        attention: &'static str,
        /// The name in the recipe.
        objective: &'static str,
    },
    /// The adapter section does not describe an adapter.
    #[error("the [adapter] section does not describe an adapter")]
    Adapter(#[source] LoraError),
    /// The model cannot represent every token.
    #[error("model.vocab_size {vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}")]
    VocabTooSmall {
        /// Rows of the embedding.
        vocab_size: usize,
        /// Tokens of the tokenizer.
        tokenizer_vocab_size: usize,
    },
    /// Sequences are longer than the model's positions.
    #[error(
        "data.seq_len {seq_len} exceeds model.max_position_embeddings {max_position_embeddings}"
    )]
    SequenceTooLong {
        /// Tokens in a sequence.
        seq_len: usize,
        /// Positions of the model.
        max_position_embeddings: usize,
    },
    /// An override or a sweep cannot be read.
    #[error("'{text}' is not an override: {reason}")]
    BadOverride {
        /// The argument.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A sweep has more runs than anyone means.
    #[error("the sweep has {runs} runs; at most {max} are accepted")]
    SweepTooLarge {
        /// Runs of the grid.
        runs: usize,
        /// The limit.
        max: usize,
    },
}

/// Which of several keys are set, in words.
fn which(set: &[&'static str]) -> String {
    match set {
        [] => "none is set".to_owned(),
        set => format!("{} are set", set.join(" and ")),
    }
}

impl Hint for RecipeError {
    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::UnknownFormat { .. } => "use .toml, .yaml, .yml or .json".to_owned(),
            Self::MissingSchema => format!("begin the file with schema = \"{SCHEMA}\""),
            Self::UnknownSchema { .. } => "use a newer version of cairn for this file".to_owned(),
            Self::UnknownSection { nearest: Some(nearest), .. } => {
                format!("did you mean [{nearest}]?")
            }
            Self::UnknownKey { nearest: Some(nearest), .. } => {
                format!("did you mean '{nearest}'?")
            }
            Self::Missing { key: "model.family" } => {
                "describe the model in [model], name the file \
                 that does (model.config=DIR/config.json), or a folder to begin with \
                 (model.initial=DIR)"
                    .to_owned()
            }
            Self::Missing { key } => format!("add it to the file, or pass {key}=VALUE"),
            Self::UnevenBatch { micro_batch_size, .. } => {
                format!("choose a multiple of {micro_batch_size}")
            }
            Self::Family { .. } => {
                "keys describe llama and gpt2; give the Hugging Face file of any other model: \
                 model.config=DIR/config.json"
                    .to_owned()
            }
            Self::KeyBeside { key } => {
                format!("take it out ({key}=null), or take model.config and model.initial out")
            }
            Self::TrainingField { field: "router_aux_loss_coef", .. } => {
                "set output_router_logits to false in config.json to train without a \
                 load-balancing loss, as transformers does then"
                    .to_owned()
            }
            Self::TrainingField { field, .. } => {
                format!("set {field} to 0 in config.json to train without it")
            }
            Self::Objective { attention: "causal", .. } => {
                "leave objective.kind out, or set it to causal_lm".to_owned()
            }
            Self::Objective { .. } => "leave objective.kind out, or set it to masked_lm".to_owned(),
            Self::Adapter(error) => return error.hints(),
            Self::NotExactlyOne { set, .. } => match set.as_slice() {
                [] | [_] => return Vec::new(),
                set => {
                    let out: Vec<_> = set.iter().map(|key| format!("{key}=null")).collect();
                    format!(
                        "a change leaves the recipe's other keys as they are; take out what is not \
                         meant: {}",
                        out.join(" or ")
                    )
                }
            },
            Self::Model(error) => return error.hints(),
            Self::VocabTooSmall { tokenizer_vocab_size, .. } => format!(
                "set model.vocab_size to at least {tokenizer_vocab_size}, or leave it out to take \
                 the tokenizer's"
            ),
            Self::SequenceTooLong { .. } => {
                "shorten data.seq_len or raise model.max_position_embeddings".to_owned()
            }
            Self::BadOverride { .. } => {
                "write section.key=value, for example optimizer.learning_rate=3e-4".to_owned()
            }
            _ => return Vec::new(),
        };
        vec![hint]
    }
}

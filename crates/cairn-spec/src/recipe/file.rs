//! The first stage: a recipe as it is written, in sections of optional keys.

use super::adapter::AdapterSection;
use super::migrate::{SCHEMA, migrate};
use super::objective::ObjectiveSection;
use super::{RecipeError, overrides};
use crate::model::Family;
use crate::units::{ByteSize, Count};
use crate::{Activation, DType, ModelSpec, unique_json};
use serde::de::{self, DeserializeOwned};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use std::fmt;

/// How a recipe is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `.toml`
    Toml,
    /// `.yaml`, `.yml`
    Yaml,
    /// `.json`
    Json,
}

impl Format {
    /// Returns the format of files with this ending (without the dot).
    ///
    /// # Errors
    ///
    /// [`RecipeError::UnknownFormat`].
    pub fn from_extension(extension: &str) -> Result<Self, RecipeError> {
        match extension {
            "toml" => Ok(Self::Toml),
            "yaml" | "yml" => Ok(Self::Yaml),
            "json" => Ok(Self::Json),
            _ => Err(RecipeError::UnknownFormat { extension: extension.to_owned() }),
        }
    }
}

/// A recipe as it is written; what is absent is decided by [`resolve`](Self::resolve).
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[expect(missing_docs, reason = "each section's type says what it is")]
pub struct RecipeFile {
    pub run: RunSection,
    pub model: ModelSection,
    pub objective: ObjectiveSection,
    pub adapter: AdapterSection,
    pub dropout: DropoutSection,
    pub data: DataSection,
    pub optimizer: OptimizerSection,
    pub schedule: ScheduleSection,
    pub batch: BatchSection,
    pub budget: BudgetSection,
    pub eval: EvalSection,
    pub checkpoint: CheckpointSection,
    pub early_stop: EarlyStopSection,
}

/// The run as a whole: `[run]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunSection {
    /// What the run is called in folders and reports; `train` if absent.
    pub name: Option<String>,
    /// Seed of everything random; 0 if absent.
    pub seed: Option<u64>,
    /// Threads; all of the machine's if absent.
    pub threads: Option<usize>,
    /// The run is refused if its plan exceeds this.
    pub memory_limit: Option<ByteSize>,
    /// Which activations are computed again in the backward pass; `auto` if absent.
    pub recompute: Option<Recompute>,
    /// Type of the weights that products read; `f32` if absent. Updates are made in f32.
    pub weights: Option<DType>,
}

/// Which activations are computed again in the backward pass instead of kept: `"auto"`, `"none"`,
/// `"cheap"`, `"blocks"`, or a number of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Everything is kept.
    None,
    /// Results of norms and activations are computed again.
    Cheap,
    /// This many blocks, from the first, keep only their inputs; the others as under `Cheap`.
    Blocks(u32),
    /// As little as needed to stay below the memory limit.
    Auto,
}

impl Recompute {
    /// `"blocks"`: every block keeps only its input.
    pub const ALL_BLOCKS: Self = Self::Blocks(u32::MAX);
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::None => f.write_str("none"),
            Self::Cheap => f.write_str("cheap"),
            Self::Auto => f.write_str("auto"),
            Self::ALL_BLOCKS => f.write_str("blocks"),
            Self::Blocks(count) => write!(f, "{count}"),
        }
    }
}

impl Serialize for Recompute {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Blocks(count) if *self != Self::ALL_BLOCKS => serializer.serialize_u32(count),
            _ => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Recompute {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Clone, Copy)]
        struct Choice;
        impl de::Visitor<'_> for Choice {
            type Value = Recompute;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\", \"none\", \"cheap\", \"blocks\" or a number of blocks")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Recompute, E> {
                let named =
                    [Recompute::Auto, Recompute::None, Recompute::Cheap, Recompute::ALL_BLOCKS];
                let named = named.into_iter().find(|choice| choice.to_string() == name);
                named.ok_or_else(|| E::invalid_value(de::Unexpected::Str(name), &self))
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<Recompute, E> {
                let narrow =
                    u32::try_from(count).ok().filter(|count| (1..u32::MAX).contains(count));
                let refused = || E::invalid_value(de::Unexpected::Unsigned(count), &self);
                narrow.map(Recompute::Blocks).ok_or_else(refused)
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<Recompute, E> {
                let refused = |_| E::invalid_value(de::Unexpected::Signed(count), &self);
                self.visit_u64(u64::try_from(count).map_err(refused)?)
            }
        }
        deserializer.deserialize_any(Choice)
    }
}

/// The model: `[model]`, by the names of `config.json`, or by such a file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// A Hugging Face `config.json` of any family, or the folder that holds it, instead of the keys
    /// below.
    pub config: Option<String>,
    /// A model folder whose weights the run begins with, instead of fresh ones; its `config.json`
    /// describes the model where nothing else does.
    pub initial: Option<String>,
    /// The whole description, as resolving writes it for models that the keys below cannot say.
    pub spec: Option<ModelSpec>,
    /// `llama` or `gpt2`.
    pub family: Option<Family>,
    /// The tokenizer's size if absent.
    pub vocab_size: Option<usize>,
    /// Width of the residual stream.
    pub hidden_size: Option<usize>,
    /// Number of blocks.
    pub num_hidden_layers: Option<usize>,
    /// Query heads.
    pub num_attention_heads: Option<usize>,
    /// Key and value heads; as many as query heads if absent. LLaMA only.
    pub num_key_value_heads: Option<usize>,
    /// Size of a head; an even share of the width if absent. LLaMA only.
    pub head_dim: Option<usize>,
    /// Inner width of the feed-forward part; four times the width for GPT-2 if absent.
    pub intermediate_size: Option<usize>,
    /// Longest sequence; `data.seq_len` if absent.
    pub max_position_embeddings: Option<usize>,
    /// Base of the rotation; 10000 if absent. LLaMA only.
    pub rope_theta: Option<f64>,
    /// 1e-5 if absent. LLaMA only.
    pub rms_norm_eps: Option<f64>,
    /// 1e-5 if absent. GPT-2 only.
    pub layer_norm_epsilon: Option<f64>,
    /// `silu` for LLaMA and `gelu_new` for GPT-2 if absent.
    #[serde(with = "activation_name")]
    pub hidden_act: Option<Activation>,
    /// Biases in attention; false if absent. LLaMA only: GPT-2 always has them.
    pub attention_bias: Option<bool>,
    /// Biases in the feed-forward part; false if absent. LLaMA only.
    pub mlp_bias: Option<bool>,
    /// Whether the head is the embedding; true if absent.
    pub tie_word_embeddings: Option<bool>,
    /// Standard deviation of new weights; 0.02 if absent.
    pub initializer_range: Option<f64>,
}

/// Activations by the names of `config.json`.
mod activation_name {
    use crate::Activation;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    #[expect(clippy::ref_option, reason = "the signature is serde's")]
    pub(super) fn serialize<S: Serializer>(
        activation: &Option<Activation>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        activation.map(Activation::hf_name).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Activation>, D::Error> {
        let Some(name) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        let known = || format!("'{name}', expected one of {}", Activation::HF_NAMES.join(", "));
        Activation::from_hf_name(&name).map(Some).ok_or_else(|| de::Error::custom(known()))
    }
}

/// Probabilities of zeroing values: `[dropout]`; all 0 if absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DropoutSection {
    /// On the sum of the embeddings.
    pub embd: Option<f64>,
    /// On attention probabilities.
    pub attn: Option<f64>,
    /// On what a block adds to the residual stream.
    pub resid: Option<f64>,
}

/// What is learned from: `[data]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// Folder of shards with their manifest.
    pub corpus: Option<String>,
    /// A `tokenizer.json`; the one beside the shards if absent.
    pub tokenizer: Option<String>,
    /// Tokens in a sequence.
    pub seq_len: Option<usize>,
}

/// How weights are updated: `[optimizer]`, AdamW (Loshchilov and Hutter 2019).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerSection {
    /// The highest learning rate; 1e-3 if absent.
    pub learning_rate: Option<f64>,
    /// Memory of the two moments; 0.9 and 0.95 if absent.
    pub betas: Option<[f64; 2]>,
    /// 1e-8 if absent.
    pub eps: Option<f64>,
    /// Decoupled; 0.1 if absent.
    pub weight_decay: Option<f64>,
    /// Which parameters decay; `matrices` if absent.
    pub decay: Option<Decay>,
    /// Gradients are scaled down to this norm; 1 if absent, 0 means never.
    pub max_grad_norm: Option<f64>,
    /// Memory of an average of the weights; none is kept if absent.
    pub ema_decay: Option<f64>,
}

/// Which parameters decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Those of two and more dimensions.
    Matrices,
    /// Matrices, without the embeddings of tokens and positions.
    MatricesWithoutEmbeddings,
    /// Every one.
    All,
}

/// How the learning rate changes: `[schedule]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleSection {
    /// `cosine` if absent.
    pub kind: Option<ScheduleKind>,
    /// Steps of linear rise; 0 if absent.
    pub warmup_steps: Option<u64>,
    /// Steps of decay: for `wsd` the last fifth of the run if absent, for `cosine` all after the
    /// warm-up.
    pub decay_steps: Option<u64>,
    /// Lowest learning rate as a part of the highest; 0.1 if absent.
    pub min_lr_ratio: Option<f64>,
}

/// The shape of the learning rate over steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Half a cosine down.
    Cosine,
    /// Warm-up, stable, linear decay (Hu et al. 2024, <https://arxiv.org/abs/2404.06395>).
    Wsd,
    /// Level after the warm-up.
    Constant,
}

/// Sequences in a step: `[batch]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchSection {
    /// Sequences computed at a time; 8 if absent.
    pub micro_batch_size: Option<u64>,
    /// Sequences in a step; `micro_batch_size · grad_accum_steps` if absent.
    pub global_batch_size: Option<u64>,
    /// Micro batches in a step; 1 if absent.
    pub grad_accum_steps: Option<u64>,
}

/// How long the run is: `[budget]`, exactly one of its keys. An override of one of them does not take
/// the others out: that is a contradiction, and `budget.tokens=null budget.steps=100` resolves it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetSection {
    /// Steps.
    pub steps: Option<u64>,
    /// Tokens, rounded up to whole steps.
    pub tokens: Option<Count>,
    /// Floating point operations, rounded down to whole steps, but at least one.
    pub flops: Option<f64>,
}

/// Validation during the run: `[eval]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalSection {
    /// Steps between evaluations; 250 if absent, 0 means only at the end.
    pub every: Option<u64>,
    /// Tokens of validation data looked at; 1M if absent.
    pub max_tokens: Option<Count>,
}

/// Saving: `[checkpoint]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointSection {
    /// Steps between checkpoints; 250 if absent, 0 means only at the end.
    pub every: Option<u64>,
    /// Latest checkpoints kept; 2 if absent.
    pub keep_last: Option<usize>,
    /// Whether the one with the lowest validation loss is kept; true if absent.
    pub keep_best: Option<bool>,
}

/// Ending before the budget is spent: `[early_stop]`; never if `patience` is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EarlyStopSection {
    /// Evaluations without a lower validation loss before the run ends.
    pub patience: Option<u64>,
    /// By how much a loss must be lower to count; 0 if absent.
    pub min_delta: Option<f64>,
}

/// Longest recipe that is read, in bytes; the longest real ones have a few thousand. YAML's aliases
/// let a text stand for a hundred times as many values as it has.
pub const RECIPE_BYTES_MAX: usize = 64 << 10;

impl RecipeFile {
    /// Reads a recipe of any known schema version.
    ///
    /// # Errors
    ///
    /// [`RecipeError`] naming the section and key concerned, with the nearest name for an unknown
    /// one.
    pub fn parse(text: &str, format: Format) -> Result<Self, RecipeError> {
        if text.len() > RECIPE_BYTES_MAX {
            return Err(RecipeError::TooLong { bytes: text.len(), max: RECIPE_BYTES_MAX });
        }
        let tree = match format {
            Format::Toml => {
                toml::from_str::<Value>(text).map_err(|error| ("TOML", error.to_string()))
            }
            Format::Yaml => {
                serde_yaml_ng::from_str(text).map_err(|error| ("YAML", error.to_string()))
            }
            Format::Json => unique_json::parse(text).map_err(|error| ("JSON", error.to_string())),
        };
        let tree = tree.map_err(|(format, reason)| RecipeError::Parse { format, reason })?;
        let Value::Object(sections) = tree else {
            return Err(RecipeError::MissingSchema);
        };
        Self::from_sections(migrate(sections)?)
    }

    /// Applies overrides `section.key=value`, in order; values are in TOML's syntax, and a value
    /// that is not is a text. `section.key=null` takes the key out. No other key changes.
    ///
    /// # Errors
    ///
    /// [`RecipeError::BadOverride`], or as from [`parse`](Self::parse) for its key and value.
    pub fn with_overrides(&self, overrides: &[impl AsRef<str>]) -> Result<Self, RecipeError> {
        let mut sections = self.to_sections();
        for text in overrides {
            overrides::apply(&mut sections, text.as_ref())?;
        }
        Self::from_sections(sections)
    }

    /// The recipe as TOML, with its schema; absent keys are left out.
    pub fn to_toml(&self) -> String {
        let mut tree = Map::new();
        tree.insert("schema".to_owned(), SCHEMA.into());
        tree.extend(self.to_sections());
        toml::to_string(&tree).expect("sections of numbers and texts are TOML")
    }

    /// Sections and keys that are set.
    pub(super) fn to_sections(&self) -> Map<String, Value> {
        let tree = serde_json::to_value(self).expect("sections of numbers and texts are JSON");
        let Value::Object(sections) = tree else { unreachable!("a struct is an object") };
        let sections = sections.into_iter().map(|(name, section)| (name, set(section)));
        sections.filter(|(_, section)| section.as_object().is_some_and(|s| !s.is_empty())).collect()
    }

    fn from_sections(mut sections: Map<String, Value>) -> Result<Self, RecipeError> {
        // Its keys all have defaults, and it is there or not by them.
        if sections.get("adapter").and_then(Value::as_object).is_some_and(Map::is_empty) {
            return Err(RecipeError::Missing { key: "adapter.r" });
        }
        let mut take = |name: &'static str| (name, sections.remove(name));
        let file = Self {
            run: read_section(take("run"))?,
            model: read_section(take("model"))?,
            objective: read_section(take("objective"))?,
            adapter: read_section(take("adapter"))?,
            dropout: read_section(take("dropout"))?,
            data: read_section(take("data"))?,
            optimizer: read_section(take("optimizer"))?,
            schedule: read_section(take("schedule"))?,
            batch: read_section(take("batch"))?,
            budget: read_section(take("budget"))?,
            eval: read_section(take("eval"))?,
            checkpoint: read_section(take("checkpoint"))?,
            early_stop: read_section(take("early_stop"))?,
        };
        match sections.into_iter().next() {
            None => Ok(file),
            Some((section, _)) => {
                let nearest =
                    nearest(&section, Self::known_keys().iter().map(|(name, _)| name.clone()));
                Err(RecipeError::UnknownSection { section, nearest })
            }
        }
    }

    /// Every section with its keys.
    pub(super) fn known_keys() -> Vec<(String, Vec<String>)> {
        let tree = serde_json::to_value(Self::default()).expect("absent keys are JSON");
        let Value::Object(sections) = tree else { unreachable!("a struct is an object") };
        let keys = |section: Value| match section {
            Value::Object(keys) => keys.into_iter().map(|(key, _)| key).collect(),
            _ => Vec::new(),
        };
        sections.into_iter().map(|(name, section)| (name, keys(section))).collect()
    }
}

/// What is set of a value: TOML has no null, and what is absent is read as it.
fn set(value: Value) -> Value {
    match value {
        Value::Object(keys) => {
            let keys = keys.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(keys.map(|(key, value)| (key, set(value))).collect())
        }
        other => other,
    }
}

/// Reads one section key by key, so that an error can name the key.
fn read_section<T: DeserializeOwned + Default>(
    (name, section): (&'static str, Option<Value>),
) -> Result<T, RecipeError> {
    let keys = match section {
        None | Some(Value::Null) => return Ok(T::default()),
        Some(Value::Object(keys)) => keys,
        Some(other) => {
            return Err(RecipeError::WrongType {
                key: name.to_owned(),
                reason: format!("it is a section, not the value {other}"),
            });
        }
    };
    let known = RecipeFile::known_keys();
    for (key, value) in &keys {
        let exists = known.iter().any(|(section, keys)| section == name && keys.contains(key));
        if !exists {
            return Err(unknown_key(name, key, &known));
        }
        if value.is_null() {
            return Err(RecipeError::WrongType {
                key: format!("{name}.{key}"),
                reason: "it has no value, or one that is not a finite number".to_owned(),
            });
        }
        let alone = Map::from_iter([(key.clone(), value.clone())]);
        serde_json::from_value::<T>(Value::Object(alone)).map_err(|error| {
            RecipeError::WrongType { key: format!("{name}.{key}"), reason: in_words(&error) }
        })?;
    }
    serde_json::from_value(Value::Object(keys))
        .map_err(|error| RecipeError::WrongType { key: name.to_owned(), reason: in_words(&error) })
}

/// What serde says, without the names of Rust's types.
fn in_words(error: &impl fmt::Display) -> String {
    let text = error.to_string();
    let Some((found, expected)) = text.rsplit_once("expected ") else { return text };
    let expected = match expected {
        "f64" | "f32" => "a number",
        "u64" | "u32" | "usize" => "a whole number, 0 or more",
        other => other,
    };
    format!("{found}expected {expected}")
}

/// Refuses a key that does not exist.
pub(super) fn check_key(section: &str, key: &str) -> Result<(), RecipeError> {
    let known = RecipeFile::known_keys();
    match known.iter().find(|(name, _)| name == section) {
        Some((_, keys)) if keys.iter().any(|known| known == key) => Ok(()),
        _ => Err(unknown_key(section, key, &known)),
    }
}

/// Suggests a key of the same section, or the same key of another one.
fn unknown_key(section: &str, key: &str, known: &[(String, Vec<String>)]) -> RecipeError {
    let own = known.iter().filter(|(name, _)| name == section);
    let own = own.flat_map(|(name, keys)| keys.iter().map(move |key| (name, key)));
    let elsewhere = known.iter().find(|(_, keys)| keys.iter().any(|known| known == key));
    let near =
        nearest(key, own.map(|(_, key)| key.clone())).map(|near| format!("{section}.{near}"));
    let exact = elsewhere.map(|(name, _)| format!("{name}.{key}"));
    let all = known.iter().flat_map(|(_, keys)| keys.iter().cloned());
    let far = || {
        let near = nearest(key, all)?;
        let (name, _) = known.iter().find(|(_, keys)| keys.contains(&near))?;
        Some(format!("{name}.{near}"))
    };
    RecipeError::UnknownKey {
        section: section.to_owned(),
        key: key.to_owned(),
        nearest: exact.or(near).or_else(far),
    }
}

/// The most similar of `names`, if it is similar at all.
fn nearest(name: &str, names: impl Iterator<Item = String>) -> Option<String> {
    /// Below this, a suggestion confuses more than it helps.
    const SIMILARITY_MIN: f64 = 0.75;
    let scored = names.map(|candidate| (strsim::jaro_winkler(name, &candidate), candidate));
    let best = scored.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
    (best.0 >= SIMILARITY_MIN).then_some(best.1)
}

//! Low-rank adapters, as data: PEFT's `adapter_config.json` (Hu et al. 2021,
//! <https://arxiv.org/abs/2106.09685>).
//!
//! A projection `W` of a base model becomes `W + s · B · A` with `A: [r, inputs]`,
//! `B: [outputs, r]` and `s = lora_alpha / r` (`lora_alpha / √r` under `use_rslora`, Kalajdzievski
//! 2023). Everything in the file that changes numbers is honored or refused by name.
//! Which modules its names mean is decided as PEFT 0.21 decides it (`check_target_module_exists`,
//! `get_pattern_key`, `_inject_parameters`).

mod pattern;

use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use crate::Hint;
use crate::unique_json;

pub use pattern::{NamePattern, Patterns};
use pattern::{PATTERNS_MAX, too_many};

/// Name of the file that describes an adapter.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
/// Ranks that an adapter may have.
pub const RANKS: RangeInclusive<usize> = 1..=4096;
/// The value of `target_modules` that means every projection but the head over the vocabulary.
pub const ALL_LINEAR: &str = "all-linear";

/// Which projections of a model have an adapter, and how large it is.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    /// `r`, where no pattern says otherwise.
    pub r: usize,
    /// `lora_alpha`, where no pattern says otherwise.
    pub lora_alpha: f64,
    /// Probability with which inputs of an adapter are zeroed in training.
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / √r`.
    pub use_rslora: bool,
    /// Which modules of the family have one.
    pub target_modules: TargetModules,
    /// Parameters that have one, by the names of transformers 5, or what these end in after a dot:
    /// stacked experts, which are no modules there, and routers.
    pub target_parameters: Vec<String>,
    /// Modules that have none though they are among `target_modules`.
    pub exclude_modules: Option<ModuleNames>,
    /// Blocks whose modules have adapters; all of them if absent or empty.
    pub layers_to_transform: Option<Vec<usize>>,
    /// What stands before the number of a block; anything if empty.
    pub layers_pattern: Vec<NamePattern>,
    /// Ranks of modules and parameters whose name, or what follows one of its dots, the key matches.
    pub rank_pattern: Patterns<usize>,
    /// `lora_alpha` of modules and parameters, likewise.
    pub alpha_pattern: Patterns<f64>,
    /// The model the adapter was made for, as its author named it.
    pub base_model_name_or_path: Option<String>,
}

/// Which modules have an adapter.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetModules {
    /// Every projection but the head over the vocabulary, as PEFT has it: in models with experts the
    /// experts, their routers and the attention.
    AllLinear,
    /// Modules whose name is, or ends with a dot and, one of these.
    Named(Vec<String>),
    /// Modules whose whole name matches.
    Matching(NamePattern),
}

/// Some modules.
#[derive(Clone, Debug, PartialEq)]
pub enum ModuleNames {
    /// Modules whose name is, or ends with a dot and, one of these.
    Listed(Vec<String>),
    /// Modules whose whole name matches.
    Matching(NamePattern),
}

impl ModuleNames {
    fn has(&self, module: &str) -> bool {
        match self {
            Self::Listed(names) => names.iter().any(|name| ends_in(module, name)),
            Self::Matching(pattern) => pattern.matches(module),
        }
    }

    fn to_json(&self) -> Value {
        match self {
            Self::Listed(names) => json!(names),
            Self::Matching(pattern) => json!(pattern.text()),
        }
    }
}

/// An `adapter_config.json` that cannot be honored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoraError {
    /// The text is no JSON object.
    #[error("{ADAPTER_CONFIG_FILE} is not a JSON object: {reason}")]
    NotJson {
        /// What is wrong.
        reason: String,
    },
    /// A field is missing or has a value that no adapter can have.
    #[error("'{field}' must be {expected}, not {actual}")]
    Field {
        /// Its name.
        field: &'static str,
        /// What belongs there.
        expected: &'static str,
        /// What was found.
        actual: String,
    },
    /// The file asks for something that is not built.
    #[error("'{field}' = {value} is not supported")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        value: String,
    },
    /// A pattern of names cannot be used.
    #[error("'{field}' has the pattern {pattern}, which cannot be used: {reason}")]
    Pattern {
        /// The field.
        field: &'static str,
        /// The pattern.
        pattern: String,
        /// Why not.
        reason: String,
    },
    /// Dropout beside parameters, where PEFT knows none.
    #[error("'lora_dropout' = {dropout} cannot be had beside 'target_parameters'")]
    DropoutBesideParameters {
        /// The probability, as it is written.
        dropout: String,
    },
}

impl Hint for LoraError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Pattern { .. } => vec!["list the modules by name".to_owned()],
            Self::DropoutBesideParameters { .. } => {
                let hint = "PEFT knows none there; name the experts' modules to train with dropout";
                vec![hint.to_owned()]
            }
            Self::Unsupported { field, .. } if field == INIT => {
                let hint = "it belongs to a base model with changed weights; save it converted to LoRA, with \
                            PEFT's path_initial_model_for_weight_conversion";
                vec![hint.to_owned()]
            }
            Self::Unsupported { .. } => {
                vec!["plain LoRA and rsLoRA adapters in PEFT's layout can be used".to_owned()]
            }
            Self::NotJson { .. } | Self::Field { .. } => Vec::new(),
        }
    }
}

/// Fields that change no number of a plain `LoRA`, whatever they hold.
const HARMLESS: [&str; 18] = [
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    // Says how the base weight is stored; the base model's own file says so as well.
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Field that says where the training of an adapter began.
const INIT: &str = "init_lora_weights";
/// Beginnings that leave the base model's weights as they are; others belong to changed weights.
const HARMLESS_INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl LoraSpec {
    /// An adapter of one rank on the modules named, `lora_alpha` twice the rank.
    pub fn new(r: usize, target_modules: TargetModules) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "ranks are small")]
        let lora_alpha = 2.0 * r as f64;
        Self {
            r,
            lora_alpha,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules,
            target_parameters: Vec::new(),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            base_model_name_or_path: None,
        }
    }

    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    ///
    /// [`LoraError`] naming the first field that is wrong or cannot be honored.
    pub fn from_peft_json(text: &str) -> Result<Self, LoraError> {
        let not_json = |reason: String| LoraError::NotJson { reason };
        let value = unique_json::parse(text).map_err(|error| not_json(error.to_string()))?;
        let Value::Object(fields) = value else {
            return Err(not_json("it holds something else".to_owned()));
        };
        Reader { fields: &fields }.read()
    }

    /// Writes `adapter_config.json`, as PEFT reads it.
    pub fn to_peft_json(&self) -> Value {
        let target_modules = match &self.target_modules {
            TargetModules::AllLinear => json!(ALL_LINEAR),
            TargetModules::Named(names) => json!(names),
            TargetModules::Matching(pattern) => json!(pattern.text()),
        };
        let target_parameters = Some(&self.target_parameters).filter(|names| !names.is_empty());
        let layers_pattern: Vec<&str> = self.layers_pattern.iter().map(NamePattern::text).collect();
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": target_modules,
            "target_parameters": target_parameters,
            "exclude_modules": self.exclude_modules.as_ref().map(ModuleNames::to_json),
            "layers_to_transform": self.layers_to_transform,
            "layers_pattern": Some(layers_pattern).filter(|patterns| !patterns.is_empty()),
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
        })
    }

    /// The rank of the adapter of a module of block `layer`, or `None` where it has none. `module` is
    /// the family's full name of it; which modules are linear is the model's to say. Where only some
    /// blocks have adapters, modules outside of them have one only if a target is their full name, as
    /// PEFT has it.
    pub fn rank(&self, module: &str, layer: Option<usize>) -> Option<usize> {
        if self.exclude_modules.as_ref().is_some_and(|names| names.has(module)) {
            return None;
        }
        let is_target = match &self.target_modules {
            TargetModules::AllLinear => self.transforms(module, layer),
            TargetModules::Matching(pattern) => pattern.matches(module),
            TargetModules::Named(names) => {
                names.iter().any(|name| name == module)
                    || names.iter().any(|name| ends_in(module, name))
                        && self.transforms(module, layer)
            }
        };
        is_target.then(|| self.rank_pattern.get(module).unwrap_or(self.r))
    }

    /// Whether the block of a module is one of those that have adapters.
    fn transforms(&self, module: &str, layer: Option<usize>) -> bool {
        let layers = self.layers_to_transform.as_ref().filter(|layers| !layers.is_empty());
        let Some(layers) = layers else { return true };
        let layer = match &self.layers_pattern[..] {
            [] => layer,
            patterns => patterns.iter().find_map(|pattern| pattern.number(module)).flatten(),
        };
        layer.is_some_and(|layer| layers.contains(&layer))
    }

    /// The rank of the adapter of a parameter, or `None` where it has none; `parameter` is its full name
    /// in transformers 5. Neither blocks nor exclusions count for these, as PEFT has it.
    pub fn parameter_rank(&self, parameter: &str) -> Option<usize> {
        let is_target = self.target_parameters.iter().any(|name| ends_in(parameter, name));
        is_target.then(|| self.rank_pattern.get(parameter).unwrap_or(self.r))
    }

    /// The factor `s` of the adapter of a module or a parameter.
    pub fn scale(&self, name: &str, rank: usize) -> f64 {
        let alpha = self.alpha_pattern.get(name).unwrap_or(self.lora_alpha);
        #[expect(clippy::cast_precision_loss, reason = "ranks are small")]
        let rank = rank as f64;
        alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// Whether a module's name is `name` or ends in `.name`.
fn ends_in(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

struct Reader<'a> {
    fields: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn read(&self) -> Result<LoraSpec, LoraError> {
        self.refuse()?;
        let r = self.field("r", "a rank from 1 to 4096", |value| {
            usize::try_from(value.as_u64()?).ok().filter(|r| RANKS.contains(r))
        })?;
        let positive = |value: &Value| value.as_f64().filter(|alpha| *alpha > 0.0);
        let lora_alpha = self.field("lora_alpha", "a positive number", positive)?;
        let target_parameters =
            self.or("target_parameters", Vec::new(), "a list of names of parameters", texts)?;
        let mut spec = LoraSpec::new(r, self.target_modules(!target_parameters.is_empty())?);
        spec.lora_alpha = lora_alpha;
        spec.target_parameters = target_parameters;
        spec.lora_dropout = self.or("lora_dropout", 0.0, "a probability below 1", |value| {
            value.as_f64().filter(|p| (0.0..1.0).contains(p))
        })?;
        if spec.lora_dropout > 0.0 && !spec.target_parameters.is_empty() {
            let dropout = spec.lora_dropout.to_string();
            return Err(LoraError::DropoutBesideParameters { dropout });
        }
        spec.use_rslora = self.or("use_rslora", false, "true or false", Value::as_bool)?;
        spec.exclude_modules = self.exclude_modules()?;
        self.read_layers(&mut spec)?;
        spec.rank_pattern = self.patterns("rank_pattern", |value| {
            usize::try_from(value.as_u64()?).ok().filter(|r| RANKS.contains(r))
        })?;
        spec.alpha_pattern = self.patterns("alpha_pattern", positive)?;
        let base = self.fields.get("base_model_name_or_path").and_then(Value::as_str);
        spec.base_model_name_or_path = base.map(str::to_owned);
        Ok(spec)
    }

    /// Which blocks have adapters.
    fn read_layers(&self, spec: &mut LoraSpec) -> Result<(), LoraError> {
        let (field, expected) = ("layers_to_transform", "a block or a list of blocks");
        spec.layers_to_transform = self.or(field, None, expected, |value| {
            let one = |value: &Value| usize::try_from(value.as_u64()?).ok();
            let list = match value {
                Value::Array(list) => list.iter().map(one).collect::<Option<Vec<_>>>()?,
                value => vec![one(value)?],
            };
            Some(Some(list))
        })?;
        let (field, expected) = ("layers_pattern", "a pattern or a list of patterns");
        let patterns: Vec<String> = self.or(field, Vec::new(), expected, |value| match value {
            Value::String(pattern) => Some(vec![pattern.clone()]),
            value => texts(value),
        })?;
        for text in patterns.iter().filter(|text| !text.is_empty()) {
            if spec.layers_pattern.len() == PATTERNS_MAX {
                let (pattern, reason) = (text.clone(), too_many());
                return Err(LoraError::Pattern { field, pattern, reason });
            }
            let pattern = compiled(field, text, NamePattern::before_number)?;
            spec.layers_pattern.push(pattern);
        }
        // What PEFT refuses.
        let wrong = |field, expected| {
            let actual = self.fields[field].to_string();
            Err(LoraError::Field { field, expected, actual })
        };
        let has_pattern = !spec.layers_pattern.is_empty();
        let expected = "absent where 'target_modules' is a pattern";
        match (&spec.target_modules, &spec.layers_to_transform) {
            (TargetModules::Matching(_), Some(_)) => wrong("layers_to_transform", expected),
            (TargetModules::Matching(_), None) if has_pattern => wrong(field, expected),
            (_, None) if has_pattern => wrong(field, "absent without 'layers_to_transform'"),
            _ => Ok(()),
        }
    }

    /// Everything that makes another model than plain `LoRA`.
    fn refuse(&self) -> Result<(), LoraError> {
        let known = [
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "rank_pattern",
            "alpha_pattern",
        ];
        for (field, value) in self.fields {
            let neutral = match field.as_str() {
                "peft_type" => value == "LORA",
                "bias" => value == "none",
                INIT => leaves_the_base(value),
                field if known.contains(&field) || HARMLESS.contains(&field) => true,
                _ => is_nothing(value),
            };
            if !neutral {
                let (field, value) = (field.clone(), value.to_string());
                return Err(LoraError::Unsupported { field, value });
            }
        }
        Ok(())
    }

    fn target_modules(&self, may_be_empty: bool) -> Result<TargetModules, LoraError> {
        let field = "target_modules";
        match self.fields.get(field) {
            Some(Value::String(word)) if word.eq_ignore_ascii_case(ALL_LINEAR) => {
                Ok(TargetModules::AllLinear)
            }
            Some(Value::String(text)) => {
                compiled(field, text, NamePattern::whole).map(TargetModules::Matching)
            }
            None | Some(Value::Null) if may_be_empty => Ok(TargetModules::Named(Vec::new())),
            _ => self.field(field, "a list of module names", |value| {
                let names = texts(value).filter(|names| may_be_empty || !names.is_empty());
                names.map(TargetModules::Named)
            }),
        }
    }

    fn exclude_modules(&self) -> Result<Option<ModuleNames>, LoraError> {
        let field = "exclude_modules";
        if let Some(Value::String(text)) = self.fields.get(field).filter(|value| *value != "") {
            let pattern = compiled(field, text, NamePattern::whole)?;
            return Ok(Some(ModuleNames::Matching(pattern)));
        }
        self.or(field, None, "a pattern or a list of module names", |value| match value {
            Value::String(_) => Some(None),
            value => texts(value)
                .map(|names| Some(ModuleNames::Listed(names)).filter(|_| !is_nothing(value))),
        })
    }

    fn patterns<T: Copy>(
        &self,
        field: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Patterns<T>, LoraError> {
        let entries: Vec<(String, T)> =
            self.or(field, Vec::new(), "an object of numbers", |value| {
                let entries = value.as_object()?.iter();
                entries.map(|(key, value)| Some((key.clone(), read(value)?))).collect()
            })?;
        let mut patterns = Patterns::default();
        for (pattern, value) in entries {
            patterns.push(&pattern, value).map_err(|reason| LoraError::Pattern {
                field,
                pattern,
                reason,
            })?;
        }
        Ok(patterns)
    }

    /// A field that may be absent or null.
    fn or<T>(
        &self,
        field: &'static str,
        default: T,
        expected: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, LoraError> {
        match self.fields.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.field(field, expected, read),
        }
    }

    fn field<T>(
        &self,
        field: &'static str,
        expected: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, LoraError> {
        let value = self.fields.get(field).unwrap_or(&Value::Null);
        let wrong = || LoraError::Field { field, expected, actual: value.to_string() };
        read(value).ok_or_else(wrong)
    }
}

/// A list of texts.
fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
}

fn compiled(
    field: &'static str,
    text: &str,
    compile: impl Fn(&str) -> Result<NamePattern, String>,
) -> Result<NamePattern, LoraError> {
    let pattern = || text.to_owned();
    compile(text).map_err(|reason| LoraError::Pattern { field, pattern: pattern(), reason })
}

/// Whether an adapter that began so is one of the base model as it is.
fn leaves_the_base(init: &Value) -> bool {
    match init {
        Value::Null | Value::Bool(_) => true,
        Value::String(name) => HARMLESS_INITS.iter().any(|init| name.eq_ignore_ascii_case(init)),
        _ => false,
    }
}

/// Null, false, zero or empty.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

#[cfg(test)]
mod tests;

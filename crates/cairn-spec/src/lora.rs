//! Low-rank adapters, as data: PEFT's `adapter_config.json` (Hu et al. 2021,
//! <https://arxiv.org/abs/2106.09685>).
//!
//! A projection `W` of a base model becomes `W + s · B · A` with `A: [r, inputs]`,
//! `B: [outputs, r]` and `s = lora_alpha / r` (`lora_alpha / √r` under `use_rslora`, Kalajdzievski
//! 2023). Everything in the file that changes numbers is honored or refused by name.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use crate::Hint;
use crate::unique_json;

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
    /// Blocks that have adapters; all of them if absent or empty.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Ranks of modules whose name ends in the key.
    pub rank_pattern: BTreeMap<String, usize>,
    /// `lora_alpha` of modules whose name ends in the key.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// The model the adapter was made for, as its author named it.
    pub base_model_name_or_path: Option<String>,
}

/// Which modules have an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// Every projection but the head over the vocabulary, as PEFT has it: in models with experts the
    /// experts, their routers and the attention.
    AllLinear,
    /// Modules whose name is, or ends with a dot and, one of these.
    Named(Vec<String>),
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
}

impl Hint for LoraError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Unsupported { field, .. } if field == "target_modules" => {
                vec!["list the modules by name, or say \"all-linear\"".to_owned()]
            }
            Self::Unsupported { .. } => {
                vec!["plain LoRA and rsLoRA adapters in PEFT's layout can be used".to_owned()]
            }
            Self::NotJson { .. } | Self::Field { .. } => Vec::new(),
        }
    }
}

/// Fields that change no number of a plain `LoRA`, whatever they hold.
const HARMLESS: [&str; 20] = [
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    // Says how the base weight is stored; the base model's own file says so as well.
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "layers_pattern",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

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
            layers_to_transform: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
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
        };
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": target_modules,
            "layers_to_transform": self.layers_to_transform,
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
        let layers = self.layers_to_transform.as_ref().filter(|layers| !layers.is_empty());
        let is_in = |layer| layers.is_none_or(|layers| layers.contains(&layer));
        let may_have_one = layers.is_none() || layer.is_some_and(is_in);
        let is_target = match &self.target_modules {
            TargetModules::AllLinear => may_have_one,
            TargetModules::Named(names) => {
                let is_named = |name: &String| may_have_one && ends_in(module, name);
                names.iter().any(|name| name == module || is_named(name))
            }
        };
        is_target.then(|| pattern(&self.rank_pattern, module).unwrap_or(self.r))
    }

    /// The factor `s` of a module's adapter.
    pub fn scale(&self, module: &str, rank: usize) -> f64 {
        let alpha = pattern(&self.alpha_pattern, module).unwrap_or(self.lora_alpha);
        #[expect(clippy::cast_precision_loss, reason = "ranks are small")]
        let rank = rank as f64;
        alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

fn pattern<T: Copy>(patterns: &BTreeMap<String, T>, module: &str) -> Option<T> {
    patterns.iter().find(|(key, _)| ends_in(module, key)).map(|(_, &value)| value)
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
        let mut spec = LoraSpec::new(r, self.target_modules()?);
        spec.lora_alpha = lora_alpha;
        spec.lora_dropout = self.or("lora_dropout", 0.0, "a probability below 1", |value| {
            value.as_f64().filter(|p| (0.0..1.0).contains(p))
        })?;
        spec.use_rslora = self.or("use_rslora", false, "true or false", Value::as_bool)?;
        spec.layers_to_transform =
            self.or("layers_to_transform", None, "a block or a list of blocks", |value| {
                let one = |value: &Value| usize::try_from(value.as_u64()?).ok();
                let list = match value {
                    Value::Array(list) => list.iter().map(one).collect::<Option<Vec<_>>>()?,
                    value => vec![one(value)?],
                };
                Some(Some(list))
            })?;
        spec.rank_pattern = self.patterns("rank_pattern", |value| {
            usize::try_from(value.as_u64()?).ok().filter(|r| RANKS.contains(r))
        })?;
        spec.alpha_pattern = self.patterns("alpha_pattern", positive)?;
        let base = self.fields.get("base_model_name_or_path").and_then(Value::as_str);
        spec.base_model_name_or_path = base.map(str::to_owned);
        Ok(spec)
    }

    /// Everything that makes another model than plain `LoRA`.
    fn refuse(&self) -> Result<(), LoraError> {
        let known = [
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "target_modules",
            "layers_to_transform",
            "rank_pattern",
            "alpha_pattern",
        ];
        for (field, value) in self.fields {
            let neutral = match field.as_str() {
                "peft_type" => value == "LORA",
                "bias" => value == "none",
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

    fn target_modules(&self) -> Result<TargetModules, LoraError> {
        let expected = "a list of module names";
        match self.fields.get("target_modules") {
            Some(Value::String(word)) if word == ALL_LINEAR => Ok(TargetModules::AllLinear),
            Some(value @ Value::String(_)) => Err(LoraError::Unsupported {
                field: "target_modules".to_owned(),
                value: value.to_string(),
            }),
            _ => self.field("target_modules", expected, |value| {
                let names = value.as_array()?.iter();
                let names: Option<Vec<String>> =
                    names.map(|name| name.as_str().map(str::to_owned)).collect();
                names.filter(|names| !names.is_empty()).map(TargetModules::Named)
            }),
        }
    }

    /// Patterns whose keys are plain ends of names; PEFT allows regular expressions there.
    fn patterns<T>(
        &self,
        field: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<BTreeMap<String, T>, LoraError> {
        let patterns = self.or(field, BTreeMap::new(), "an object of numbers", |value| {
            let entries = value.as_object()?.iter();
            entries.map(|(key, value)| Some((key.clone(), read(value)?))).collect()
        })?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        match patterns.keys().find(|key| !key.chars().all(plain)) {
            None => Ok(patterns),
            Some(key) => {
                Err(LoraError::Unsupported { field: field.to_owned(), value: key.clone() })
            }
        }
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
mod tests {
    use super::*;

    fn read(change: impl FnOnce(&mut Map<String, Value>)) -> Result<LoraSpec, LoraError> {
        let mut value =
            LoraSpec::new(8, TargetModules::Named(vec!["q_proj".into()])).to_peft_json();
        change(value.as_object_mut().unwrap());
        LoraSpec::from_peft_json(&value.to_string())
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut spec = LoraSpec::new(4, TargetModules::AllLinear);
        spec.use_rslora = true;
        spec.layers_to_transform = Some(vec![1, 3]);
        spec.rank_pattern.insert("self_attn.q_proj".into(), 2);
        spec.alpha_pattern.insert("v_proj".into(), 3.5);
        spec.base_model_name_or_path = Some("base".into());
        assert_eq!(LoraSpec::from_peft_json(&spec.to_peft_json().to_string()), Ok(spec));
    }

    #[test]
    fn names_are_matched_whole() {
        let spec = read(|_| {}).unwrap();
        assert_eq!(spec.rank("model.layers.0.self_attn.q_proj", Some(0)), Some(8));
        assert_eq!(spec.rank("q_proj", Some(0)), Some(8));
        assert_eq!(spec.rank("model.layers.0.self_attn.eq_proj", Some(0)), None);
        let spec = read(|fields| {
            fields.insert("rank_pattern".into(), json!({ "0.self_attn.q_proj": 2 }));
            fields.insert("alpha_pattern".into(), json!({ "q_proj": 6 }));
        });
        let spec = spec.unwrap();
        assert_eq!(spec.rank("model.layers.0.self_attn.q_proj", Some(0)), Some(2));
        assert_eq!(spec.rank("model.layers.1.self_attn.q_proj", Some(1)), Some(8));
        assert!((spec.scale("model.layers.0.self_attn.q_proj", 2) - 3.0).abs() < 1e-12);
    }

    /// As `check_target_module_exists` of PEFT 0.21.
    #[test]
    fn full_names_count_in_every_block_and_no_blocks_are_all() {
        let head = |layers: Value| {
            let spec = read(|fields| {
                fields.insert("target_modules".into(), json!(["lm_head", "a.0.k_proj", "q_proj"]));
                fields.insert("layers_to_transform".into(), layers);
            });
            let spec = spec.unwrap();
            [
                ("lm_head", None),
                ("x.lm_head", None),
                ("a.0.k_proj", Some(0)),
                ("a.0.q_proj", Some(0)),
            ]
            .map(|(module, layer)| spec.rank(module, layer).is_some())
        };
        assert_eq!(head(json!([1])), [true, false, true, false]);
        assert_eq!(head(json!([0])), [true, false, true, true]);
        assert_eq!(head(json!([])), [true; 4]);
        assert_eq!(head(Value::Null), [true; 4]);
    }

    #[test]
    fn what_makes_another_model_is_refused_by_name() {
        for (field, value) in [
            ("use_dora", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("bias", json!("all")),
            ("peft_type", json!("IA3")),
            ("target_modules", json!(".*q_proj")),
            ("something_new", json!(7)),
            ("rank_pattern", json!({ "layers\\.[0-3]": 2 })),
        ] {
            let error = read(|fields| {
                fields.insert(field.into(), value);
            });
            assert!(
                matches!(error, Err(LoraError::Unsupported { field: ref found, .. }) if found == field)
            );
        }
        for (field, value) in [
            ("r", json!(0)),
            ("r", json!(1e9)),
            ("lora_alpha", json!(-1)),
            ("lora_dropout", json!(1)),
            ("target_modules", json!([])),
            ("layers_to_transform", json!("all")),
        ] {
            let error = read(|fields| {
                fields.insert(field.into(), value);
            });
            assert!(matches!(error, Err(LoraError::Field { field: found, .. }) if found == field));
        }
    }
}

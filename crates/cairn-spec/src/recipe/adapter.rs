//! Low-rank adapters to train beside a frozen model: `[adapter]`, by PEFT's names.

use super::{RecipeError, RecipeFile};
use crate::lora::{ALL_LINEAR, LoraError, ModuleNames, NamePattern, Patterns};
use crate::{DType, LoraSpec, TargetModules};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Keys that PEFT does not have.
const OWN: [&str; 2] = ["base_encoding", "initial"];

/// A low-rank adapter (Hu et al. 2021) to train instead of the model: `[adapter]`, by the names of
/// PEFT's `LoraConfig`; the model itself is `model.initial`. Without a key there is no adapter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterSection {
    /// Folder of an adapter to go on from, as PEFT saves it; keys that are absent are then as its
    /// `adapter_config.json` has them. Fresh if absent.
    pub initial: Option<String>,
    /// Rank; 8 if absent.
    pub r: Option<usize>,
    /// Scale, over the rank; 8 if absent.
    pub lora_alpha: Option<f64>,
    /// Probability with which inputs of an adapter are zeroed in training; 0 if absent.
    pub lora_dropout: Option<f64>,
    /// Scale by `lora_alpha / √r` (Kalajdzievski 2023); false if absent.
    pub use_rslora: Option<bool>,
    /// Names of modules, a pattern of them, or `"all-linear"`: every projection but the head; in models
    /// with experts these, their routers and the attention. If absent, `"all-linear"`; none where there
    /// are `target_parameters`.
    pub target_modules: Option<TargetModulesKey>,
    /// Names of stacked parameters of transformers 5, such as `experts.gate_up_proj`; PEFT knows no dropout
    /// beside them.
    pub target_parameters: Option<Vec<String>>,
    /// Names of modules, or a pattern of them, that have none.
    pub exclude_modules: Option<TargetModulesKey>,
    /// Blocks that have adapters; all if absent.
    pub layers_to_transform: Option<Vec<usize>>,
    /// What stands before the number of a block: a pattern, or several.
    pub layers_pattern: Option<TargetModulesKey>,
    /// Ranks of modules whose name ends in what the key matches; of several, the first in alphabetical
    /// order counts.
    pub rank_pattern: Option<Patterns<usize>>,
    /// `lora_alpha` of modules whose name ends in what the key matches.
    pub alpha_pattern: Option<Patterns<f64>>,
    /// Only `"none"`: biases of the model are frozen like its weights.
    pub bias: Option<String>,
    /// How the frozen matrices are held: `f32`, `bf16`, `q8` or `nf4`; `f32` if absent.
    pub base_encoding: Option<BaseEncoding>,
}

/// `"all-linear"` or a pattern, or a list of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModulesKey {
    /// A word.
    Word(String),
    /// Names of modules.
    Names(Vec<String>),
}

/// How the matrices of a frozen model are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseEncoding {
    /// Four bytes a weight.
    F32,
    /// Two bytes a weight.
    Bf16,
    /// Signed bytes with a scale for every 32 of them.
    Q8,
    /// Four bits, quantiles of the normal distribution, with a scale for every 64 of them (Dettmers et
    /// al. 2023, <https://arxiv.org/abs/2305.14314>).
    Nf4,
}

/// An adapter to train.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Which projections have one, and how large it is.
    pub lora: LoraSpec,
    /// How the frozen matrices are held.
    pub base_encoding: BaseEncoding,
    /// Folder of the adapter whose weights it begins with; fresh ones if absent.
    pub initial: Option<String>,
}

impl RecipeFile {
    /// The folder of the adapter to go on from, if there is one;
    /// [`with_adapter_config`](Self::with_adapter_config) takes its description.
    pub fn initial_adapter(&self) -> Option<&str> {
        self.adapter.initial.as_deref()
    }

    /// The recipe with what it leaves open of `[adapter]` as the text of an `adapter_config.json` has it.
    ///
    /// # Errors
    ///
    /// [`RecipeError::Adapter`] if it describes no adapter that can be trained here.
    pub fn with_adapter_config(&self, text: &str) -> Result<Self, RecipeError> {
        let lora = LoraSpec::from_peft_json(text).map_err(RecipeError::Adapter)?;
        let sorted = [
            ("rank_pattern", lora.rank_pattern.is_sorted()),
            ("alpha_pattern", lora.alpha_pattern.is_sorted()),
        ];
        if let Some((field, _)) = sorted.into_iter().find(|(_, is_sorted)| !is_sorted) {
            let expected = "in alphabetical order, as PEFT saves it and a recipe has it";
            let actual = "in another".to_owned();
            return Err(RecipeError::Adapter(LoraError::Field { field, expected, actual }));
        }
        let given = self.adapter.clone();
        let own = section(&Adapter { lora, base_encoding: BaseEncoding::F32, initial: None });
        let adapter = AdapterSection {
            initial: given.initial,
            r: given.r.or(own.r),
            lora_alpha: given.lora_alpha.or(own.lora_alpha),
            lora_dropout: given.lora_dropout.or(own.lora_dropout),
            use_rslora: given.use_rslora.or(own.use_rslora),
            target_modules: given.target_modules.or(own.target_modules),
            target_parameters: given.target_parameters.or(own.target_parameters),
            exclude_modules: given.exclude_modules.or(own.exclude_modules),
            layers_pattern: given.layers_pattern.or(own.layers_pattern),
            layers_to_transform: given.layers_to_transform.or(own.layers_to_transform),
            rank_pattern: given.rank_pattern.or(own.rank_pattern),
            alpha_pattern: given.alpha_pattern.or(own.alpha_pattern),
            bias: given.bias,
            base_encoding: given.base_encoding,
        };
        Ok(Self { adapter, ..self.clone() })
    }
}

pub(super) fn resolve(
    section: &AdapterSection,
    initial: Option<&str>,
    weights: DType,
) -> Result<Option<Adapter>, RecipeError> {
    if *section == AdapterSection::default() {
        return Ok(None);
    }
    let initial = initial.ok_or(RecipeError::Missing { key: "model.initial" })?;
    if weights != DType::F32 {
        return Err(RecipeError::OutOfRange {
            key: "run.weights",
            expected: "absent beside an adapter, whose weights are f32 (the frozen ones go by \
                       adapter.base_encoding)"
                .to_owned(),
            actual: weights.to_string(),
        });
    }
    let keys = serde_json::to_value(section).expect("a section is plain data");
    let Value::Object(keys) = keys else { unreachable!("a struct is an object") };
    let mut config: Map<String, Value> = keys
        .into_iter()
        .filter(|(key, value)| !OWN.contains(&key.as_str()) && !value.is_null())
        .collect();
    let parameters = section.target_parameters.as_ref().is_some_and(|names| !names.is_empty());
    let target_modules = if parameters { Value::Array(Vec::new()) } else { ALL_LINEAR.into() };
    // PEFT's defaults; `all-linear` stands for its tables of modules by family.
    for (key, value) in [
        ("peft_type", Value::from("LORA")),
        ("r", 8.into()),
        ("lora_alpha", 8.into()),
        ("target_modules", target_modules),
        ("base_model_name_or_path", initial.into()),
    ] {
        config.entry(key).or_insert(value);
    }
    let config = Value::Object(config).to_string();
    let lora = LoraSpec::from_peft_json(&config).map_err(RecipeError::Adapter)?;
    let base_encoding = section.base_encoding.unwrap_or(BaseEncoding::F32);
    Ok(Some(Adapter { lora, base_encoding, initial: section.initial.clone() }))
}

/// The section that resolves to an adapter.
pub(super) fn section(adapter: &Adapter) -> AdapterSection {
    let lora = &adapter.lora;
    AdapterSection {
        initial: adapter.initial.clone(),
        r: Some(lora.r),
        lora_alpha: Some(lora.lora_alpha),
        lora_dropout: Some(lora.lora_dropout),
        use_rslora: Some(lora.use_rslora),
        target_modules: Some(match &lora.target_modules {
            TargetModules::AllLinear => TargetModulesKey::Word(ALL_LINEAR.to_owned()),
            TargetModules::Named(names) => TargetModulesKey::Names(names.clone()),
            TargetModules::Matching(pattern) => TargetModulesKey::Word(pattern.text().to_owned()),
        }),
        target_parameters: Some(lora.target_parameters.clone()).filter(|names| !names.is_empty()),
        exclude_modules: lora.exclude_modules.as_ref().map(|names| match names {
            ModuleNames::Listed(names) => TargetModulesKey::Names(names.clone()),
            ModuleNames::Matching(pattern) => TargetModulesKey::Word(pattern.text().to_owned()),
        }),
        layers_pattern: Some(&lora.layers_pattern).filter(|patterns| !patterns.is_empty()).map(
            |patterns| {
                let texts = patterns.iter().map(NamePattern::text).map(str::to_owned);
                TargetModulesKey::Names(texts.collect())
            },
        ),
        layers_to_transform: lora.layers_to_transform.clone(),
        rank_pattern: Some(lora.rank_pattern.clone()).filter(|pattern| !pattern.is_empty()),
        alpha_pattern: Some(lora.alpha_pattern.clone()).filter(|pattern| !pattern.is_empty()),
        bias: Some("none".to_owned()),
        base_encoding: Some(adapter.base_encoding),
    }
}

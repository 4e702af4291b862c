//! The model of a recipe: described by a few keys, by a `config.json`, or whole.
//!
//! Keys describe LLaMA and GPT-2. Every other model is what a Hugging Face `config.json` says; its
//! text is handed in ([`RecipeFile::with_model_config`]), and becomes the whole [`ModelSpec`] under
//! `[model.spec]`, so that a resolved recipe depends on no other file.

use super::RecipeError;
use super::file::{ModelSection, RecipeFile};
use super::resolve::{Facts, dropout};
use crate::model::hf::HfConfig;
use crate::model::{AttentionForm, Dropout, Family, Mlp, ModelFields, Position};
use crate::{Activation, ModelSpec, SpecError};
use serde_json::{Map, Value, json};

/// Keys of the section that other keys may stand beside, whoever describes the model.
const BESIDE: [&str; 3] = ["config", "initial", "spec"];

/// The model of a recipe.
pub(super) fn model(
    file: &RecipeFile,
    seq_len: usize,
    facts: &Facts,
) -> Result<ModelSpec, RecipeError> {
    let section = &file.model;
    if let Some(path) = file.unread_config() {
        return Err(RecipeError::UnreadConfig { path: path.to_owned() });
    }
    let spec = match &section.spec {
        Some(spec) => {
            refuse_keys_beside(section)?;
            spec.clone()
        }
        None => described(section, seq_len, facts.tokenizer_vocab_size)?,
    };
    let vocab_size = spec.vocab_size;
    if let Some(tokenizer_vocab_size) = facts.tokenizer_vocab_size
        && vocab_size < tokenizer_vocab_size
    {
        return Err(RecipeError::VocabTooSmall { vocab_size, tokenizer_vocab_size });
    }
    let dropout = dropout(&file.dropout, spec.dropout);
    let fields = ModelFields { dropout, ..spec.into_fields() };
    ModelSpec::new(fields).map_err(RecipeError::Model)
}

impl RecipeFile {
    /// Where the `config.json` lies that describes the model, or the folder that holds it; `None`
    /// where the recipe describes it. [`with_model_config`](Self::with_model_config) takes its text.
    pub fn unread_config(&self) -> Option<&str> {
        let section = &self.model;
        let initial = || {
            let describes = section.spec.is_some() || !keys_beside(section).is_empty();
            section.initial.as_deref().filter(|_| !describes)
        };
        section.config.as_deref().or_else(initial)
    }

    /// The recipe with the model that the text of a `config.json` describes, and the fields of the
    /// text that nothing here knows.
    ///
    /// # Errors
    ///
    /// [`RecipeError::Model`] if it describes no model, [`RecipeError::TrainingField`] if it asks
    /// for something in training that there is not, [`RecipeError::KeyBeside`] if the recipe
    /// describes a model as well.
    pub fn with_model_config(&self, text: &str) -> Result<(Self, Vec<String>), RecipeError> {
        refuse_keys_beside(&self.model)?;
        let HfConfig { spec, ignored } = HfConfig::from_json(text).map_err(RecipeError::Model)?;
        refuse_training_fields(text, &spec)?;
        let mut file = self.clone();
        file.model.config = None;
        file.model.spec = Some(spec);
        Ok((file, ignored))
    }
}

/// The keys that are set and describe a model.
fn keys_beside(section: &ModelSection) -> Vec<String> {
    let keys = serde_json::to_value(section).expect("a section is plain data");
    let Value::Object(keys) = keys else { unreachable!("a struct is an object") };
    let set = keys.into_iter().filter(|(_, value)| !value.is_null());
    set.map(|(key, _)| key).filter(|key| !BESIDE.contains(&key.as_str())).collect()
}

/// A model is described once.
fn refuse_keys_beside(section: &ModelSection) -> Result<(), RecipeError> {
    match keys_beside(section).into_iter().next() {
        None => Ok(()),
        Some(key) => Err(RecipeError::KeyBeside { key: format!("model.{key}") }),
    }
}

/// Fields of a `config.json` that change nothing of what a model computes, and much of how
/// transformers trains it.
fn refuse_training_fields(text: &str, spec: &ModelSpec) -> Result<(), RecipeError> {
    let config: Value = serde_json::from_str(text).unwrap_or_default();
    let number = |field: &str| config.get(field).and_then(Value::as_f64);
    // Without `output_router_logits` transformers computes no such loss either; where the model has
    // one it is computed.
    let is_known = matches!(&spec.mlp, Mlp::Moe(moe) if moe.router.aux_loss_coef.is_some());
    let balances = config.get("output_router_logits") == Some(&Value::Bool(true)) && !is_known;
    let fields =
        [("router_aux_loss_coef", balances), ("router_jitter_noise", true), ("mlp_dropout", true)];
    for (field, counts) in fields {
        if let Some(value) = number(field).filter(|value| counts && *value != 0.0) {
            return Err(RecipeError::TrainingField { field, value });
        }
    }
    // transformers' default of the coefficient is not zero.
    if balances && config.get("router_aux_loss_coef").is_none() {
        return Err(RecipeError::TrainingField { field: "router_aux_loss_coef", value: 0.001 });
    }
    Ok(())
}

/// Builds the spec through `config.json`'s reader, so that both mean the same by the same names.
fn described(
    section: &ModelSection,
    seq_len: usize,
    tokenizer_vocab_size: Option<usize>,
) -> Result<ModelSpec, RecipeError> {
    let family = section.family.ok_or(RecipeError::Missing { key: "model.family" })?;
    let vocab_size = section.vocab_size.or(tokenizer_vocab_size);
    let vocab_size = vocab_size.ok_or(RecipeError::Missing { key: "model.vocab_size" })?;
    refuse_keys_of_other_families(section, family)?;
    let config = config(section, family, vocab_size, seq_len)?;
    let spec = ModelSpec::from_hf_config(&Value::Object(config)).map_err(RecipeError::Model)?;
    // Dropout is asked for where it is wanted; transformers' defaults for GPT-2 are not nothing.
    let fields = ModelFields { dropout: Dropout::default(), ..spec.into_fields() };
    ModelSpec::new(fields).map_err(RecipeError::Model)
}

/// The section that describes a model, by its keys where they can.
pub(super) fn section(spec: &ModelSpec, initial: Option<&str>) -> ModelSection {
    let whole = || ModelSection { spec: Some(spec.clone()), ..ModelSection::default() };
    let means = |section: &ModelSection| {
        let read = described(section, 1, None).ok();
        let same = ModelFields { dropout: Dropout::default(), ..spec.clone().into_fields() };
        read.is_some_and(|read| read.into_fields() == same)
    };
    let section = by_keys(spec).filter(means).unwrap_or_else(whole);
    ModelSection { initial: initial.map(str::to_owned), ..section }
}

fn by_keys(spec: &ModelSpec) -> Option<ModelSection> {
    let AttentionForm::Gqa(gqa) = &spec.attention.form else { return None };
    let is_llama = spec.family == Family::Llama;
    let (Mlp::Glu { bias, .. } | Mlp::Plain { bias, .. }) = spec.mlp else { return None };
    Some(ModelSection {
        family: Some(spec.family),
        vocab_size: Some(spec.vocab_size),
        hidden_size: Some(spec.hidden_size),
        num_hidden_layers: Some(spec.num_hidden_layers),
        num_attention_heads: Some(gqa.num_attention_heads),
        num_key_value_heads: is_llama.then_some(gqa.num_key_value_heads),
        head_dim: is_llama.then_some(gqa.head_dim),
        intermediate_size: Some(spec.mlp.intermediate_size()),
        max_position_embeddings: Some(spec.max_position_embeddings),
        rope_theta: match &spec.position {
            Position::Rope(rope) => Some(rope.theta),
            Position::Learned => None,
        },
        rms_norm_eps: is_llama.then_some(spec.norm.eps),
        layer_norm_epsilon: (!is_llama).then_some(spec.norm.eps),
        hidden_act: Some(spec.mlp.activation()),
        attention_bias: is_llama.then_some(gqa.qkv_bias),
        mlp_bias: is_llama.then_some(bias),
        tie_word_embeddings: Some(spec.tie_word_embeddings),
        initializer_range: Some(spec.initializer_range),
        ..ModelSection::default()
    })
}

fn config(
    section: &ModelSection,
    family: Family,
    vocab_size: usize,
    seq_len: usize,
) -> Result<Map<String, Value>, RecipeError> {
    let eps = section.rms_norm_eps.unwrap_or(1e-5);
    let mut config = json!({
        "model_type": family.model_type(),
        "vocab_size": vocab_size,
        "hidden_size": section.hidden_size,
        "num_hidden_layers": section.num_hidden_layers,
        "num_attention_heads": section.num_attention_heads,
        "max_position_embeddings": section.max_position_embeddings.unwrap_or(seq_len),
        "tie_word_embeddings": section.tie_word_embeddings.unwrap_or(true),
        "initializer_range": section.initializer_range,
        // Which tokens these are is the tokenizer's to say.
        "bos_token_id": null, "eos_token_id": null,
    });
    let activation = section.hidden_act.map(Activation::hf_name);
    let own = match family {
        Family::Llama => json!({
            "num_key_value_heads": section.num_key_value_heads,
            "head_dim": section.head_dim,
            "intermediate_size": section.intermediate_size,
            "rope_theta": section.rope_theta,
            "rms_norm_eps": eps,
            "hidden_act": activation,
            "attention_bias": section.attention_bias,
            "mlp_bias": section.mlp_bias,
        }),
        Family::Gpt2 => json!({
            "n_inner": section.intermediate_size,
            "layer_norm_epsilon": section.layer_norm_epsilon,
            "activation_function": activation,
        }),
        _ => return Err(RecipeError::Family { family }),
    };
    match (&mut config, own) {
        (Value::Object(config), Value::Object(own)) => {
            config.extend(own);
            Ok(std::mem::take(config))
        }
        _ => unreachable!("both are written as objects above"),
    }
}

/// A key that the family has no use for would be ignored; that must not happen silently.
fn refuse_keys_of_other_families(
    section: &ModelSection,
    family: Family,
) -> Result<(), RecipeError> {
    let foreign: &[(&str, bool)] = match family {
        Family::Llama => &[("layer_norm_epsilon", section.layer_norm_epsilon.is_some())],
        Family::Gpt2 => &[
            ("num_key_value_heads", section.num_key_value_heads.is_some()),
            ("head_dim", section.head_dim.is_some()),
            ("rope_theta", section.rope_theta.is_some()),
            ("rms_norm_eps", section.rms_norm_eps.is_some()),
            ("attention_bias", section.attention_bias.is_some()),
            ("mlp_bias", section.mlp_bias.is_some()),
        ],
        _ => return Err(RecipeError::Family { family }),
    };
    match foreign.iter().find(|(_, is_set)| *is_set) {
        None => Ok(()),
        Some((key, _)) => Err(RecipeError::Model(SpecError::Unsupported {
            field: (*key).to_owned(),
            value: "any value".to_owned(),
            family,
        })),
    }
}

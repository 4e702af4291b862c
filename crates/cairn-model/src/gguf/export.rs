//! A spec → the keys of a GGUF file, and the tensors that say what no key can.
//!
//! What `decoder` reads is written here, from the `config.json` of the spec. That nothing was lost is
//! not argued but tried: [`same_model`] compares the spec with the one that the file reads back as.

use super::{ROPE_FACTORS, ROPE_FACTORS_LONG};
use crate::names::TensorMap;
use cairn_artifacts::gguf::OutValue;
use cairn_spec::ModelSpec;
use cairn_spec::model::{Family, Rope, RopeScaling, SpecError};
use serde_json::Value;

/// How far a number may be from the one it was written for: keys hold `f32`.
const TOLERANCE: f64 = 1e-6;
/// What of a spec does not change what a trained model computes, or is not in such files.
const UNSAID: [&str; 5] = ["dtype", "tokens", "dropout", "initializer_range", "attention_factor"];

/// Why a model cannot be described by the keys of a GGUF file.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufExportError {
    /// The family has no layout there.
    #[error("models of the family {family} are not written as GGUF")]
    Family {
        /// The family.
        family: Family,
    },
    /// The spec has no description to begin with.
    #[error("the model cannot be described")]
    Spec(#[from] SpecError),
    /// A number is beyond what a key holds.
    #[error("{key} is {value}, which no key of a GGUF file holds")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// The keys describe another model.
    #[error("as GGUF, {field} of the model would be {found} instead of {expected}")]
    Lost {
        /// Where in the spec.
        field: String,
        /// In the spec.
        expected: String,
        /// As it reads back.
        found: String,
    },
}

/// The keys of a model, `general.architecture` first.
///
/// # Errors
///
/// [`GgufExportError::Family`] for a family that is not read from such files either.
pub fn metadata(spec: &ModelSpec) -> Result<Vec<(String, OutValue)>, GgufExportError> {
    let unread = GgufExportError::Family { family: spec.family };
    let architecture = match spec.family {
        Family::Llama | Family::Mixtral => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
        Family::Qwen3Moe => "qwen3moe",
        Family::Gemma2 => "gemma2",
        Family::Gemma3Text => "gemma3",
        Family::Phi3 => "phi3",
        Family::Gpt2 => "gpt2",
        _ => return Err(unread),
    };
    if TensorMap::gguf(spec).is_none() {
        return Err(unread);
    }
    let general = ("general.architecture".to_owned(), OutValue::Text(architecture.to_owned()));
    let config = spec.to_hf_config()?;
    let mut keys = Keys { architecture, config: &config, written: vec![general] };
    keys.write(spec)?;
    Ok(keys.written)
}

/// Tensors that are no weights: divisors of the rotation's frequencies.
pub fn divisors(spec: &ModelSpec) -> Vec<(String, Vec<f32>)> {
    let Some(rope) = (0..spec.num_hidden_layers).find_map(|layer| spec.rope(layer)) else {
        return Vec::new();
    };
    match &rope.scaling {
        RopeScaling::Llama3(_) => {
            let plain = Rope { scaling: RopeScaling::Default, ..rope.clone() }.inv_freq();
            let ratios = plain.iter().zip(rope.inv_freq()).map(|(plain, scaled)| plain / scaled);
            vec![(ROPE_FACTORS.to_owned(), ratios.collect())]
        }
        RopeScaling::Longrope(long) => {
            let lists = [&long.short_factor, &long.long_factor];
            let narrow = |list: &[f64]| list.iter().map(|&divisor| narrowed(divisor)).collect();
            let named = ROPE_FACTORS_LONG.into_iter().zip(lists);
            named.map(|(name, list)| (name.to_owned(), narrow(list))).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether a file's spec is that of the model it was written for.
///
/// # Errors
///
/// [`GgufExportError::Lost`] naming the first field that differs.
pub fn same_model(written: &ModelSpec, read: &ModelSpec) -> Result<(), GgufExportError> {
    for layer in 0..written.num_hidden_layers.min(read.num_hidden_layers) {
        // Files may state it or leave it to the rule.
        let [a, b] = [written, read].map(|spec| spec.rope(layer).map(Rope::attention_scaling));
        let [a, b] = [a, b].map(|scaling| Value::from(scaling.map(f64::from)));
        compare("attention_factor", &a, &b)?;
    }
    let json = |spec: &ModelSpec| serde_json::to_value(spec).unwrap_or_default();
    compare("the spec", &json(written), &json(read))
}

fn compare(field: &str, expected: &Value, found: &Value) -> Result<(), GgufExportError> {
    let lost = || GgufExportError::Lost {
        field: field.to_owned(),
        expected: expected.to_string(),
        found: found.to_string(),
    };
    match (expected, found) {
        (Value::Object(a), Value::Object(b)) => {
            let names = a.keys().chain(b.keys()).filter(|name| !UNSAID.contains(&name.as_str()));
            for name in names {
                let inner = |object: &serde_json::Map<String, Value>| {
                    object.get(name).cloned().unwrap_or_default()
                };
                compare(name, &inner(a), &inner(b))?;
            }
            Ok(())
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).try_for_each(|(a, b)| compare(field, a, b))
        }
        (Value::Number(a), Value::Number(b)) => {
            let [a, b] = [a, b].map(|number| number.as_f64().unwrap_or(f64::NAN));
            if (a - b).abs() <= TOLERANCE * a.abs() { Ok(()) } else { Err(lost()) }
        }
        (a, b) if a == b => Ok(()),
        _ => Err(lost()),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "keys and divisors are f32 in these files")]
fn narrowed(value: f64) -> f32 {
    value as f32
}

/// Keys being written.
struct Keys<'a> {
    architecture: &'static str,
    config: &'a Value,
    written: Vec<(String, OutValue)>,
}

impl Keys<'_> {
    fn put(&mut self, key: &str, value: OutValue) {
        self.written.push((format!("{}.{key}", self.architecture), value));
    }

    fn put_whole(&mut self, key: &str, value: u64) -> Result<(), GgufExportError> {
        let beyond = |_| GgufExportError::Value { key: key.to_owned(), value: value.to_string() };
        let value = u32::try_from(value).map_err(beyond)?;
        self.put(key, OutValue::U32(value));
        Ok(())
    }

    /// A size of the `config.json`, under its first name that is there; nothing where none is.
    fn size(&mut self, key: &str, names: &[&str]) -> Result<(), GgufExportError> {
        let found = names.iter().find_map(|name| self.config[*name].as_u64());
        found.map_or(Ok(()), |value| self.put_whole(key, value))
    }

    fn real(&mut self, key: &str, value: &Value) {
        if let Some(value) = value.as_f64() {
            self.put(key, OutValue::F32(narrowed(value)));
        }
    }

    fn write(&mut self, spec: &ModelSpec) -> Result<(), GgufExportError> {
        let config = self.config;
        self.size("context_length", &["max_position_embeddings", "n_positions"])?;
        self.size("embedding_length", &["hidden_size", "n_embd"])?;
        self.size("block_count", &["num_hidden_layers", "n_layer"])?;
        self.size("attention.head_count", &["num_attention_heads", "n_head"])?;
        self.put_whole("vocab_size", spec.vocab_size as u64)?;
        if spec.family == Family::Gpt2 {
            let inner = config["n_inner"].as_u64().unwrap_or(4 * spec.hidden_size as u64);
            self.put_whole("feed_forward_length", inner)?;
            self.real("attention.layer_norm_epsilon", &config["layer_norm_epsilon"]);
            return Ok(());
        }
        self.size("feed_forward_length", &["intermediate_size", "moe_intermediate_size"])?;
        self.size("attention.head_count_kv", &["num_key_value_heads"])?;
        self.real("attention.layer_norm_rms_epsilon", &config["rms_norm_eps"]);
        let head_dim = spec.attention.form.key_dim() as u64;
        if spec.family != Family::Phi3 {
            self.put_whole("attention.key_length", head_dim)?;
            self.put_whole("attention.value_length", head_dim)?;
        }
        let rotated = spec.rope(0).map_or(head_dim, |rope| rope.rotary_dim as u64);
        self.put_whole("rope.dimension_count", rotated)?;
        self.write_experts(spec)?;
        self.write_windows(spec)?;
        self.write_rotation(spec)
    }

    fn write_experts(&mut self, spec: &ModelSpec) -> Result<(), GgufExportError> {
        if !matches!(spec.family, Family::Mixtral | Family::Qwen3Moe) {
            return Ok(());
        }
        self.size("expert_count", &["num_local_experts", "num_experts"])?;
        self.size("expert_used_count", &["num_experts_per_tok"])?;
        if spec.family == Family::Qwen3Moe {
            self.size("expert_feed_forward_length", &["moe_intermediate_size"])?;
        }
        Ok(())
    }

    fn write_windows(&mut self, spec: &ModelSpec) -> Result<(), GgufExportError> {
        let config = self.config;
        if !matches!(spec.family, Family::Gemma2 | Family::Gemma3Text | Family::Phi3) {
            return Ok(());
        }
        let window = config["sliding_window"].as_u64().unwrap_or(0);
        self.put_whole("attention.sliding_window", window)?;
        self.real("attn_logit_softcapping", &config["attn_logit_softcapping"]);
        self.real("final_logit_softcapping", &config["final_logit_softcapping"]);
        if spec.family == Family::Gemma3Text {
            let kinds = config["layer_types"].as_array().map(Vec::as_slice).unwrap_or_default();
            let full = kinds.iter().position(|kind| kind == "full_attention");
            let pattern = full.map_or(kinds.len() + 1, |first| first + 1);
            self.put_whole("attention.sliding_window_pattern", pattern as u64)?;
        }
        Ok(())
    }

    fn write_rotation(&mut self, spec: &ModelSpec) -> Result<(), GgufExportError> {
        let all = &self.config["rope_parameters"];
        let (whole, local) = match all.get("full_attention") {
            Some(full) => (full, all.get("sliding_attention")),
            None => (all, None),
        };
        self.real("rope.freq_base", &whole["rope_theta"]);
        if let Some(local) = local {
            self.real("rope.freq_base_swa", &local["rope_theta"]);
        }
        let original = [whole, self.config]
            .iter()
            .find_map(|object| object["original_max_position_embeddings"].as_u64());
        match whole["rope_type"].as_str().unwrap_or("default") {
            "linear" => {
                self.put("rope.scaling.type", OutValue::Text("linear".to_owned()));
                self.real("rope.scaling.factor", &whole["factor"]);
            }
            "yarn" => {
                self.put("rope.scaling.type", OutValue::Text("yarn".to_owned()));
                self.real("rope.scaling.factor", &whole["factor"]);
                self.real("rope.scaling.yarn_beta_fast", &whole["beta_fast"]);
                self.real("rope.scaling.yarn_beta_slow", &whole["beta_slow"]);
            }
            "longrope" => {
                self.put("rope.scaling.type", OutValue::Text("longrope".to_owned()));
                let factor = spec.rope(0).map_or(1.0, Rope::attention_scaling);
                self.put("rope.scaling.attn_factor", OutValue::F32(factor));
            }
            // Those of the llama3 rule lie in a tensor; whatever else there is fails to read back.
            _ => return Ok(()),
        }
        original.map_or(Ok(()), |original| {
            self.put_whole("rope.scaling.original_context_length", original)
        })
    }
}

//! How a text's hidden states become one vector, as sentence-transformers' files say it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use cairn_artifacts::bounded::{CONFIG_BYTES_MAX, read_text};
use cairn_artifacts::gguf::{GgufFile, Value};
use clap::ValueEnum;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::failure::UserError;

/// Below this length a vector is not divided by it.
const NORM_MIN: f64 = 1e-12;

/// What of the hidden states is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pooling {
    /// The mean of all tokens.
    Mean,
    /// The first token.
    Cls,
    /// The last token.
    Last,
}

/// How texts are embedded.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct EmbedSettings {
    /// What is taken, where the files say.
    pub(crate) pooling: Option<Pooling>,
    /// Whether vectors get length 1.
    pub(crate) normalize: bool,
    /// Most tokens of a text.
    pub(crate) max_tokens: Option<usize>,
    /// Whether texts are put in lower case first.
    pub(crate) lower_case: bool,
    /// What every text begins with.
    pub(crate) prompt: String,
    /// Fields that had no influence: the file and their names.
    pub(crate) ignored: Vec<String>,
}

/// An entry of `modules.json`.
#[derive(Debug, Deserialize)]
struct Module {
    r#type: String,
    #[serde(default)]
    path: String,
}

/// `config.json` of a pooling module. Older files switch modes on, newer ones name one.
#[derive(Debug, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "the file has a switch for every mode")]
struct PoolingConfig {
    #[serde(default)]
    pooling_mode: Option<String>,
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
    #[serde(default)]
    pooling_mode_lasttoken: bool,
    #[serde(default)]
    pooling_mode_max_tokens: bool,
    #[serde(default)]
    pooling_mode_mean_sqrt_len_tokens: bool,
    #[serde(default)]
    pooling_mode_weightedmean_tokens: bool,
    /// Whether the tokens of the prompt count.
    #[serde(default = "yes")]
    include_prompt: bool,
    /// Known, and told by the model itself.
    #[serde(default, rename = "word_embedding_dimension", alias = "embedding_dimension")]
    _width: Option<usize>,
    #[serde(flatten)]
    unknown: Unknown,
}

/// `sentence_bert_config.json`.
#[derive(Debug, Deserialize)]
struct TransformerConfig {
    #[serde(default)]
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
    #[serde(flatten)]
    unknown: Unknown,
}

/// `config_sentence_transformers.json`.
#[derive(Debug, Deserialize)]
struct PromptConfig {
    #[serde(default)]
    prompts: BTreeMap<String, String>,
    #[serde(default)]
    default_prompt_name: Option<String>,
    #[serde(default, rename = "__version__")]
    _version: IgnoredAny,
    #[serde(default, rename = "similarity_fn_name")]
    _similarity: IgnoredAny,
    #[serde(default, rename = "model_type")]
    _model_type: IgnoredAny,
    #[serde(flatten)]
    unknown: Unknown,
}

/// Fields that nothing here knows.
type Unknown = BTreeMap<String, IgnoredAny>;

const fn yes() -> bool {
    true
}

impl EmbedSettings {
    /// Reads what the files of a sentence-transformers model say; nothing without them.
    pub(crate) fn read(folder: &Path) -> anyhow::Result<Self> {
        let mut settings = Self::default();
        let path = folder.join("modules.json");
        let Some(modules) = read::<Vec<Module>>(&path)? else { return Ok(settings) };
        let mut includes_prompt = true;
        for Module { r#type, path: place } in modules {
            match r#type.rsplit('.').next().unwrap_or_default() {
                "Transformer" => {}
                "Pooling" => {
                    let path = folder.join(place).join("config.json");
                    if let Some(config) = read::<PoolingConfig>(&path)? {
                        settings.pooling = Some(config.pooling(&path)?);
                        includes_prompt &= config.include_prompt;
                        settings.note_unknown(&path, &config.unknown);
                    }
                }
                "Normalize" => settings.normalize = true,
                other => {
                    let message = format!("{} has a module '{other}'", path.display());
                    return Err(UserError::new(message)
                        .hint("cairn embed knows Transformer, Pooling and Normalize")
                        .into());
                }
            }
        }
        let path = folder.join("sentence_bert_config.json");
        if let Some(config) = read::<TransformerConfig>(&path)? {
            settings.max_tokens = config.max_seq_length;
            settings.lower_case = config.do_lower_case;
            settings.note_unknown(&path, &config.unknown);
        }
        settings.take_prompt(&folder.join("config_sentence_transformers.json"))?;
        if !includes_prompt && !settings.prompt.is_empty() {
            let message = format!("{} pools without its prompt", folder.display());
            return Err(UserError::new(message)
                .hint("cairn embed pools all tokens of a text, its prompt included")
                .into());
        }
        Ok(settings)
    }

    /// What a GGUF file says: how it pools, where it does.
    pub(crate) fn of_gguf(file: &GgufFile) -> anyhow::Result<Self> {
        let architecture = match file.value("general.architecture") {
            Some(Value::Text(architecture)) => architecture,
            _ => return Ok(Self::default()),
        };
        let key = format!("{architecture}.pooling_type");
        let pooling = match file.value(&key) {
            None | Some(Value::Unsigned(0, _)) => None,
            Some(Value::Unsigned(1, _)) => Some(Pooling::Mean),
            Some(Value::Unsigned(2, _)) => Some(Pooling::Cls),
            Some(Value::Unsigned(3, _)) => Some(Pooling::Last),
            Some(_) => {
                let message = format!("{} pools in an unknown way ({key})", file.path().display());
                return Err(UserError::new(message)
                    .hint("cairn embed pools by mean, cls or last")
                    .into());
            }
        };
        Ok(Self { pooling, ..Self::default() })
    }

    fn take_prompt(&mut self, path: &Path) -> anyhow::Result<()> {
        let Some(mut config) = read::<PromptConfig>(path)? else { return Ok(()) };
        if let Some(name) = &config.default_prompt_name {
            let prompt = config.prompts.remove(name);
            let missing = || format!("{} has no prompt called '{name}'", path.display());
            self.prompt = prompt.with_context(missing)?;
        }
        self.note_unknown(path, &config.unknown);
        Ok(())
    }

    fn note_unknown(&mut self, path: &Path, unknown: &Unknown) {
        if !unknown.is_empty() {
            let names: Vec<&str> = unknown.keys().map(String::as_str).collect();
            self.ignored.push(format!("{}: {}", path.display(), names.join(", ")));
        }
    }
}

impl PoolingConfig {
    /// The one mode that is set; an unknown one, or several, are refused by name.
    fn pooling(&self, path: &Path) -> anyhow::Result<Pooling> {
        let switches = [
            (self.pooling_mode_cls_token, "cls"),
            (self.pooling_mode_mean_tokens, "mean"),
            (self.pooling_mode_lasttoken, "lasttoken"),
            (self.pooling_mode_max_tokens, "max_tokens"),
            (self.pooling_mode_mean_sqrt_len_tokens, "mean_sqrt_len_tokens"),
            (self.pooling_mode_weightedmean_tokens, "weightedmean_tokens"),
        ];
        let on = switches.iter().filter(|(on, _)| *on).map(|(_, name)| *name);
        let modes: Vec<&str> = on.chain(self.pooling_mode.as_deref()).collect();
        match modes.as_slice() {
            ["mean"] => Ok(Pooling::Mean),
            ["cls"] => Ok(Pooling::Cls),
            ["lasttoken"] => Ok(Pooling::Last),
            other => {
                let modes = if other.is_empty() { "nothing".into() } else { other.join(" and ") };
                let message = format!("{} pools by {modes}", path.display());
                Err(UserError::new(message).hint("cairn embed pools by mean, cls or last").into())
            }
        }
    }
}

/// A JSON file, if it is there.
fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = read_text(path, CONFIG_BYTES_MAX)?;
    let value = serde_json::from_str(&text);
    value.map(Some).with_context(|| format!("{} is not what its name says", path.display()))
}

/// One vector of the hidden states `[t, d]` of a text.
pub(crate) fn pool(hidden_td: &[f32], width: usize, pooling: Pooling) -> Vec<f32> {
    let rows = hidden_td.len() / width;
    match pooling {
        Pooling::Cls => hidden_td[..width].to_vec(),
        Pooling::Last => hidden_td[(rows - 1) * width..].to_vec(),
        Pooling::Mean => {
            let mut sum_d = vec![0.0f64; width];
            for row in hidden_td.chunks_exact(width) {
                for (sum, value) in sum_d.iter_mut().zip(row) {
                    *sum += f64::from(*value);
                }
            }
            sum_d.iter().map(|sum| narrow(sum / rows as f64)).collect()
        }
    }
}

/// Gives a vector length 1.
pub(crate) fn normalize(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|value| f64::from(*value).powi(2)).sum();
    let length = squares.sqrt().max(NORM_MIN);
    for value in vector {
        *value = narrow(f64::from(*value) / length);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounded to the precision of the output")]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pooling_takes_its_part() {
        let hidden = [1.0, 2.0, 3.0, 6.0, 5.0, 1.0];
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&pool(&hidden, 2, Pooling::Cls)), bits(&[1.0, 2.0]));
        assert_eq!(bits(&pool(&hidden, 2, Pooling::Last)), bits(&[5.0, 1.0]));
        assert_eq!(bits(&pool(&hidden, 2, Pooling::Mean)), bits(&[3.0, 3.0]));
        let mut vector = [3.0, 4.0];
        normalize(&mut vector);
        assert_eq!(bits(&vector), bits(&[0.6, 0.8]));
        let mut zero = [0.0, 0.0];
        normalize(&mut zero);
        assert_eq!(bits(&zero), bits(&[0.0, 0.0]));
    }

    fn settings(files: &[(&str, &str)]) -> anyhow::Result<EmbedSettings> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        EmbedSettings::read(folder.path())
    }

    const MODULES: &str = r#"[{"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}]"#;

    #[test]
    fn settings_come_from_the_files() {
        assert_eq!(settings(&[]).unwrap(), EmbedSettings::default());
        let mean = r#"{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}"#;
        let found = settings(&[
            ("modules.json", MODULES),
            ("1_Pooling/config.json", mean),
            ("sentence_bert_config.json", r#"{"max_seq_length": 256, "do_lower_case": false}"#),
        ])
        .unwrap();
        assert_eq!((found.pooling, found.normalize), (Some(Pooling::Mean), true));
        assert_eq!((found.max_tokens, found.lower_case), (Some(256), false));
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let max = r#"{"pooling_mode_max_tokens": true}"#;
        let error = settings(&[("modules.json", MODULES), ("1_Pooling/config.json", max)]);
        assert!(error.unwrap_err().to_string().ends_with("pools by max_tokens"));
        let dense = r#"[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]"#;
        let error = settings(&[("modules.json", dense)]).unwrap_err().to_string();
        assert!(error.ends_with("has a module 'Dense'"), "{error}");
    }

    #[test]
    fn files_are_held_to_their_types_and_unknown_fields_are_named() {
        let refused = |files: &[(&str, &str)]| format!("{:#}", settings(files).unwrap_err());
        let words = r#"{"pooling_mode_mean_tokens": "yes"}"#;
        let error = refused(&[("modules.json", MODULES), ("1_Pooling/config.json", words)]);
        assert!(error.contains("1_Pooling/config.json is not what its name says"), "{error}");
        assert!(error.contains("expected a boolean"), "{error}");
        let error = refused(&[("modules.json", r#"[{"path": "x"}]"#)]);
        assert!(error.contains("missing field `type`"), "{error}");
        let error = refused(&[("modules.json", MODULES), ("1_Pooling/config.json", "{}")]);
        assert!(error.ends_with("pools by nothing"), "{error}");
        let mean = r#"{"pooling_mode": "mean", "include_prompt": false, "new": 1}"#;
        let prompts = r#"{"prompts": {"q": "query: "}, "default_prompt_name": "q"}"#;
        let files = [
            ("modules.json", MODULES),
            ("1_Pooling/config.json", mean),
            ("config_sentence_transformers.json", prompts),
        ];
        assert!(refused(&files).ends_with("pools without its prompt"));
        let found = settings(&files[..2]).unwrap();
        assert_eq!(found.pooling, Some(Pooling::Mean));
        assert!(found.ignored[0].ends_with("1_Pooling/config.json: new"), "{:?}", found.ignored);
        let long = " ".repeat(usize::try_from(CONFIG_BYTES_MAX).unwrap() + 1);
        let error = refused(&[("modules.json", &long)]);
        assert!(error.contains("larger than 8.00 MiB"), "{error}");
    }
}

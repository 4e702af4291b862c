//! How a text's hidden states become one vector, as sentence-transformers' files say it.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cairn_artifacts::FileError;
use clap::ValueEnum;
use serde_json::Value;

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
}

impl EmbedSettings {
    /// Reads what the files of a sentence-transformers model say; nothing without them.
    pub(crate) fn read(folder: &Path) -> anyhow::Result<Self> {
        let mut settings = Self::default();
        let Some((path, modules)) = read(folder, "modules.json")? else { return Ok(settings) };
        for module in modules.as_array().into_iter().flatten() {
            let kind = module["type"].as_str().unwrap_or_default();
            let place = folder.join(module["path"].as_str().unwrap_or_default());
            match kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" => {}
                "Pooling" => settings.pooling = pooling(&place)?,
                "Normalize" => settings.normalize = true,
                other => {
                    let message = format!("{} has a module '{other}'", path.display());
                    return Err(UserError::new(message)
                        .hint("cairn embed knows Transformer, Pooling and Normalize")
                        .into());
                }
            }
        }
        if let Some((_, config)) = read(folder, "sentence_bert_config.json")? {
            let tokens = config["max_seq_length"].as_u64();
            settings.max_tokens = tokens.and_then(|tokens| usize::try_from(tokens).ok());
            settings.lower_case = config["do_lower_case"] == true;
        }
        if let Some((path, config)) = read(folder, "config_sentence_transformers.json")?
            && let Some(name) = config["default_prompt_name"].as_str()
        {
            let prompt = config["prompts"][name].as_str();
            settings.prompt = prompt
                .with_context(|| format!("{} has no prompt called '{name}'", path.display()))?
                .to_owned();
        }
        Ok(settings)
    }
}

/// A JSON file in a folder, if it is there.
fn read(folder: &Path, name: &str) -> anyhow::Result<Option<(PathBuf, Value)>> {
    let path = folder.join(name);
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).map_err(FileError::on("read", &path))?;
    let value =
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    Ok(Some((path, value)))
}

/// The one mode that a pooling module sets; an unknown one asks for `--pooling`.
fn pooling(folder: &Path) -> anyhow::Result<Option<Pooling>> {
    let Some((path, config)) = read(folder, "config.json")? else { return Ok(None) };
    let set = config.as_object().into_iter().flatten();
    let mut modes: Vec<&str> = set
        .filter(|(_, value)| **value == true)
        .filter_map(|(key, _)| key.strip_prefix("pooling_mode_"))
        .collect();
    modes.extend(config["pooling_mode"].as_str());
    match modes.as_slice() {
        ["mean_tokens" | "mean"] => Ok(Some(Pooling::Mean)),
        ["cls_token" | "cls"] => Ok(Some(Pooling::Cls)),
        ["lasttoken"] => Ok(Some(Pooling::Last)),
        other => {
            let message = format!("{} pools by {}", path.display(), other.join(" and "));
            Err(UserError::new(message).hint("cairn embed pools by mean, cls or last").into())
        }
    }
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
}

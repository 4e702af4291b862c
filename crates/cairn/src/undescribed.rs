//! Weights without a description: what their names and shapes tell, and what has to be told.

use std::path::{Path, PathBuf};

use cairn_model::{DetectError, TensorSource, detect_model_spec};
use cairn_spec::{Hint, ModelSpec};

use crate::model_folder::CONFIG_FILE;
use crate::named_values::named_values;

/// What to tell of a field, where one is missing.
const EXAMPLE: &str = "num_attention_heads=12";

/// Weights that do not say which model they are.
#[derive(Debug, thiserror::Error)]
#[error("{} has no config.json", .path.display())]
pub(crate) struct Undescribed {
    path: PathBuf,
    /// What is not known.
    source: DetectError,
}

impl Hint for Undescribed {
    fn hints(&self) -> Vec<String> {
        let path = self.path.display();
        match &self.source {
            DetectError::Incomplete { questions, .. } => {
                let told: Vec<String> =
                    questions.iter().map(|name| format!("--set {name}=…")).collect();
                let folder = if self.path.is_file() { self.path.parent() } else { None };
                let config = folder.unwrap_or(&self.path).join(CONFIG_FILE);
                vec![format!(
                    "tell them, and have it written: cairn inspect {path} {} --write-config {}",
                    told.join(" "),
                    config.display()
                )]
            }
            DetectError::Ambiguous { families } => {
                let told: Vec<String> = families
                    .iter()
                    .map(|family| format!("--set model_type={}", family.model_type()))
                    .collect();
                vec![format!("tell which: cairn inspect {path} {}", told.join(" or "))]
            }
            DetectError::Roberta { may_be_bert: true, .. } => {
                vec![format!("if it is bert: cairn inspect {path} --set model_type=bert")]
            }
            _ => Vec::new(),
        }
    }
}

/// The model that tensors belong to, by their names, their shapes and what is told.
pub(crate) fn spec(
    path: &Path,
    tensors: &dyn TensorSource,
    told: &[String],
) -> anyhow::Result<ModelSpec> {
    let told = named_values(told, EXAMPLE)?;
    let undescribed = |source| Undescribed { path: path.to_owned(), source };
    Ok(detect_model_spec(&told, tensors).map_err(undescribed)?)
}

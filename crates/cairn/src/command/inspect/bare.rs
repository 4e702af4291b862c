//! Weights without a description: what their names and shapes tell, and what has to be told.

use std::path::{Path, PathBuf};

use cairn_model::{DetectError, TensorSource, detect_model_spec};
use cairn_spec::{Hint, ModelSpec};

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
                vec![format!("tell them: cairn inspect {path} {}", told.join(" "))]
            }
            DetectError::Ambiguous { families } => {
                let told: Vec<String> = families
                    .iter()
                    .map(|family| format!("--set model_type={}", family.model_type()))
                    .collect();
                vec![format!("tell which: {}", told.join(" or "))]
            }
            _ => Vec::new(),
        }
    }
}

/// The model that tensors belong to, by their names, their shapes and what is told.
pub(super) fn spec(
    path: &Path,
    tensors: &dyn TensorSource,
    told: &[String],
) -> anyhow::Result<ModelSpec> {
    let told = named_values(told, EXAMPLE)?;
    let undescribed = |source| Undescribed { path: path.to_owned(), source };
    Ok(detect_model_spec(&told, tensors).map_err(undescribed)?)
}

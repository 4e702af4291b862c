//! A folder with a model in it: `config.json` and safetensors.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cairn_artifacts::FileError;
use cairn_artifacts::checkpoint::TOKENIZER_FILE;
use cairn_artifacts::safetensors::WeightFolder;
use cairn_data::tokenizer::Tokenizer;
use cairn_spec::ModelSpec;
use cairn_spec::model::hf::HfConfig;

use crate::failure::UserError;
use crate::terminal::Terminal;

pub(crate) use cairn_artifacts::checkpoint::CONFIG_FILE;

/// A model's description and its mapped weights.
#[derive(Debug)]
pub(crate) struct ModelFolder {
    /// The folder itself.
    pub(crate) path: PathBuf,
    /// What the model computes.
    pub(crate) spec: ModelSpec,
    /// Its tensors.
    pub(crate) weights: WeightFolder,
}

impl ModelFolder {
    /// Opens a folder in the Hugging Face layout; says on `terminal` what of it had no influence.
    pub(crate) fn open(path: &Path, terminal: Terminal) -> anyhow::Result<Self> {
        let spec = read_spec(path, terminal)?;
        let weights = WeightFolder::open(path)?;
        Ok(Self { path: path.to_owned(), spec, weights })
    }

    /// The tokenizer beside the weights, if there is one.
    pub(crate) fn tokenizer(&self) -> anyhow::Result<Option<Tokenizer>> {
        let path = self.path.join(TOKENIZER_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let tokenizer = Tokenizer::load(&path)?;
        tokenizer.check_model(self.spec.vocab_size)?;
        Ok(Some(tokenizer))
    }
}

/// Reads the description of the model in `folder`; names on `terminal` what of it nothing here knows.
pub(crate) fn read_spec(folder: &Path, terminal: Terminal) -> anyhow::Result<ModelSpec> {
    let config = folder.join(CONFIG_FILE);
    if !config.exists() {
        let what = if folder.is_dir() { "holds no model" } else { "is not a folder" };
        return Err(UserError::new(format!("{} {what}", folder.display()))
            .hint(format!("a model is a folder with {CONFIG_FILE} and safetensors"))
            .into());
    }
    let text = std::fs::read_to_string(&config).map_err(FileError::on("read", &config))?;
    let HfConfig { spec, ignored } = HfConfig::from_json(&text)
        .with_context(|| format!("{} does not describe a model", config.display()))?;
    if !ignored.is_empty() {
        let (path, names) = (config.display(), ignored.join(", "));
        terminal.warn(format_args!("{path} has fields that nothing here knows: {names}"));
    }
    Ok(spec)
}

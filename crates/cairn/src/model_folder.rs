//! A model on disk: a folder with `config.json` and safetensors, or a GGUF file.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cairn_artifacts::FileError;
use cairn_artifacts::checkpoint::{MANIFEST_FILE, TOKENIZER_FILE, verify_model};
use cairn_artifacts::gguf::GgufFile;
use cairn_artifacts::safetensors::WeightFolder;
use cairn_data::tokenizer::Tokenizer;
use cairn_model::{Naming, TensorSource};
use cairn_spec::ModelSpec;
use cairn_spec::model::hf::HfConfig;

use crate::failure::UserError;
use crate::terminal::Terminal;

pub(crate) use cairn_artifacts::checkpoint::CONFIG_FILE;

/// Largest `config.json` that is read, in bytes; real ones are a few KiB.
const CONFIG_BYTES_MAX: u64 = 8 << 20;

/// A model's description and its mapped weights.
#[derive(Debug)]
pub(crate) struct ModelFolder {
    /// The folder, or the GGUF file.
    pub(crate) path: PathBuf,
    /// What the model computes.
    pub(crate) spec: ModelSpec,
    /// Its tensors.
    pub(crate) weights: ModelWeights,
}

/// Where a model's tensors are.
#[derive(Debug)]
pub(crate) enum ModelWeights {
    /// In the safetensors of a folder.
    Folder(WeightFolder),
    /// In a GGUF file, which also holds everything else.
    Gguf(Box<GgufFile>),
}

impl ModelWeights {
    fn source(&self) -> &dyn TensorSource {
        match self {
            Self::Folder(folder) => folder,
            Self::Gguf(file) => &**file,
        }
    }
}

impl TensorSource for ModelWeights {
    fn names(&self) -> Vec<String> {
        self.source().names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.source().shape(name)
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        self.source().read_f32(name, elements, out)
    }

    fn read_q8(
        &self,
        name: &str,
        elements: Range<usize>,
        values: &mut [i8],
        scales: &mut [f32],
    ) -> Result<bool, String> {
        self.source().read_q8(name, elements, values, scales)
    }

    fn naming(&self) -> Naming {
        self.source().naming()
    }
}

impl ModelFolder {
    /// Opens a folder in the Hugging Face layout, or a GGUF file; says on `terminal` what of it had
    /// no influence.
    pub(crate) fn open(path: &Path, terminal: Terminal) -> anyhow::Result<Self> {
        if path.is_file() {
            let file = GgufFile::open(path)?;
            let spec = gguf_spec(&file)?;
            let weights = ModelWeights::Gguf(Box::new(file));
            return Ok(Self { path: path.to_owned(), spec, weights });
        }
        let spec = read_spec(path, terminal)?;
        verify_model(path).with_context(|| {
            format!(
                "{} is not as it was saved; without {MANIFEST_FILE} it is taken as it is",
                path.display()
            )
        })?;
        let weights = ModelWeights::Folder(WeightFolder::open(path)?);
        Ok(Self { path: path.to_owned(), spec, weights })
    }

    /// The tokenizer beside or among the weights, if there is one.
    pub(crate) fn tokenizer(&self) -> anyhow::Result<Option<Tokenizer>> {
        if let ModelWeights::Gguf(file) = &self.weights {
            return Ok(Tokenizer::from_gguf(file)?);
        }
        let path = self.path.join(TOKENIZER_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let tokenizer = Tokenizer::load(&path)?;
        tokenizer.check_model(self.spec.vocab_size)?;
        Ok(Some(tokenizer))
    }
}

fn gguf_spec(file: &GgufFile) -> anyhow::Result<ModelSpec> {
    cairn_model::gguf::spec(file)
        .with_context(|| format!("{} does not describe a model", file.path().display()))
}

/// Reads the description of the model in `folder`, or in a GGUF file; names on `terminal` what of a
/// `config.json` nothing here knows.
pub(crate) fn read_spec(folder: &Path, terminal: Terminal) -> anyhow::Result<ModelSpec> {
    if folder.is_file() {
        return gguf_spec(&GgufFile::open(folder)?);
    }
    let config = folder.join(CONFIG_FILE);
    if !config.exists() {
        let what = if folder.is_dir() { "holds no model" } else { "is not a folder" };
        return Err(UserError::new(format!("{} {what}", folder.display()))
            .hint(format!("a model is a folder with {CONFIG_FILE} and safetensors, or a GGUF file"))
            .into());
    }
    let bytes = std::fs::metadata(&config).map_err(FileError::on("read", &config))?.len();
    if bytes > CONFIG_BYTES_MAX {
        let message = format!("{} has {bytes} bytes", config.display());
        return Err(UserError::new(message)
            .hint(format!("no real one has more than {CONFIG_BYTES_MAX}"))
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

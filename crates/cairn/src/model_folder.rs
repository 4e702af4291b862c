//! A model on disk: a folder with `config.json` and safetensors, or a GGUF file.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cairn_artifacts::bounded::{CONFIG_BYTES_MAX, read_text};
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

/// What can be named as a model.
const MODEL_FORMS: &str = "a model is a folder with config.json and safetensors, or a GGUF file";

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
            let file = open_gguf(path)?;
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

    /// The tokenizer, for a command that cannot do without.
    pub(crate) fn text_tokenizer(&self) -> anyhow::Result<Tokenizer> {
        Ok(self.tokenizer()?.ok_or_else(|| self.no_tokenizer())?)
    }

    /// What is said where there is text and nothing to read it with.
    pub(crate) fn no_tokenizer(&self) -> UserError {
        UserError::new(format!("{} has no {TOKENIZER_FILE}", self.path.display()))
            .hint(format!("copy the {TOKENIZER_FILE} that belongs to the model beside its weights"))
            .hint("or continue token ids: cairn generate --prompt-ids 5,6,7")
    }
}

/// Opens a file that is named as a model.
fn open_gguf(path: &Path) -> anyhow::Result<GgufFile> {
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).display();
        return Err(UserError::new(format!("{} holds weights alone", path.display()))
            .hint(format!("name the folder, with its {CONFIG_FILE}: {folder}"))
            .into());
    }
    let what = || format!("{} is not a model: {MODEL_FORMS}", path.display());
    GgufFile::open(path).with_context(what)
}

/// What is said of a folder without a model: what it is instead, where that can be seen.
fn no_model(folder: &Path) -> UserError {
    let shown = folder.display();
    if !folder.exists() {
        return UserError::new(format!("there is nothing at {shown}")).hint(MODEL_FORMS);
    }
    let error = UserError::new(format!("{shown} holds no model"));
    if folder.join(cairn_data::corpus::MANIFEST_FILE).exists() {
        return error.hint(format!("it is a corpus: cairn corpus stats {shown}"));
    }
    let run = crate::runs::last_in(folder);
    match run {
        Some(run) => error.hint(format!("name one of its runs, such as {}", run.root().display())),
        None => error.hint(MODEL_FORMS),
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
        return gguf_spec(&open_gguf(folder)?);
    }
    let config = folder.join(CONFIG_FILE);
    if !config.exists() {
        return Err(no_model(folder).into());
    }
    let text = read_text(&config, CONFIG_BYTES_MAX)?;
    let HfConfig { spec, ignored } = HfConfig::from_json(&text)
        .with_context(|| format!("{} does not describe a model", config.display()))?;
    if !ignored.is_empty() {
        let (path, names) = (config.display(), ignored.join(", "));
        terminal.warn(format_args!("{path} has fields that nothing here knows: {names}"));
    }
    Ok(spec)
}

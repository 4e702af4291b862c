//! A model on disk: a folder with `config.json` and safetensors, or a GGUF file.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cairn_artifacts::bounded::{CONFIG_BYTES_MAX, read_text};
use cairn_artifacts::checkpoint::{
    ADAPTER_CONFIG_FILE, ADAPTER_FILE, MANIFEST_FILE, TOKENIZER_FILE, verify_model,
};
use cairn_artifacts::gguf::{GgufError, GgufFile, GgufReadError};
use cairn_artifacts::leanpack::PackFile;
use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder, WeightsError};
use cairn_data::tokenizer::{ModelFiles, Tokenizer, TokenizerConfig};
use cairn_engine::{Engine, EngineOptions, EnginePlan};
use cairn_kernels::{Cpu, Encoding, Layout};
use cairn_model::{
    AdapterMap, FolderSource, LoadError, Naming, PackCheck, PackSource, TensorSource, load_adapter,
    load_weights,
};
use cairn_program::{LentWeights, MemoryPlan, Session};
use cairn_spec::model::hf::HfConfig;
use cairn_spec::{LoraSpec, ModelSpec};
use clap::Args;

use crate::context::Context;
use crate::failure::UserError;
use crate::pack_args::PackArgs;
use crate::runs;
use crate::storage::Storage;
use crate::terminal::Terminal;
use crate::undescribed;

pub(crate) use cairn_artifacts::checkpoint::CONFIG_FILE;

/// What can be named as a model.
const MODEL_FORMS: &str =
    "a model is a folder with config.json and safetensors, a GGUF file or a leanpack";

/// Unknown fields of a `config.json` that are named, at most.
const IGNORED_SHOWN: usize = 20;

/// Which model, for commands that use one.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// Folder of a model or a run [default: the last run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of a low-rank adapter, as PEFT saves it, to use beside the model's weights; without
    /// --model, beside the model that it names
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    pack: PackArgs,
}

impl ModelArgs {
    /// A model by its path, beside whose weights an adapter may be used.
    pub(crate) fn of(model: Option<PathBuf>, adapter: Option<PathBuf>, pack: PackArgs) -> Self {
        Self { model, adapter, pack }
    }

    /// Opens the model, with the adapter if there is one.
    pub(crate) fn open(&self, context: &Context) -> anyhow::Result<ModelFolder> {
        let terminal = context.terminal;
        let adapter = self.adapter.as_deref().map(|adapter| runs::model_folder(Some(adapter)));
        match (&self.model, adapter.transpose()?) {
            (None, Some(adapter)) => ModelFolder::open(&adapter, terminal),
            (model, None) => self.pack.open(&runs::model_folder(model.as_deref())?, context),
            (Some(model), Some(adapter)) => {
                let model = runs::model_folder(Some(model))?;
                let model = self.pack.open(&model, context)?;
                if let Some(own) = &model.adapter {
                    let message = format!("{} is an adapter itself", own.path.display());
                    return Err(UserError::new(message).hint("leave --adapter out").into());
                }
                model.with_adapter(&adapter)
            }
        }
    }
}

/// A low-rank adapter beside a model.
#[derive(Debug)]
pub(crate) struct FolderAdapter {
    /// Its folder.
    pub(crate) path: PathBuf,
    map: AdapterMap,
    tensors: SafetensorsFile,
}

/// A model's description and its mapped weights.
#[derive(Debug)]
pub(crate) struct ModelFolder {
    /// The folder, the GGUF file or the pack.
    pub(crate) path: PathBuf,
    /// What the model computes.
    pub(crate) spec: ModelSpec,
    /// Its tensors.
    pub(crate) weights: ModelWeights,
    /// What is used beside them.
    pub(crate) adapter: Option<FolderAdapter>,
    terminal: Terminal,
}

/// Where a model's tensors are.
#[derive(Debug)]
pub(crate) enum ModelWeights {
    /// In the safetensors of a folder.
    Folder(Box<FolderSource>),
    /// In a GGUF file, which also holds everything else.
    Gguf(Box<GgufFile>),
    /// In a pack, which also holds everything else.
    Pack(Box<PackSource>),
}

impl ModelWeights {
    fn source(&self) -> &dyn TensorSource {
        match self {
            Self::Folder(folder) => &**folder,
            Self::Gguf(file) => &**file,
            Self::Pack(pack) => &**pack,
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

    fn read_codes(
        &self,
        encoding: Encoding,
        name: &str,
        elements: Range<usize>,
        codes: (&mut [i8], &mut [f32]),
    ) -> Result<bool, String> {
        self.source().read_codes(encoding, name, elements, codes)
    }

    fn encoding(&self, name: &str) -> Option<Encoding> {
        self.source().encoding(name)
    }

    fn read_bits(&self, name: &str, elements: Range<usize>, out: &mut [u16]) -> Result<(), String> {
        self.source().read_bits(name, elements, out)
    }

    fn release(&self, name: &str) {
        self.source().release(name);
    }

    fn read_stored(
        &self,
        name: &str,
        form: (Encoding, Layout),
        cpu: &Cpu,
        out: &mut [u8],
    ) -> Result<bool, String> {
        self.source().read_stored(name, form, cpu, out)
    }

    fn lend(
        &self,
        spec: &ModelSpec,
        plan: &MemoryPlan,
        cpu: &Cpu,
    ) -> Result<Vec<LentWeights>, LoadError> {
        self.source().lend(spec, plan, cpu)
    }

    fn naming(&self) -> Naming {
        self.source().naming()
    }
}

/// What is said when weights that were lent were copied after all.
fn copied(path: &Path, terminal: Terminal) -> impl Fn() + Send + Sync + 'static {
    let shown = path.display().to_string();
    move || {
        terminal.warn(format_args!(
            "somebody wants to change {shown}: its weights were copied into memory, and nothing \
             else changes"
        ));
    }
}

/// Whether a folder holds an adapter and no model.
pub(crate) fn is_adapter(folder: &Path) -> bool {
    folder.join(ADAPTER_CONFIG_FILE).exists() && !folder.join(CONFIG_FILE).exists()
}

impl ModelFolder {
    /// Opens a folder in the Hugging Face layout, a GGUF file, a pack, or an adapter with the model that
    /// it names; says on `terminal` what of it had no influence.
    pub(crate) fn open(path: &Path, terminal: Terminal) -> anyhow::Result<Self> {
        if is_adapter(path) {
            return Self::open_base(path, terminal)?.with_adapter(path);
        }
        if PackFile::is_pack(path) {
            return Self::open_pack(path, PackCheck::default(), terminal);
        }
        if path.is_file() {
            let file = open_gguf(path)?;
            let spec = gguf_spec(&file)?;
            let weights = ModelWeights::Gguf(Box::new(file));
            return Ok(Self { path: path.to_owned(), spec, weights, adapter: None, terminal });
        }
        let spec = read_spec(path, terminal)?;
        verify(path)?;
        let folder =
            FolderSource::new(WeightFolder::open(path)?).with_notice(copied(path, terminal));
        let weights = ModelWeights::Folder(Box::new(folder));
        Ok(Self { path: path.to_owned(), spec, weights, adapter: None, terminal })
    }

    /// Opens a pack.
    pub(crate) fn open_pack(
        path: &Path,
        check: PackCheck,
        terminal: Terminal,
    ) -> anyhow::Result<Self> {
        let pack = PackSource::new(PackFile::open(path)?, check)?;
        let pack = pack.with_notice(copied(path, terminal));
        let spec = pack.pack().header().spec.clone();
        let weights = ModelWeights::Pack(Box::new(pack));
        Ok(Self { path: path.to_owned(), spec, weights, adapter: None, terminal })
    }

    /// Says why weights were copied that could have been read where they lie, if they were.
    pub(crate) fn tell_copies(&self) {
        let reason = match &self.weights {
            ModelWeights::Folder(folder) => folder.copied_because(),
            ModelWeights::Pack(pack) => pack.copied_because(),
            ModelWeights::Gguf(_) => None,
        };
        if let Some(reason) = reason {
            let path = self.path.display();
            self.terminal.warn(format_args!("the weights of {path} were copied: {reason}"));
        }
    }

    /// The pack, if the model is one.
    pub(crate) fn pack(&self) -> Option<&PackSource> {
        match &self.weights {
            ModelWeights::Pack(pack) => Some(pack),
            ModelWeights::Folder(_) | ModelWeights::Gguf(_) => None,
        }
    }

    /// The layout in which nothing has to be moved when the weights are loaded.
    pub(crate) fn layout(&self) -> Layout {
        self.pack().map_or(Layout::RowMajor, |pack| pack.storage().1)
    }

    /// Where the small files are.
    pub(crate) fn files(&self) -> ModelFiles<'_> {
        match self.pack() {
            Some(pack) => ModelFiles::Pack(pack.pack()),
            None => ModelFiles::Folder(&self.path),
        }
    }

    /// Opens the model that an adapter was made for.
    fn open_base(adapter: &Path, terminal: Terminal) -> anyhow::Result<Self> {
        let base = read_lora(adapter)?.base_model_name_or_path;
        match base.as_deref().map(Path::new).filter(|base| base.exists()) {
            Some(base) => {
                let base = runs::model_folder(Some(base))?;
                if is_adapter(&base) {
                    // Adapters do not pile up, and two that name each other would never end.
                    let (adapter, base) = (adapter.display(), base.display());
                    let message =
                        format!("{adapter} was made for {base}, which is an adapter itself");
                    return Err(UserError::new(message)
                        .hint("merge that one into its model first: cairn adapter merge --help")
                        .into());
                }
                Self::open(&base, terminal)
            }
            None => {
                let (adapter, base) = (adapter.display(), base.as_deref().unwrap_or("no model"));
                let message =
                    format!("{adapter} is an adapter and names {base}, which is no folder here");
                Err(UserError::new(message)
                    .hint(format!("name its model: --model DIR --adapter {adapter}"))
                    .into())
            }
        }
    }

    /// Puts an adapter beside the weights.
    fn with_adapter(self, folder: &Path) -> anyhow::Result<Self> {
        let lora = read_lora(folder)?;
        verify(folder)?;
        let map = AdapterMap::new(&self.spec, &lora)
            .map_err(anyhow::Error::from)
            .with_context(|| format!("{} does not fit this model", folder.display()))?;
        let tensors = SafetensorsFile::open(&folder.join(ADAPTER_FILE))?;
        let adapter = FolderAdapter { path: folder.to_owned(), map, tensors };
        Ok(Self { adapter: Some(adapter), ..self })
    }

    /// The folder of the adapter, or that of the model where there is none.
    pub(crate) fn used(&self) -> &Path {
        self.adapter.as_ref().map_or(&self.path, |adapter| &adapter.path)
    }

    /// What of the program lies beside the projections.
    pub(crate) fn adapters(&self) -> AdapterMap {
        self.adapter.as_ref().map(|adapter| adapter.map.clone()).unwrap_or_default()
    }

    /// The tensors of model and adapter.
    pub(crate) fn tensors(&self) -> (&dyn TensorSource, Option<&dyn TensorSource>) {
        let adapter = self.adapter.as_ref().map(|adapter| &adapter.tensors as &dyn TensorSource);
        (&self.weights, adapter)
    }

    /// A session over the model's program, with its weights, where they lie if they can be read so.
    pub(crate) fn session(&self, memory: MemoryPlan, cpu: Cpu) -> anyhow::Result<Session> {
        let cannot = |path: &Path| format!("cannot load {}", path.display());
        let lent = self.weights.lend(&self.spec, &memory, &cpu);
        let lent = lent.with_context(|| cannot(&self.path))?;
        let mut session = Session::to_be_loaded(memory, cpu, lent)?;
        load_weights(&mut session, &self.spec, &self.weights)
            .with_context(|| cannot(&self.path))?;
        if let Some(adapter) = &self.adapter {
            load_adapter(&mut session, &self.spec, &adapter.map, &adapter.tensors)
                .with_context(|| cannot(&adapter.path))?;
        }
        self.tell_copies();
        Ok(session)
    }

    /// The model as an engine, its weights held as `storage` says.
    pub(crate) fn engine(
        &self,
        options: EngineOptions,
        storage: &Storage,
        cpu: Cpu,
    ) -> anyhow::Result<Engine> {
        let options = EngineOptions { encoding: storage.encoding, ..options };
        let plan = EnginePlan::with_storage(&self.spec, options, &self.adapters(), &storage.own)?;
        self.load(plan, cpu)
    }

    /// The model as the engine that was planned.
    pub(crate) fn load(&self, plan: EnginePlan, cpu: Cpu) -> anyhow::Result<Engine> {
        let engine = Engine::load_adapted(plan, cpu, self.tensors())
            .with_context(|| format!("cannot load {}", self.path.display()))?;
        self.tell_copies();
        Ok(engine)
    }

    /// The tokenizer beside or among the weights, if there is one.
    pub(crate) fn tokenizer(&self) -> anyhow::Result<Option<Tokenizer>> {
        if let ModelWeights::Gguf(file) = &self.weights {
            return Ok(Tokenizer::from_gguf(file)?);
        }
        let tokenizer = Tokenizer::of(self.files())?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_model(self.spec.vocab_size)?;
        }
        Ok(tokenizer)
    }

    /// The tokenizer, for a command that cannot do without.
    pub(crate) fn text_tokenizer(&self) -> anyhow::Result<Tokenizer> {
        Ok(self.tokenizer()?.ok_or_else(|| self.no_tokenizer())?)
    }

    /// What is said where there is text and nothing to read it with.
    pub(crate) fn no_tokenizer(&self) -> UserError {
        UserError::new(format!("{} has no {TOKENIZER_FILE}", self.path.display()))
            .hint(format!("copy the {TOKENIZER_FILE} that belongs to the model beside its weights"))
    }

    /// What the model's files say beside its tokenizer.
    pub(crate) fn tokenizer_config(
        &self,
        tokenizer: &Tokenizer,
    ) -> anyhow::Result<TokenizerConfig> {
        if let ModelWeights::Gguf(file) = &self.weights {
            return Ok(TokenizerConfig::from_gguf(file)?);
        }
        let config = TokenizerConfig::of(self.files())?;
        config.check(tokenizer, &self.path)?;
        Ok(config)
    }
}

/// The text of an adapter's description.
pub(crate) fn adapter_config(folder: &Path) -> anyhow::Result<String> {
    let path = folder.join(ADAPTER_CONFIG_FILE);
    if !path.exists() {
        return Err(UserError::new(format!("{} holds no adapter", folder.display()))
            .hint(format!("an adapter is a folder with {ADAPTER_CONFIG_FILE} and {ADAPTER_FILE}"))
            .into());
    }
    Ok(read_text(&path, CONFIG_BYTES_MAX)?)
}

/// Reads an adapter's description.
pub(crate) fn read_lora(folder: &Path) -> anyhow::Result<LoraSpec> {
    LoraSpec::from_peft_json(&adapter_config(folder)?)
        .map_err(anyhow::Error::from)
        .with_context(|| format!("{} cannot be used", folder.join(ADAPTER_CONFIG_FILE).display()))
}

/// Refuses a folder whose manifest says that it was altered.
fn verify(folder: &Path) -> anyhow::Result<()> {
    verify_model(folder).with_context(|| {
        format!(
            "{} is not as it was saved; without {MANIFEST_FILE} it is taken as it is",
            folder.display()
        )
    })
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
    GgufFile::open(path).map_err(|error| match &error {
        // It is none of those files, rather than a damaged one.
        GgufReadError::Header { source, .. } if matches!(**source, GgufError::NotGguf { .. }) => {
            let what = format!("{} is not a model: {MODEL_FORMS}", path.display());
            anyhow::Error::from(error).context(what)
        }
        _ => error.into(),
    })
}

/// What is said of a folder without a description: which model its weights seem to be, and what has to
/// be told of it; or that there are none.
pub(crate) fn undescribed(folder: &Path) -> anyhow::Error {
    let weights = match WeightFolder::open(folder) {
        Ok(weights) => weights,
        Err(WeightsError::NoWeights { .. }) => return no_model(folder).into(),
        Err(error) if folder.is_dir() => return error.into(),
        Err(_) => return no_model(folder).into(),
    };
    match undescribed::spec(folder, &weights, &[]) {
        Err(error) => error,
        // No family's shapes tell everything.
        Ok(spec) => UserError::new(format!("{} has no {CONFIG_FILE}", folder.display()))
            .hint(format!("its tensors are those of a {} model", spec.family))
            .into(),
    }
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
    let run = runs::last_in(folder);
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
    if PackFile::is_pack(folder) {
        return Ok(PackFile::open(folder)?.header().spec.clone());
    }
    if folder.is_file() {
        return gguf_spec(&open_gguf(folder)?);
    }
    let config = folder.join(CONFIG_FILE);
    if !config.exists() {
        return Err(undescribed(folder));
    }
    let text = read_config(&config)?;
    let HfConfig { spec, ignored } = HfConfig::from_json(&text)
        .with_context(|| format!("{} does not describe a model", config.display()))?;
    warn_of_ignored(&config, &ignored, terminal);
    Ok(spec)
}

/// The text of a `config.json`.
pub(crate) fn read_config(config: &Path) -> anyhow::Result<String> {
    Ok(read_text(config, CONFIG_BYTES_MAX)?)
}

/// Says which fields of a `config.json` had no influence.
pub(crate) fn warn_of_ignored(config: &Path, ignored: &[String], terminal: Terminal) {
    let (shown, rest) = ignored.split_at(ignored.len().min(IGNORED_SHOWN));
    if !shown.is_empty() {
        let (path, mut names) = (config.display(), shown.join(", "));
        if !rest.is_empty() {
            names = format!("{names} and {} more", rest.len());
        }
        terminal.warn(format_args!("{path} has fields that nothing here knows: {names}"));
    }
}

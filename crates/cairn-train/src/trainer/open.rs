//! Opening a run: a new one, or where the newest checkpoint left it.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;

use cairn_artifacts::checkpoint::{ADAPTER_FILE, Checkpoint, SavedCheckpoint, Verify};
use cairn_artifacts::run::{CodeRevision, RunFolder, RunRecord};
use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_artifacts::{FileError, atomic};
use cairn_data::corpus::Corpus;
use cairn_data::loader::{Loader, LoaderError, LoaderSettings};
use cairn_data::tokenizer::Tokenizer;
use cairn_kernels::Cpu;
use cairn_model::{AdapterMap, init_adapter, init_weights, load_adapter, load_weights};
use cairn_spec::ModelSpec;
use cairn_spec::model::{Mlp, SpecialTokens};
use cairn_spec::recipe::{Objective, TrainRecipe};
use serde_json::json;

use super::Trainer;
use super::finish::timestamp;
use crate::checkpoint::{self, StateError, TrainState, TrainedAdapter};
use crate::error::TrainError;
use crate::host::Host;
use crate::initial::{INITIAL_WEIGHTS, InitialWeights, check_beginning};
use crate::learner::Learner;
use crate::masking::Masking;
use crate::metrics::{Metric, RunLog};
use crate::observer::Warning;
use crate::plan::Plan;
use crate::progress::Progress;
use crate::resume::{ResumeError, check_recipe};
use crate::schedule::Schedule;
use crate::validation::Validation;

/// What a run is opened with.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    /// What the run does.
    pub recipe: &'a TrainRecipe,
    /// What it learns from.
    pub corpus: Arc<Corpus>,
    /// Where everything it writes goes.
    pub folder: &'a Path,
    /// A model folder whose weights a new run starts from, instead of fresh ones. A run that goes
    /// on takes only the folder it began with.
    pub initial: Option<&'a Path>,
    /// The code, for the record.
    pub code: CodeRevision,
    /// The machine's measured arithmetic peak in f32, for the fraction of it that training reaches.
    pub peak_flops_per_s: Option<f64>,
}

impl Trainer {
    /// Opens a run folder: reads the newest checkpoint if there is one, else makes fresh weights.
    /// The resolved recipe and the record, with machine and plan, are written into the folder.
    ///
    /// # Errors
    ///
    /// [`TrainError::Resume`] if the checkpoint was made with another recipe,
    /// [`TrainError::Data`] if with other data, [`TrainError::Load`] if it is damaged.
    pub fn open(
        setup: &Setup<'_>,
        plan: Plan,
        cpu: Cpu,
        host: &dyn Host,
    ) -> Result<Self, TrainError> {
        let recipe = setup.recipe;
        let tokenizer = setup.corpus.load_tokenizer()?;
        let mut warnings = Vec::new();
        let spec = saved_spec(recipe, &setup.corpus, &tokenizer, &mut warnings)?;
        let masking = masking(recipe, &tokenizer)?;
        let loader = loader(recipe, &setup.corpus)?;
        let folder = RunFolder::new(setup.folder);
        let lock = lock(setup.folder)?;
        // Refusals come before the memory is taken and anything is written.
        let saved = match newest(&folder, &mut warnings)? {
            Some(saved) => Some((read_checked(&saved, recipe, &loader, &tokenizer, &plan)?, saved)),
            None => None,
        };
        if let Some(path) = setup.initial {
            InitialWeights::check_model(path, &spec)?;
        }
        let initial = setup.initial.map(InitialWeights::open).transpose()?;
        let given = initial.as_ref().map(|(initial, _)| initial);
        let adapter = trained_adapter(recipe, &spec, given)?;
        if let (Some(adapter), Some((state, _))) = (&adapter, &saved) {
            check_base(adapter, state, given)?;
        }
        let began = check_beginning(&folder, given, saved.is_some())?;
        let validation = validation(recipe, &setup.corpus, &tokenizer, &mut warnings)?;
        let validation = validation.map(|validation| validation.with_masking(masking.clone()));
        let mut learner = Learner::new(plan.memory_plan()?, cpu)?;
        if saved.is_none() || adapter.is_some() {
            start(recipe, (&spec, adapter.as_ref()), initial.as_ref(), &mut learner)?;
        }
        if saved.is_none() {
            begin_adapter(recipe, (&spec, adapter.as_ref()), &mut learner)?;
        }
        if let Some((state, saved)) = &saved {
            checkpoint::load(&saved.folder, (&spec, adapter.as_ref()), &mut learner)
                .map_err(load_error)?;
            warnings.extend(other_length(state, &plan));
        }
        let step = saved.as_ref().map_or(0, |(_, saved)| saved.manifest.step);
        let beginning = (step, began, host.unix_s());
        let record = write_run_files(setup, &folder, &plan, beginning)?;
        let log = RunLog::open(&folder, step, host.unix_s())?;
        let expected =
            saved.as_ref().map(|(state, saved)| (state.state_hash, saved.folder.clone()));
        let trainer = Self {
            schedule: Schedule::of_recipe(recipe, plan.total_steps),
            saved_step: saved.as_ref().map(|(_, saved)| saved.manifest.step),
            elapsed_before_s: log.metrics().last().map_or(0.0, Metric::elapsed_s),
            progress: saved.map_or_else(Progress::default, |(state, _)| state.progress),
            checkpoints: folder.checkpoints(),
            recipe: recipe.clone(),
            peak_flops_per_s: setup.peak_flops_per_s,
            folder,
            record,
            spec,
            plan,
            learner,
            loader,
            tokenizer,
            masking,
            adapter,
            validation,
            log,
            step,
            warnings,
            _lock: lock,
        };
        match expected {
            Some((expected, folder)) => trainer.check_state(expected, folder),
            None => Ok(trainer),
        }
    }

    /// Refuses to go on from anything but exactly what was saved.
    fn check_state(
        self,
        expected: cairn_artifacts::Hash,
        folder: std::path::PathBuf,
    ) -> Result<Self, TrainError> {
        let actual = self.state_hash();
        if actual != expected {
            return Err(load_error(StateError::OtherState { folder, expected, actual }));
        }
        Ok(self)
    }
}

/// Creates the folder and makes it this process's: two runs in one folder would spoil each other.
fn lock(folder: &Path) -> Result<File, TrainError> {
    std::fs::create_dir_all(folder).map_err(FileError::on("create", folder))?;
    let path = folder.join("lock");
    let file = File::create(&path).map_err(FileError::on("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(TrainError::Busy { folder: folder.to_owned() }),
        Err(TryLockError::Error(error)) => Err(FileError::on("lock", &path)(error).into()),
    }
}

fn load_error(error: StateError) -> TrainError {
    TrainError::Load(Box::new(error))
}

/// The newest complete checkpoint; warns of a newer one that is damaged, and refuses if there are
/// only damaged ones or such of another schema.
fn newest(
    folder: &RunFolder,
    warnings: &mut Vec<Warning>,
) -> Result<Option<SavedCheckpoint>, TrainError> {
    let series = folder.checkpoints();
    let load = |error| load_error(StateError::from(error));
    series.clean().map_err(load)?;
    let latest = series.latest().map_err(load)?;
    if !series.folder().exists() {
        return Ok(None);
    }
    let entries =
        std::fs::read_dir(series.folder()).map_err(FileError::on("list", series.folder()));
    for entry in entries? {
        let path = entry.map_err(FileError::on("list", series.folder()))?.path();
        let is_newer = latest.as_ref().is_none_or(|latest| latest.folder < path);
        if is_newer && path.is_dir() {
            // Without any checkpoint to go on from, beginning anew would throw the history away.
            if latest.is_none() {
                Checkpoint::open(&path, Verify::Sizes).map_err(load)?;
            }
            warnings.push(Warning::Damaged { path });
        }
    }
    Ok(latest)
}

/// The recipe's model as checkpoints describe it: with the tokenizer's special tokens, among them
/// the one that ends documents, and the dtype that weights are saved in.
fn saved_spec(
    recipe: &TrainRecipe,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    warnings: &mut Vec<Warning>,
) -> Result<ModelSpec, TrainError> {
    let mut fields = recipe.model.clone().into_fields();
    let tokenizer_vocab_size = tokenizer.vocab_size() as usize;
    let vocab_size = fields.vocab_size;
    if vocab_size < tokenizer_vocab_size {
        return Err(TrainError::Vocab { vocab_size, tokenizer_vocab_size });
    }
    let is_unbalanced = matches!(&fields.mlp, Mlp::Moe(moe) if moe.router.aux_loss_coef.is_none());
    if is_unbalanced && recipe.adapter.is_none() {
        warnings.push(Warning::Unbalanced);
    }
    fields.tokens = special_tokens(&fields.tokens, corpus, tokenizer, warnings);
    fields.dtype = recipe.run.weights;
    Ok(ModelSpec::new(fields).expect("the end-of-document token is below the vocabulary's size"))
}

/// What is taken away of a batch, where that is what the model learns to predict.
fn masking(recipe: &TrainRecipe, tokenizer: &Tokenizer) -> Result<Option<Masking>, TrainError> {
    match &recipe.objective {
        Objective::CausalLm => Ok(None),
        Objective::MaskedLm(settings) => Ok(Some(Masking::new(settings, tokenizer)?)),
    }
}

/// The tokens of a model's description that are special in the tokenizer, and the end of a document.
/// An id that is some word here would end texts where the word stands.
fn special_tokens(
    own: &SpecialTokens,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    warnings: &mut Vec<Warning>,
) -> SpecialTokens {
    let end = corpus.end_of_document();
    let is_special = |id: &u32| *id == end || tokenizer.specials().contains_key(id);
    let named = [("bos_token_id", own.bos), ("pad_token_id", own.pad)];
    let named = named.into_iter().filter_map(|(name, id)| Some((name, id?)));
    let all = named.chain(own.eos.iter().map(|&id| ("eos_token_id", id)));
    let foreign = all.filter(|(_, id)| !is_special(id));
    let foreign: Vec<String> = foreign.map(|(name, id)| format!("{name} {id}")).collect();
    if !foreign.is_empty() {
        warnings.push(Warning::ForeignTokens { tokens: foreign });
    }
    let others = own.eos.iter().copied().filter(|id| *id != end && is_special(id));
    SpecialTokens {
        bos: own.bos.filter(is_special),
        eos: std::iter::once(end).chain(others).collect(),
        pad: own.pad.filter(is_special),
    }
}

/// The adapter that a recipe trains.
fn trained_adapter(
    recipe: &TrainRecipe,
    spec: &ModelSpec,
    initial: Option<&InitialWeights>,
) -> Result<Option<TrainedAdapter>, TrainError> {
    let Some(adapter) = &recipe.adapter else { return Ok(None) };
    let base_hash = initial.ok_or(TrainError::NoBase)?.hash;
    let lora = adapter.lora.clone();
    Ok(Some(TrainedAdapter { map: AdapterMap::new(spec, &lora)?, lora, base_hash }))
}

/// Refuses frozen weights that are not those of the checkpoint.
fn check_base(
    adapter: &TrainedAdapter,
    state: &TrainState,
    initial: Option<&InitialWeights>,
) -> Result<(), ResumeError> {
    if state.base_hash == Some(adapter.base_hash) {
        return Ok(());
    }
    Err(ResumeError::OtherBase {
        folder: initial.map_or_else(String::new, |initial| initial.folder.clone()),
        started: state.base_hash.map_or_else(|| "none".to_owned(), |hash| hash.to_string()),
        now: adapter.base_hash.to_string(),
    })
}

fn loader(recipe: &TrainRecipe, corpus: &Arc<Corpus>) -> Result<Loader, LoaderError> {
    let batch_rows = usize::try_from(recipe.batch.global_batch_size())
        .expect("recipes limit the sequences of a step");
    let settings =
        LoaderSettings { seq_len: recipe.data.seq_len, batch_rows, seed: recipe.run.seed };
    Loader::new(Arc::clone(corpus), settings)
}

/// Reads a checkpoint's state and refuses it if this run would not continue its numbers.
fn read_checked(
    saved: &SavedCheckpoint,
    recipe: &TrainRecipe,
    loader: &Loader,
    tokenizer: &Tokenizer,
    plan: &Plan,
) -> Result<TrainState, TrainError> {
    let state = checkpoint::train_state(&saved.folder, &saved.manifest).map_err(load_error)?;
    if state.tokenizer_hash != tokenizer.hash() {
        let (started, now) = (state.tokenizer_hash.to_string(), tokenizer.hash().to_string());
        return Err(ResumeError::OtherTokenizer { started, now }.into());
    }
    check_recipe(&state.recipe, recipe)?;
    loader.resume(&state.loader)?;
    let (step, total_steps) = (saved.manifest.step, plan.total_steps);
    if step > total_steps {
        return Err(ResumeError::AlreadyPast { step, total_steps }.into());
    }
    Ok(state)
}

fn other_length(state: &TrainState, plan: &Plan) -> Option<Warning> {
    let (before, now) = (state.total_steps, plan.total_steps);
    (before != now).then_some(Warning::OtherLength { before, now })
}

fn validation(
    recipe: &TrainRecipe,
    corpus: &Arc<Corpus>,
    tokenizer: &Tokenizer,
    warnings: &mut Vec<Warning>,
) -> Result<Option<Validation>, TrainError> {
    match Validation::new(corpus, tokenizer, recipe.data.seq_len, recipe.eval.max_tokens) {
        Err(LoaderError::NoTargets { .. }) => {
            warnings.push(Warning::NoValidation);
            Ok(None)
        }
        result => Ok(Some(result?)),
    }
}

/// Fills the weights of a run that begins, or those that are frozen of one that goes on.
fn start(
    recipe: &TrainRecipe,
    (spec, adapter): (&ModelSpec, Option<&TrainedAdapter>),
    initial: Option<&(InitialWeights, WeightFolder)>,
    learner: &mut Learner,
) -> Result<(), TrainError> {
    match initial {
        None => init_weights(learner.session_mut(), spec, recipe.run.seed),
        Some((initial, weights)) => {
            load_weights(learner.session_mut(), spec, weights).map_err(|source| {
                TrainError::InitialModel { folder: (&initial.folder).into(), source }
            })?;
        }
    }
    if let Some(adapter) = adapter {
        init_adapter(learner.session_mut(), &adapter.map, recipe.run.seed);
    }
    learner.start_states();
    Ok(())
}

/// Fills the adapter's weights from the one that the recipe goes on from, if there is one.
fn begin_adapter(
    recipe: &TrainRecipe,
    (spec, adapter): (&ModelSpec, Option<&TrainedAdapter>),
    learner: &mut Learner,
) -> Result<(), TrainError> {
    let initial = recipe.adapter.as_ref().and_then(|adapter| adapter.initial.as_deref());
    let (Some(adapter), Some(initial)) = (adapter, initial) else { return Ok(()) };
    let folder = Path::new(initial);
    let failed = |source| TrainError::InitialAdapter { folder: folder.to_owned(), source };
    let tensors = SafetensorsFile::open(&folder.join(ADAPTER_FILE));
    let tensors = tensors.map_err(|error| failed(error.into()))?;
    load_adapter(learner.session_mut(), spec, &adapter.map, &tensors)
        .map_err(|error| failed(error.into()))?;
    learner.start_states();
    Ok(())
}

/// Writes the resolved recipe and a record of what begins.
fn write_run_files(
    setup: &Setup<'_>,
    folder: &RunFolder,
    plan: &Plan,
    (step, began, unix_s): (u64, Option<InitialWeights>, f64),
) -> Result<RunRecord, TrainError> {
    atomic::clean(folder.root())?;
    atomic::write_bytes(&folder.recipe(), setup.recipe.to_toml().as_bytes())?;
    let mut settings = json!(setup.recipe.to_file());
    if let Some(began) = began {
        settings[INITIAL_WEIGHTS] = json!(began);
    }
    let mut record = RunRecord::new("train", settings, setup.code.clone());
    record.data_hash = Some(setup.corpus.data_hash());
    // A run that goes on keeps its beginning.
    let earlier = RunRecord::load(&folder.record()).ok().filter(|_| step != 0);
    record.started = earlier.and_then(|earlier| earlier.started).or(timestamp(unix_s));
    record.figures.insert("plan".to_owned(), json!(plan));
    record.figures.insert("opened_at_step".to_owned(), json!(step));
    if let Some(peak) = setup.peak_flops_per_s {
        record.figures.insert("peak_flops_per_s".to_owned(), json!(peak));
    }
    record.save(&folder.record())?;
    Ok(record)
}

//! From a recipe to a plan and a run: what `plan`, `train` and `quickstart` share.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use cairn_artifacts::bounded::read_text;
use cairn_artifacts::gguf::GgufFile;
use cairn_artifacts::leanpack::PackFile;
use cairn_artifacts::machine::{ProcessMemory, available_memory_bytes};
use cairn_data::corpus::{Corpus, MANIFEST_FILE};
use cairn_kernels::Cpu;
use cairn_spec::recipe::{Facts, Format, RECIPE_BYTES_MAX, RecipeError, RecipeFile, TrainRecipe};
use cairn_train::{Ending, Outcome, Pace, Plan, PlanRequest, Setup, Trainer, measure_pace};

use crate::context::Context;
use crate::failure::UserError;
use crate::machine_profile::{self, Measuring};
use crate::model_folder::{CONFIG_FILE, adapter_config, read_config, undescribed, warn_of_ignored};
use crate::outside::{Outside, code_revision};
use crate::train_display::TrainDisplay;

/// A resolved recipe and what it learns from.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// Everything decided.
    pub(crate) recipe: TrainRecipe,
    /// The opened corpus; `None` where a plan is asked for before there is one.
    pub(crate) corpus: Option<Arc<Corpus>>,
}

impl Job {
    /// Reads a recipe file, applies overrides and resolves it against its corpus.
    pub(crate) fn read(
        path: &Path,
        overrides: &[String],
        context: &Context,
    ) -> anyhow::Result<Self> {
        Self::read_from(path, overrides, None, context)
    }

    /// As [`read`](Self::read), beginning with the weights of the model in `initial`.
    pub(crate) fn read_from(
        path: &Path,
        overrides: &[String],
        initial: Option<&Path>,
        context: &Context,
    ) -> anyhow::Result<Self> {
        let text = read_text(path, RECIPE_BYTES_MAX as u64)?;
        let what = || path.display().to_string();
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        let format = Format::from_extension(&extension).with_context(what)?;
        let file = RecipeFile::parse(&text, format).with_context(what)?;
        let mut file = file.with_overrides(overrides)?;
        if let Some(folder) = initial {
            file.model.initial = Some(folder.display().to_string());
        }
        let file = with_described_model(file, context)?;
        let file = with_initial_adapter(file)?;
        Self::resolve(&file, context).with_context(what)
    }

    /// Resolves a recipe against its corpus.
    pub(crate) fn resolve(file: &RecipeFile, context: &Context) -> anyhow::Result<Self> {
        let mut file = file.clone();
        if context.threads_asked {
            file.run.threads = Some(context.threads);
        }
        let corpus = match &file.data.corpus {
            Some(folder) if Path::new(folder).join(MANIFEST_FILE).exists() => {
                Some(Arc::new(Corpus::open(Path::new(folder))?))
            }
            _ => None,
        };
        let vocab_size = corpus.as_ref().map(|corpus| corpus.manifest().tokenizer.vocab_size);
        let facts = Facts {
            available_threads: context.threads,
            tokenizer_vocab_size: vocab_size.map(|size| size as usize),
        };
        let recipe = match (file.resolve(&facts), &file.data.corpus) {
            // The corpus would say; that it is not there is what a person can mend.
            (Err(RecipeError::Missing { key: "model.vocab_size" }), Some(folder)) => {
                return Err(no_corpus(folder)
                    .hint("or say what it will have: model.vocab_size=N")
                    .into());
            }
            (recipe, _) => recipe?,
        };
        if let (Some(corpus), Some(path)) = (&corpus, &recipe.data.tokenizer) {
            check_tokenizer(corpus, Path::new(path))?;
        }
        Ok(Self { recipe, corpus })
    }

    /// The corpus, or what to do to have one.
    pub(crate) fn corpus(&self) -> anyhow::Result<Arc<Corpus>> {
        self.corpus.clone().ok_or_else(|| no_corpus(&self.recipe.data.corpus).into())
    }

    /// Measures how fast this machine trains the model.
    pub(crate) fn pace(&self, outside: &Outside, context: &Context) -> anyhow::Result<Pace> {
        let threads = self.recipe.run.threads;
        let cpu = || machine_profile::cpu(context, threads);
        measure_pace(&self.recipe, cpu, outside).context("cannot measure the pace of this model")
    }

    /// Plans the run; one that does not fit into what is free is refused.
    pub(crate) fn plan(&self, pace: Option<Pace>) -> anyhow::Result<Plan> {
        let baseline_bytes = ProcessMemory::read().map_or(0, |memory| memory.anonymous_bytes);
        let scratch = Cpu::scratch_bytes_of(self.recipe.run.threads);
        let recipe = self.limited()?;
        Ok(Plan::new(&PlanRequest {
            recipe: &recipe,
            baseline_bytes,
            scratch_bytes: scratch as u64,
            pace,
        })?)
    }

    /// The recipe with the memory that is free as its limit, unless its own is lower.
    fn limited(&self) -> anyhow::Result<TrainRecipe> {
        let own = self.recipe.run.memory_limit_bytes;
        let Some(limit) = [own, available_memory_bytes()].into_iter().flatten().min() else {
            return Ok(self.recipe.clone());
        };
        let file = self.recipe.to_file().with_overrides(&[format!("run.memory_limit={limit}")])?;
        let vocab_size = self.recipe.model.vocab_size;
        let facts = Facts {
            available_threads: self.recipe.run.threads,
            tokenizer_vocab_size: Some(vocab_size),
        };
        Ok(file.resolve(&facts)?)
    }
}

/// Reads the `config.json` that describes the model, where one does.
fn with_described_model(file: RecipeFile, context: &Context) -> anyhow::Result<RecipeFile> {
    let Some(path) = file.unread_config().map(Path::new) else { return Ok(file) };
    let config = if path.is_dir() { path.join(CONFIG_FILE) } else { path.to_owned() };
    if path.is_dir() && !config.exists() {
        return Err(undescribed(path));
    }
    refuse_single_file(path)?;
    let text = read_config(&config)?;
    let (described, ignored) = file
        .with_model_config(&text)
        .with_context(|| format!("{} does not describe a model to train", config.display()))?;
    warn_of_ignored(&config, &ignored, context.terminal);
    Ok(described)
}

/// Refuses to go on from a model in one file: what is saved is a folder with the files beside it.
fn refuse_single_file(path: &Path) -> Result<(), UserError> {
    let (kind, hint) = if PackFile::is_pack(path) {
        ("leanpack", format!("make a folder of it: cairn unpack {} --output DIR", path.display()))
    } else if path.is_file() && GgufFile::open(path).is_ok() {
        ("GGUF file", "name the folder that it was made from".to_owned())
    } else {
        return Ok(());
    };
    let message = format!("{} is a {kind}; training begins with a folder", path.display());
    Err(UserError::new(message).hint(hint))
}

/// Reads the `adapter_config.json` of the adapter to go on from, where there is one.
fn with_initial_adapter(file: RecipeFile) -> anyhow::Result<RecipeFile> {
    let Some(folder) = file.initial_adapter().map(Path::new) else { return Ok(file) };
    let text = adapter_config(folder)?;
    let described = file.with_adapter_config(&text);
    described.with_context(|| format!("{} cannot be trained on", folder.display()))
}

fn no_corpus(folder: &str) -> UserError {
    UserError::new(format!("there is no corpus in {folder}"))
        .hint(format!("build one: cairn corpus build --input FOLDER --output {folder}"))
        .hint("or name another: data.corpus=FOLDER")
}

/// The shards were made with the corpus's own tokenizer; another one would give other text.
fn check_tokenizer(corpus: &Corpus, path: &Path) -> anyhow::Result<()> {
    let found = cairn_artifacts::Hash::of_file(path)?;
    let expected = corpus.manifest().tokenizer.file.blake3;
    if found == expected {
        return Ok(());
    }
    Err(UserError::new(format!(
        "data.tokenizer {} ({found}) is not the tokenizer that the corpus was made with ({expected})",
        path.display()
    ))
    .hint("leave data.tokenizer out, or build the corpus again with this tokenizer")
    .into())
}

/// What a run is started with besides its job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunOptions<'a> {
    /// The run's folder.
    pub(crate) folder: &'a Path,
    /// A model whose weights a new run starts from.
    pub(crate) initial: Option<&'a Path>,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub(crate) struct Trained {
    /// How it ended and where it stands.
    pub(crate) outcome: Outcome,
    /// Hash of the training state at the end.
    pub(crate) state_hash: String,
}

/// Trains to the end, or until someone asks to stop.
pub(crate) fn train(
    job: &Job,
    plan: Plan,
    options: RunOptions<'_>,
    outside: &Outside,
    context: &Context,
) -> anyhow::Result<Trained> {
    let corpus = job.corpus()?;
    // Opening looks at sizes only; what is trained on has to be what the record will name.
    corpus.verify()?;
    let tokens = plan.shape.micro_batch_size * job.recipe.data.seq_len;
    let cases = machine_profile::cases(&plan.programs().train, tokens);
    let cpu = machine_profile::cpu(context, job.recipe.run.threads)?;
    let peak = machine_profile::load(context).peak(&cpu);
    let host = Measuring::new(outside, context, cases);
    let setup = Setup {
        recipe: &job.recipe,
        corpus,
        folder: options.folder,
        initial: options.initial,
        code: code_revision(),
        peak_flops_per_s: peak.map(|peak| peak.gflops * 1e9),
    };
    let mut trainer = Trainer::open(&setup, plan, cpu, outside)?;
    let mut display = TrainDisplay::new(context.terminal, trainer.plan().total_steps);
    let outcome = trainer.run(&host, &mut display);
    display.finish();
    Ok(Trained { outcome: outcome?, state_hash: trainer.state_hash().to_string() })
}

/// Says how a run ended and what to do next.
pub(crate) fn conclude(trained: &Trained, plan_steps: u64, folder: &Path, context: &Context) {
    let Outcome { ending, step, best, elapsed_s, .. } = &trained.outcome;
    let time = crate::figures::Seconds(*elapsed_s);
    let terminal = context.terminal;
    match ending {
        Ending::Finished => terminal.step("Finished", format_args!("{step} steps in {time}")),
        Ending::EarlyStopped => terminal.step(
            "Finished",
            format_args!(
                "early, after {step} of {plan_steps} steps: validation no longer improves"
            ),
        ),
        Ending::Stopped => terminal.step(
            "Stopped",
            format_args!("after step {step} of {plan_steps}, saved; run it again to go on"),
        ),
    }
    if let Some(best) = best {
        let bits =
            best.bits_per_byte.map_or_else(String::new, |b| format!(", {b:.3} bits per byte"));
        terminal.step(
            "Best",
            format_args!("validation loss {:.3} at step {}{bits}", best.loss, best.step),
        );
    }
    terminal.step("Report", folder.join("report.html").display());
}

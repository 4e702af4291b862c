//! Runs of tiny models on a tiny corpus: the same state however a run is cut, and what is left of
//! one that fails.

mod adapters;
mod families;
mod measuring;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_artifacts::Checkpoint;
use cairn_artifacts::checkpoint::Verify;
use cairn_artifacts::run::{CodeRevision, RunStatus};
use cairn_artifacts::safetensors::WeightFolder;
use cairn_data::corpus::{
    BuildSettings, Corpus, Input, ScanSettings, Split, SplitSettings, build, scan,
};
use cairn_data::tokenizer::{BpeSettings, train_bpe};
use cairn_eval::{Comparison, ModelScorer, ModelScorerOptions, ModelScorerPlan, Windows};
use cairn_eval::{compare, sample};
use cairn_kernels::{Cpu, Isa};
use cairn_spec::Hint;
use cairn_spec::recipe::{Facts, Format, RecipeFile, TrainRecipe};

use super::*;
use crate::checkpoint::StateError;
use crate::error::FailedBatch;
use crate::host::FakeHost;
use crate::metrics::read_metrics;
use crate::observer::Silent;
use crate::plan::PlanRequest;
use crate::resume::ResumeError;

/// A recipe of two small blocks, with changes.
pub(crate) fn recipe(overrides: &[&str]) -> TrainRecipe {
    let text = r#"
        schema = "train/2"
        [model]
        family = "llama"
        hidden_size = 32
        num_hidden_layers = 2
        num_attention_heads = 2
        intermediate_size = 64
        vocab_size = 300
        [dropout]
        resid = 0.1
        attn = 0.1
        [data]
        corpus = "corpus"
        seq_len = 32
        [batch]
        micro_batch_size = 4
        [schedule]
        warmup_steps = 2
        [budget]
        steps = 8
        [eval]
        every = 4
        [checkpoint]
        every = 3
    "#;
    let file = RecipeFile::parse(text, Format::Toml).unwrap().with_overrides(overrides).unwrap();
    file.resolve(&Facts { available_threads: 2, tokenizer_vocab_size: None }).unwrap()
}

/// A corpus in a temporary folder, and room for runs.
struct Fixture {
    root: tempfile::TempDir,
    corpus: Arc<Corpus>,
}

impl Fixture {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let corpus = Arc::new(build_corpus(root.path(), "stones"));
        Self { root, corpus }
    }

    fn run_folder(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn open(&self, name: &str, recipe: &TrainRecipe, cpu: Cpu) -> Result<Trainer, TrainError> {
        open(&self.run_folder(name), &self.corpus, recipe, cpu)
    }

    /// Opens a run that begins with the weights of a model folder.
    fn open_from(&self, name: &str, initial: Option<&Path>) -> Result<Trainer, TrainError> {
        let recipe = recipe(&[]);
        open_from(&self.run_folder(name), &self.corpus, (&recipe, initial), Cpu::detect(1))
    }

    /// Opens and runs to the end, or until the host stops it.
    fn run(&self, name: &str, overrides: &[&str], host: &FakeHost) -> (Trainer, Outcome) {
        let mut trainer = self.open(name, &recipe(overrides), Cpu::detect(1)).unwrap();
        let outcome = trainer.run(host, &mut Silent).unwrap();
        (trainer, outcome)
    }
}

fn open(
    folder: &Path,
    corpus: &Arc<Corpus>,
    recipe: &TrainRecipe,
    cpu: Cpu,
) -> Result<Trainer, TrainError> {
    open_from(folder, corpus, (recipe, None), cpu)
}

fn open_from(
    folder: &Path,
    corpus: &Arc<Corpus>,
    (recipe, initial): (&TrainRecipe, Option<&Path>),
    cpu: Cpu,
) -> Result<Trainer, TrainError> {
    let request = PlanRequest {
        recipe,
        baseline_bytes: 0,
        scratch_bytes: cpu.scratch_bytes() as u64,
        pace: None,
    };
    let setup = Setup {
        recipe,
        corpus: Arc::clone(corpus),
        folder,
        initial,
        code: CodeRevision::default(),
        peak_flops_per_s: Some(1e12),
    };
    Trainer::open(&setup, Plan::new(&request).unwrap(), cpu, &FakeHost::new())
}

fn build_corpus(root: &Path, word: &str) -> Corpus {
    let text = root.join(word);
    for group in 0..8 {
        let folder = text.join(format!("group-{group}"));
        std::fs::create_dir_all(&folder).unwrap();
        for file in 0..4 {
            let line = |i: usize| format!("{word} {} on {word} {}\n", i * file, (i + group) % 7);
            let lines: String = (0..12 + 5 * file).map(line).collect();
            std::fs::write(folder.join(format!("{file}.txt")), lines).unwrap();
        }
    }
    let mut quiet = |_| ControlFlow::Continue(());
    let mut settings = ScanSettings::new(vec![Input::Path(text)]);
    settings.split = SplitSettings { validation_fraction: 0.25, ..SplitSettings::default() };
    let scan = scan(settings, &mut quiet).unwrap();
    let bpe = BpeSettings { vocab_size: 280, ..BpeSettings::default() };
    let tokenizer = train_bpe(&bpe, scan.sample(1 << 20)).unwrap();
    let folder = root.join(format!("{word}-corpus"));
    build(&scan, &tokenizer, &BuildSettings::new(folder.clone()), &mut quiet).unwrap();
    Corpus::open(&folder).unwrap()
}

/// Training losses by step, as bits.
fn losses(trainer: &Trainer) -> Vec<(u64, u64)> {
    let metrics = read_metrics(trainer.folder()).unwrap();
    let loss = |metric: &Metric| match metric {
        Metric::Step(step) => Some((step.step, step.loss.to_bits())),
        Metric::Validation(_) => None,
    };
    metrics.iter().filter_map(loss).collect()
}

#[test]
fn threads_instructions_and_recomputation_do_not_change_the_state() {
    let fixture = Fixture::new();
    let (straight, outcome) = fixture.run("straight", &[], &FakeHost::new());
    assert_eq!((outcome.ending, outcome.step), (Ending::Finished, 8));
    for isa in Isa::supported() {
        for threads in [1, 2] {
            let name = format!("{isa}-{threads}");
            let mut other = fixture.open(&name, &recipe(&[]), Cpu::new(isa, threads)).unwrap();
            other.run(&FakeHost::new(), &mut Silent).unwrap();
            assert_eq!(other.state_hash(), straight.state_hash(), "{name}");
        }
    }
    let (blocks, _) = fixture.run("blocks", &["run.recompute=blocks"], &FakeHost::new());
    assert_eq!(blocks.state_hash(), straight.state_hash());
    assert_eq!(losses(&blocks), losses(&straight));
    let (other_seed, _) = fixture.run("seed", &["run.seed=1"], &FakeHost::new());
    assert_ne!(other_seed.state_hash(), straight.state_hash());
}

#[test]
fn cuts_of_the_batch_do_not_change_the_state_of_an_untied_model() {
    let fixture = Fixture::new();
    let untied = "model.tie_word_embeddings=false";
    let (straight, Outcome { best, .. }) = fixture.run("straight", &[untied], &FakeHost::new());
    for (rows, accum) in [(2, 2), (1, 4)] {
        let cut =
            [format!("batch.micro_batch_size={rows}"), format!("batch.grad_accum_steps={accum}")];
        let name = format!("{rows}x{accum}");
        let (other, outcome) = fixture.run(&name, &[untied, &cut[0], &cut[1]], &FakeHost::new());
        assert_eq!(other.state_hash(), straight.state_hash(), "{name}");
        assert_eq!(losses(&other), losses(&straight), "{name}");
        assert_eq!(outcome.best, best, "validation reads the same rows, {name}");
    }
}

#[test]
fn a_stopped_and_a_killed_run_resume_bit_for_bit() {
    let fixture = Fixture::new();
    for overrides in [&[][..], &["run.weights=bf16", "optimizer.ema_decay=0.9"]] {
        let tag = overrides.len();
        let (straight, _) = fixture.run(&format!("straight-{tag}"), overrides, &FakeHost::new());
        for stop in [1, 4, 5] {
            let name = format!("stopped-{tag}-{stop}");
            let host = FakeHost::stopping_after(stop);
            let (stopped, outcome) = fixture.run(&name, overrides, &host);
            assert_eq!((outcome.ending, outcome.step), (Ending::Stopped, stop));
            assert!(!stopped.is_done());
            drop(stopped);
            if stop == 5 {
                // As if it had been killed while it wrote: the newest complete one is of step 4
                // (the best validation), and half a folder lies there.
                let series = RunFolder::new(fixture.run_folder(&name)).checkpoints();
                let half = series.folder().join("step-00000005.tmp-1-0");
                std::fs::rename(series.path_of(5), half).unwrap();
            }
            let (resumed, _) = fixture.run(&name, overrides, &FakeHost::new());
            assert_eq!(resumed.state_hash(), straight.state_hash(), "{name}");
            assert_eq!(losses(&resumed), losses(&straight), "{name}");
        }
    }
}

#[test]
fn a_finished_run_is_done_when_it_is_opened_again() {
    let fixture = Fixture::new();
    let (first, _) = fixture.run("run", &[], &FakeHost::new());
    let busy = fixture.open("run", &recipe(&[]), Cpu::detect(1)).unwrap_err();
    assert!(matches!(busy, TrainError::Busy { .. }), "{busy:?}");
    let first_hash = first.state_hash();
    drop(first);
    let (again, outcome) = fixture.run("run", &[], &FakeHost::new());
    assert_eq!(outcome.ending, Ending::Finished);
    assert_eq!(again.state_hash(), first_hash);
    assert_eq!(losses(&again).len(), 8);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch() {
    let fixture = Fixture::new();
    let host = FakeHost::stopping_after(4);
    let (mut trainer, _) = fixture.run("run", &[], &host);
    let weight = "model.layers.1.mlp.up_proj.weight";
    trainer.learner_mut().session_mut().stored_f32_mut(weight).unwrap()[0] = f32::NAN;
    let error = trainer.run(&FakeHost::new(), &mut Silent).unwrap_err();
    let TrainError::NotFinite { what: "loss", step: 4, batch: FailedBatch::Kept(batch), .. } =
        &error
    else {
        panic!("{error:?}")
    };
    let kept: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(batch).unwrap()).unwrap();
    assert_eq!(kept["ids"].as_array().unwrap().len(), 4 * 32);
    assert_eq!(kept["step"], 4);
    let record = RunRecord::load(&trainer.folder().record()).unwrap();
    assert_eq!(record.status, RunStatus::Failed);
    drop(trainer);
    let (resumed, _) = fixture.run("run", &[], &FakeHost::new());
    let (straight, _) = fixture.run("straight", &[], &FakeHost::new());
    assert_eq!(resumed.state_hash(), straight.state_hash(), "nothing of it was saved");
}

/// Numbers that cancel on the way forward and overflow on the way back: the loss is a number, the
/// gradient is none.
#[test]
fn a_gradient_that_is_no_number_is_not_applied() {
    let fixture = Fixture::new();
    let (mut trainer, _) = fixture.run("run", &[], &FakeHost::stopping_after(4));
    let before = trainer.learner().hash();
    let session = trainer.learner_mut().session_mut();
    let mut change = |name: &str, change: fn(&mut f32)| {
        let name = format!("model.layers.1.mlp.{name}_proj.weight");
        session.stored_f32_mut(&name).unwrap().iter_mut().for_each(change);
    };
    change("up", |weight| *weight = 1e-38);
    change("gate", |weight| *weight *= 1e3);
    change("down", |weight| *weight = 3e38);
    let spoiled = trainer.learner().hash();
    assert_ne!(before, spoiled);
    // Where the batch is kept there is a folder: it cannot be written, and that is said beside.
    let place = trainer.folder().failed_batch(4);
    std::fs::create_dir_all(place.join("in the way")).unwrap();
    let error = trainer.run(&FakeHost::new(), &mut Silent).unwrap_err();
    let TrainError::NotFinite { what: "gradient norm", batch: FailedBatch::Lost(_), .. } = &error
    else {
        panic!("{error:?}")
    };
    assert!(error.to_string().contains("is not kept: cannot"), "{error}");
    assert_eq!(trainer.learner().hash(), spoiled, "nothing was applied");
    assert_eq!(trainer.step(), 4);
}

#[test]
fn initial_weights_are_remembered_and_not_ignored() {
    let fixture = Fixture::new();
    let (first, outcome) = fixture.run("first", &[], &FakeHost::stopping_after(2));
    drop(first);
    let (other, _) = fixture.run("other", &["run.seed=5"], &FakeHost::stopping_after(1));
    let foreign = other.folder().checkpoints().path_of(1);
    drop(other);
    let model = outcome.checkpoint;

    // A run that has begun with fresh weights takes no others.
    let error = fixture.open_from("first", Some(&foreign)).unwrap_err();
    assert!(error.to_string().contains("with fresh ones"), "{error}");
    assert!(error.hints()[0].contains("--output"), "{:?}", error.hints());

    // One that was to begin with some, and was killed before it saved, does not begin without.
    drop(fixture.open_from("tuned", Some(&model)).unwrap());
    let error = fixture.open_from("tuned", None).unwrap_err();
    assert!(error.hints()[0].contains(&format!("--initial {}", model.display())), "{error}");

    // The same command goes on, and so does one without; the record still says where it began.
    let mut tuned = fixture.open_from("tuned", Some(&model)).unwrap();
    tuned.run(&FakeHost::stopping_after(2), &mut Silent).unwrap();
    drop(tuned);
    for again in [Some(&*model), None] {
        let tuned = fixture.open_from("tuned", again).unwrap();
        assert_eq!(tuned.step(), 2);
        let record = RunRecord::load(&tuned.folder().record()).unwrap();
        let began = &record.settings["initial_weights"];
        assert_eq!(began["folder"], model.display().to_string());
    }
    let error = fixture.open_from("tuned", Some(&foreign)).unwrap_err();
    assert!(error.to_string().contains(&model.display().to_string()), "{error}");
    // Tensors that fit, of a model that turns them into other numbers.
    let config = foreign.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("10000.0", "500000.0")).unwrap();
    let error = fixture.open_from("turned", Some(&foreign)).unwrap_err();
    assert!(error.to_string().contains("theta is 500000.0, the recipe says 10000.0"), "{error}");
    assert!(fixture.open_from("tuned", Some(Path::new("/nowhere"))).is_err());
}

/// What a reader that follows TensorBoard's rules sees of `tag`: a START event purges what earlier
/// files say about its step and later ones.
fn tensorboard_steps(folder: &Path, tag: &[u8]) -> Vec<u64> {
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut steps = Vec::new();
    for file in files {
        let bytes = std::fs::read(file).unwrap();
        for payload in crate::tensorboard::tests::payloads(&bytes) {
            let step = crate::tensorboard::tests::step_of(payload);
            if payload.ends_with(&[0x3a, 2, 8, 1]) {
                steps.retain(|&earlier| earlier < step);
            } else if payload.windows(tag.len()).any(|window| window == tag) {
                steps.push(step);
            }
        }
    }
    steps
}

#[test]
fn tensorboard_shows_every_step_of_a_resumed_run_once() {
    let fixture = Fixture::new();
    for stop in [2, 3, 0] {
        fixture.run("run", &[], &FakeHost::stopping_after(stop));
    }
    // Killed at step 6: what was recorded after the checkpoint of step 5 is done again.
    let (trainer, _) = fixture.run("run", &[], &FakeHost::stopping_after(1));
    let series = trainer.folder().checkpoints();
    drop(trainer);
    std::fs::remove_dir_all(series.path_of(6)).unwrap();
    let (trainer, _) = fixture.run("run", &[], &FakeHost::new());
    let folder = trainer.folder().tensorboard();
    assert_eq!(tensorboard_steps(&folder, b"train/loss"), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(tensorboard_steps(&folder, b"val/loss"), [4, 8]);
}

/// Scores the documents of the corpus as an evaluation of the saved model does.
fn evaluated(fixture: &Fixture, model: &Path, windows: Windows) -> Comparison {
    let text = std::fs::read_to_string(model.join("config.json")).unwrap();
    let spec = ModelSpec::from_hf_json(&text).unwrap();
    let options = ModelScorerOptions::new(windows.context(), 300);
    let plan = ModelScorerPlan::new(&spec, options).unwrap();
    let weights = WeightFolder::open(model).unwrap();
    let mut scorer = ModelScorer::load(plan, Cpu::detect(2), &weights).unwrap();
    let tokenizer = fixture.corpus.load_tokenizer().unwrap();
    let documents = sample(&fixture.corpus, Split::Validation, &tokenizer, u64::MAX).unwrap();
    compare(&mut scorer, windows, &documents, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn validation_and_evaluation_are_one_figure() {
    let fixture = Fixture::new();
    let windows = Windows::new(32, 32).unwrap();
    for weights in ["f32", "bf16"] {
        let overrides =
            [&format!("run.weights={weights}")[..], "optimizer.ema_decay=0.6", "eval.every=8"];
        let (trainer, outcome) = fixture.run(weights, &overrides, &FakeHost::new());
        let Some(Metric::Validation(found)) = trainer.log.metrics().last().cloned() else {
            panic!("the last step is validated")
        };
        let check = |model: &Path, loss: f64, bits: f64| {
            let evaluated = evaluated(&fixture, model, windows);
            assert_eq!(evaluated.num_targets, found.targets);
            assert_eq!(Some(evaluated.text_bytes), found.bytes);
            assert!((evaluated.model.loss - loss).abs() < 1e-12 * loss, "{weights}");
            // A code is whole bytes, rounded up once.
            let byte = 8.0 / evaluated.text_bytes as f64;
            let difference = evaluated.model.code.bits_per_byte - bits;
            assert!((0.0..=byte).contains(&difference), "{weights}: {difference}");
        };
        check(&outcome.checkpoint, found.loss, found.bits_per_byte.unwrap());
        let (average, bits) = (found.average_loss.unwrap(), found.average_bits_per_byte.unwrap());
        check(&trainer.folder().average(), average, bits);
        assert_ne!(average.to_bits(), found.loss.to_bits(), "other weights were measured");
    }
}

#[test]
fn a_limit_on_validation_takes_documents_evenly_and_cuts_the_last() {
    let fixture = Fixture::new();
    let tokenizer = fixture.corpus.load_tokenizer().unwrap();
    let documents = fixture.corpus.documents(Split::Validation);
    let all = documents.num_tokens();
    let (trainer, _) = fixture.run("run", &[], &FakeHost::stopping_after(1));
    drop(trainer);
    let take = |max_tokens| Validation::new(&fixture.corpus, &tokenizer, 32, max_tokens).unwrap();
    for max_tokens in [2, 50, all / 3, all - 1, all, 10 * all] {
        let mut learner = fixture.open("run", &recipe(&[]), Cpu::detect(1)).unwrap().learner;
        let validation = take(max_tokens);
        let mut scorer = learner.scorer(Weights::Trained, validation.limits(128), 300);
        let score = validation.score(&mut scorer).unwrap();
        assert!(score.targets < max_tokens && score.bytes.unwrap() > 0);
        assert!(score.targets > max_tokens.min(all) / 4 || max_tokens < 10, "{max_tokens}");
        if max_tokens >= all {
            assert_eq!(score.targets, all - documents.len() as u64);
        }
    }
    let none = Validation::new(&fixture.corpus, &tokenizer, 32, 1);
    assert!(matches!(none, Err(cairn_data::loader::LoaderError::NoTargets { .. })));
}

#[test]
fn another_recipe_or_other_data_is_refused_by_name() {
    let fixture = Fixture::new();
    fixture.run("run", &[], &FakeHost::stopping_after(2));
    let other = recipe(&["optimizer.learning_rate=0.5"]);
    let error = fixture.open("run", &other, Cpu::detect(1)).unwrap_err();
    assert!(matches!(&error, TrainError::Resume(ResumeError::OtherRecipe { .. })), "{error:?}");
    assert!(error.to_string().contains("optimizer.learning_rate was 0.001, is 0.5"), "{error}");
    let error = fixture.open("run", &recipe(&["budget.steps=1"]), Cpu::detect(1)).unwrap_err();
    assert!(error.to_string().contains("step 2"), "{error}");
    let elsewhere = Arc::new(build_corpus(fixture.root.path(), "pebbles"));
    let folder = fixture.run_folder("run");
    let error = open(&folder, &elsewhere, &recipe(&[]), Cpu::detect(1)).unwrap_err();
    assert!(error.to_string().contains("tokenizer"), "{error}");
}

#[test]
fn a_longer_run_goes_on_and_says_so() {
    let fixture = Fixture::new();
    fixture.run("run", &["schedule.kind=constant"], &FakeHost::new());
    let longer = recipe(&["schedule.kind=constant", "budget.steps=10"]);
    let mut trainer = fixture.open("run", &longer, Cpu::detect(1)).unwrap();
    assert_eq!(trainer.warnings, [Warning::OtherLength { before: 8, now: 10 }]);
    let outcome = trainer.run(&FakeHost::new(), &mut Silent).unwrap();
    assert_eq!(outcome.step, 10);
    let (straight, _) =
        fixture.run("straight", &["schedule.kind=constant", "budget.steps=10"], &FakeHost::new());
    assert_eq!(trainer.state_hash(), straight.state_hash());
}

#[test]
fn an_altered_checkpoint_is_named_and_a_cut_one_left_out() {
    let fixture = Fixture::new();
    let (trainer, _) = fixture.run("run", &[], &FakeHost::stopping_after(5));
    let series = trainer.folder().checkpoints();
    drop(trainer);
    let file = series.path_of(5).join("optimizer.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let error = fixture.open("run", &recipe(&[]), Cpu::detect(1)).unwrap_err();
    assert!(error.to_string().contains("optimizer.safetensors was altered"), "{error}");
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let trainer = fixture.open("run", &recipe(&[]), Cpu::detect(1)).unwrap();
    assert_eq!(trainer.warnings, [Warning::Damaged { path: series.path_of(5) }]);
    assert_eq!(trainer.step(), 4);
}

#[test]
fn patience_ends_a_run_for_good() {
    let fixture = Fixture::new();
    let overrides = [
        "optimizer.learning_rate=0",
        "eval.every=1",
        "early_stop.patience=2",
        "dropout.resid=0",
        "dropout.attn=0",
    ];
    let (_, outcome) = fixture.run("run", &overrides, &FakeHost::new());
    assert_eq!((outcome.ending, outcome.step), (Ending::EarlyStopped, 3));
    assert_eq!(outcome.best.unwrap().step, 1);
    let (again, outcome) = fixture.run("run", &overrides, &FakeHost::new());
    assert_eq!((outcome.ending, outcome.step), (Ending::EarlyStopped, 3));
    let record = RunRecord::load(&again.folder().record()).unwrap();
    assert_eq!(record.status, RunStatus::EarlyStopped);
}

/// Puts a file where the checkpoints are once the first is saved: as good as a full disk.
struct Saboteur {
    folder: PathBuf,
}

impl Observer for Saboteur {
    fn observe(&mut self, event: &Event<'_>) {
        if let Event::Saved { step: 3, .. } = event {
            let checkpoints = self.folder.join("checkpoints");
            std::fs::rename(&checkpoints, self.folder.join("away")).unwrap();
            std::fs::write(checkpoints, "in the way").unwrap();
        }
    }
}

#[test]
fn a_checkpoint_that_cannot_be_written_leaves_the_one_before() {
    let fixture = Fixture::new();
    let folder = fixture.run_folder("run");
    let mut trainer = fixture.open("run", &recipe(&[]), Cpu::detect(1)).unwrap();
    let mut saboteur = Saboteur { folder: folder.clone() };
    let error = trainer.run(&FakeHost::new(), &mut saboteur).unwrap_err();
    let TrainError::Save { step: 4, source } = &error else { panic!("{error:?}") };
    let StateError::Checkpoint(source) = &**source else { panic!("{source:?}") };
    assert!(source.to_string().contains("checkpoints"), "{source}");
    drop(trainer);
    std::fs::remove_file(folder.join("checkpoints")).unwrap();
    std::fs::rename(folder.join("away"), folder.join("checkpoints")).unwrap();
    let trainer = fixture.open("run", &recipe(&[]), Cpu::detect(1)).unwrap();
    assert_eq!(trainer.step(), 3);
}

#[test]
fn a_run_folder_holds_all_there_is_to_know() {
    let fixture = Fixture::new();
    let overrides = ["optimizer.ema_decay=0.9", "checkpoint.keep_last=1"];
    let (trainer, outcome) = fixture.run("run", &overrides, &FakeHost::new());
    let folder = trainer.folder();
    let toml = std::fs::read_to_string(folder.recipe()).unwrap();
    let facts = Facts { available_threads: 1, tokenizer_vocab_size: None };
    let read = RecipeFile::parse(&toml, Format::Toml).unwrap().resolve(&facts).unwrap();
    assert_eq!(read, recipe(&overrides));
    let record = RunRecord::load(&folder.record()).unwrap();
    assert_eq!(record.status, RunStatus::Finished);
    assert_eq!(record.data_hash, Some(fixture.corpus.data_hash()));
    assert_eq!(record.figures["state_hash"], trainer.state_hash().to_string());
    let page = std::fs::read_to_string(folder.report()).unwrap();
    assert_eq!(page.matches("<svg").count(), 5, "five curves");
    assert!(page.contains("Validation bits per byte") && !page.contains("<script"));
    assert_eq!(std::fs::read_to_string(folder.metrics_csv()).unwrap().lines().count(), 1 + 8 + 2);
    assert_eq!(std::fs::read_dir(folder.tensorboard()).unwrap().count(), 1);
    let kept: Vec<u64> =
        folder.checkpoints().list().unwrap().iter().map(|saved| saved.manifest.step).collect();
    let mut expected = vec![outcome.best.unwrap().step, 8];
    expected.dedup();
    assert_eq!(kept, expected);
    for model in [&outcome.checkpoint, &folder.root().join("ema")] {
        let saved = Checkpoint::open(model, Verify::Hashes).unwrap();
        let config = String::from_utf8(saved.read_file("config.json").unwrap()).unwrap();
        let spec = ModelSpec::from_hf_json(&config).unwrap();
        assert_eq!(spec.hidden_size, 32);
        assert_eq!(spec.dropout.attn.to_bits(), 0.1_f64.to_bits(), "LLaMA's attention_dropout");
        assert_eq!(spec.tokens.eos, [fixture.corpus.end_of_document()]);
        assert!(model.join("tokenizer.json").exists());
    }
}

#[test]
fn training_learns() {
    let fixture = Fixture::new();
    let overrides = ["budget.steps=60", "optimizer.learning_rate=0.01", "dropout.resid=0"];
    let (_, outcome) = fixture.run("run", &overrides, &FakeHost::new());
    let best = outcome.best.unwrap();
    assert!(best.loss < 3.0, "{best:?}");
    assert!(best.bits_per_byte.unwrap() < 4.5, "{best:?}");
}

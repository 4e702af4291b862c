//! The second stage: a recipe in which everything is decided and checked.

use super::adapter::{self, Adapter};
use super::file::{
    BatchSection, BudgetSection, CheckpointSection, DataSection, Decay, DropoutSection,
    EarlyStopSection, EvalSection, OptimizerSection, RecipeFile, Recompute, RunSection,
    ScheduleKind, ScheduleSection,
};
use super::model::model;
use super::objective::{self, Objective};
use super::{RecipeError, written};
use crate::model::Dropout;
use crate::{DType, ModelSpec};
use std::ops::Deref;

/// What resolving needs to know about the world.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Threads to use where the recipe does not say.
    pub available_threads: usize,
    /// Tokens of the tokenizer, if it is there already.
    pub tokenizer_vocab_size: Option<usize>,
}

/// A training run in which everything is decided; read through [`TrainFields`].
#[derive(Clone, Debug, PartialEq)]
pub struct TrainRecipe(TrainFields);

/// The contents of a [`TrainRecipe`].
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each part's type says what it is")]
pub struct TrainFields {
    pub run: Run,
    pub model: ModelSpec,
    pub initial: Option<String>,
    pub objective: Objective,
    pub adapter: Option<Adapter>,
    pub data: Data,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    pub batch: Batch,
    pub budget: Budget,
    pub eval: Eval,
    pub checkpoint: Checkpoint,
    pub early_stop: Option<EarlyStop>,
}

/// The run as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What the run is called in folders and reports.
    pub name: String,
    /// Seed of everything random.
    pub seed: u64,
    /// Threads; they change no number.
    pub threads: usize,
    /// The run is refused if its plan exceeds this many bytes.
    pub memory_limit_bytes: Option<u64>,
    /// Which activations are computed again in the backward pass.
    pub recompute: Recompute,
    /// Type of the weights that products read: f32 or bf16.
    pub weights: DType,
}

/// What is learned from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// Folder of shards with their manifest.
    pub corpus: String,
    /// A `tokenizer.json`; the one beside the shards if absent.
    pub tokenizer: Option<String>,
    /// Tokens in a sequence.
    pub seq_len: usize,
}

/// AdamW.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Memory of the first and of the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled.
    pub weight_decay: f64,
    /// Which parameters decay.
    pub decay: Decay,
    /// Gradients are scaled down to this norm.
    pub max_grad_norm: Option<f64>,
    /// Memory of an average of the weights.
    pub ema_decay: Option<f64>,
}

/// The learning rate over steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Its shape.
    pub kind: ScheduleKind,
    /// Steps of linear rise.
    pub warmup_steps: u64,
    /// Steps of decay, where the recipe fixes them; else see [`Schedule::decay_steps_of`].
    pub decay_steps: Option<u64>,
    /// Lowest learning rate as a part of the highest.
    pub min_lr_ratio: f64,
}

impl Schedule {
    /// Steps of decay in a run of `total_steps`.
    pub fn decay_steps_of(&self, total_steps: u64) -> u64 {
        let after_warmup = total_steps.saturating_sub(self.warmup_steps);
        let default = match self.kind {
            ScheduleKind::Cosine => after_warmup,
            ScheduleKind::Wsd => total_steps.div_ceil(5),
            ScheduleKind::Constant => 0,
        };
        self.decay_steps.unwrap_or(default).min(after_warmup)
    }
}

/// Sequences in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Sequences computed at a time.
    pub micro_batch_size: u64,
    /// Micro batches in a step.
    pub grad_accum_steps: u64,
}

impl Batch {
    /// Sequences in a step.
    pub const fn global_batch_size(&self) -> u64 {
        self.micro_batch_size * self.grad_accum_steps
    }
}

/// How long the run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Steps.
    Steps(u64),
    /// Tokens.
    Tokens(u64),
    /// Floating point operations.
    Flops(f64),
}

/// Validation during the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eval {
    /// Steps between evaluations; only at the end if absent.
    pub every: Option<u64>,
    /// Tokens of validation data looked at.
    pub max_tokens: u64,
}

/// Saving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Steps between checkpoints; only at the end if absent.
    pub every: Option<u64>,
    /// Latest checkpoints kept; at least 1.
    pub keep_last: usize,
    /// Whether the one with the lowest validation loss is kept.
    pub keep_best: bool,
}

/// Ending before the budget is spent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EarlyStop {
    /// Evaluations without a lower validation loss before the run ends.
    pub patience: u64,
    /// By how much a loss must be lower to count.
    pub min_delta: f64,
}

impl TrainRecipe {
    /// The recipe as TOML in which nothing is left open; read and resolved again, it is equal.
    pub fn to_toml(&self) -> String {
        self.to_file().to_toml()
    }

    /// The recipe as a file in which nothing is left open.
    pub fn to_file(&self) -> RecipeFile {
        written::file(&self.0)
    }
}

impl Deref for TrainRecipe {
    type Target = TrainFields;

    fn deref(&self) -> &TrainFields {
        &self.0
    }
}

impl TrainFields {
    /// Tokens of one optimizer step.
    pub fn tokens_per_step(&self) -> u64 {
        self.batch.global_batch_size() * self.data.seq_len as u64
    }

    /// Steps of the whole run, where a step costs `flops_per_step`; at least 1.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float becomes the nearest u64, which is what a step count above 2^53 is worth"
    )]
    pub fn total_steps(&self, flops_per_step: f64) -> u64 {
        let steps = match self.budget {
            Budget::Steps(steps) => steps,
            Budget::Tokens(tokens) => tokens.div_ceil(self.tokens_per_step()),
            Budget::Flops(flops) => (flops / flops_per_step).floor() as u64,
        };
        steps.max(1)
    }
}

/// Largest accepted number of sequences, and of micro batches, in a step.
const BATCH_MAX: u64 = 1 << 20;
/// Largest accepted number of threads: more than any machine this runs on has, and few enough that
/// their stacks and scratch memory are no danger to it.
pub const THREADS_MAX: usize = 1024;
/// Largest accepted number of steps or tokens.
const STEPS_MAX: u64 = 1 << 50;

impl RecipeFile {
    /// Decides what the file leaves open and checks everything.
    ///
    /// # Errors
    ///
    /// [`RecipeError`] naming the key that is missing, out of range or in conflict with another.
    pub fn resolve(&self, facts: &Facts) -> Result<TrainRecipe, RecipeError> {
        let data = data(&self.data)?;
        let model = model(self, data.seq_len, facts)?;
        // Less than `max_position_embeddings` where longer texts are rotated otherwise.
        let max_position_embeddings = model.context_limit();
        if data.seq_len > max_position_embeddings {
            let seq_len = data.seq_len;
            return Err(RecipeError::SequenceTooLong { seq_len, max_position_embeddings });
        }
        let run = run(&self.run, facts)?;
        let initial = self.model.initial.clone();
        Ok(TrainRecipe(TrainFields {
            objective: objective::resolve(&self.objective, &model)?,
            adapter: adapter::resolve(&self.adapter, initial.as_deref(), run.weights)?,
            run,
            model,
            initial,
            data,
            optimizer: optimizer(&self.optimizer)?,
            schedule: schedule(&self.schedule)?,
            batch: batch(&self.batch)?,
            budget: budget(&self.budget)?,
            eval: eval(&self.eval)?,
            checkpoint: checkpoint(&self.checkpoint)?,
            early_stop: early_stop(&self.early_stop)?,
        }))
    }
}

/// Checks the name of a run: it names a folder.
///
/// # Errors
///
/// [`RecipeError::OutOfRange`] for an empty, a long or a hidden one, or one with other characters than
/// letters, digits, `-`, `_` and `.`.
pub fn check_run_name(name: &str) -> Result<(), RecipeError> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 100 || name.starts_with('.') || !name.chars().all(is_plain) {
        let expected = "letters, digits, '-', '_' and '.', at most 100 of them";
        let actual = if name.is_empty() { "empty" } else { name };
        return Err(out_of_range("run.name", expected, actual.to_owned()));
    }
    Ok(())
}

fn run(section: &RunSection, facts: &Facts) -> Result<Run, RecipeError> {
    let name = section.name.clone().unwrap_or_else(|| "train".to_owned());
    check_run_name(&name)?;
    let threads = section.threads.unwrap_or(facts.available_threads.clamp(1, THREADS_MAX));
    whole("run.threads", threads as u64, 1, THREADS_MAX as u64)?;
    let weights = section.weights.unwrap_or(DType::F32);
    if !matches!(weights, DType::F32 | DType::Bf16) {
        return Err(out_of_range("run.weights", "f32 or bf16", weights.to_string()));
    }
    let seed = section.seed.unwrap_or(0);
    // TOML's integers end there, and the resolved recipe must be writable.
    whole("run.seed", seed, 0, i64::MAX as u64)?;
    Ok(Run {
        name,
        seed,
        threads,
        memory_limit_bytes: section.memory_limit.map(|limit| limit.0),
        recompute: section.recompute.unwrap_or(Recompute::Auto),
        weights,
    })
}

fn data(section: &DataSection) -> Result<Data, RecipeError> {
    let seq_len = section.seq_len.ok_or(RecipeError::Missing { key: "data.seq_len" })?;
    whole("data.seq_len", seq_len as u64, 1, crate::model::MAX_POSITION_EMBEDDINGS_MAX as u64)?;
    let corpus = section.corpus.clone().ok_or(RecipeError::Missing { key: "data.corpus" })?;
    Ok(Data { corpus, tokenizer: section.tokenizer.clone(), seq_len })
}

/// The rates that a recipe asks for; where it says nothing, those of the model's description.
pub(super) fn dropout(section: &DropoutSection, own: Dropout) -> Dropout {
    Dropout {
        embd: section.embd.unwrap_or(own.embd),
        attn: section.attn.unwrap_or(own.attn),
        resid: section.resid.unwrap_or(own.resid),
    }
}

fn optimizer(section: &OptimizerSection) -> Result<Optimizer, RecipeError> {
    let betas = section.betas.unwrap_or([0.9, 0.95]);
    for beta in betas {
        real("optimizer.betas", beta, 0.0, 0.999_999)?;
    }
    let max_grad_norm = section.max_grad_norm.unwrap_or(1.0);
    real("optimizer.max_grad_norm", max_grad_norm, 0.0, 1e9)?;
    if let Some(decay) = section.ema_decay {
        real("optimizer.ema_decay", decay, 0.0, 0.999_999_9)?;
    }
    let optimizer = Optimizer {
        learning_rate: section.learning_rate.unwrap_or(1e-3),
        betas,
        eps: section.eps.unwrap_or(1e-8),
        weight_decay: section.weight_decay.unwrap_or(0.1),
        decay: section.decay.unwrap_or(Decay::Matrices),
        max_grad_norm: (max_grad_norm > 0.0).then_some(max_grad_norm),
        ema_decay: section.ema_decay,
    };
    real("optimizer.learning_rate", optimizer.learning_rate, 0.0, 100.0)?;
    real("optimizer.eps", optimizer.eps, 1e-30, 1.0)?;
    real("optimizer.weight_decay", optimizer.weight_decay, 0.0, 100.0)?;
    Ok(optimizer)
}

fn schedule(section: &ScheduleSection) -> Result<Schedule, RecipeError> {
    let schedule = Schedule {
        kind: section.kind.unwrap_or(ScheduleKind::Cosine),
        warmup_steps: section.warmup_steps.unwrap_or(0),
        decay_steps: section.decay_steps,
        min_lr_ratio: section.min_lr_ratio.unwrap_or(0.1),
    };
    whole("schedule.warmup_steps", schedule.warmup_steps, 0, STEPS_MAX)?;
    whole("schedule.decay_steps", schedule.decay_steps.unwrap_or(0), 0, STEPS_MAX)?;
    real("schedule.min_lr_ratio", schedule.min_lr_ratio, 0.0, 1.0)?;
    Ok(schedule)
}

fn batch(section: &BatchSection) -> Result<Batch, RecipeError> {
    let micro_batch_size = section.micro_batch_size.unwrap_or(8);
    whole("batch.micro_batch_size", micro_batch_size, 1, BATCH_MAX)?;
    let from_global = match section.global_batch_size {
        None => None,
        Some(global) if global.is_multiple_of(micro_batch_size) => Some(global / micro_batch_size),
        Some(global_batch_size) => {
            return Err(RecipeError::UnevenBatch { global_batch_size, micro_batch_size });
        }
    };
    if let (Some(from_global), Some(steps)) = (from_global, section.grad_accum_steps)
        && from_global != steps
    {
        let expected = format!("global_batch_size / micro_batch_size = {from_global}");
        return Err(out_of_range("batch.grad_accum_steps", expected, steps.to_string()));
    }
    let grad_accum_steps = from_global.or(section.grad_accum_steps).unwrap_or(1);
    whole("batch.grad_accum_steps", grad_accum_steps, 1, BATCH_MAX)?;
    Ok(Batch { micro_batch_size, grad_accum_steps })
}

fn budget(section: &BudgetSection) -> Result<Budget, RecipeError> {
    const KEYS: &[&str] = &["budget.steps", "budget.tokens", "budget.flops"];
    let given = [
        section.steps.map(Budget::Steps),
        section.tokens.map(|tokens| Budget::Tokens(tokens.0)),
        section.flops.map(Budget::Flops),
    ];
    let set: Vec<_> = KEYS.iter().zip(given).filter(|(_, budget)| budget.is_some()).collect();
    let [(_, Some(budget))] = set.as_slice() else {
        let set = set.iter().map(|(key, _)| **key).collect();
        return Err(RecipeError::NotExactlyOne { keys: KEYS, set });
    };
    match *budget {
        Budget::Steps(steps) => whole("budget.steps", steps, 1, STEPS_MAX)?,
        Budget::Tokens(tokens) => whole("budget.tokens", tokens, 1, STEPS_MAX)?,
        Budget::Flops(flops) => real("budget.flops", flops, 1.0, 1e30)?,
    }
    Ok(*budget)
}

fn eval(section: &EvalSection) -> Result<Eval, RecipeError> {
    let every = section.every.unwrap_or(250);
    let max_tokens = section.max_tokens.map_or(1_000_000, |count| count.0);
    whole("eval.every", every, 0, STEPS_MAX)?;
    whole("eval.max_tokens", max_tokens, 1, STEPS_MAX)?;
    Ok(Eval { every: (every > 0).then_some(every), max_tokens })
}

fn checkpoint(section: &CheckpointSection) -> Result<Checkpoint, RecipeError> {
    let every = section.every.unwrap_or(250);
    let keep_last = section.keep_last.unwrap_or(2);
    whole("checkpoint.every", every, 0, STEPS_MAX)?;
    whole("checkpoint.keep_last", keep_last as u64, 1, 1_000_000)?;
    let keep_best = section.keep_best.unwrap_or(true);
    Ok(Checkpoint { every: (every > 0).then_some(every), keep_last, keep_best })
}

fn early_stop(section: &EarlyStopSection) -> Result<Option<EarlyStop>, RecipeError> {
    let min_delta = section.min_delta.unwrap_or(0.0);
    real("early_stop.min_delta", min_delta, 0.0, 1e9)?;
    match section.patience {
        // A threshold alone does nothing; it must not look as if it did.
        None if section.min_delta.is_some() => {
            Err(RecipeError::Missing { key: "early_stop.patience" })
        }
        None => Ok(None),
        Some(patience) => {
            whole("early_stop.patience", patience, 1, STEPS_MAX)?;
            Ok(Some(EarlyStop { patience, min_delta }))
        }
    }
}

fn whole(key: &'static str, value: u64, min: u64, max: u64) -> Result<(), RecipeError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(out_of_range(key, format!("between {min} and {max}"), value.to_string()))
}

fn real(key: &'static str, value: f64, min: f64, max: f64) -> Result<(), RecipeError> {
    // Written so that NaN, which is in no range, is refused.
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(out_of_range(key, format!("between {min} and {max}"), value.to_string()))
}

fn out_of_range(key: &'static str, expected: impl Into<String>, actual: String) -> RecipeError {
    RecipeError::OutOfRange { key, expected: expected.into(), actual }
}

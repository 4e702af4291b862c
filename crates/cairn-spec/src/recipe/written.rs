//! A resolved recipe as a file again.

use super::file::{
    BatchSection, BudgetSection, CheckpointSection, DataSection, DropoutSection, EarlyStopSection,
    EvalSection, OptimizerSection, RecipeFile, RunSection, ScheduleSection,
};
use super::resolve::{Budget, Optimizer, TrainFields};
use crate::units::{ByteSize, Count};

/// The file that resolves to `recipe` without a fact about the world.
pub(super) fn file(recipe: &TrainFields) -> RecipeFile {
    let TrainFields { run, data, optimizer, schedule, batch, eval, checkpoint, .. } = recipe;
    RecipeFile {
        run: RunSection {
            name: Some(run.name.clone()),
            seed: Some(run.seed),
            threads: Some(run.threads),
            memory_limit: run.memory_limit_bytes.map(ByteSize),
            recompute: Some(run.recompute),
            weights: Some(run.weights),
        },
        model: super::model::section(&recipe.model, recipe.initial.as_deref()),
        objective: super::objective::section(&recipe.objective),
        adapter: recipe.adapter.as_ref().map(super::adapter::section).unwrap_or_default(),
        dropout: DropoutSection {
            embd: Some(recipe.model.dropout.embd),
            attn: Some(recipe.model.dropout.attn),
            resid: Some(recipe.model.dropout.resid),
        },
        data: DataSection {
            corpus: Some(data.corpus.clone()),
            tokenizer: data.tokenizer.clone(),
            seq_len: Some(data.seq_len),
        },
        optimizer: optimizer_section(optimizer),
        schedule: ScheduleSection {
            kind: Some(schedule.kind),
            warmup_steps: Some(schedule.warmup_steps),
            decay_steps: schedule.decay_steps,
            min_lr_ratio: Some(schedule.min_lr_ratio),
        },
        batch: BatchSection {
            micro_batch_size: Some(batch.micro_batch_size),
            global_batch_size: Some(batch.global_batch_size()),
            grad_accum_steps: Some(batch.grad_accum_steps),
        },
        budget: budget_section(recipe.budget),
        eval: EvalSection {
            every: Some(eval.every.unwrap_or(0)),
            max_tokens: Some(Count(eval.max_tokens)),
        },
        checkpoint: CheckpointSection {
            every: Some(checkpoint.every.unwrap_or(0)),
            keep_last: Some(checkpoint.keep_last),
            keep_best: Some(checkpoint.keep_best),
        },
        early_stop: recipe.early_stop.map_or_else(EarlyStopSection::default, |stop| {
            EarlyStopSection { patience: Some(stop.patience), min_delta: Some(stop.min_delta) }
        }),
    }
}

fn optimizer_section(optimizer: &Optimizer) -> OptimizerSection {
    OptimizerSection {
        learning_rate: Some(optimizer.learning_rate),
        betas: Some(optimizer.betas),
        eps: Some(optimizer.eps),
        weight_decay: Some(optimizer.weight_decay),
        decay: Some(optimizer.decay),
        max_grad_norm: Some(optimizer.max_grad_norm.unwrap_or(0.0)),
        ema_decay: optimizer.ema_decay,
    }
}

fn budget_section(budget: Budget) -> BudgetSection {
    let empty = BudgetSection::default();
    match budget {
        Budget::Steps(steps) => BudgetSection { steps: Some(steps), ..empty },
        Budget::Tokens(tokens) => BudgetSection { tokens: Some(Count(tokens)), ..empty },
        Budget::Flops(flops) => BudgetSection { flops: Some(flops), ..empty },
    }
}

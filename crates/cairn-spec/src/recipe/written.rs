//! A resolved recipe as a file again.

use super::file::{
    BatchSection, BudgetSection, CheckpointSection, DataSection, DropoutSection, EarlyStopSection,
    EvalSection, ModelSection, OptimizerSection, RecipeFile, RunSection, ScheduleSection,
};
use super::resolve::{Budget, Optimizer, TrainFields};
use crate::ModelSpec;
use crate::model::{AttentionForm, Family, Mlp, Position};
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
        model: model_section(&recipe.model),
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

fn model_section(spec: &ModelSpec) -> ModelSection {
    let AttentionForm::Gqa(gqa) = &spec.attention.form else {
        unreachable!("recipes only describe grouped attention")
    };
    let is_llama = spec.family == Family::Llama;
    let mlp_bias = match &spec.mlp {
        Mlp::Glu { bias, .. } | Mlp::Plain { bias, .. } => *bias,
        Mlp::Moe(_) => unreachable!("recipes only describe dense models"),
    };
    ModelSection {
        family: Some(spec.family),
        vocab_size: Some(spec.vocab_size),
        hidden_size: Some(spec.hidden_size),
        num_hidden_layers: Some(spec.num_hidden_layers),
        num_attention_heads: Some(gqa.num_attention_heads),
        num_key_value_heads: is_llama.then_some(gqa.num_key_value_heads),
        head_dim: is_llama.then_some(gqa.head_dim),
        intermediate_size: Some(spec.mlp.intermediate_size()),
        max_position_embeddings: Some(spec.max_position_embeddings),
        rope_theta: match &spec.position {
            Position::Rope(rope) => Some(rope.theta),
            Position::Learned => None,
        },
        rms_norm_eps: is_llama.then_some(spec.norm.eps),
        layer_norm_epsilon: (!is_llama).then_some(spec.norm.eps),
        hidden_act: Some(spec.mlp.activation()),
        attention_bias: is_llama.then_some(gqa.qkv_bias),
        mlp_bias: is_llama.then_some(mlp_bias),
        tie_word_embeddings: Some(spec.tie_word_embeddings),
        initializer_range: Some(spec.initializer_range),
    }
}

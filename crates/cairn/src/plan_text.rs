//! A plan as text: bytes by class, arithmetic by phase, time.

use cairn_data::corpus::Split;
use cairn_program::{Cost, Program, Workload};
use cairn_train::Plan;

use crate::figures::{Bytes, Count, Seconds};
use crate::table::Table;
use crate::training::Job;

/// The whole plan, a few small tables.
pub(crate) fn plan_text(job: &Job, plan: &Plan) -> String {
    [summary(job, plan), memory(plan), phases(job, plan)].join("\n\n")
}

fn summary(job: &Job, plan: &Plan) -> String {
    let recipe = &job.recipe;
    let mut table = Table::new(&[]).with_text_columns(2);
    let parameters = Count(plan.parameters as f64);
    let layers = recipe.model.num_hidden_layers;
    table.row([
        &"model",
        &format!("{}, {layers} blocks, {parameters} parameters", recipe.model.family),
    ]);
    if let Some(adapter) = &recipe.adapter {
        // Gradients are f32.
        let trained = Count(plan.bytes.session.gradients as f64 / 4.0);
        let rank = adapter.lora.r;
        table.row([
            &"adapter",
            &format!("rank {rank}, {trained} of the parameters; the rest is frozen"),
        ]);
    }
    let tokens = plan.total_steps * plan.tokens_per_step;
    let data = match &job.corpus {
        None => format!("{} (not there yet)", recipe.data.corpus),
        Some(corpus) => {
            let train = corpus.manifest().split(Split::Train).counts.tokens;
            let epochs = tokens as f64 / train.max(1) as f64;
            format!(
                "{}, {} tokens, read {epochs:.2} times",
                recipe.data.corpus,
                Count(train as f64)
            )
        }
    };
    table.row([&"data", &data]);
    let steps = format!("{} of {} tokens", plan.total_steps, plan.tokens_per_step);
    table.row([&"steps", &steps]);
    table.row([&"tokens", &Count(tokens as f64)]);
    table.row([&"micro-batches", &plan.shape]);
    let total = plan.model_flops_per_step * plan.total_steps as f64;
    table.row([
        &"FLOPs",
        &format!("{} a step, {} in all", Count(plan.model_flops_per_step), Count(total)),
    ]);
    let time = plan.seconds.map_or_else(
        || "not measured".to_owned(),
        |seconds| format!("{} at the pace just measured", Seconds(seconds)),
    );
    table.row([&"time", &time]);
    table.to_string()
}

fn memory(plan: &Plan) -> String {
    let bytes = &plan.bytes;
    let session = &bytes.session;
    let mut table = Table::new(&["memory", "bytes"]);
    let mut row = |name: &str, bytes: u64| {
        if bytes > 0 {
            table.row([&name, &Bytes(bytes as f64)]);
        }
    };
    row("weights", session.weights as u64);
    row("gradients", session.gradients as u64);
    row("optimizer states", session.states as u64);
    row("activations", session.arena as u64);
    row("threads' scratch", bytes.scratch);
    row("batches and saving", bytes.host);
    row("the process itself", bytes.baseline);
    row("all, at the peak", bytes.total());
    table.to_string()
}

/// Forward, backward and update of one step.
fn phases(job: &Job, plan: &Plan) -> String {
    let rows = plan.shape.micro_batch_size;
    let workload = Workload::causal(rows, job.recipe.data.seq_len);
    let programs = plan.programs();
    let accum = plan.shape.grad_accum_steps as f64;
    let train = &programs.train;
    let costs = train.account(&workload);
    let (forward, backward) = costs.split_at(train.forward_len.min(costs.len()));
    let mut update = total(&programs.norm);
    update += total(&programs.update);
    let mut table = Table::new(&["phase of a step", "FLOPs", "moved at least"]);
    let mut row = |name: &str, cost: Cost| {
        table.row([&name, &Count(cost.flops), &Bytes(cost.bytes)]);
    };
    row("forward", sum(forward, accum));
    row("backward", sum(backward, accum));
    row("update", update);
    table.to_string()
}

fn sum(costs: &[Cost], times: f64) -> Cost {
    let flops = costs.iter().map(|cost| cost.flops).sum::<f64>();
    let bytes = costs.iter().map(|cost| cost.bytes).sum::<f64>();
    Cost { flops: times * flops, bytes: times * bytes }
}

fn total(program: &Program) -> Cost {
    program.total_cost(&Workload::causal(0, 0))
}

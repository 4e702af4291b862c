//! Timing training steps instruction by instruction, on a pattern of tokens instead of a corpus.
//!
//! What is timed is the step that trains: the same programs, plan and kernels, in a session of its
//! own. Losses mean nothing here; times do not depend on the tokens.

use std::collections::BTreeMap;

use cairn_eval::median;
use cairn_kernels::Cpu;
use cairn_program::{
    Class, Cost, Feed, GRAD_NORM_SQUARED, Program, ProgramId, Run, RunError, Session, Workload,
};
use cairn_spec::recipe::TrainRecipe;
use serde::Serialize;

use crate::batch::MicroBatch;
use crate::host::Host;
use crate::learner::Learner;
use crate::pace::{PaceError, pattern};
use crate::plan::Plan;
use crate::programs::{NORM, ProgramsError, TRAIN, UPDATE};

/// What the instructions of one kind took in one step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepPart {
    /// Operation, and for products the weight it multiplies by.
    pub name: String,
    /// How many there are in a step.
    pub count: usize,
    /// Mean time in a step.
    pub seconds: f64,
    /// Multiply-adds counted as two, per second.
    pub gflops: f64,
    /// Least bytes that must move, per second.
    pub gbs: f64,
    /// Share of the step.
    pub share: f64,
}

/// Times of training steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepFigures {
    /// Tokens of a step.
    pub tokens: usize,
    /// Parameters of the model.
    pub parameters: u64,
    /// Time of each step, the first left out.
    pub seconds: Vec<f64>,
    /// Median of tokens per second.
    pub tokens_per_s: f64,
    /// Arithmetic that the model needs, per second of the median step.
    pub model_gflops: f64,
    /// Bytes planned for the session.
    pub planned_bytes: u64,
    /// Anonymous memory of the process after the last step, where the system tells.
    pub anonymous_bytes: Option<u64>,
    /// Instructions by kind, slowest first.
    pub parts: Vec<StepPart>,
}

/// Runs `steps` steps of `plan` after one that does not count.
///
/// # Errors
///
/// [`PaceError`] if the programs cannot be laid out or do not run, which is a bug.
pub fn bench_steps(
    recipe: &TrainRecipe,
    plan: &Plan,
    (cpu, host): (Cpu, &dyn Host),
    steps: usize,
) -> Result<StepFigures, PaceError> {
    let rows = plan.shape.micro_batch_size;
    let seq_len = recipe.data.seq_len;
    let memory = plan.memory_plan().map_err(ProgramsError::from)?;
    let mut learner = Learner::new(memory, cpu).map_err(ProgramsError::from)?;
    cairn_model::init_weights(learner.session_mut(), &recipe.model, 0);
    learner.start_states();
    let batch = pattern(rows, seq_len, recipe.model.vocab_size);
    let micro = MicroBatch::whole(&batch);
    let mut parts = Parts::new(learner.session(), &Workload::causal(rows, seq_len));
    let mut seconds = Vec::new();
    for step in 0..=steps {
        let start = host.monotonic_s();
        for index in 0..plan.shape.grad_accum_steps {
            let weights = micro.loss_weights(1.0 / plan.tokens_per_step as f32);
            let [ids, positions, targets] = micro.feeds();
            let feeds = [ids, positions, targets, Feed::f32("loss_weights", &weights)];
            let run = Run { accumulate: index != 0, ..micro.scoring_run(&feeds) };
            let session = learner.session_mut();
            session.run_observed(TRAIN, &run, &mut |at, took| {
                parts.add(TRAIN, (at, took), step != 0);
            })?;
        }
        update(learner.session_mut(), step, &mut parts)?;
        if step != 0 {
            seconds.push(host.monotonic_s() - start);
        }
    }
    let median = median(seconds.iter().copied()).unwrap_or(f64::NAN);
    let tokens = rows * seq_len * plan.shape.grad_accum_steps;
    Ok(StepFigures {
        tokens,
        parameters: plan.parameters,
        tokens_per_s: tokens as f64 / median,
        model_gflops: plan.model_flops_per_step / median / 1e9,
        planned_bytes: plan.bytes.session.total() as u64,
        // Asked while the session lives.
        anonymous_bytes: host.anonymous_bytes(),
        parts: parts.finish(steps, seconds.iter().sum::<f64>() / steps.max(1) as f64),
        seconds,
    })
}

/// The norm and the update, as [`Learner::update`] runs them.
fn update(session: &mut Session, step: usize, parts: &mut Parts) -> Result<(), RunError> {
    let mut timed = |session: &mut Session, program, feeds: &[Feed<'_>]| {
        session.run_observed(program, &Run::forward(feeds, &[]), &mut |at, took| {
            parts.add(program, (at, took), step != 0);
        })
    };
    timed(session, NORM, &[])?;
    let squares = [session.output_f64(NORM, GRAD_NORM_SQUARED)];
    let (lr, number) = ([1e-4], [u32::try_from(step + 1).unwrap_or(u32::MAX)]);
    let feeds =
        [Feed::f64("lr", &lr), Feed::u32("step", &number), Feed::f64(GRAD_NORM_SQUARED, &squares)];
    timed(session, UPDATE, &feeds)
}

/// Times and costs by kind of instruction.
struct Parts {
    /// Name and cost of each instruction of the programs of a step.
    instrs: BTreeMap<usize, Vec<(String, Cost)>>,
    sums: BTreeMap<String, (usize, f64, Cost)>,
}

impl Parts {
    fn new(session: &Session, workload: &Workload) -> Self {
        let of = |program: &Program| -> Vec<(String, Cost)> {
            let costs = program.account(workload);
            let names = (0..program.instrs.len()).map(|index| name(program, index));
            names.zip(costs).collect()
        };
        let programs = [TRAIN, NORM, UPDATE];
        let instrs = programs.map(|id| (id.0, of(session.program(id)))).into();
        Self { instrs, sums: BTreeMap::new() }
    }

    fn add(&mut self, program: ProgramId, (index, seconds): (usize, f64), counts: bool) {
        if counts {
            let (name, cost) = &self.instrs[&program.0][index];
            let sum = self.sums.entry(name.clone()).or_default();
            sum.0 += 1;
            sum.1 += seconds;
            sum.2 += *cost;
        }
    }

    fn finish(self, steps: usize, step_seconds: f64) -> Vec<StepPart> {
        let steps_real = steps.max(1) as f64;
        let part = |(name, (count, seconds, cost)): (String, (usize, f64, Cost))| StepPart {
            name,
            count: count / steps.max(1),
            seconds: seconds / steps_real,
            gflops: cost.flops / seconds / 1e9,
            gbs: cost.bytes / seconds / 1e9,
            share: seconds / steps_real / step_seconds,
        };
        let mut parts: Vec<StepPart> = self.sums.into_iter().map(part).collect();
        parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        parts
    }
}

/// Operation, and for products the last part of the name of the weight: `matmul_dw gate_proj`.
fn name(program: &Program, index: usize) -> String {
    let instr = &program.instrs[index];
    let is_product = instr.op.name().starts_with("matmul");
    let matrix = instr.reads().map(|id| program.value(id)).find(|value| {
        matches!(value.class, Class::Weight | Class::Gradient) && value.shape.0.len() > 1
    });
    match matrix {
        Some(weight) if is_product => {
            let kind = weight.name.rsplit('.').nth(1).unwrap_or(&weight.name);
            format!("{} {kind}", instr.op.name())
        }
        _ => instr.op.name().to_owned(),
    }
}

//! What a run will take, before it starts: bytes, arithmetic, time.
//!
//! A plan is made from the resolved recipe alone. A plan over the memory limit is refused, with the
//! fastest one that fits in its place: recomputation does not change a bit of the result, the
//! micro-batch size at most the last bits of a gradient (see [`crate::Learner`]).

use std::fmt;

use cairn_kernels::Encoding;
use cairn_program::{MemoryPlan, PlannedBytes, Recompute, SessionError, Workload};
use cairn_spec::recipe::{self, Adapter, BaseEncoding, TrainRecipe};
use cairn_spec::units::RoundedBytes;
use cairn_spec::{DType, Hint, ModelSpec};
use serde::Serialize;

use crate::metrics::Metric;
use crate::programs::{ProgramOptions, Programs, ProgramsError};
use crate::resume::cuts_decide_bits;
use cairn_model::{AdapterMap, gather_bytes_max, gather_bytes_max_of};

/// Buffers of open files, the report and other small things that come and go.
const SMALL_BYTES: u64 = 4 << 20;
/// Bytes of a token in the loader's batch and the micro-batch made of it.
const BATCH_BYTES_PER_TOKEN: u64 = 32;

/// What a plan is made for.
#[derive(Clone, Copy, Debug)]
pub struct PlanRequest<'a> {
    /// What the run does.
    pub recipe: &'a TrainRecipe,
    /// Anonymous memory of the process without the run, measured.
    pub baseline_bytes: u64,
    /// Scratch memory of the threads: [`cairn_kernels::Cpu::scratch_bytes`].
    pub scratch_bytes: u64,
    /// How fast this machine is, measured; without it the plan says nothing about time.
    pub pace: Option<Pace>,
}

/// Speed of training, measured on this machine with a short model of the same widths.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pace {
    /// Arithmetic of forward and backward, per second.
    pub flops_per_s: f64,
    /// Time of the update for one parameter.
    pub update_s_per_parameter: f64,
}

/// Bytes of a run, by what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PredictedBytes {
    /// Weights, gradients, states and arena, each as planned.
    pub session: PlannedBytes,
    /// Scratch memory of the threads.
    pub scratch: u64,
    /// Batches, what is recorded of every step, and the largest tensor that is rearranged while a
    /// checkpoint is written.
    pub host: u64,
    /// The process without the run.
    pub baseline: u64,
}

impl PredictedBytes {
    /// Everything together: the anonymous memory of the process at its peak.
    pub fn total(&self) -> u64 {
        let fixed = self.session.total() as u64 + self.scratch + self.baseline;
        fixed.saturating_add(self.host)
    }
}

/// What can be chosen without changing what is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Sequences computed at a time.
    pub micro_batch_size: usize,
    /// Micro-batches of a step.
    pub grad_accum_steps: usize,
    /// What the backward pass computes again.
    pub recompute: Recompute,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { micro_batch_size, grad_accum_steps, recompute } = self;
        let recompute = match *recompute {
            Recompute::None => recipe::Recompute::None,
            Recompute::Cheap => recipe::Recompute::Cheap,
            Recompute::Blocks(count) => recipe::Recompute::Blocks(count),
        };
        write!(
            f,
            "batch.micro_batch_size={micro_batch_size} batch.grad_accum_steps={grad_accum_steps} \
             run.recompute={recompute}"
        )
    }
}

/// A run that fits.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Batch and recomputation.
    pub shape: Shape,
    /// Elements of all weights, tied ones once.
    pub parameters: u64,
    /// Bytes by what they hold.
    pub bytes: PredictedBytes,
    /// Tokens of a step.
    pub tokens_per_step: u64,
    /// Arithmetic of a step, recomputation left out: what the model itself needs. Attention counts
    /// rows of one document each, the most there can be.
    pub model_flops_per_step: f64,
    /// Arithmetic of a step, recomputation counted.
    pub flops_per_step: f64,
    /// Steps of the run.
    pub total_steps: u64,
    /// Seconds of the run without validation and checkpoints, at the measured pace.
    pub seconds: Option<f64>,
    #[serde(skip)]
    programs: Programs,
    #[serde(skip)]
    tokens_per_run: usize,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The model cannot be trained as asked.
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    /// The run needs more memory than it may have.
    #[error(
        "the plan needs {}, the limit is {}",
        RoundedBytes(*needed),
        RoundedBytes(*limit)
    )]
    OverLimit {
        /// Bytes of the plan as asked.
        needed: u64,
        /// Bytes it may have.
        limit: u64,
        /// The fastest choice that fits, and its bytes.
        nearest: Option<(Shape, u64)>,
        /// Bytes of the smallest plan of this model, where none fits.
        smallest: u64,
        /// Whether that choice changes the last bits of a gradient: it cuts the batch otherwise, and
        /// a weight is used twice (an embedding that is the head as well).
        last_bits: bool,
    },
}

impl Hint for PlanError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::OverLimit { nearest: Some((shape, bytes)), last_bits, .. } => {
                let learns = if *last_bits {
                    // Its two uses add to one gradient by turns: see `resume`.
                    "learns the same but for the last bits of the gradient of a shared weight"
                } else {
                    "learns the same to the last bit"
                };
                vec![format!("this fits in {} and {learns}: {shape}", RoundedBytes(*bytes))]
            }
            Self::OverLimit { smallest, .. } => vec![format!(
                "even one sequence at a time takes {}; raise run.memory_limit, shorten \
                 data.seq_len or make the model smaller",
                RoundedBytes(*smallest)
            )],
            Self::Programs(_) => Vec::new(),
        }
    }
}

impl From<SessionError> for PlanError {
    fn from(error: SessionError) -> Self {
        Self::Programs(ProgramsError::from(error))
    }
}

impl Plan {
    /// Plans a run.
    ///
    /// With `recompute = auto` it is the least recomputation that fits: none, the cheap operations,
    /// or so many whole blocks.
    ///
    /// # Errors
    ///
    /// [`PlanError::OverLimit`] with the nearest plan that fits; [`PlanError::Programs`] naming
    /// what of the model cannot be trained.
    pub fn new(request: &PlanRequest<'_>) -> Result<Self, PlanError> {
        let recipe = request.recipe;
        let limit = recipe.run.memory_limit_bytes.unwrap_or(u64::MAX);
        let [rows, accum] =
            [recipe.batch.micro_batch_size, recipe.batch.grad_accum_steps].map(narrow);
        let policies = match recipe.run.recompute {
            recipe::Recompute::None => vec![Recompute::None],
            recipe::Recompute::Cheap => vec![Recompute::Cheap],
            recipe::Recompute::Blocks(count) => vec![Recompute::Blocks(count)],
            recipe::Recompute::Auto => policies(&recipe.model),
        };
        let needed = match least_that_fits(request, (rows, accum), &policies, limit)? {
            Ok(plan) => return Ok(plan),
            Err(needed) => needed,
        };
        let (nearest, smallest) = nearest(request, limit)?;
        let cut = nearest.is_some_and(|(shape, _)| shape.micro_batch_size != rows);
        let last_bits = cut && cuts_decide_bits(recipe);
        Err(PlanError::OverLimit { needed, limit, nearest, smallest, last_bits })
    }

    /// The plan of one choice, whatever it takes.
    fn of_shape(request: &PlanRequest<'_>, shape: Shape) -> Result<Self, PlanError> {
        let recipe = request.recipe;
        let programs = programs_of(&recipe.model, recipe, shape.recompute)?;
        let tokens = shape.micro_batch_size * recipe.data.seq_len;
        let workload = Workload::causal(shape.micro_batch_size, recipe.data.seq_len);
        let micro = programs.train.total_cost(&workload).flops;
        let model = programs.differentiated.total_cost(&workload).flops;
        let once = Workload::causal(0, 0);
        let update =
            programs.norm.total_cost(&once).flops + programs.update.total_cost(&once).flops;
        let accum = real(shape.grad_accum_steps as u64);
        let model_flops_per_step = accum * model + update;
        let total_steps = recipe.total_steps(model_flops_per_step);
        let parameters = programs.train.num_parameters() as u64;
        let seconds = request.pace.map(|pace| {
            let step =
                accum * micro / pace.flops_per_s + real(parameters) * pace.update_s_per_parameter;
            step * real(total_steps)
        });
        let session = programs.clone().memory_plan(tokens)?.bytes();
        let bytes = PredictedBytes {
            session,
            scratch: request.scratch_bytes,
            host: host_bytes(recipe, total_steps),
            baseline: request.baseline_bytes,
        };
        Ok(Self {
            shape,
            parameters,
            bytes,
            tokens_per_step: recipe.tokens_per_step(),
            model_flops_per_step,
            flops_per_step: accum * micro + update,
            total_steps,
            seconds,
            programs,
            tokens_per_run: tokens,
        })
    }

    /// The programs of the run.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Tokens that a run of its programs takes.
    pub(crate) fn tokens_per_run(&self) -> usize {
        self.tokens_per_run
    }

    /// Where every byte of the session will lie.
    ///
    /// # Errors
    ///
    /// [`SessionError`] if the programs do not fit together, which is a bug.
    pub fn memory_plan(&self) -> Result<MemoryPlan, SessionError> {
        self.programs.clone().memory_plan(self.tokens_per_run)
    }
}

/// Every recomputation there is for a model, from the fastest to the smallest.
fn policies(spec: &ModelSpec) -> Vec<Recompute> {
    let blocks = u32::try_from(spec.num_hidden_layers).expect("a valid spec limits its blocks");
    let mut policies = vec![Recompute::None, Recompute::Cheap];
    policies.extend((1..blocks).map(Recompute::Blocks));
    policies.push(Recompute::ALL_BLOCKS);
    policies
}

/// The first of `policies` whose plan fits, or the bytes of the last, which is the smallest. More
/// recomputation never takes more memory, so halving finds it in a few plans.
fn least_that_fits(
    request: &PlanRequest<'_>,
    (micro_batch_size, grad_accum_steps): (usize, usize),
    policies: &[Recompute],
    limit: u64,
) -> Result<Result<Plan, u64>, PlanError> {
    let plan = |index: usize| {
        let recompute = policies[index];
        Plan::of_shape(request, Shape { micro_batch_size, grad_accum_steps, recompute })
    };
    let mut best = plan(policies.len() - 1)?;
    if best.bytes.total() > limit {
        return Ok(Err(best.bytes.total()));
    }
    // `best` is the plan of `fits`; everything before `from` does not fit. The first two are tried
    // one by one: mostly one of them fits.
    let (mut from, mut fits) = (0, policies.len() - 1);
    while from < fits {
        let middle = if from < 2 { from } else { usize::midpoint(from, fits) };
        let tried = plan(middle)?;
        if tried.bytes.total() <= limit {
            (best, fits) = (tried, middle);
        } else {
            from = middle + 1;
        }
    }
    Ok(Ok(best))
}

/// The programs of a model under a recipe's settings.
pub(crate) fn programs_of(
    spec: &ModelSpec,
    recipe: &TrainRecipe,
    recompute: Recompute,
) -> Result<Programs, ProgramsError> {
    Programs::new(spec, &options_of((spec, recipe.adapter.as_ref()), recipe, recompute)?)
}

/// The options of a model's programs under a recipe's settings, with this adapter.
pub(crate) fn options_of(
    (spec, adapter): (&ModelSpec, Option<&Adapter>),
    recipe: &TrainRecipe,
    recompute: Recompute,
) -> Result<ProgramOptions, ProgramsError> {
    let encoding = match recipe.run.weights {
        DType::Bf16 => Encoding::Bf16,
        _ => Encoding::F32,
    };
    let mut options = ProgramOptions::of_recipe(&recipe.optimizer, encoding, recompute);
    if let Some(adapter) = adapter {
        options.adapters = AdapterMap::new(spec, &adapter.lora)?;
        options.encoding = match adapter.base_encoding {
            BaseEncoding::F32 => Encoding::F32,
            BaseEncoding::Bf16 => Encoding::Bf16,
            BaseEncoding::Q8 => Encoding::Q8,
            BaseEncoding::Nf4 => Encoding::Nf4,
        };
    }
    Ok(options)
}

/// The choice with the least arithmetic that fits (among those with the largest micro-batch), and
/// the bytes of the smallest there is.
fn nearest(
    request: &PlanRequest<'_>,
    limit: u64,
) -> Result<(Option<(Shape, u64)>, u64), PlanError> {
    let rows = narrow(request.recipe.batch.global_batch_size());
    let asked = narrow(request.recipe.batch.micro_batch_size);
    let policies = policies(&request.recipe.model);
    let mut smallest = u64::MAX;
    let mut best: Option<Plan> = None;
    for micro_batch_size in (1..=asked).rev().filter(|&size| rows.is_multiple_of(size)) {
        let batch = (micro_batch_size, rows / micro_batch_size);
        match least_that_fits(request, batch, &policies, limit)? {
            Err(bytes) => smallest = smallest.min(bytes),
            Ok(plan) => {
                let is_last = plan.shape.recompute == policies[0];
                if best.as_ref().is_none_or(|best| plan.flops_per_step < best.flops_per_step) {
                    best = Some(plan);
                }
                // Without recomputation, smaller micro-batches are no faster.
                if is_last {
                    break;
                }
            }
        }
    }
    Ok((best.map(|plan| (plan.shape, plan.bytes.total())), smallest))
}

fn host_bytes(recipe: &TrainRecipe, total_steps: u64) -> u64 {
    let batch = BATCH_BYTES_PER_TOKEN * recipe.tokens_per_step();
    let adapters = recipe.adapter.as_ref();
    let adapters = adapters.and_then(|adapter| AdapterMap::new(&recipe.model, &adapter.lora).ok());
    let saving = match adapters {
        Some(adapters) => gather_bytes_max_of(&adapters.tensor_map()),
        None => gather_bytes_max(&recipe.model),
    } as u64;
    let validations = recipe.eval.every.map_or(1, |every| total_steps / every + 1);
    // What the report is drawn from.
    let metrics = (total_steps + validations).saturating_mul(size_of::<Metric>() as u64);
    (batch + saving + SMALL_BYTES).saturating_add(metrics)
}

fn narrow(count: u64) -> usize {
    usize::try_from(count).expect("recipes limit the batch")
}

fn real(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests;

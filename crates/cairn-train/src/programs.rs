//! The programs of a training run: forward and backward; scoring; the gradients' norm; update; and,
//! where an average of the weights is kept, scoring with it.

use std::collections::BTreeSet;

use cairn_kernels::{Encoding, Layout};
use cairn_model::{
    AdapterError, AdapterMap, BuildError, BuildOptions, Head, build_adapted_program,
};
use cairn_program::{
    AdamWAttrs, Class, DifferentiateError, Instr, KvPlacement, Loss, MemoryPlan, Op, Program,
    ProgramId, Recompute, SessionError, SessionProgram, Sizes, UpdateOptions, VerifyError,
    differentiate, norm_program, recompute, update_program,
};
use cairn_spec::ModelSpec;
use cairn_spec::recipe::{Decay, Optimizer};

/// Forward and backward.
pub(crate) const TRAIN: ProgramId = ProgramId(0);
/// Forward without dropout, for validation.
pub(crate) const SCORE: ProgramId = ProgramId(1);
/// The norm of all gradients.
pub(crate) const NORM: ProgramId = ProgramId(2);
/// Gradients to new weights.
pub(crate) const UPDATE: ProgramId = ProgramId(3);
/// Forward without dropout over the averages of the weights; not always there.
pub(crate) const SCORE_AVERAGE: ProgramId = ProgramId(4);

/// Prefix of an average's name.
const AVERAGE_PREFIX: &str = "ema.";

/// What decides the programs besides the model.
#[derive(Clone, Debug, PartialEq)]
pub struct ProgramOptions {
    /// Storage of weight matrices: `f32`, or `bf16` with an `f32` master beside it.
    pub encoding: Encoding,
    /// Adapters beside the model's projections; then they alone are trained.
    pub adapters: AdapterMap,
    /// Weights to train; `None` trains all, or all adapters.
    pub trainable: Option<BTreeSet<String>>,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// The optimizer; its weight decay falls on the weights that `decay` names.
    pub update: UpdateOptions,
    /// Which weights decay.
    pub decay: Decay,
}

impl ProgramOptions {
    /// What a recipe asks for.
    pub fn of_recipe(optimizer: &Optimizer, encoding: Encoding, recompute: Recompute) -> Self {
        let [beta1, beta2] = optimizer.betas;
        let Optimizer { eps, weight_decay, decay, max_grad_norm, ema_decay, .. } = *optimizer;
        Self {
            encoding,
            adapters: AdapterMap::default(),
            trainable: None,
            recompute,
            update: UpdateOptions {
                adamw: AdamWAttrs { beta1, beta2, eps, weight_decay },
                max_grad_norm: max_grad_norm.map(rounded),
                ema_decay: ema_decay.map(rounded),
            },
            decay,
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "applied to f32 values")]
fn rounded(setting: f64) -> f32 {
    setting as f32
}

/// Why a model cannot be trained as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramsError {
    /// The model cannot be built.
    #[error("this model cannot be built")]
    Build(#[from] BuildError),
    /// The model cannot have the adapters.
    #[error("the adapter does not fit the model")]
    Adapter(#[from] AdapterError),
    /// The model cannot be differentiated.
    #[error("this model cannot be trained as asked")]
    Differentiate(#[from] DifferentiateError),
    /// A derived program does not verify: a bug.
    #[error("a program of the step does not verify")]
    Derived(#[from] VerifyError),
    /// The programs do not share a session: a bug.
    #[error("the programs of a step do not fit together")]
    Session(#[from] SessionError),
}

/// Programs that share weights, gradients and states.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Forward and backward.
    pub train: Program,
    /// Forward without dropout.
    pub score: Program,
    /// The norm of all gradients, before they are applied.
    pub norm: Program,
    /// Gradients to new weights.
    pub update: Program,
    /// Forward without dropout over the averages of the weights, where they are kept.
    pub score_average: Option<Program>,
    /// Forward and backward before recomputation: what the model itself needs.
    pub(crate) differentiated: Program,
}

impl Programs {
    /// Lowers `spec`, differentiates it and derives its update.
    ///
    /// # Errors
    ///
    /// [`ProgramsError`] naming what of the spec has no program.
    pub fn new(spec: &ModelSpec, options: &ProgramOptions) -> Result<Self, ProgramsError> {
        // Dropout and the load-balancing loss are about training alone.
        let build = |training| BuildOptions {
            encoding: options.encoding,
            layout: Layout::RowMajor,
            dropout: training,
            balance: training,
            ..BuildOptions::new(Head::TokenLogprob)
        };
        let adapters = &options.adapters;
        let program = |build: &BuildOptions| build_adapted_program(spec, build, adapters);
        let forward = program(&build(true))?;
        let trainable = match &options.trainable {
            Some(names) => names.clone(),
            None if !adapters.is_empty() => adapters.weights(),
            None => forward.of_class(Class::Weight).map(|(_, w)| w.name.clone()).collect(),
        };
        let differentiated = differentiate(&forward, &trainable, &Loss::CrossEntropy)?;
        let norm = norm_program(&differentiated)?;
        let mut update = update_program(&differentiated, &options.update)?;
        set_decay(&mut update, &differentiated, options);
        let train = recompute(&differentiated, options.recompute);
        let score = program(&build(false))?;
        let score_average = match options.update.ema_decay {
            Some(_) => {
                // Averages are f32, and frozen weights are their own.
                let encoding = match adapters.is_empty() {
                    true => Encoding::F32,
                    false => options.encoding,
                };
                let averaged = BuildOptions { encoding, ..build(false) };
                Some(over_averages(program(&averaged)?, &update)?)
            }
            None => None,
        };
        Ok(Self { train, score, norm, update, score_average, differentiated })
    }

    /// Lays the programs out for runs of up to `tokens` tokens.
    ///
    /// # Errors
    ///
    /// [`SessionError`] if the programs declare a shared value differently, which is a bug.
    pub fn memory_plan(self, tokens: usize) -> Result<MemoryPlan, SessionError> {
        // In the worst case every token is a document of its own.
        let sizes = Sizes::dense(tokens, tokens);
        let kv = KvPlacement::Arena;
        // In the order of the identifiers above.
        let programs = [self.train, self.score, self.norm, self.update];
        let programs = programs.into_iter().chain(self.score_average);
        MemoryPlan::new(
            programs.map(|program| SessionProgram { program, sizes, kv }).collect(),
            None,
        )
    }
}

/// Makes a program read the averages that `update` keeps in the place of the weights. They are states
/// of the session already, so measuring them takes no memory and moves nothing.
fn over_averages(mut program: Program, update: &Program) -> Result<Program, VerifyError> {
    for value in program.values.iter_mut().filter(|value| value.class == Class::Weight) {
        let average = format!("{AVERAGE_PREFIX}{}", value.name);
        // A frozen weight has none, and is its own average.
        if update.find(&average).is_some() {
            value.name = average;
            value.class = Class::State;
        }
    }
    program.verify()?;
    Ok(program)
}

/// Gives each weight of an update its decay. [`update_program`] lets matrices decay; embeddings are
/// told from other matrices by the lookups that read them, also where they are the head as well.
fn set_decay(update: &mut Program, training: &Program, options: &ProgramOptions) {
    let lookup = |op: &Op| match op {
        Op::Embed => Some(1),
        Op::PositionEmbed => Some(2),
        _ => None,
    };
    let looked_up = |instr: &Instr| lookup(&instr.op).and_then(|slot| instr.inputs[slot]);
    let embeddings: BTreeSet<&str> = training
        .instrs
        .iter()
        .filter_map(looked_up)
        .map(|id| training.value(id).name.as_str())
        .collect();
    for index in 0..update.instrs.len() {
        let Some(id) = update.instrs[index].inputs.first().copied().flatten() else { continue };
        let name = &update.value(id).name;
        let weight = name.strip_prefix("master.").unwrap_or(name);
        let is_embedding = embeddings.contains(weight);
        if let Op::AdamW(attrs) = &mut update.instrs[index].op {
            match options.decay {
                Decay::Matrices => {}
                Decay::MatricesWithoutEmbeddings if is_embedding => attrs.weight_decay = 0.0,
                Decay::MatricesWithoutEmbeddings => {}
                Decay::All => attrs.weight_decay = options.update.adamw.weight_decay,
            }
        }
    }
}

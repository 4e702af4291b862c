//! A model in training: its memory, and the steps that change it.
//!
//! An optimizer step is any number of [`accumulate`](Learner::accumulate) calls and one
//! [`update`](Learner::update). Gradients are means over the targets of all micro-batches together,
//! because every micro-batch is given the same loss weight. A load-balancing loss is that of each
//! micro-batch, weighted by its share of the targets. How the rows are cut into micro-batches
//! does not change a bit of the result, but for a weight that is used twice (an embedding that is
//! the head as well), whose uses add to one gradient by turns, and for a load-balancing loss, which is
//! no sum over tokens.

use cairn_artifacts::Hash;
use cairn_artifacts::hash::Hasher;
use cairn_eval::{ScoreLimits, SessionScorer};
use cairn_kernels::{Cpu, Encoding};
use cairn_model::{is_adapter_weight, widened_bf16};
use cairn_program::{
    BALANCE_WEIGHT, Class, Feed, GRAD_NORM_SQUARED, MemoryPlan, Run, RunError, Session,
    SessionError, ValueType,
};

use crate::batch::MicroBatch;
use crate::programs::{NORM, SCORE, SCORE_AVERAGE, TRAIN, UPDATE};

/// Keys the randomness of one micro-batch and says where it stands in its step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Seed of the run.
    pub seed: u64,
    /// The step, from 0.
    pub step: u64,
    /// Tokens of the step's micro-batches before this one; 0 starts the gradients anew.
    pub first_token: u64,
}

/// Which weights are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Those that are trained.
    Trained,
    /// Their moving average, where the optimizer keeps one.
    Average,
}

/// A session that trains.
#[derive(Debug)]
pub struct Learner {
    session: Session,
}

impl Learner {
    /// Allocates what [`Programs::memory_plan`](crate::Programs::memory_plan) laid out. Weights are
    /// zeros until they are initialized or loaded.
    ///
    /// # Errors
    ///
    /// [`SessionError::Memory`] if the system does not have the memory.
    pub fn new(plan: MemoryPlan, cpu: Cpu) -> Result<Self, SessionError> {
        Ok(Self { session: Session::to_be_trained(plan, cpu)? })
    }

    /// Weights and states by name.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Weights and states by name, to fill. Call [`start_states`](Self::start_states) after
    /// changing weights.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Sets what the optimizer keeps beside fresh weights: masters and averages to the weights.
    /// Moments are zero from the beginning.
    ///
    /// A master starts from the weight's bf16 value, so that what is trained is what was measured
    /// before the first step.
    pub fn start_states(&mut self) {
        let copies: Vec<(String, String)> = self
            .session
            .persistent()
            .filter(|(_, class, ..)| *class == Class::State)
            .filter_map(|(name, ..)| {
                let weight =
                    ["master.", "ema."].iter().find_map(|prefix| name.strip_prefix(prefix));
                Some((name.to_owned(), weight?.to_owned()))
            })
            .collect();
        for (name, weight) in copies {
            let values = self.weight_f32(&weight);
            let state = self.session.stored_f32_mut(&name).expect("optimizer states are f32");
            state.copy_from_slice(&values);
        }
    }

    /// The values of a weight, widened from how it is stored.
    fn weight_f32(&self, name: &str) -> Vec<f32> {
        let bytes = self.session.stored(name).expect("a state belongs to a weight");
        if let Some(values) = self.session.stored_f32(name) {
            return values.to_vec();
        }
        widened_bf16(bytes)
    }

    /// Runs forward and backward over a micro-batch and adds `loss_weight` times the gradient of
    /// its summed loss. Adds the negative log-likelihoods of its targets, in nats, to `sum`.
    ///
    /// # Errors
    ///
    /// [`RunError`] if the batch does not fit the plan; nothing was computed then.
    pub fn accumulate(
        &mut self,
        batch: &MicroBatch<'_>,
        loss_weight: f32,
        place: Place,
        sum: &mut f64,
    ) -> Result<(), RunError> {
        let weights = batch.loss_weights(loss_weight);
        let [ids, positions, targets] = batch.feeds();
        let mut feeds = vec![ids, positions, targets, Feed::f32("loss_weights", &weights)];
        // A load-balancing loss counts as much as the targets beside it.
        let share = [weights.iter().sum::<f32>()];
        if self.session.program(TRAIN).find(BALANCE_WEIGHT).is_some() {
            feeds.push(Feed::f32(BALANCE_WEIGHT, &share));
        }
        let run = Run {
            accumulate: place.first_token != 0,
            seed: place.seed,
            step: place.step,
            first_token: place.first_token,
            ..batch.scoring_run(&feeds)
        };
        self.session.run(TRAIN, &run)?;
        batch.add_negative_log_likelihood(self.session.output(TRAIN, "logprob"), sum);
        Ok(())
    }

    /// Clips the gradients and applies them. `step` counts from 0. Returns the norm of all
    /// gradients together, before clipping. If that is no number nothing is applied: weights and
    /// states stay as they were.
    ///
    /// # Errors
    ///
    /// [`RunError`] if the update program does not take the feeds, which is a bug.
    ///
    /// # Panics
    ///
    /// Panics after 2³² steps.
    pub fn update(&mut self, lr: f64, step: u64) -> Result<f64, RunError> {
        self.session.run(NORM, &Run::forward(&[], &[]))?;
        let squares = self.session.output_f64(NORM, GRAD_NORM_SQUARED);
        if !squares.is_finite() {
            return Ok(squares.sqrt());
        }
        let (lr, step) = ([lr], [u32::try_from(step + 1).expect("fewer than 2^32 steps")]);
        let norm = [squares];
        let feeds =
            [Feed::f64("lr", &lr), Feed::u32("step", &step), Feed::f64(GRAD_NORM_SQUARED, &norm)];
        self.session.run(UPDATE, &Run::forward(&feeds, &[]))?;
        Ok(squares.sqrt())
    }

    /// The model as a measure, without dropout, within `limits` of the plan.
    pub fn scorer(
        &mut self,
        weights: Weights,
        limits: ScoreLimits,
        vocab_size: usize,
    ) -> SessionScorer<'_> {
        let program = match weights {
            Weights::Trained => SCORE,
            Weights::Average => SCORE_AVERAGE,
        };
        SessionScorer::new(&mut self.session, program, limits, vocab_size)
    }

    /// Adds names and bytes of every weight and state to a hash, in name order. Gradients are left
    /// out: the next step starts them anew. Where adapters are trained, the frozen weights are left
    /// out as well: they have a hash of their own.
    pub fn hash_into(&self, hasher: &mut Hasher) {
        let trains_adapters = self.session.persistent().any(|(name, ..)| is_adapter_weight(name));
        for (name, class, ..) in self.session.persistent() {
            let counts = match class {
                Class::Weight => !trains_adapters || is_adapter_weight(name),
                class => class == Class::State,
            };
            if counts {
                let bytes = self.session.stored(name).expect("listed by the session");
                hash_part(hasher, name, bytes);
            }
        }
    }

    /// Hash of every weight and state.
    pub fn hash(&self) -> Hash {
        let mut hasher = Hasher::new();
        self.hash_into(&mut hasher);
        hasher.finish()
    }

    /// How matrices are stored.
    pub fn encoding(&self) -> Encoding {
        let widest = |found: Encoding, (_, class, value_type, _): (_, _, ValueType, _)| match (
            class,
            value_type.encoding(),
        ) {
            (Class::Weight, Some(Encoding::Bf16)) => Encoding::Bf16,
            _ => found,
        };
        self.session.persistent().fold(Encoding::F32, widest)
    }
}

/// Adds a named part to a hash so that no two lists of parts hash alike.
pub(crate) fn hash_part(hasher: &mut Hasher, name: &str, bytes: &[u8]) {
    for part in [name.as_bytes(), bytes] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
}

#[cfg(test)]
mod tests;

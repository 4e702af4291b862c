//! A plan and weights → an engine, and what only an engine with weights can be asked.

use cairn_kernels::{Cpu, log_sum_exp};
use cairn_model::{TensorSource, init_weights, load_adapter, load_weights};
use cairn_program::{LentWeights, Session};
use cairn_spec::ModelSpec;

use super::Engine;
use crate::error::{EngineError, GenerateError};
use crate::executor::Executor;
use crate::options::EnginePlan;
use crate::request::Request;
use crate::sampling::SamplingParams;

impl Engine {
    /// Allocates the plan and loads the weights.
    ///
    /// # Errors
    ///
    /// [`EngineError::Session`] without the memory, [`EngineError::Load`] if the tensors are not the
    /// model's.
    pub fn load(
        plan: EnginePlan,
        cpu: Cpu,
        source: &dyn TensorSource,
    ) -> Result<Self, EngineError> {
        Self::load_adapted(plan, cpu, (source, None))
    }

    /// As [`load`](Self::load), with the weights of the plan's adapters from PEFT's tensors.
    ///
    /// # Errors
    ///
    /// As from [`load`](Self::load).
    pub fn load_adapted(
        plan: EnginePlan,
        cpu: Cpu,
        (source, adapter): (&dyn TensorSource, Option<&dyn TensorSource>),
    ) -> Result<Self, EngineError> {
        let adapters = plan.adapters.clone();
        let lent = source.lend(&plan.spec, &plan.memory, &cpu)?;
        Self::with_weights(plan, cpu, lent, |session, spec| {
            load_weights(session, spec, source)?;
            match adapter {
                Some(adapter) => load_adapter(session, spec, &adapters, adapter),
                None => Ok(()),
            }
        })
    }

    /// Allocates the plan and fills it with fresh weights: to measure speed, not to generate text.
    ///
    /// # Errors
    ///
    /// [`EngineError::Session`] without the memory.
    pub fn with_fresh_weights(plan: EnginePlan, cpu: Cpu, seed: u64) -> Result<Self, EngineError> {
        Self::with_weights(plan, cpu, Vec::new(), |session, spec| {
            init_weights(session, spec, seed);
            Ok(())
        })
    }

    fn with_weights(
        plan: EnginePlan,
        cpu: Cpu,
        lent: Vec<LentWeights>,
        fill: impl FnOnce(&mut Session, &ModelSpec) -> Result<(), cairn_model::LoadError>,
    ) -> Result<Self, EngineError> {
        let EnginePlan { memory, buckets, spec, options, .. } = plan;
        let mut session = Session::to_be_loaded(memory, cpu, lent)?;
        fill(&mut session, &spec)?;
        // Filling may have taken longer than the system waits for a lease.
        session.keep_lent()?;
        Self::with_model(Executor::new(session, buckets, spec), options)
    }

    /// The model.
    pub fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    /// The session that holds weights and cache.
    pub fn session(&self) -> &Session {
        self.model.session()
    }

    /// The log-probability of every token after `tokens`: `[v]`.
    ///
    /// # Errors
    ///
    /// As [`generate`](Self::generate).
    pub fn next_logprobs(&mut self, tokens: &[u32]) -> Result<Vec<f32>, GenerateError> {
        let request = Request::new(tokens.to_vec(), SamplingParams::greedy(), 1);
        self.generate(request, &mut |_| std::ops::ControlFlow::Continue(()))?;
        // The only sequence of the last step is in its first row.
        let logits_v = self.model.logits(0);
        let lse = log_sum_exp(self.session().cpu(), logits_v);
        Ok(logits_v.iter().map(|logit| logit - lse).collect())
    }

    /// Runs the model over one token by itself and calls `observe` with the index of each instruction of
    /// the session's first program and its seconds. What requests have left in the cache
    /// is forgotten.
    ///
    /// # Errors
    ///
    /// [`GenerateError::Busy`] with requests under way, [`GenerateError::Engine`] if the run fails.
    pub fn observe_token(
        &mut self,
        token: u32,
        observe: &mut dyn FnMut(usize, f64),
    ) -> Result<(), GenerateError> {
        self.check_idle()?;
        // It is run in a block of the cache.
        self.reset_prefix_cache();
        self.model.run_observed(token, observe).map_err(EngineError::from)?;
        Ok(())
    }
}

//! One of our own sides: an engine, and its speeds turn by turn.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context as _;
use cairn_engine::{Engine, EngineOptions};
use cairn_eval::contract::{PLAIN, Ran, Turn, TurnBench};
use cairn_kernels::{CacheType, Compute, Encoding};
use serde::Serialize;

use crate::context::Context;
use crate::failure::UserError;
use crate::model_folder::ModelFolder;
use crate::storage::Storage;
use crate::weight_type::WeightType;

/// A model of ours in memory.
#[derive(Debug)]
pub(in crate::command::bench) struct OwnSide {
    /// What tables call it.
    pub(in crate::command::bench) name: String,
    /// Where it came from.
    pub(in crate::command::bench) model: ModelFolder,
    /// What runs it.
    pub(in crate::command::bench) engine: Engine,
    path: PathBuf,
    dtype: WeightType,
    /// How the weights are held.
    storage: Storage,
}

impl OwnSide {
    /// Loads a model for sequences of up to `length` tokens.
    pub(in crate::command::bench) fn load(
        model: ModelFolder,
        (dtype, compute): (WeightType, Compute),
        length: usize,
        context: &Context,
    ) -> anyhow::Result<Self> {
        let path = model.path.clone();
        let mut options = EngineOptions::new(1, length);
        options.cache_type = CacheType::F32;
        options.compute = compute;
        let storage = dtype.storage(&model, compute, context)?;
        let arithmetic = match compute {
            Compute::F32 => String::new(),
            other => format!(":{other}"),
        };
        let name = format!("cairn, {storage}{arithmetic} {}", path.display());
        let engine = model.engine(options, &storage, context.cpu()?)?;
        Ok(Self { name, model, engine, path, dtype, storage })
    }

    /// What a turn of it ran.
    pub(in crate::command::bench) fn ran(&self, bench: &TurnBench, tokens: &[u32]) -> Ran {
        Ran {
            prompt_tokens: bench.prompt.len(),
            output_tokens: tokens.len(),
            threads: Some(self.engine.session().cpu().threads()),
            weight_bytes: Some(TurnBench::weight_bytes(&self.engine)),
            values: Some(self.values()),
        }
    }

    /// Types of the values that its matrices hold: twelve bits hold what bf16 does.
    fn values(&self) -> Vec<String> {
        let held = self.storage.in_use().into_iter();
        let plain = held.map(|encoding| match encoding {
            Encoding::Bf16z => Encoding::Bf16,
            other => other,
        });
        plain
            .map(|encoding| encoding.name().to_owned())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    }

    /// Refuses a model that is not the exact one of `side`: one that was rounded itself, or has other tokens.
    pub(in crate::command::bench) fn check_exact(&self, side: &Self) -> anyhow::Result<()> {
        let (own, other) = (self.model.spec.vocab_size, side.model.spec.vocab_size);
        if own != other {
            let message = format!("{} has {own} tokens, the model {other}", self.path.display());
            return Err(UserError::new(message)
                .hint("--source is the model before it was rounded")
                .into());
        }
        let values = self.values();
        if values.iter().any(|name| !PLAIN.contains(&name.as_str())) {
            let message = format!("{} holds {}", self.path.display(), values.join(" and "));
            return Err(UserError::new(message)
                .hint("--source is the model before it was rounded")
                .into());
        }
        Ok(())
    }

    /// Seconds from the start of a process to its first token, after a short prompt.
    pub(in crate::command::bench) fn start_seconds(
        &self,
        prompt: &[u32],
        context: &Context,
    ) -> anyhow::Result<f64> {
        let ids: Vec<String> = prompt.iter().take(3).map(u32::to_string).collect();
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = Command::new(program);
        command.args(["--quiet", "--threads", &context.threads.to_string(), "generate", "--model"]);
        command.arg(&self.path).args(["--prompt-ids", &ids.join(",")]);
        command.args(["--max-new-tokens", "1", "--temperature", "0", "--json"]);
        command.args(["--dtype", self.dtype.name()]);
        command.args(["--compute-dtype", self.engine.options().compute.name()]);
        let begin = Instant::now();
        let done = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !done.with_context(|| format!("cannot start {command:?}"))?.success() {
            return Err(UserError::new(format!("{command:?} failed")).into());
        }
        Ok(begin.elapsed().as_secs_f64())
    }
}

/// Speeds of one side, turn by turn.
#[derive(Clone, Debug, Serialize)]
pub(in crate::command::bench) struct Speeds {
    /// Whose.
    pub(in crate::command::bench) name: String,
    /// Tokens of the prompt read a second.
    pub(in crate::command::bench) prefill_tokens_per_s: Vec<f64>,
    /// Tokens made a second.
    pub(in crate::command::bench) decode_tokens_per_s: Vec<f64>,
    /// What was made; the same in every turn.
    token_ids: Vec<u32>,
    /// Whether a turn made other tokens than the one before.
    pub(in crate::command::bench) is_steady: bool,
}

impl Speeds {
    /// A side without turns.
    pub(in crate::command::bench) fn of(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            prefill_tokens_per_s: Vec::new(),
            decode_tokens_per_s: Vec::new(),
            token_ids: Vec::new(),
            is_steady: true,
        }
    }

    /// Takes a turn; its speeds only if it `counts`.
    pub(in crate::command::bench) fn push(
        &mut self,
        turn: Turn,
        prompt_tokens: usize,
        counts: bool,
    ) {
        if counts {
            let rates = turn.rates(prompt_tokens);
            self.prefill_tokens_per_s.push(rates.prefill_tokens_per_s);
            self.decode_tokens_per_s.push(rates.decode_tokens_per_s);
        }
        self.is_steady &= self.token_ids.is_empty() || self.token_ids == turn.tokens;
        self.token_ids = turn.tokens;
    }

    /// The tokens of the last turn.
    pub(in crate::command::bench) fn tokens(&self) -> &[u32] {
        &self.token_ids
    }
}

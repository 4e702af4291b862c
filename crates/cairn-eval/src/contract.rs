//! The contract of a comparison: what is run, fixed in a file before anyone measures.
//!
//! A contract names the model, the type of its weights, the machine, the prompt and how many tokens
//! are made of it. Two sides are compared only where both did exactly that; [`Evenness`] says what
//! was not the same, and then there is no ratio.

mod agreement;
mod evenness;
mod turn;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use agreement::{Agreement, Divergence, SourceKl, divergence_of, first_divergence};
pub use evenness::{Even, Evenness, PLAIN, Ran};
pub use turn::{Turn, TurnBench, TurnRates};

/// Schema of the file.
pub const CONTRACT_SCHEMA: &str = "contract/1";
/// Positions whose mean says something of quality.
const QUALITY_POSITIONS_MIN: usize = 8;

/// What is run, by whom, how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contract {
    /// [`CONTRACT_SCHEMA`].
    pub schema: String,
    /// What records and reports call it.
    pub name: String,
    /// The model.
    #[serde(default)]
    pub model: ContractModel,
    /// The machine.
    pub machine: ContractMachine,
    /// What is read.
    pub prompt: ContractPrompt,
    /// What is made of it.
    pub output: ContractOutput,
    /// How tokens are chosen.
    #[serde(default)]
    pub sampling: ContractSampling,
    /// How often, and what is compared beside speed.
    #[serde(default)]
    pub measure: ContractMeasure,
}

/// The model of a contract.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContractModel {
    /// Where it is; the command line may say so instead.
    pub path: Option<PathBuf>,
    /// Type of our weight matrices, as `--dtype` names it.
    pub dtype: Option<String>,
    /// Type of our head, where it is another; the model has to be a pack that is stored so.
    pub head_dtype: Option<String>,
    /// Arithmetic of our products by them, as `--compute-dtype` names it.
    pub compute_dtype: Option<String>,
    /// In what the weights of both sides have to be equal.
    pub even: Even,
}

/// The machine of a contract.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContractMachine {
    /// Threads of each side.
    pub threads: usize,
    /// Instruction set; left out, the best one there is.
    #[serde(default)]
    pub isa: Option<String>,
    /// Below this read bandwidth, in GB/s, the machine is too busy and the run is void.
    #[serde(default)]
    pub bandwidth_min_gbs: Option<f64>,
}

/// The prompt of a contract: the first `tokens` tokens of a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContractPrompt {
    /// Its exact length.
    pub tokens: usize,
    /// A text file, beside the contract.
    pub text: PathBuf,
}

/// The output of a contract. Its length is forced: nothing ends it early.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContractOutput {
    /// Its exact length.
    pub tokens: usize,
}

/// How tokens are chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContractSampling {
    /// 0 for the likeliest token; two engines do not draw the same numbers, so nothing else is
    /// comparable.
    pub temperature: f64,
}

/// How often, and what is compared beside speed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContractMeasure {
    /// Turns of each side.
    pub repetitions: usize,
    /// Positions of the output at which whole distributions are compared.
    pub kl_positions: usize,
    /// The most that the distributions of both sides may be apart, in nats in the mean of these positions:
    /// beyond it they run different models.
    pub kl_max: Option<f64>,
}

impl Default for ContractMeasure {
    fn default() -> Self {
        Self { repetitions: 5, kl_positions: 4, kl_max: None }
    }
}

/// What is wrong with a contract.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContractError {
    /// It is no contract.
    #[error("this is no contract: {0}")]
    Syntax(String),
    /// It is of another version.
    #[error("the contract's schema is {found}, this program reads {CONTRACT_SCHEMA}")]
    Schema {
        /// What it says.
        found: String,
    },
    /// A value makes no sense.
    #[error("{key} is {value}, which {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The text has too few tokens.
    #[error("{} has {found} tokens for this model, the prompt wants {wanted}", path.display())]
    ShortText {
        /// The text.
        path: PathBuf,
        /// Tokens of it.
        found: usize,
        /// Tokens of the prompt.
        wanted: usize,
    },
}

impl Contract {
    /// Reads and checks a contract.
    ///
    /// # Errors
    ///
    /// [`ContractError`] with the key that is wrong.
    pub fn parse(text: &str) -> Result<Self, ContractError> {
        let contract: Self =
            toml::from_str(text).map_err(|error| ContractError::Syntax(error.to_string()))?;
        contract.check()?;
        Ok(contract)
    }

    fn check(&self) -> Result<(), ContractError> {
        if self.schema != CONTRACT_SCHEMA {
            return Err(ContractError::Schema { found: self.schema.clone() });
        }
        let positive = [
            ("machine.threads", self.machine.threads, 1),
            ("prompt.tokens", self.prompt.tokens, 1),
            // The first comes out of the prompt; what is timed are the others.
            ("output.tokens", self.output.tokens, 2),
            ("measure.repetitions", self.measure.repetitions, 1),
        ];
        for (key, value, min) in positive {
            if value < min {
                let why = if min == 1 { "is not at least 1" } else { "is not at least 2" };
                return Err(ContractError::Value { key, value: value.to_string(), why });
            }
        }
        if let Some(most) = self.measure.kl_max
            && (most.is_nan() || most <= 0.0 || self.measure.kl_positions == 0)
        {
            let why = "asks for positions, and is a number above 0";
            return Err(ContractError::Value {
                key: "measure.kl_max",
                value: most.to_string(),
                why,
            });
        }
        if self.model.even == Even::Quality && self.measure.kl_positions < QUALITY_POSITIONS_MIN {
            let value = self.measure.kl_positions.to_string();
            let why = "is not at least 8, which even = \"quality\" asks for";
            return Err(ContractError::Value { key: "measure.kl_positions", value, why });
        }
        if self.model.even == Even::Values && self.measure.kl_max.is_none() {
            let why = "is needed for even = \"values\": types alone do not make the same model";
            let value = "not there".to_owned();
            return Err(ContractError::Value { key: "measure.kl_max", value, why });
        }
        if self.sampling.temperature != 0.0 {
            let value = self.sampling.temperature.to_string();
            let why = "is not 0: two engines draw different numbers";
            return Err(ContractError::Value { key: "sampling.temperature", value, why });
        }
        Ok(())
    }

    /// The text of the prompt, for a contract that lies at `path`.
    pub fn text_path(&self, path: &Path) -> PathBuf {
        path.parent().unwrap_or(Path::new("")).join(&self.prompt.text)
    }

    /// The exact prompt, out of the tokens of the whole text.
    ///
    /// # Errors
    ///
    /// [`ContractError::ShortText`].
    pub fn prompt_of(&self, path: &Path, ids: &[u32]) -> Result<Vec<u32>, ContractError> {
        let wanted = self.prompt.tokens;
        let (path, found) = (self.text_path(path), ids.len());
        let prompt = ids.get(..wanted).ok_or(ContractError::ShortText { path, found, wanted })?;
        Ok(prompt.to_vec())
    }
}

#[cfg(test)]
mod tests;

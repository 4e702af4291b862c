//! The model that is served: what clients call it, and what turns its tokens into text and back.

use std::collections::BTreeMap;

use cairn_data::chat::ChatTemplate;
use cairn_data::tokenizer::{GenerationConfig, Tokenizer};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::grammar::Grammars;

/// What a served model is made of.
#[derive(Debug)]
pub struct ServedParts {
    /// What clients call it.
    pub name: String,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
    /// Special tokens by name, for the template.
    pub special_tokens: BTreeMap<String, String>,
    /// Tokens that end an output.
    pub stop_tokens: Vec<u32>,
    /// What its authors generate with.
    pub stated: GenerationConfig,
    /// Tokens of prompt and output together, at most.
    pub max_context: usize,
}

/// A model that is served.
#[derive(Debug)]
pub struct ServedModel {
    pub(crate) parts: ServedParts,
    pub(crate) grammars: Grammars,
}

impl ServedModel {
    /// Serves these parts.
    pub fn new(parts: ServedParts) -> Self {
        Self { parts, grammars: Grammars::default() }
    }

    /// Lets requests for this model through; one that names none is for it.
    pub(crate) fn check_name(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(asked) if asked != self.parts.name => {
                Err(ApiError::no_model(asked, &self.parts.name))
            }
            _ => Ok(()),
        }
    }

    /// The entry of `/v1/models`.
    pub(crate) fn entry(&self, now: u64) -> Value {
        json!({
            "id": self.parts.name,
            "object": "model",
            "created": now,
            "owned_by": "cairn",
            "max_model_len": self.parts.max_context,
        })
    }

    /// Tokens that a prompt leaves room for.
    pub(crate) fn room(&self, num_prompt: usize) -> Result<usize, ApiError> {
        let max_context = self.parts.max_context;
        match max_context.checked_sub(num_prompt) {
            Some(0) | None => Err(ApiError::context(num_prompt, max_context)),
            Some(room) => Ok(room),
        }
    }
}

//! The model that is served: what clients call it, and what turns its tokens into text and back.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use cairn_data::chat::{CallForm, ChatTemplate, ReasoningMarkers};
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
    /// How what it thinks is told from what it says.
    pub reasoning: ReasoningSplit,
    /// Special tokens by name, for the template.
    pub special_tokens: BTreeMap<String, String>,
    /// Tokens that end an output.
    pub stop_tokens: Vec<u32>,
    /// What its authors generate with.
    pub stated: GenerationConfig,
    /// Tokens of prompt and output together, at most.
    pub max_context: usize,
}

/// How what a model thinks is told from what it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ReasoningSplit {
    /// By the markers of its template, or among its tokens; where there are none, all is said.
    #[default]
    Learned,
    /// Not at all: all is said.
    Off,
    /// By these markers.
    Markers {
        /// In front of what is thought.
        open: String,
        /// Behind it.
        close: String,
    },
}

/// What the answers of a model are made of, as its template and its tokens say.
#[derive(Debug, Default)]
pub(crate) struct Shape {
    /// How calls are written, if there is a form for them.
    pub(crate) calls: Option<CallForm>,
    /// What stands around what is thought.
    pub(crate) reasoning: Option<ReasoningMarkers>,
}

impl Shape {
    fn learn(parts: &ServedParts) -> Self {
        let ServedParts { tokenizer, template, special_tokens, reasoning, .. } = parts;
        let Some(template) = template else { return Self::default() };
        let learned = || template.reasoning_markers(tokenizer, special_tokens);
        let reasoning = match reasoning {
            ReasoningSplit::Off => None,
            ReasoningSplit::Learned => learned(),
            ReasoningSplit::Markers { open, close } => Some(ReasoningMarkers {
                open: open.clone(),
                close: close.clone(),
                field: learned().and_then(|markers| markers.field),
            }),
        };
        Self { calls: template.call_form(special_tokens), reasoning }
    }
}

/// A model that is served.
#[derive(Debug)]
pub struct ServedModel {
    pub(crate) parts: ServedParts,
    pub(crate) grammars: Grammars,
    /// Learned when it is first needed.
    shape: OnceLock<Shape>,
}

impl ServedModel {
    /// Serves these parts.
    pub fn new(parts: ServedParts) -> Self {
        Self { parts, grammars: Grammars::default(), shape: OnceLock::new() }
    }

    /// What its answers are made of.
    pub(crate) fn shape(&self) -> &Shape {
        self.shape.get_or_init(|| Shape::learn(&self.parts))
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

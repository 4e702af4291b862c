//! A model that is served: what clients call it, what turns its tokens into text and back, and the way to its
//! engine.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use cairn_data::chat::{CallForm, ChatTemplate, ReasoningMarkers};
use cairn_data::tokenizer::{GenerationConfig, Tokenizer};
use cairn_engine::{Engine, Model};
use serde_json::{Value, json};

use crate::driver::{Driver, DriverError, DriverThread, Turns};
use crate::embedder::{Embed, EmbedForm, Embedder};
use crate::error::ApiError;
use crate::grammar::Grammars;
use crate::metrics::Metrics;
use crate::models::Room;

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

/// What models do that are asked for something else.
const EMBEDS: &str = "embeds: it answers /v1/embeddings";
const GENERATES: &str = "generates: vectors come from encoders, served as models of their own";

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

/// Starts a model's thread.
type Start = dyn FnOnce((Arc<Metrics>, Turns)) -> Result<(Way, DriverThread), DriverError> + Send;

/// The way to what a model computes.
#[derive(Debug)]
enum Way {
    Generates(Driver),
    Embeds(Embedder),
}

/// What a model is loaded from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSource {
    /// What clients call it.
    pub name: String,
    /// Its file or folder.
    pub path: PathBuf,
    /// The folder of an adapter that is used beside its weights.
    pub adapter: Option<PathBuf>,
}

/// A model in memory, to be served.
pub struct LoadedModel {
    source: ModelSource,
    parts: ServedParts,
    room: Room,
    start: Box<Start>,
}

impl fmt::Debug for LoadedModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, room) = (&self.source, &self.room);
        f.debug_struct("LoadedModel").field("source", source).field("room", room).finish()
    }
}

impl LoadedModel {
    /// A model with its engine, in the memory that was taken for it.
    pub fn new<M: Model + Send + 'static>(
        source: ModelSource,
        parts: ServedParts,
        engine: Engine<M>,
        room: Room,
    ) -> Self {
        let start = Box::new(|shared| {
            Driver::start(engine, shared).map(|(driver, thread)| (Way::Generates(driver), thread))
        });
        Self { source, parts, room, start }
    }

    /// A model that turns texts into vectors, in the memory that was taken for it.
    pub fn embedding(
        source: ModelSource,
        parts: ServedParts,
        (model, form): (Box<dyn Embed>, EmbedForm),
        room: Room,
    ) -> Self {
        let start = Box::new(|(_, turns)| {
            Embedder::start(model, form, turns)
                .map(|(embedder, thread)| (Way::Embeds(embedder), thread))
        });
        Self { source, parts, room, start }
    }

    /// Starts its engine.
    pub(crate) fn start(
        self,
        shared: (Arc<Metrics>, Turns),
        since: u64,
    ) -> Result<(ServedModel, DriverThread, Room), DriverError> {
        let Self { source, parts, room, start } = self;
        let (way, thread) = start(shared)?;
        let (grammars, shape) = (Grammars::default(), OnceLock::new());
        Ok((ServedModel { source, parts, grammars, shape, way, since }, thread, room))
    }
}

/// A model that is served. Its engine ends when nobody has this any more and what was asked is done.
#[derive(Debug)]
pub(crate) struct ServedModel {
    pub(crate) source: ModelSource,
    pub(crate) parts: ServedParts,
    pub(crate) grammars: Grammars,
    /// Learned when it is first needed.
    shape: OnceLock<Shape>,
    way: Way,
    /// When it came, in seconds since 1970.
    since: u64,
}

impl ServedModel {
    /// What its answers are made of.
    pub(crate) fn shape(&self) -> &Shape {
        self.shape.get_or_init(|| Shape::learn(&self.parts))
    }

    /// The entry of `/v1/models`; the model takes `bytes` of memory.
    pub(crate) fn entry(&self, bytes: usize) -> Value {
        json!({
            "id": self.parts.name,
            "object": "model",
            "created": self.since,
            "owned_by": "cairn",
            "max_model_len": self.parts.max_context,
            "bytes": bytes,
        })
    }

    /// The way to its engine.
    pub(crate) fn driver(&self) -> Result<&Driver, ApiError> {
        match &self.way {
            Way::Generates(driver) => Ok(driver),
            Way::Embeds(_) => Err(ApiError::other_kind(&self.parts.name, EMBEDS)),
        }
    }

    /// The way to its vectors.
    pub(crate) fn embedder(&self) -> Result<&Embedder, ApiError> {
        match &self.way {
            Way::Embeds(embedder) => Ok(embedder),
            Way::Generates(_) => Err(ApiError::other_kind(&self.parts.name, GENERATES)),
        }
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

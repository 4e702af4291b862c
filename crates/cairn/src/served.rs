//! Models on their way to being served: opened, laid out within the memory there is for them, and only then read.

use std::path::PathBuf;

use cairn_engine::{Engine, EngineOptions, EnginePlan, MockModel};
use cairn_program::Sizes;
use cairn_serve::{
    Embed, EmbedForm, LoadedModel, Memory, ModelSource, ReasoningSplit, ServedParts,
};
use cairn_spec::model::MaskKind;
use clap::Args;

use crate::command::chat::{stop_tokens, template};
use crate::command::embed::settings;
use crate::command::generate::StorageArgs;
use crate::context::Context;
use crate::encoder::{Encoder, RUN_TOKENS, Wanted, plan, warn_of_bare_texts};
use crate::failure::UserError;
use crate::model_folder::{ModelArgs, ModelFolder};
use crate::pack_args::PackArgs;
use crate::pooling::{Pooling, normalize, pool};
use crate::sampling::stated;

/// Tokens of a prompt whose log-probabilities a step tells: few rows of logits, but enough that the weights
/// are not read for a handful of tokens.
const NUM_PROMPT_LOGITS: usize = 64;
/// Tokens of a sequence, where nothing is asked for and the model has room.
const MAX_MODEL_LEN: usize = 4096;
/// Texts that an encoder reads together, at most.
const RUN_TEXTS: usize = 64;
/// Bytes that made-up tokens take in a cache, each.
const MOCK_TOKEN_BYTES: usize = 16;

/// How each model is loaded.
#[derive(Clone, Debug, Args)]
pub(crate) struct EngineArgs {
    /// Tokens of prompt and answer together, at most [default: 4096, or the model's positions]
    #[arg(long, value_name = "N")]
    max_model_len: Option<usize>,
    /// Requests that run at a time, of each model
    #[arg(long, value_name = "N", default_value_t = 8)]
    max_num_seqs: usize,
    /// Requests that wait for a model, at most; one more is told to come back
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_num_waiting: usize,
    /// What of an encoder's hidden states is taken [default: what the model's files say]
    #[arg(long, value_enum)]
    pooling: Option<Pooling>,
    /// File with the chat template, in Jinja [default: the model's own]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// How what the model thinks is told from what it says: auto (the markers of its template or its tokens), off,
    /// or OPEN,CLOSE
    #[arg(long, value_name = "MARKERS", default_value = "auto", value_parser = reasoning_split)]
    reasoning_markers: ReasoningSplit,
    #[command(flatten)]
    storage: StorageArgs,
    #[command(flatten)]
    pack: PackArgs,
}

/// Reads how what is thought is told from what is said.
fn reasoning_split(text: &str) -> Result<ReasoningSplit, String> {
    match (text, text.split_once(',')) {
        ("auto", _) => Ok(ReasoningSplit::Learned),
        ("off", _) => Ok(ReasoningSplit::Off),
        (_, Some((open, close))) if !open.trim().is_empty() && !close.trim().is_empty() => {
            let [open, close] = [open, close].map(|marker| marker.trim().to_owned());
            Ok(ReasoningSplit::Markers { open, close })
        }
        _ => Err("neither auto, off nor two markers with a comma between them".to_owned()),
    }
}

/// An encoder that is served.
struct ServedEncoder {
    encoder: Encoder,
    pooling: Pooling,
    normalizes: bool,
    width: usize,
}

impl Embed for ServedEncoder {
    fn embed(&mut self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, String> {
        let run = self.encoder.run(texts, None);
        let mut rest = run.map_err(|error| format!("{error:#}"))?;
        let mut vectors = Vec::with_capacity(texts.len());
        for text in texts {
            let (hidden_td, after) = rest.split_at(text.len() * self.width);
            let mut vector = pool(hidden_td, self.width, self.pooling);
            if self.normalizes {
                normalize(&mut vector);
            }
            vectors.push(vector);
            rest = after;
        }
        Ok(vectors)
    }
}

/// Loads models to be served.
#[derive(Debug)]
pub(crate) struct ModelLoader {
    args: EngineArgs,
    /// Whether tokens are made up.
    mock: bool,
    context: Context,
}

impl ModelLoader {
    /// A loader that loads every model alike.
    pub(crate) fn new(args: EngineArgs, mock: bool, context: Context) -> Self {
        Self { args, mock, context }
    }

    /// Where a model comes from, which is called by its file or folder if it has no other name. A path or an
    /// adapter has to be there.
    pub(crate) fn source(
        name: Option<String>,
        path: Option<PathBuf>,
        adapter: Option<PathBuf>,
    ) -> anyhow::Result<ModelSource> {
        let (path, adapter) = match (path, adapter) {
            (Some(path), adapter) => (path, adapter),
            (None, adapter) => (crate::runs::model_folder(adapter.as_deref())?, None),
        };
        let own_name = || {
            let path = path.canonicalize().unwrap_or_else(|_| path.clone());
            // A folder may have dots in its name.
            let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
            name.unwrap_or_default().to_string_lossy().into_owned()
        };
        Ok(ModelSource { name: name.unwrap_or_else(own_name), path, adapter })
    }

    /// Loads a model, if it fits into the memory that is left.
    pub(crate) fn load(
        &self,
        source: &ModelSource,
        memory: &Memory,
    ) -> anyhow::Result<LoadedModel> {
        let Self { args, context, .. } = self;
        let opened = ModelArgs::of(Some(source.path.clone()), source.adapter.clone(), args.pack);
        let model = opened.open(context)?;
        if model.spec.attention.mask == MaskKind::Bidirectional {
            return self.load_encoder(source, &model, memory);
        }
        let limit = model.spec.context_limit();
        let max_context = args.max_model_len.unwrap_or_else(|| MAX_MODEL_LEN.min(limit));
        let mut planned = EngineOptions::new(args.max_num_seqs, max_context);
        planned.max_num_waiting = args.max_num_waiting;
        planned.max_num_prompt_logits = NUM_PROMPT_LOGITS;
        if self.mock {
            let bytes = planned.num_blocks * cairn_engine::BLOCK_TOKENS * MOCK_TOKEN_BYTES;
            let room = memory.take(bytes)?;
            let mock = MockModel::new(model.spec.vocab_size, planned.num_blocks);
            let engine = Engine::with_model(mock, planned)?;
            let parts = self.parts(source, &model, max_context)?;
            return Ok(LoadedModel::new(source.clone(), parts, engine, room));
        }
        let storage = args.storage.apply(&mut planned, (&model, context))?;
        planned.encoding = storage.encoding;
        let plan = EnginePlan::with_storage(&model.spec, planned, &model.adapters(), &storage.own)?;
        // Known before anything of it is read or allocated.
        let room = memory.take(plan.bytes().total())?;
        // Neither waits for the other.
        let (parts, engine) = std::thread::scope(|scope| {
            let parts = scope.spawn(|| self.parts(source, &model, max_context));
            let engine = context.cpu().map_err(Into::into).and_then(|cpu| model.load(plan, cpu));
            (parts.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), engine)
        });
        Ok(LoadedModel::new(source.clone(), parts?, engine?, room))
    }

    /// Loads an encoder, if it fits into the memory that is left.
    fn load_encoder(
        &self,
        source: &ModelSource,
        model: &ModelFolder,
        memory: &Memory,
    ) -> anyhow::Result<LoadedModel> {
        let Self { args, context, mock } = self;
        if *mock {
            return Err(UserError::new(format!("{} embeds", model.path.display()))
                .hint("--mock makes up tokens of models that generate")
                .into());
        }
        let (settings, pooling) = settings(model, args.pooling, context)?;
        let positions = model.spec.max_position_embeddings;
        let limit = settings.max_tokens.map_or(positions, |tokens| tokens.min(positions));
        let max_context = args.max_model_len.unwrap_or(limit).min(limit);
        let form = EmbedForm {
            prompt: settings.prompt,
            lower_case: settings.lower_case,
            width: model.spec.hidden_size,
            vocab_size: model.spec.vocab_size,
            max_run_tokens: RUN_TOKENS.max(max_context),
            max_run_texts: RUN_TEXTS,
        };
        let storage = args.storage.of_encoder(model, context)?;
        let sizes = Sizes::dense(form.max_run_tokens, form.max_run_texts);
        let planned = plan((model, &storage), sizes, Wanted::Hidden)?;
        // Known before anything of it is read or allocated.
        let room = memory.take(planned.0.bytes().total())?;
        let encoder = Encoder::planned(model, planned, context)?;
        let parts = self.parts(source, model, max_context)?;
        warn_of_bare_texts(model, &parts.tokenizer, context.terminal)?;
        let (width, normalizes) = (form.width, settings.normalize);
        let embed = ServedEncoder { encoder, pooling, normalizes, width };
        Ok(LoadedModel::embedding(source.clone(), parts, (Box::new(embed), form), room))
    }

    /// What turns the model's tokens into text.
    fn parts(
        &self,
        source: &ModelSource,
        model: &ModelFolder,
        max_context: usize,
    ) -> anyhow::Result<ServedParts> {
        let tokenizer = model.text_tokenizer()?;
        let config = model.tokenizer_config(&tokenizer)?;
        let file = self.args.chat_template.as_deref();
        // A model without a template only continues text.
        let has_template = file.is_some() || !config.chat_templates.is_empty();
        let template = has_template.then(|| template((file, None), &config, model)).transpose()?;
        let stated = stated(model, &self.context)?;
        let stop_tokens = stop_tokens(model, &stated, (&tokenizer, &config), template.as_ref());
        Ok(ServedParts {
            name: source.name.clone(),
            tokenizer,
            template,
            reasoning: self.args.reasoning_markers.clone(),
            special_tokens: config.special_tokens,
            stop_tokens,
            stated,
            max_context,
        })
    }
}

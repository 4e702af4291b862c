//! `cairn generate`: a prompt continued.

use std::mem::ManuallyDrop;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use cairn_artifacts::bounded::{TEXT_BYTES_MAX, read_text, text_of};
use cairn_data::stop_strings::StopStrings;
use cairn_data::tokenizer::{SpelledSpecials, TokenStream, Tokenizer};
use cairn_engine::{
    BeamParams, BeamRequest, Engine, EngineOptions, Finish, Request, SamplingFields, SamplingParams,
};
use cairn_kernels::{CacheType, Compute};
use cairn_spec::ModelSpec;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::compute_dtype::ComputeDtypeArgs;
use crate::context::Context;
use crate::failure::UserError;
use crate::figures::Count;
use crate::model_folder::{ModelArgs, ModelFolder};
use crate::sampling::{SamplingArgs, stated};
use crate::speculative::{SpeculativeArgs, summary};
use crate::storage::Storage;
use crate::weight_type::WeightTypeArgs;

const EXAMPLES: &str = "\
Examples:
  cairn generate --prompt 'fn main() {'
  cairn generate --prompt 'use std::' --temperature 0 --max-new-tokens 40
  echo 'impl Iterator for' | cairn generate --prompt-file - --top-p 0.9 --seed 7
  cairn generate --model DIR --prompt-file code.rs --speculative ngram
  cairn generate --model DIR --prompt-ids 5,6,7 --max-new-tokens 24 --temperature 0 --json";

/// New tokens, where nothing is asked for and the model has room.
const MAX_NEW_TOKENS: usize = 128;

/// Continue a prompt
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Tokens to add at most [default: 128, or what the model has room for]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Print one JSON object with `token_ids` (prompt and new) at the end
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    ending: EndingArgs,
    #[command(flatten)]
    beams: BeamArgs,
    #[command(flatten)]
    storage: StorageArgs,
    #[command(flatten)]
    speculative: SpeculativeArgs,
}

/// What to continue.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct PromptArgs {
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File with the text to continue; `-` is standard input
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue; no tokenizer is needed
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    prompt_ids: Vec<u32>,
}

/// When to end.
#[derive(Debug, Args)]
#[command(next_help_heading = "Ending")]
struct EndingArgs {
    /// End in front of this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// End after this token; may be repeated
    #[arg(long, value_name = "ID")]
    stop_token: Vec<u32>,
    /// Go on after the model's end-of-text token
    #[arg(long)]
    ignore_eos: bool,
}

impl EndingArgs {
    /// Refuses stop strings that could never end a text.
    fn check(&self, has_tokenizer: bool) -> Result<(), UserError> {
        if self.stop.iter().any(String::is_empty) {
            return Err(UserError::new("--stop is empty").hint("leave it out to go on to the end"));
        }
        if !self.stop.is_empty() && !has_tokenizer {
            return Err(UserError::new("--stop compares text, and this model has no tokenizer")
                .hint("end after a token id: --stop-token ID"));
        }
        Ok(())
    }
}

/// Beam search.
#[derive(Debug, Args)]
#[command(next_help_heading = "Beam search")]
struct BeamArgs {
    /// Search with N beams instead of sampling
    #[arg(long, value_name = "N", conflicts_with_all = [
        "stop", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "seed", "speculative",
    ])]
    beams: Option<usize>,
    /// Exponent of the length that scores are divided by
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        requires = "beams",
        allow_hyphen_values = true
    )]
    length_penalty: f32,
}

/// How the model is held.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Storage")]
pub(crate) struct StorageArgs {
    #[command(flatten)]
    weights: WeightTypeArgs,
    #[command(flatten)]
    compute: ComputeDtypeArgs,
    /// Type of cached keys and values
    #[arg(
        long,
        value_enum,
        value_name = "TYPE",
        visible_alias = "cache",
        default_value_t = CachedType::F32
    )]
    kv_cache_dtype: CachedType,
    /// Tokens of one run of the model at most: longer prompts are read in pieces; any number gives
    /// the same tokens [default: 512]
    #[arg(long, value_name = "N")]
    max_num_batched_tokens: Option<usize>,
}

impl StorageArgs {
    /// Sets what was asked for; returns how the weights are held.
    pub(crate) fn apply(
        &self,
        options: &mut EngineOptions,
        (model, context): (&ModelFolder, &Context),
    ) -> anyhow::Result<Storage> {
        options.compute = self.compute.compute();
        let storage = self.weights.dtype.storage(model, options.compute, context)?;
        options.cache_type = self.kv_cache_dtype.cache_type();
        if let Some(most) = self.max_num_batched_tokens {
            options.max_num_batched_tokens = most;
        }
        Ok(storage)
    }

    /// How the weights of an encoder are held, which computes in f32 and caches nothing.
    pub(crate) fn of_encoder(
        &self,
        model: &ModelFolder,
        context: &Context,
    ) -> anyhow::Result<Storage> {
        if self.compute.compute() != Compute::F32 {
            return Err(UserError::new("an encoder computes in f32")
                .hint("leave --compute-dtype out")
                .into());
        }
        self.weights.dtype.storage(model, Compute::F32, context)
    }
}

/// How keys and values are cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CachedType {
    /// 32-bit floats.
    F32,
    /// The high half of 32-bit floats.
    Bf16,
    /// Signed bytes, a factor for each key and each value.
    Q8,
}

impl CachedType {
    /// The engine's name for it.
    pub(crate) fn cache_type(self) -> CacheType {
        match self {
            Self::F32 => CacheType::F32,
            Self::Bf16 => CacheType::Bf16,
            Self::Q8 => CacheType::Q8,
        }
    }
}

/// Tokens that may stand around a text.
const TOKENS_AROUND: usize = 2;
/// Longest text, in tokens of a byte each, that the cache is reserved for before it is cut.
const UNCUT_TOKENS_MAX: usize = 1024;

/// Generates and prints.
pub(crate) fn run(args: &GenerateArgs, context: &Context) -> anyhow::Result<()> {
    let model = args.model.open(context)?;
    let stated = stated(&model, context)?;
    let text = args.prompt.text()?;
    let named = (&model, text.as_deref());
    let Loaded { tokenizer, engine: loaded } = load(args, named, stated.max_new_tokens, context)?;
    // The process ends with it, and a hundred thousand strings are quicker not freed.
    let tokenizer = ManuallyDrop::new(tokenizer);
    args.ending.check(tokenizer.is_some())?;
    let prompt = Prompt::new((&args.prompt, text), &model, tokenizer.as_ref())?;
    let stops = stops(&args.ending, &model, (&stated.eos_token_ids, tokenizer.as_ref()));
    let max_new_tokens = args.room(&model, prompt.ids.len(), stated.max_new_tokens)?;
    let max_context = prompt.ids.len() + max_new_tokens;
    let mut engine = match loaded {
        Some((engine, room)) if room >= max_context => engine,
        _ => engine(args, &model, max_context, context)?,
    };
    if let Some(num_beams) = args.beams.beams {
        if stated.repetition_penalty.is_some() || stated.no_repeat_ngram_size.is_some() {
            context.terminal.warn(format_args!(
                "beam search takes no penalty of generation_config.json; ignored"
            ));
        }
        let mut beams = BeamParams::new(num_beams);
        beams.length_penalty = args.beams.length_penalty;
        let request =
            BeamRequest { prompt: prompt.ids.clone(), beams, max_new_tokens, stop_tokens: stops };
        return search(args, &mut engine, &request, (&prompt, tokenizer.as_ref()), context);
    }
    let sampling = SamplingParams::new(args.sampling.resolve(&stated, context))?;
    let mut request = Request::new(prompt.ids.clone(), sampling, max_new_tokens);
    request.stop_tokens = stops;
    let form = Form { json: args.json, stops: &args.ending.stop };
    sample(form, &mut engine, request, (&prompt, tokenizer.as_ref()), context)
}

/// What a prompt needs.
struct Loaded {
    tokenizer: Option<Tokenizer>,
    /// With the tokens that it has room for.
    engine: Option<(Engine, usize)>,
}

/// The tokenizer, and the engine of a pack with the tokens that it has room for: neither waits for the
/// other, so a text counts as one token a byte until it can be cut.
fn load(
    args: &GenerateArgs,
    (model, text): (&ModelFolder, Option<&str>),
    stated: Option<usize>,
    context: &Context,
) -> anyhow::Result<Loaded> {
    let bound = text.map_or(args.prompt.prompt_ids.len(), |text| text.len() + TOKENS_AROUND);
    let is_short = text.is_none() || bound <= UNCUT_TOKENS_MAX;
    // A prompt without room is told as such once its tokens are counted.
    let room = args.room(model, bound, stated).ok();
    let Some(room) = room.filter(|_| is_short && model.pack().is_some()) else {
        return Ok(Loaded { tokenizer: model.tokenizer()?, engine: None });
    };
    std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| model.tokenizer());
        let engine = engine(args, model, bound + room, context);
        let tokenizer = tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(Loaded { tokenizer: tokenizer?, engine: Some((engine?, bound + room)) })
    })
}

/// Continues a text with a trained model and prints it as it comes: how `quickstart` shows off.
pub(crate) fn show_off(
    model: &ModelFolder,
    text: &str,
    max_new_tokens: usize,
    context: &Context,
) -> anyhow::Result<()> {
    let tokenizer = model.text_tokenizer()?;
    let ids = tokenizer.encode(text)?;
    let room = model.spec.context_limit().saturating_sub(ids.len()).max(1);
    let max_new_tokens = max_new_tokens.min(room);
    let options = EngineOptions::new(1, ids.len() + max_new_tokens);
    let storage = Storage::uniform(options.encoding);
    let mut engine = model.engine(options, &storage, context.cpu()?)?;
    let fields =
        SamplingFields { temperature: 0.7, top_p: Some(0.95), ..SamplingFields::default() };
    let mut request = Request::new(ids.clone(), SamplingParams::new(fields)?, max_new_tokens);
    request.stop_tokens.extend(tokenizer.end_of_document());
    let prompt = Prompt { ids, text: Some(text.to_owned()) };
    let form = Form { json: false, stops: &[] };
    sample(form, &mut engine, request, (&prompt, Some(&tokenizer)), context)
}

/// How an output is printed and where its text ends.
#[derive(Clone, Copy, Debug)]
struct Form<'a> {
    json: bool,
    stops: &'a [String],
}

impl GenerateArgs {
    /// New tokens that are asked for and that the model has room for.
    fn room(
        &self,
        model: &ModelFolder,
        prompt_tokens: usize,
        stated: Option<usize>,
    ) -> anyhow::Result<usize> {
        let positions = model.spec.context_limit();
        let room = positions.saturating_sub(prompt_tokens);
        let too_long = |what: String| {
            let error = UserError::new(format!("{what}, but {}", limit(&model.spec)));
            Err(error
                .hint(match room {
                    0 => format!("shorten the prompt to fewer than {positions} tokens"),
                    room => format!("ask for at most {room} new tokens"),
                })
                .into())
        };
        match self.max_new_tokens {
            _ if room == 0 => too_long(format!("the prompt has {prompt_tokens} tokens")),
            Some(asked) if asked > room => too_long(format!(
                "{prompt_tokens} prompt tokens and {asked} new ones are asked for"
            )),
            Some(asked) => Ok(asked),
            None => Ok(stated.unwrap_or(MAX_NEW_TOKENS).min(room)),
        }
    }
}

/// How long a text may become, and why.
fn limit(spec: &ModelSpec) -> String {
    let (limit, positions) = (spec.context_limit(), spec.max_position_embeddings);
    if limit == positions {
        return format!("the model has {positions} positions");
    }
    format!(
        "beyond {limit} of its {positions} positions the model rotates by other frequencies, and what \
         was cached before would be wrong"
    )
}

impl PromptArgs {
    /// The text to continue; `None` where token ids are given.
    fn text(&self) -> anyhow::Result<Option<String>> {
        Ok(match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => Some(text.clone()),
            (None, Some(path)) if path.as_os_str() == "-" => Some(
                text_of(std::io::stdin().lock(), TEXT_BYTES_MAX)
                    .context("cannot read a prompt from standard input")?,
            ),
            (None, Some(path)) => Some(read_text(path, TEXT_BYTES_MAX)?),
            (None, None) => None,
        })
    }
}

/// The prompt as ids, and as the text it was given as.
struct Prompt {
    ids: Vec<u32>,
    text: Option<String>,
}

impl Prompt {
    fn new(
        (args, text): (&PromptArgs, Option<String>),
        model: &ModelFolder,
        tokenizer: Option<&Tokenizer>,
    ) -> anyhow::Result<Self> {
        let Some(text) = text else {
            return Ok(Self { ids: args.prompt_ids.clone(), text: None });
        };
        let tokenizer = tokenizer.ok_or_else(|| {
            model.no_tokenizer().hint("or continue token ids: cairn generate --prompt-ids 5,6,7")
        })?;
        let mut ids = tokenizer.encode_for_model(&text, SpelledSpecials::Text)?;
        if ids.is_empty() {
            // An empty prompt means a new document.
            ids.extend(tokenizer.end_of_document());
        }
        Ok(Self { ids, text: Some(text) })
    }
}

/// Tokens that end the output: the model's own, the tokenizer's end of document, and those asked
/// for. An id outside the vocabulary, which small models inherit from large ones, never comes.
fn stops(
    args: &EndingArgs,
    model: &ModelFolder,
    (stated, tokenizer): (&[u32], Option<&Tokenizer>),
) -> Vec<u32> {
    let mut stops = args.stop_token.clone();
    if !args.ignore_eos {
        let own = model.spec.tokens.eos.iter().chain(stated).copied();
        let end = tokenizer.and_then(Tokenizer::end_of_document);
        let vocab_size = model.spec.vocab_size;
        stops.extend(own.chain(end).filter(|&id| (id as usize) < vocab_size));
    }
    stops
}

fn engine(
    args: &GenerateArgs,
    model: &ModelFolder,
    max_context: usize,
    context: &Context,
) -> anyhow::Result<Engine> {
    let mut options = EngineOptions::new(args.beams.beams.unwrap_or(1).max(1), max_context);
    let storage = args.storage.apply(&mut options, (model, context))?;
    args.speculative.apply(&mut options);
    let mut engine = model.engine(options, &storage, context.cpu()?)?;
    args.speculative.attach(&mut engine, context)?;
    Ok(engine)
}

/// Samples, printing the text as it comes.
fn sample(
    form: Form<'_>,
    engine: &mut Engine,
    request: Request,
    (prompt, tokenizer): (&Prompt, Option<&Tokenizer>),
    context: &Context,
) -> anyhow::Result<()> {
    let streams = !form.json;
    let mut writer = TextWriter::new((prompt, tokenizer), form.stops, streams, context);
    let begin = Instant::now();
    let mut failure = None;
    let output = engine.generate(request, &mut |token| match writer.push(token) {
        Ok(false) => ControlFlow::Continue(()),
        Ok(true) => ControlFlow::Break(()),
        Err(error) => {
            failure = Some(error);
            ControlFlow::Break(())
        }
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    let seconds = begin.elapsed().as_secs_f64();
    let stopped = writer.stopped();
    let text = writer.finish()?;
    let finish = if stopped { Finish::Stop } else { output.finish };
    let count = output.tokens.len();
    if form.json {
        let object = json!({
            "token_ids": joined(&prompt.ids, &output.tokens),
            "num_prompt_tokens": prompt.ids.len(),
            "num_new_tokens": count,
            "text": text,
            "finish": finish,
            "seconds": seconds,
            "speculation": engine.speculation(),
        });
        return context.terminal.print(object);
    }
    let rate = Count(count as f64 / seconds);
    context.terminal.step("Generated", format_args!("{count} tokens, {rate} tokens/s"));
    if let Some(summary) = summary(engine.speculation().as_ref()) {
        context.terminal.step("Guessed", summary);
    }
    Ok(())
}

/// Searches with beams and prints the best.
fn search(
    args: &GenerateArgs,
    engine: &mut Engine,
    request: &BeamRequest,
    (prompt, tokenizer): (&Prompt, Option<&Tokenizer>),
    context: &Context,
) -> anyhow::Result<()> {
    let found = engine.beam_search(request)?;
    let best = found.first().context("the search found nothing")?;
    let text = tokenizer.map(|tokenizer| tokenizer.decode(&best.tokens)).transpose()?;
    if args.json {
        let object = json!({
            "token_ids": joined(&prompt.ids, &best.tokens),
            "num_prompt_tokens": prompt.ids.len(),
            "num_new_tokens": best.tokens.len(),
            "text": text,
            "score": best.score,
        });
        return context.terminal.print(object);
    }
    let shown = match (&prompt.text, text) {
        (Some(before), Some(text)) => format!("{before}{text}"),
        _ => spelled(&joined(&prompt.ids, &best.tokens)),
    };
    context.terminal.print(shown)
}

fn joined(prompt: &[u32], new: &[u32]) -> Vec<u32> {
    [prompt, new].concat()
}

fn spelled(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// Turns tokens into printed text, or into printed ids where there is no tokenizer.
struct TextWriter<'a> {
    context: &'a Context,
    prints: bool,
    /// The prompt as it is shown, until the first token comes: a refused request shows nothing.
    prompt: Option<String>,
    stream: Option<TokenStream<'a>>,
    stops: StopStrings,
    /// The text so far, without the prompt's.
    text: String,
}

impl<'a> TextWriter<'a> {
    fn new(
        (prompt, tokenizer): (&Prompt, Option<&'a Tokenizer>),
        stops: &[String],
        prints: bool,
        context: &'a Context,
    ) -> Self {
        let shown = prompt.text.clone().unwrap_or_else(|| spelled(&prompt.ids));
        Self {
            context,
            prints,
            prompt: prints.then_some(shown),
            stream: tokenizer.map(Tokenizer::stream),
            stops: StopStrings::new(stops.to_vec()),
            text: String::new(),
        }
    }

    fn stopped(&self) -> bool {
        self.stops.stopped()
    }

    /// Takes a token; whether a stop string has come.
    fn push(&mut self, token: u32) -> anyhow::Result<bool> {
        if let Some(prompt) = self.prompt.take() {
            self.context.terminal.print_piece(&prompt)?;
        }
        let piece = match &mut self.stream {
            Some(stream) => self.stops.push(&stream.push(token)?),
            None => format!(",{token}"),
        };
        self.emit(&piece)?;
        Ok(self.stops.stopped())
    }

    fn emit(&mut self, piece: &str) -> anyhow::Result<()> {
        self.text += piece;
        if self.prints { self.context.terminal.print_piece(piece) } else { Ok(()) }
    }

    /// Ends the text; returns it where there is a tokenizer.
    fn finish(mut self) -> anyhow::Result<Value> {
        let has_text = self.stream.is_some();
        let rest = self.stream.take().map(TokenStream::finish).transpose()?.unwrap_or_default();
        let certain = self.stops.push(&rest);
        self.emit(&certain)?;
        let stops = std::mem::take(&mut self.stops);
        self.emit(&stops.finish())?;
        if self.prints {
            self.context.terminal.print_piece("\n")?;
        }
        Ok(if has_text { self.text.into() } else { Value::Null })
    }
}

//! `cairn serve`: a model behind HTTP.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use cairn_artifacts::bounded::{TEXT_BYTES_MAX, read_text};
use cairn_engine::EngineOptions;
use cairn_serve::{ApiKeys, ReasoningSplit, ServeOptions, ServedModel, ServedParts, serve};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use tracing_subscriber::filter::LevelFilter;

use crate::command::chat::{refuse_encoder, stop_tokens, template};
use crate::command::generate::StorageArgs;
use crate::context::Context;
use crate::log_lines::LogLines;
use crate::model_folder::{ModelArgs, ModelFolder};
use crate::outside::unix_seconds;
use crate::sampling::stated;
use crate::signals::StopFlag;

const EXAMPLES: &str = "\
Examples:
  cairn serve --model model.leanpack
  cairn serve --model DIR --port 8080 --max-num-seqs 16 --max-model-len 2048
  cairn serve --model DIR --host 0.0.0.0 --api-keys keys.txt
  curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\": \"fn main() {\"}'";

/// How lines of the log are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// What the log tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    /// Nothing
    Off,
    /// Requests that failed for a reason of the server's own
    Error,
    /// And each request: its number, path, status, tokens and seconds, and never what was said
    Info,
}

/// Names under which metrics are told beside the own ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MetricsCompat {
    /// Those of vLLM
    Vllm,
}

/// Tokens of a prompt whose log-probabilities a step tells: few rows of logits, but enough that the weights
/// are not read for a handful of tokens.
const NUM_PROMPT_LOGITS: usize = 64;
/// Tokens of a sequence, where nothing is asked for and the model has room.
const MAX_MODEL_LEN: usize = 4096;

/// Serve a model over HTTP: completions, chats, responses and messages
///
/// A field of a request is honored or refused by name. The first Ctrl-C or SIGTERM ends the server in good
/// order: nothing new is taken, what runs comes to its end; the second ends it at once.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen at; one that other machines reach asks for --api-keys
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen at; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8000)]
    port: u16,
    /// File of the keys of those who may ask, one a line
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// What clients call the model [default: the name of its folder or file]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Tokens of prompt and answer together, at most [default: 4096, or the model's positions]
    #[arg(long, value_name = "N")]
    max_model_len: Option<usize>,
    /// Requests that run at a time
    #[arg(long, value_name = "N", default_value_t = 8)]
    max_num_seqs: usize,
    /// Requests that wait, at most; one more is told to come back
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_num_waiting: usize,
    #[command(flatten)]
    limits: LimitArgs,
    /// How lines of the log are written, on the standard error
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
    /// What the log tells
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LogLevel,
    /// Tell metrics under these names as well
    #[arg(long, value_name = "NAMES")]
    metrics_compat: Option<MetricsCompat>,
    /// File with the chat template, in Jinja [default: the model's own]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// How what the model thinks is told from what it says: auto (the markers of its template or its tokens), off,
    /// or OPEN,CLOSE
    #[arg(long, value_name = "MARKERS", default_value = "auto", value_parser = reasoning_split)]
    reasoning_markers: ReasoningSplit,
    #[command(flatten)]
    storage: StorageArgs,
    /// Keys the randomness of requests without a seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// What clients may take.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = 2 << 20)]
    max_body_bytes: usize,
    /// Bytes of all bodies together that are being taken
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 20)]
    max_bodies_bytes: usize,
    /// Connections at a time; further ones wait
    #[arg(long, value_name = "N", default_value_t = 1024,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    max_connections: usize,
    /// Seconds for a request's head
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = seconds_range())]
    header_timeout: u64,
    /// Seconds for a request's body
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = seconds_range())]
    body_timeout: u64,
    /// Seconds that a client may leave an answer unread
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = seconds_range())]
    write_timeout: u64,
    /// Seconds that running requests have once the server is to end
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = seconds_range())]
    drain_timeout: u64,
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

/// A second to a day.
fn seconds_range() -> RangedU64ValueParser<u64> {
    RangedU64ValueParser::new().range(1..=86_400)
}

/// Loads the model and serves it.
pub(crate) fn run(args: &ServeArgs, context: &Context) -> anyhow::Result<()> {
    let model = args.model.open(context)?;
    refuse_encoder(&model)?;
    let keys = match &args.api_keys {
        Some(path) => ApiKeys::parse(&read_text(path, TEXT_BYTES_MAX)?, path)?,
        None => ApiKeys::default(),
    };
    let seconds = Duration::from_secs;
    let options = ServeOptions {
        address: SocketAddr::new(args.host, args.port),
        keys,
        max_body_bytes: args.limits.max_body_bytes,
        max_bodies_bytes: args.limits.max_bodies_bytes,
        max_connections: args.limits.max_connections,
        header_timeout: seconds(args.limits.header_timeout),
        body_timeout: seconds(args.limits.body_timeout),
        write_timeout: seconds(args.limits.write_timeout),
        drain_timeout: seconds(args.limits.drain_timeout),
        has_vllm_metrics: args.metrics_compat == Some(MetricsCompat::Vllm),
        seed: args.seed,
        now: unix_seconds,
    };
    // Whoever may not listen there is told before the model is loaded.
    options.check()?;
    let max_context =
        args.max_model_len.unwrap_or_else(|| MAX_MODEL_LEN.min(model.spec.context_limit()));
    let mut planned = EngineOptions::new(args.max_num_seqs, max_context);
    planned.max_num_waiting = args.max_num_waiting;
    planned.max_num_prompt_logits = NUM_PROMPT_LOGITS;
    let storage = args.storage.apply(&mut planned, (&model, context))?;
    let served = ServedModel::new(parts(args, &model, max_context, context)?);
    let engine = model.engine(planned, &storage, context.cpu()?)?;
    start_log(args.log_format, args.log_level).context("cannot start the log")?;
    let stop = StopFlag::listen()?;
    let listening = |address| context.terminal.step("Serving", format_args!("http://{address}"));
    Ok(serve(engine, served, &options, || stop.is_set(), listening)?)
}

/// Writes what is told from here on to the standard error. A line that cannot be written is lost: what is served
/// does not hang on it.
fn start_log(format: LogFormat, level: LogLevel) -> std::io::Result<()> {
    let level = match level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Info => LevelFilter::INFO,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_writer(LogLines::start()?)
        .log_internal_errors(false);
    match format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    Ok(())
}

/// What turns the model's tokens into text.
fn parts(
    args: &ServeArgs,
    model: &ModelFolder,
    max_context: usize,
    context: &Context,
) -> anyhow::Result<ServedParts> {
    let tokenizer = model.text_tokenizer()?;
    let config = model.tokenizer_config(&tokenizer)?;
    let file = args.chat_template.as_deref();
    // A model without a template only continues text.
    let has_template = file.is_some() || !config.chat_templates.is_empty();
    let template = has_template.then(|| template((file, None), &config, model)).transpose()?;
    let stated = stated(model, context)?;
    let stop_tokens = stop_tokens(model, &stated, (&tokenizer, &config), template.as_ref());
    let own_name = || {
        let path = model.path.canonicalize().unwrap_or_else(|_| model.path.clone());
        // A folder may have dots in its name.
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        name.unwrap_or_default().to_string_lossy().into_owned()
    };
    Ok(ServedParts {
        name: args.served_model_name.clone().unwrap_or_else(own_name),
        tokenizer,
        template,
        reasoning: args.reasoning_markers.clone(),
        special_tokens: config.special_tokens,
        stop_tokens,
        stated,
        max_context,
    })
}

//! `cairn serve`: a model behind HTTP.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use cairn_artifacts::FileError;
use cairn_artifacts::bounded::{TEXT_BYTES_MAX, read_text};
use cairn_serve::{ApiKeys, Memory, ModelSource, NoRoom, ServeOptions, Stock, Tls, serve};
use cairn_spec::units::ByteSize;
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use tracing_subscriber::filter::LevelFilter;

use crate::context::Context;
use crate::failure::UserError;
use crate::log_lines::LogLines;
use crate::outside::unix_seconds;
use crate::served::{EngineArgs, ModelLoader};
use crate::signals::StopFlag;

const EXAMPLES: &str = "\
Examples:
  cairn serve model.leanpack
  cairn serve DIR --port 8080 --max-num-seqs 16 --max-model-len 2048
  cairn serve small=A.leanpack large=B.leanpack --memory 8GiB --models-dir models
  cairn serve DIR --host 0.0.0.0 --api-keys keys.toml --tls-cert cert.pem --tls-key key.pem
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

/// Serve models over HTTP: completions, chats, responses and messages
///
/// A field of a request is honored or refused by name. The first Ctrl-C or SIGTERM ends the server in good
/// order: nothing new is taken, what runs comes to its end; the second ends it at once.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ServeArgs {
    /// Models to serve, each a folder of a model or a run, a GGUF file or a leanpack, with a name for clients or
    /// that of its folder or file; the first answers requests that name none [default: the last run]
    #[arg(value_name = "[NAME=]MODEL", conflicts_with = "model")]
    models: Vec<String>,
    /// One model to serve
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of a low-rank adapter, as PEFT saves it, served as a model NAME of its own beside the weights of the
    /// first model; without a name, used beside them in that model itself; may be repeated
    #[arg(long, value_name = "[NAME=]DIR")]
    adapter: Vec<String>,
    /// What clients call the first model [default: the name of its folder or file]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Serve made-up tokens instead of the models', to measure all that is around them
    #[arg(long)]
    mock: bool,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    stock: StockArgs,
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
    #[command(flatten)]
    engine: EngineArgs,
    /// Keys the randomness of requests without a seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Where clients come, and who they may be.
#[derive(Debug, Args)]
#[command(next_help_heading = "Address")]
struct ListenArgs {
    /// Address to listen at; one that other machines reach asks for --api-keys
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen at; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8000)]
    port: u16,
    /// File of the keys of those who may ask: one a line, or in TOML with a name, scopes and tokens a minute each
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// File of the certificate to encrypt connections with, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// File of the certificate's private key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// Models that come and go.
#[derive(Debug, Args)]
#[command(next_help_heading = "Several models")]
struct StockArgs {
    /// Folder of models and adapters that may be loaded while the server runs, by keys with the scope admin
    #[arg(long, value_name = "DIR")]
    models_dir: Option<PathBuf>,
    /// Bytes for all models together, such as 8GiB: weights, caches and working memory; one that does not fit is
    /// not loaded
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
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

/// A second to a day.
fn seconds_range() -> RangedU64ValueParser<u64> {
    RangedU64ValueParser::new().range(1..=86_400)
}

/// Loads the models and serves them.
pub(crate) fn run(args: &ServeArgs, context: &Context) -> anyhow::Result<()> {
    let options = args.options()?;
    // Whoever may not listen there is told before a model is loaded.
    options.check()?;
    if options.is_readable() {
        context.terminal.warn(format_args!(
            "keys and answers travel to {} unencrypted: --tls-cert and --tls-key encrypt them",
            options.address
        ));
    }
    let loader = ModelLoader::new(args.engine.clone(), args.mock, context.clone());
    let memory = args.stock.memory.map(|ByteSize(bytes)| usize::try_from(bytes)).transpose()?;
    let memory = Memory::new(memory);
    let sources = args.sources()?;
    let models = sources.iter().map(|source| loader.load(source, &memory));
    let models = models.collect::<anyhow::Result<Vec<_>>>()?;
    start_log(args.log_format, args.log_level).context("cannot start the log")?;
    let stop = StopFlag::listen()?;
    let scheme = if options.tls.is_some() { "https" } else { "http" };
    let listening =
        |address| context.terminal.step("Serving", format_args!("{scheme}://{address}"));
    let loader = Box::new(move |source: &ModelSource, memory: &Memory| {
        let loaded = loader.load(source, memory);
        // Told apart from what is wrong with a model.
        loaded.map_err(|error| match error.downcast::<NoRoom>() {
            Ok(no_room) => no_room.into(),
            Err(error) => error.into(),
        })
    });
    let stock = Stock { memory, models, loader };
    Ok(serve(stock, &options, || stop.is_set(), listening)?)
}

impl ServeArgs {
    fn options(&self) -> anyhow::Result<ServeOptions> {
        let ListenArgs { host, port, api_keys, tls_cert, tls_key } = &self.listen;
        let keys = api_keys.as_deref().map(read_keys).transpose()?.unwrap_or_default();
        let tls = match (tls_cert, tls_key) {
            (Some(cert), Some(key)) => {
                let texts = (read_text(cert, TEXT_BYTES_MAX)?, read_text(key, TEXT_BYTES_MAX)?);
                Some(Tls::from_pem((texts.0.as_bytes(), cert), (texts.1.as_bytes(), key))?)
            }
            _ => None,
        };
        let models_folder = self
            .stock
            .models_dir
            .as_ref()
            .map(|folder| folder.canonicalize().map_err(FileError::on("open", folder)));
        let seconds = Duration::from_secs;
        Ok(ServeOptions {
            address: SocketAddr::new(*host, *port),
            keys,
            tls,
            models_folder: models_folder.transpose()?,
            max_body_bytes: self.limits.max_body_bytes,
            max_bodies_bytes: self.limits.max_bodies_bytes,
            max_connections: self.limits.max_connections,
            header_timeout: seconds(self.limits.header_timeout),
            body_timeout: seconds(self.limits.body_timeout),
            write_timeout: seconds(self.limits.write_timeout),
            drain_timeout: seconds(self.limits.drain_timeout),
            has_vllm_metrics: self.metrics_compat == Some(MetricsCompat::Vllm),
            seed: self.seed,
            now: unix_seconds,
            version: env!("CARGO_PKG_VERSION"),
        })
    }

    /// What is served from the beginning.
    fn sources(&self) -> anyhow::Result<Vec<ModelSource>> {
        let models: Vec<_> = self.models.iter().map(|text| named(text)).collect();
        let adapters: Vec<_> = self.adapter.iter().map(|text| named(text)).collect();
        let own: Vec<_> = adapters.iter().filter(|(name, _)| name.is_none()).collect();
        let within = match own.as_slice() {
            [] => None,
            [(_, path)] => Some(path.clone()),
            _ => {
                return Err(UserError::new("several adapters have no name")
                    .hint("a model is used with one; serve others by name: --adapter NAME=DIR")
                    .into());
            }
        };
        let mut sources = Vec::new();
        if models.is_empty() {
            let path = match (&self.model, &within) {
                (Some(path), _) => Some(path.clone()),
                // An adapter names its model.
                (None, Some(_)) => None,
                (None, None) => Some(crate::runs::model_folder(None)?),
            };
            sources.push(ModelLoader::source(None, path, within)?);
        } else {
            let mut within = within;
            for (name, path) in models {
                sources.push(ModelLoader::source(name, Some(path), within.take())?);
            }
        }
        if let Some(name) = &self.served_model_name {
            sources[0].name.clone_from(name);
        }
        for (name, path) in adapters {
            let Some(name) = name else { continue };
            let base = sources[0].path.clone();
            sources.push(ModelSource { name, path: base, adapter: Some(path) });
        }
        for (index, source) in sources.iter().enumerate() {
            if sources[..index].iter().any(|other| other.name == source.name) {
                return Err(UserError::new(format!("two models are called '{}'", source.name))
                    .hint("name one of them otherwise: NAME=MODEL")
                    .into());
            }
        }
        Ok(sources)
    }
}

/// A path with a name in front of it, or without.
fn named(text: &str) -> (Option<String>, PathBuf) {
    match text.split_once('=') {
        Some((name, path))
            if !name.is_empty() && !name.contains('/') && !Path::new(text).exists() =>
        {
            (Some(name.to_owned()), path.into())
        }
        _ => (None, text.into()),
    }
}

fn read_keys(path: &Path) -> anyhow::Result<ApiKeys> {
    let text = read_text(path, TEXT_BYTES_MAX)?;
    Ok(match path.extension().is_some_and(|extension| extension == "toml") {
        true => ApiKeys::parse_toml(&text, path)?,
        false => ApiKeys::parse(&text, path)?,
    })
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

//! `cairn eval`: did it learn? Bits per byte beside general compressors.

use std::path::{Path, PathBuf};

use cairn_data::corpus::{Corpus, Split};
use cairn_eval::COMPARED_BYTES_MAX;
use cairn_spec::units::ByteSize;
use clap::{Args, ValueEnum};

use crate::compute_dtype::ComputeDtypeArgs;
use crate::context::Context;
use crate::evaluation::{
    Measurement, comparison_text, corpus_of, measure, recipe_of, run_of, save_record, settings,
};
use crate::failure::UserError;
use crate::model_folder::{ModelArgs, ModelFolder, ModelWeights};
use crate::signals::StopFlag;
use crate::weight_type::WeightTypeArgs;

const EXAMPLES: &str = "\
The model reads each document as its own context; ends of documents cost bits and add no bytes.
Compressors get each document alone, and all of them as one file.

Examples:
  cairn eval
  cairn eval --model runs/quickstart --max-bytes 1MB
  cairn eval --model runs/quickstart --corpus data/notes --stride 64 --json";

/// Measure a model on held-out text, beside gzip, xz and zstd
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Corpus made with the model's tokenizer [default: the one the run learned from]
    #[arg(long, value_name = "DIR")]
    corpus: Option<PathBuf>,
    /// Side of the corpus
    #[arg(long, value_enum, default_value_t = Side::Validation)]
    split: Side,
    /// Text at most, about: `4MB`, `512KiB`
    #[arg(long, value_name = "BYTES", default_value_t = ByteSize(COMPARED_BYTES_MAX))]
    max_bytes: ByteSize,
    /// Tokens the model sees at once [default: what the run trained on, else the model's positions]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens from one window of a long document to the next; fewer give the model more to go on
    /// and take longer [default: the window's length]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    #[command(flatten)]
    weights: WeightTypeArgs,
    #[command(flatten)]
    compute: ComputeDtypeArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Side {
    Train,
    Validation,
}

/// Measures and prints.
pub(crate) fn run(args: &EvalArgs, context: &Context) -> anyhow::Result<()> {
    if args.max_bytes.0 == 0 {
        return Err(UserError::new("--max-bytes is 0, so there is nothing to measure on").into());
    }
    let stop = StopFlag::listen()?;
    let model = args.model.open(context)?;
    let run = run_of(model.used());
    let folder = match (&args.corpus, &run) {
        (Some(folder), _) => folder.clone(),
        (None, Some(run)) => PathBuf::from(corpus_of(run)?),
        (None, None) => {
            let message = format!("{} is no run's, so it has no corpus", model.path.display());
            return Err(UserError::new(message).hint("name one with --corpus DIR").into());
        }
    };
    let corpus = Corpus::open(&folder)?;
    check_tokenizer(&model, &corpus, &folder, context)?;
    let how = Measurement {
        split: match args.split {
            Side::Train => Split::Train,
            Side::Validation => Split::Validation,
        },
        max_bytes: args.max_bytes.0,
        context: match (args.context, &run) {
            (None, Some(run)) => recipe_of(run)?.data.seq_len,
            (asked, _) => asked,
        },
        stride: args.stride,
        dtype: args.weights.dtype,
        compute: args.compute.compute(),
    };
    context
        .terminal
        .step("Evaluating", format_args!("{} on {}", model.used().display(), folder.display()));
    let comparison = measure(&model, &corpus, &how, (context, &stop))?;
    if let Some(run) = &run {
        save_record(run, &corpus, &comparison, settings(model.used(), &how))?;
    }
    if args.json {
        return context.terminal.print(serde_json::to_string_pretty(&comparison)?);
    }
    context.terminal.print(comparison_text(&comparison))
}

/// Ids of another tokenizer would give figures without meaning.
fn check_tokenizer(
    model: &ModelFolder,
    corpus: &Corpus,
    folder: &Path,
    context: &Context,
) -> anyhow::Result<()> {
    let (path, folder) = (model.path.display(), folder.display());
    let made_with = &corpus.manifest().tokenizer;
    let build = format!(
        "build one with the model's: cairn corpus build --tokenizer {path}/tokenizer.json \
         --output DIR"
    );
    if made_with.vocab_size as usize > model.spec.vocab_size {
        return Err(UserError::new(format!(
            "{folder} has {} tokens in its vocabulary, {path} knows {}",
            made_with.vocab_size, model.spec.vocab_size
        ))
        .hint(build)
        .into());
    }
    let expected = made_with.file.blake3;
    match model.tokenizer()? {
        None => context.terminal.warn(format_args!(
            "{path} has no tokenizer.json, so nothing says that its tokens are those of {folder} \
             (tokenizer {expected})"
        )),
        // A GGUF file has no tokenizer.json that could have the same hash.
        Some(tokenizer)
            if matches!(model.weights, ModelWeights::Gguf(_))
                && tokenizer.has_ids_of(&corpus.load_tokenizer()?) => {}
        Some(tokenizer) if tokenizer.hash() != expected => {
            return Err(UserError::new(format!(
                "{folder} was made with tokenizer {expected}, {path} has tokenizer {}",
                tokenizer.hash()
            ))
            .hint(build)
            .into());
        }
        Some(_) => {}
    }
    Ok(())
}

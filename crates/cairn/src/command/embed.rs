//! `cairn embed`: texts to vectors.

use std::path::PathBuf;

use anyhow::Context as _;
use cairn_artifacts::bounded::{TEXT_BYTES_MAX, read_text, text_of};
use cairn_data::tokenizer::{SpelledSpecials, Tokenizer};
use cairn_kernels::Compute;
use clap::Args;
use serde_json::json;

use crate::context::Context;
use crate::encoder::{Encoder, Wanted, runs_of, warn_of_bare_texts};
use crate::failure::UserError;
use crate::model_folder::{ModelFolder, ModelWeights};
use crate::pooling::{EmbedSettings, Pooling, normalize, pool};
use crate::runs;
use crate::weight_type::WeightTypeArgs;

const EXAMPLES: &str = "\
Examples:
  cairn embed --model DIR 'a stack of stones' 'marks the way'
  cairn embed --model DIR --file sentences.txt --json
  cat sentences.txt | cairn embed --model DIR --pooling cls --normalize";

/// Turn texts into vectors, one each
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EmbedArgs {
    /// Folder of a model or a run [default: the last run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Texts [default: the lines of standard input]
    #[arg(value_name = "TEXT", conflicts_with = "file")]
    texts: Vec<String>,
    /// File with one text a line
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// What of the hidden states is taken [default: what the model's files say]
    #[arg(long, value_enum)]
    pooling: Option<Pooling>,
    /// Give vectors length 1 [default: what the model's files say]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    normalize: Option<bool>,
    /// Cut texts that are longer than the model reads, instead of refusing them
    #[arg(long)]
    truncate: bool,
    #[command(flatten)]
    weights: WeightTypeArgs,
    /// Print one JSON object with `embeddings` and `num_tokens`
    #[arg(long)]
    json: bool,
}

/// Embeds and prints.
pub(crate) fn run(args: &EmbedArgs, context: &Context) -> anyhow::Result<()> {
    let model = ModelFolder::open(&runs::model_folder(args.model.as_deref())?, context.terminal)?;
    let tokenizer = model.text_tokenizer()?;
    warn_of_bare_texts(&model, &tokenizer, context.terminal)?;
    let (settings, pooling) = settings(&model, args.pooling, context)?;
    let normalizes = args.normalize.unwrap_or(settings.normalize);
    let texts = read_texts(&args.texts, args.file.as_deref())?;
    let ids = ids(args, &texts, &tokenizer, (&model, &settings))?;
    let width = model.spec.hidden_size;
    let storage = args.weights.dtype.storage(&model, Compute::F32, context)?;
    let mut encoder = Encoder::load((&model, &storage), &ids, Wanted::Hidden, context)?;
    let mut vectors = Vec::with_capacity(ids.len());
    for run in runs_of(&ids) {
        let mut rest = encoder.run(&ids[run.clone()], None)?;
        for text in &ids[run] {
            let (hidden_td, after) = rest.split_at(text.len() * width);
            let mut vector = pool(hidden_td, width, pooling);
            if normalizes {
                normalize(&mut vector);
            }
            vectors.push(vector);
            rest = after;
        }
    }
    if args.json {
        let num_tokens: Vec<usize> = ids.iter().map(Vec::len).collect();
        return context.terminal.print(json!({
            "pooling": format!("{pooling:?}").to_lowercase(),
            "normalized": normalizes,
            "num_tokens": num_tokens,
            "embeddings": vectors,
        }));
    }
    for vector in vectors {
        let numbers: Vec<String> = vector.iter().map(f32::to_string).collect();
        context.terminal.print(numbers.join(" "))?;
    }
    Ok(())
}

/// What the model's files say of embedding, and what is taken.
pub(crate) fn settings(
    model: &ModelFolder,
    pooling: Option<Pooling>,
    context: &Context,
) -> anyhow::Result<(EmbedSettings, Pooling)> {
    let settings = match &model.weights {
        ModelWeights::Folder(_) => EmbedSettings::read(&model.path)?,
        ModelWeights::Gguf(file) => EmbedSettings::of_gguf(file)?,
        // The files that say so are not packed.
        ModelWeights::Pack(_) => EmbedSettings::default(),
    };
    for fields in &settings.ignored {
        context.terminal.warn(format_args!("fields that nothing here knows: {fields}"));
    }
    let pooling = pooling.or(settings.pooling).ok_or_else(|| {
        UserError::new(format!("{} does not say how it pools", model.path.display()))
            .hint("choose --pooling mean, --pooling cls or --pooling last")
    })?;
    Ok((settings, pooling))
}

/// Texts that were given, or the lines of a file or of standard input.
pub(crate) fn read_texts(
    texts: &[String],
    file: Option<&std::path::Path>,
) -> anyhow::Result<Vec<String>> {
    let texts: Vec<String> = match file {
        Some(path) => read_text(path, TEXT_BYTES_MAX)?.lines().map(str::to_owned).collect(),
        None if texts.is_empty() => text_of(std::io::stdin().lock(), TEXT_BYTES_MAX)
            .context("cannot read texts from standard input")?
            .lines()
            .map(str::to_owned)
            .collect(),
        None => texts.to_vec(),
    };
    if texts.is_empty() {
        return Err(UserError::new("there is no text")
            .hint("give texts, or lines with --file")
            .into());
    }
    Ok(texts)
}

/// Token ids of the texts, none longer than the model reads.
fn ids(
    args: &EmbedArgs,
    texts: &[String],
    tokenizer: &Tokenizer,
    (model, settings): (&ModelFolder, &EmbedSettings),
) -> anyhow::Result<Vec<Vec<u32>>> {
    let positions = model.spec.max_position_embeddings;
    let limit = settings.max_tokens.map_or(positions, |tokens| tokens.min(positions));
    let mut all = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let mut text = format!("{}{text}", settings.prompt);
        if settings.lower_case {
            text = text.to_lowercase();
        }
        let mut ids = tokenizer.encode_for_model(&text, SpelledSpecials::Text)?;
        if limit < ids.len() && args.truncate {
            ids = cut(&ids, &tokenizer.encode(&text)?, limit);
        }
        let number = index + 1;
        if ids.is_empty() {
            return Err(UserError::new(format!("text {number} is empty")).into());
        }
        if limit < ids.len() {
            let count = ids.len();
            let message = format!("text {number} has {count} tokens, the model reads {limit}");
            return Err(UserError::new(message).hint("--truncate cuts long texts").into());
        }
        all.push(ids);
    }
    Ok(all)
}

/// The first tokens of a text, with all that the model wants around them.
fn cut(ids: &[u32], plain: &[u32], limit: usize) -> Vec<u32> {
    let around = ids.len().saturating_sub(plain.len());
    let before = (0..=around).find(|at| ids[*at..].starts_with(plain)).unwrap_or(0);
    let kept = limit.saturating_sub(around).min(plain.len());
    [&ids[..before + kept], &ids[before + plain.len()..]].concat()
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn cut_texts_keep_what_is_around_them() {
        assert_eq!(cut(&[1, 5, 6, 7, 2], &[5, 6, 7], 4), [1, 5, 6, 2]);
        assert_eq!(cut(&[5, 6, 7], &[5, 6, 7], 2), [5, 6]);
        assert_eq!(cut(&[5, 6, 7, 2], &[5, 6, 7], 2), [5, 2]);
    }
}

//! `cairn fill-mask`: what a masked word could be.

use std::path::PathBuf;

use cairn_data::tokenizer::{SpelledSpecials, Tokenizer};
use cairn_kernels::Compute;
use cairn_spec::model::MaskKind;
use clap::Args;
use serde_json::{Value, json};

use crate::command::embed::read_texts;
use crate::context::Context;
use crate::encoder::{Encoder, Wanted, runs_of, warn_of_bare_texts};
use crate::failure::UserError;
use crate::model_folder::ModelFolder;
use crate::runs;
use crate::weight_type::WeightTypeArgs;

const EXAMPLES: &str = "\
Examples:
  cairn fill-mask --model DIR 'A cairn is a stack of [MASK].'
  cat sentences.txt | cairn fill-mask --model DIR --top-k 3 --json";

/// What masks are called where the files do not say.
const MASK_NAMES: [&str; 2] = ["[MASK]", "<mask>"];

/// Guess the masked tokens of texts
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct FillMaskArgs {
    /// Folder of a model or a run [default: the last run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Texts with masks [default: the lines of standard input]
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,
    /// Guesses for each mask
    #[arg(long, value_name = "N", default_value_t = 5)]
    top_k: usize,
    #[command(flatten)]
    weights: WeightTypeArgs,
    /// Print one JSON object a text, with `masks`: guesses with `token`, `token_id`, `probability`
    #[arg(long)]
    json: bool,
}

/// Guesses and prints.
pub(crate) fn run(args: &FillMaskArgs, context: &Context) -> anyhow::Result<()> {
    let model = ModelFolder::open(&runs::model_folder(args.model.as_deref())?, context.terminal)?;
    if model.spec.attention.mask != MaskKind::Bidirectional || model.spec.head.is_none() {
        let message = format!("{} was not made to fill masks", model.path.display());
        return Err(UserError::new(message)
            .hint("a masked-language model is wanted, such as BertForMaskedLM")
            .into());
    }
    if !(1..=model.spec.vocab_size).contains(&args.top_k) {
        return Err(UserError::new(format!("--top-k is {}", args.top_k))
            .hint(format!("choose 1 to {}", model.spec.vocab_size))
            .into());
    }
    let tokenizer = model.text_tokenizer()?;
    let mask = mask_id(&model, &tokenizer)?;
    warn_of_bare_texts(&model, &tokenizer, context.terminal)?;
    let texts = read_texts(&args.texts, None)?;
    let ids = texts
        .iter()
        .map(|text| masked_ids(text, (&model, &tokenizer), mask))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let is_mask = |id: &&u32| **id == mask;
    let masks: Vec<usize> = ids.iter().map(|text| text.iter().filter(is_mask).count()).collect();
    let storage = args.weights.dtype.storage(&model, Compute::F32, context)?;
    let mut encoder = Encoder::load((&model, &storage), &ids, Wanted::Logits(&masks), context)?;
    for run in runs_of(&ids) {
        let all: Vec<u32> = ids[run.clone()].concat();
        let rows: Vec<u32> =
            (0..).zip(&all).filter(|(_, id)| **id == mask).map(|(row, _)| row).collect();
        let logits_ov = encoder.run(&ids[run.clone()], Some(&rows))?;
        let mut guesses = logits_ov.chunks_exact(model.spec.vocab_size);
        for index in run {
            let guesses: Vec<Vec<Guess>> = guesses
                .by_ref()
                .take(masks[index])
                .map(|logits_v| best(logits_v, args.top_k))
                .collect();
            print(args, (&texts[index], &guesses), &tokenizer, context)?;
        }
    }
    Ok(())
}

fn mask_id(model: &ModelFolder, tokenizer: &Tokenizer) -> anyhow::Result<u32> {
    let config = model.tokenizer_config(tokenizer)?;
    let stated = config.special("mask_token");
    let found = stated.into_iter().chain(MASK_NAMES).find_map(|name| tokenizer.token_id(name));
    let missing = || {
        let names = MASK_NAMES.join(" or ");
        UserError::new(format!("the tokenizer of {} has no mask token", model.path.display()))
            .hint(format!("mask_token of tokenizer_config.json names one; else it is {names}"))
    };
    Ok(found.ok_or_else(missing)?)
}

fn masked_ids(
    text: &str,
    (model, tokenizer): (&ModelFolder, &Tokenizer),
    mask: u32,
) -> anyhow::Result<Vec<u32>> {
    let ids = tokenizer.encode_for_model(text, SpelledSpecials::Tokens)?;
    if !ids.contains(&mask) {
        let name = tokenizer.token(mask).unwrap_or_default();
        return Err(UserError::new(format!("there is no {name} in '{text}'"))
            .hint(format!("write {name} where a word is wanted"))
            .into());
    }
    let (count, positions) = (ids.len(), model.spec.max_position_embeddings);
    if positions < count {
        let message = format!("the text has {count} tokens, the model reads {positions}");
        return Err(UserError::new(message).hint("shorten it").into());
    }
    Ok(ids)
}

/// A token and its probability.
struct Guess {
    id: u32,
    probability: f64,
}

/// The likeliest tokens; ties go to the lowest id.
fn best(logits_v: &[f32], count: usize) -> Vec<Guess> {
    let largest = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit) - f64::from(largest)).exp();
    let total: f64 = logits_v.iter().map(|logit| weight(*logit)).sum();
    let mut order: Vec<(u32, f32)> = (0..).zip(logits_v.iter().copied()).collect();
    order.sort_by(|(a, x), (b, y)| y.total_cmp(x).then(a.cmp(b)));
    order.truncate(count);
    order.into_iter().map(|(id, logit)| Guess { id, probability: weight(logit) / total }).collect()
}

fn print(
    args: &FillMaskArgs,
    (text, masks): (&str, &[Vec<Guess>]),
    tokenizer: &Tokenizer,
    context: &Context,
) -> anyhow::Result<()> {
    if args.json {
        let shown = |guess: &Guess| {
            Ok(json!({
                "token_id": guess.id,
                "token": tokenizer.token(guess.id),
                "probability": guess.probability,
            }))
        };
        let masks: Vec<Value> = masks
            .iter()
            .map(|guesses| {
                guesses.iter().map(shown).collect::<anyhow::Result<Vec<_>>>().map(Value::from)
            })
            .collect::<anyhow::Result<_>>()?;
        return context.terminal.print(json!({ "text": text, "masks": masks }));
    }
    context.terminal.print(text)?;
    for guesses in masks {
        let shown: Vec<String> = guesses
            .iter()
            .map(|guess| {
                let token = tokenizer.token(guess.id).unwrap_or_else(|| format!("#{}", guess.id));
                format!("{token} {:.4}", guess.probability)
            })
            .collect();
        context.terminal.print(format_args!("  {}", shown.join("  ")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::best;

    #[test]
    fn guesses_are_likeliest_first() {
        let found = best(&[0.0, 1.0, 1.0, -1.0], 3);
        assert_eq!(found.iter().map(|guess| guess.id).collect::<Vec<_>>(), [1, 2, 0]);
        let total: f64 =
            best(&[0.0, 1.0, 1.0, -1.0], 4).iter().map(|guess| guess.probability).sum();
        assert!((total - 1.0).abs() < 1e-12);
    }
}

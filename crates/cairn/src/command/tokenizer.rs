//! `cairn tokenizer`: training one, text to ids, ids to text.

use std::path::PathBuf;

use anyhow::Context as _;
use cairn_artifacts::atomic::check_writable;
use cairn_artifacts::bounded::{TEXT_BYTES_MAX, text_of};
use cairn_data::tokenizer::Tokenizer;
use clap::{Args, Subcommand};
use serde_json::json;

use crate::context::Context;
use crate::failure::UserError;
use crate::signals::StopFlag;
use crate::text_input::{TextArgs, train_tokenizer};

const EXAMPLES: &str = "\
Examples:
  cairn tokenizer train --input ~/notes --vocab-size 8192 --output tokenizer.json
  cairn tokenizer encode --tokenizer tokenizer.json 'a stack of stones'
  cairn tokenizer decode --tokenizer tokenizer.json 64,291,12";

const TRAIN_EXAMPLES: &str = "\
Examples:
  cairn tokenizer train --input ~/notes --vocab-size 8192 --output tokenizer.json";

const ENCODE_EXAMPLES: &str = "\
Examples:
  cairn tokenizer encode --tokenizer tokenizer.json 'a stack of stones'
  cat notes.txt | cairn tokenizer encode --tokenizer tokenizer.json - --json";

const DECODE_EXAMPLES: &str = "\
Examples:
  cairn tokenizer decode --tokenizer tokenizer.json 64,291,12";

/// Train a tokenizer, turn text into ids and back
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TokenizerArgs {
    #[command(subcommand)]
    command: TokenizerCommand,
}

#[derive(Debug, Subcommand)]
enum TokenizerCommand {
    Train(TrainArgs),
    Encode(EncodeArgs),
    Decode(DecodeArgs),
}

/// Train a byte-level BPE on text
#[derive(Debug, Args)]
#[command(after_help = TRAIN_EXAMPLES)]
struct TrainArgs {
    /// The `tokenizer.json` to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Tokens to end with
    #[arg(long, value_name = "N", default_value_t = 4096)]
    vocab_size: u32,
    #[command(flatten)]
    text: TextArgs,
}

/// Print the token ids of a text
#[derive(Debug, Args)]
#[command(after_help = ENCODE_EXAMPLES)]
struct EncodeArgs {
    /// The `tokenizer.json`
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// The text; `-` reads standard input
    #[arg(value_name = "TEXT", allow_hyphen_values = true)]
    text: String,
    /// Print one JSON object with `token_ids` and `tokens`
    #[arg(long)]
    json: bool,
}

/// Print the text of token ids
#[derive(Debug, Args)]
#[command(after_help = DECODE_EXAMPLES)]
struct DecodeArgs {
    /// The `tokenizer.json`
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Token ids; `-` reads them from standard input
    #[arg(value_name = "IDS")]
    ids: String,
}

/// Does what was asked.
pub(crate) fn run(args: &TokenizerArgs, context: &Context) -> anyhow::Result<()> {
    match &args.command {
        TokenizerCommand::Train(args) => train(args, context),
        TokenizerCommand::Encode(args) => encode(args, context),
        TokenizerCommand::Decode(args) => decode(args, context),
    }
}

fn train(args: &TrainArgs, context: &Context) -> anyhow::Result<()> {
    let stop = StopFlag::listen()?;
    check_writable(&args.output)?;
    let scan = args.text.scan(context, &stop)?;
    let tokenizer = train_tokenizer(&scan, args.vocab_size, context)?;
    tokenizer.save(&args.output)?;
    context.terminal.step("Wrote", args.output.display());
    Ok(())
}

fn encode(args: &EncodeArgs, context: &Context) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let ids = tokenizer.encode(&text_or_stdin(&args.text)?)?;
    if !args.json {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        return context.terminal.print(ids.join(","));
    }
    let tokens: Vec<String> =
        ids.iter().map(|&id| tokenizer.decode(&[id])).collect::<Result<_, _>>()?;
    context.terminal.print(json!({ "token_ids": ids, "tokens": tokens }))
}

fn decode(args: &DecodeArgs, context: &Context) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let text = text_or_stdin(&args.ids)?;
    let separators = [',', ' ', '\n', '\t'];
    let ids = text.split(separators).filter(|part| !part.is_empty()).map(|part| {
        part.parse::<u32>().map_err(|_| {
            UserError::new(format!("'{part}' is not a token id"))
                .hint("give ids like 64,291,12, separated by commas or spaces")
        })
    });
    let ids: Vec<u32> = ids.collect::<Result<_, _>>()?;
    context.terminal.print(tokenizer.decode(&ids)?)
}

fn text_or_stdin(argument: &str) -> anyhow::Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    text_of(std::io::stdin().lock(), TEXT_BYTES_MAX).context("cannot read text from standard input")
}

//! `cairn chat`: a conversation with a model, in the terminal or in one question.

use std::io::{BufRead, IsTerminal};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cairn_artifacts::bounded::{TEXT_BYTES_MAX, read_text, text_of};
use cairn_data::chat::{ChatTemplate, TEMPLATE_BYTES_MAX};
use cairn_data::tokenizer::{GenerationConfig, Tokenizer, TokenizerConfig};
use cairn_engine::{EngineOptions, SamplingParams};
use cairn_spec::model::MaskKind;
use clap::Args;
use serde_json::json;

use crate::chat::{Answer, Chat, ChatParts};
use crate::command::generate::StorageArgs;
use crate::context::Context;
use crate::failure::UserError;
use crate::model_folder::{ModelArgs, ModelFolder};
use crate::named_values::named_values;
use crate::sampling::{SamplingArgs, stated};
use crate::signals::StopFlag;
use crate::speculative::SpeculativeArgs;

const EXAMPLES: &str = "\
Examples:
  cairn chat --model DIR
  cairn chat --model DIR --system 'Answer in one sentence.' --temperature 0
  echo 'What is a cairn?' | cairn chat --model DIR --json
  cairn chat --model DIR --template chatml.jinja --max-new-tokens 200";

const HELP: &str = "\
/system TEXT  begin anew with TEXT as the system's message
/reset        begin anew, keeping the system's message
/undo         take the last question and its answer back
/save FILE    write the messages as JSON
/help         show this
/quit         end (Ctrl-D does, too); Ctrl-C stops an answer";

/// Talk with a model
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// File with the chat template, in Jinja [default: the model's own]
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Which of the model's templates to use, where it has several
    #[arg(long, value_name = "NAME", conflicts_with = "template")]
    template_name: Option<String>,
    /// The system's message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Variable that the template reads, such as `enable_thinking=false`; may be repeated
    #[arg(long = "set", value_name = "NAME=JSON")]
    variables: Vec<String>,
    /// Tokens of an answer at most [default: 1024, or what the context has room for]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Tokens of the conversation at most [default: 4096, or the model's positions]
    #[arg(long, value_name = "N")]
    max_context: Option<usize>,
    /// Drop the oldest turns when the conversation outgrows the context
    #[arg(long)]
    drop_oldest: bool,
    /// Read one message or command a line from standard input, as from a terminal
    #[arg(long)]
    lines: bool,
    /// Print each answer as one JSON object, with the messages and numbers of tokens
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    storage: StorageArgs,
    #[command(flatten)]
    speculative: SpeculativeArgs,
}

/// Tokens of a conversation, where nothing is asked for and the model has room.
const MAX_CONTEXT: usize = 4096;

/// Talks.
pub(crate) fn run(args: &ChatArgs, context: &Context) -> anyhow::Result<()> {
    let model = args.model.open(context)?;
    refuse_encoder(&model)?;
    let tokenizer = model.text_tokenizer()?;
    let config = model.tokenizer_config(&tokenizer)?;
    let chosen = (args.template.as_deref(), args.template_name.as_deref());
    let template = template(chosen, &config, &model)?;
    let generation = stated(&model, context)?;
    let sampling = SamplingParams::new(args.sampling.resolve(&generation, context))?;
    let positions = model.spec.max_position_embeddings;
    let max_context = args.max_context.unwrap_or_else(|| MAX_CONTEXT.min(positions));
    let mut options = EngineOptions::new(1, max_context);
    let storage = args.storage.apply(&mut options, (&model, context))?;
    args.speculative.apply(&mut options);
    let mut engine = model.engine(options, &storage, context.cpu()?)?;
    args.speculative.attach(&mut engine, context)?;
    let stops = stop_tokens(&model, &generation, (&tokenizer, &config), Some(&template));
    let mut chat = Chat::new(ChatParts {
        engine,
        tokenizer: &tokenizer,
        template,
        special_tokens: config.special_tokens.clone(),
        variables: named_values(&args.variables, "enable_thinking=false")?,
        stops,
        sampling,
        max_new_tokens: args.max_new_tokens.or(generation.max_new_tokens),
        drops_oldest: args.drop_oldest,
        system: args.system.clone(),
        stop: StopFlag::listen_to_interrupts()?,
    });
    let is_terminal = std::io::stdin().is_terminal();
    if is_terminal || args.lines {
        return converse(&mut chat, args, context, is_terminal);
    }
    let question = text_of(std::io::stdin().lock(), TEXT_BYTES_MAX)
        .context("cannot read a message from standard input")?;
    let question = question.trim_end_matches(['\n', '\r']);
    if question.is_empty() {
        return Err(UserError::new("standard input holds no message")
            .hint("echo 'What is a cairn?' | cairn chat")
            .into());
    }
    answer(&mut chat, question, args.json, context)
}

/// An encoder reads whole texts; it has no next word to say.
pub(crate) fn refuse_encoder(model: &ModelFolder) -> anyhow::Result<()> {
    if model.spec.attention.mask == MaskKind::Causal {
        return Ok(());
    }
    let (path, family) = (model.path.display(), model.spec.family);
    Err(UserError::new(format!("{path} is a {family} model: an encoder, which does not answer"))
        .hint("cairn fill-mask guesses masked words, cairn embed turns texts into vectors")
        .into())
}

/// Tokens that end an answer.
pub(crate) fn stop_tokens(
    model: &ModelFolder,
    generation: &GenerationConfig,
    (tokenizer, config): (&Tokenizer, &TokenizerConfig),
    template: Option<&ChatTemplate>,
) -> Vec<u32> {
    let mut stops = generation.eos_token_ids.clone();
    let end = |template: &ChatTemplate| template.end_of_turn(tokenizer, &config.special_tokens);
    stops.extend(template.and_then(end));
    stops.extend(config.special("eos_token").and_then(|token| tokenizer.token_id(token)));
    stops.extend(&model.spec.tokens.eos);
    stops.extend(tokenizer.end_of_document());
    stops.retain(|id| usize::try_from(*id).is_ok_and(|id| id < model.spec.vocab_size));
    stops.sort_unstable();
    stops.dedup();
    stops
}

/// The template of a file, or the model's own of this name.
pub(crate) fn template(
    (file, name): (Option<&Path>, Option<&str>),
    config: &TokenizerConfig,
    model: &ModelFolder,
) -> anyhow::Result<ChatTemplate> {
    if let Some(path) = file {
        let source = read_text(path, TEMPLATE_BYTES_MAX as u64)?;
        return Ok(ChatTemplate::parse(&source, path)?);
    }
    let named = config.chat_template(name);
    if let Some(named) = named {
        return Ok(ChatTemplate::parse(&named.source, &named.path)?);
    }
    let names: Vec<&str> = config.chat_templates.iter().map(|t| t.name.as_str()).collect();
    let folder = model.path.display();
    Err(match (name, names.as_slice()) {
        (_, []) => UserError::new(format!("{folder} has no chat template"))
            .hint("give one with --template FILE, written for this model")
            .hint("a model without one only continues text: cairn generate --prompt TEXT"),
        (Some(name), names) => {
            UserError::new(format!("{folder} has no chat template called '{name}'"))
                .hint(format!("it has {}", names.join(", ")))
        }
        (None, names) => UserError::new(format!("{folder} has several chat templates"))
            .hint(format!("choose one with --template-name: {}", names.join(", "))),
    }
    .into())
}

/// Reads lines until the end; a question that fails does not end the conversation.
fn converse(
    chat: &mut Chat<'_>,
    args: &ChatArgs,
    context: &Context,
    is_terminal: bool,
) -> anyhow::Result<()> {
    if is_terminal {
        context.terminal.say("Talk; /help shows what else there is.");
    }
    let mut line = String::new();
    loop {
        if is_terminal {
            context.terminal.ask("> ");
        }
        line.clear();
        let read = std::io::stdin().lock().read_line(&mut line);
        if read.context("cannot read from standard input")? == 0 {
            return Ok(());
        }
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let done = match line.strip_prefix('/') {
            Some(command) => obey(chat, command, context),
            None => answer(chat, line, args.json, context).map(|()| ControlFlow::Continue(())),
        };
        match done {
            Ok(ControlFlow::Continue(())) => {}
            Ok(ControlFlow::Break(())) => return Ok(()),
            Err(error) if crate::failure::is_closed_pipe(&error) => return Err(error),
            Err(error) => crate::failure::report(&error, &context.terminal),
        }
    }
}

/// Does what a line that begins with `/` says.
fn obey(chat: &mut Chat<'_>, command: &str, context: &Context) -> anyhow::Result<ControlFlow<()>> {
    let (word, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let rest = rest.trim();
    let terminal = context.terminal;
    match (word, rest) {
        ("quit" | "exit", "") => return Ok(ControlFlow::Break(())),
        ("help", "") => terminal.say(HELP),
        ("reset", "") => chat.reset(),
        ("undo", "") => match chat.undo() {
            Some(question) => terminal.say(format_args!("took back: {question}")),
            None => terminal.say("there is nothing to take back"),
        },
        ("system", text) => {
            chat.set_system(Some(text.to_owned()).filter(|text| !text.is_empty()));
            terminal.say("began anew");
        }
        ("save", file) if !file.is_empty() => {
            chat.save(file.as_ref())?;
            terminal.step("Wrote", file);
        }
        _ => {
            return Err(UserError::new(format!("'/{command}' is no command"))
                .hint("/help lists them")
                .into());
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Asks the model and prints its answer.
fn answer(
    chat: &mut Chat<'_>,
    question: &str,
    json: bool,
    context: &Context,
) -> anyhow::Result<()> {
    let terminal = context.terminal;
    let answer = chat.ask(question, &mut |piece| {
        if json { Ok(()) } else { terminal.print_piece(piece) }
    })?;
    if !json {
        terminal.print_piece("\n")?;
    }
    if 0 < answer.num_unknown {
        terminal.warn(format_args!(
            "{} of the answer's ids are no tokens of the tokenizer; they have no text",
            answer.num_unknown
        ));
    }
    if json {
        return print_json(chat, &answer, context);
    }
    if 0 < answer.num_dropped {
        terminal.warn(format_args!("dropped the {} oldest messages", answer.num_dropped));
    }
    if answer.is_cut {
        terminal.warn("the answer was cut: the context is full");
    }
    Ok(())
}

fn print_json(chat: &Chat<'_>, answer: &Answer, context: &Context) -> anyhow::Result<()> {
    context.terminal.print(json!({
        "messages": chat.messages(),
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_reused_tokens": answer.num_reused_tokens,
        "num_new_tokens": answer.num_new_tokens,
        "num_dropped_messages": answer.num_dropped,
        "finish": answer.finish,
    }))
}

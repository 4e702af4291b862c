//! `/v1/completions`: texts continued.

use serde::Serialize;
use serde_json::{Value, json};

use super::asked::{Asked, CHOICES_MAX, take_include_usage, take_n, take_user};
use super::format::{Format, Message};
use super::head::{Head, finish_reason, usage};
use super::logprobs::{self, Names, Places};
use super::{Job, Preparing, beams};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::model::ServedParts;
use crate::reply::Piece;

/// New tokens where nothing is asked for: `OpenAI`'s.
const MAX_TOKENS: usize = 16;
/// Prompts of a request, at most.
const PROMPTS_MAX: usize = CHOICES_MAX;

/// Continues texts.
pub(crate) fn job(preparing: Preparing<'_>, mut fields: Fields) -> Result<Job, ApiError> {
    let beams = beams::take(&mut fields)?;
    let mut asked = Asked::take(&mut fields, preparing, "stop")?;
    let n = take_n(&mut fields)?;
    let include_usage = take_include_usage(&mut fields, asked.stream)?;
    take_user(&mut fields)?;
    asked.max_tokens = fields.take("max_tokens")?;
    asked.logprobs = fields.take("logprobs")?;
    let names = Names::take(&mut fields)?;
    let grammar = Grammar::take(&mut fields)?;
    let prompts = prompts(fields.need("prompt")?, preparing.parts())?;
    // The best of as many as are wanted are all of them.
    fields.lacking("best_of", &[json!(n)])?;
    let echo = fields.take("echo")?.unwrap_or(false);
    fields.lacking("suffix", &[json!("")])?;
    fields.finish()?;
    asked.follow(preparing, grammar)?;
    if CHOICES_MAX < prompts.len() * n {
        let count = prompts.len();
        let message = format!("{count} prompts times n = {n} is more than {CHOICES_MAX}");
        return Err(ApiError::field("n", message));
    }
    let mut requests = Vec::with_capacity(prompts.len() * n);
    for prompt in &prompts {
        // The beams of a prompt are one search.
        for choice in 0..if beams.is_some() { 1 } else { n } {
            let mut request = asked.request(preparing, prompt, choice, MAX_TOKENS)?;
            if echo {
                // Where nothing is to be added, running the prompt is all there is to do.
                let is_run = asked.logprobs.is_some() || request.max_new_tokens == 0;
                request.prompt_logprobs = is_run.then(|| asked.logprobs.unwrap_or(0));
            }
            requests.push(request);
        }
    }
    if let Some(beams) = beams {
        asked.beams = Some(beams::of_requests(beams, n, &requests, preparing.parts())?);
    }
    let echoed = match echo {
        true => Some(echoed(&prompts, n, preparing.parts())?),
        false => None,
    };
    let format = Completions {
        head: preparing.head("cmpl", "text_completion"),
        echoed,
        places: asked.logprobs.map(|_| vec![Places::new(names); requests.len()]),
        n,
        num_prompt: prompts.iter().map(Vec::len).sum(),
        num_new: 0,
        num_cached: 0,
        include_usage,
    };
    asked.job(requests, format.num_prompt, format)
}

/// What an answer begins with when its prompt is repeated.
struct Echo {
    text: String,
    ids: Vec<u32>,
}

/// The prompts, once for each answer to them.
fn echoed(
    prompts: &[Vec<u32>],
    n: usize,
    parts: &ServedParts,
) -> Result<Vec<Option<Echo>>, ApiError> {
    let mut echoed = Vec::with_capacity(prompts.len() * n);
    for ids in prompts {
        let text = parts.tokenizer.decode(ids).map_err(|error| ApiError::field("prompt", error))?;
        echoed.extend((0..n).map(|_| Some(Echo { text: text.clone(), ids: ids.clone() })));
    }
    Ok(echoed)
}

struct Completions {
    head: Head,
    /// What each answer begins with, as long as it has not; nothing if no prompt is repeated.
    echoed: Option<Vec<Option<Echo>>>,
    /// Where each answer's text has come to, if log-probabilities are told.
    places: Option<Vec<Places>>,
    /// Answers to each prompt.
    n: usize,
    num_prompt: usize,
    num_new: usize,
    num_cached: usize,
    include_usage: bool,
}

/// An answer, or the next piece of one.
#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
}

impl Completions {
    fn choice(&mut self, parts: &ServedParts, index: usize, mut piece: Piece) -> Choice {
        self.num_new += piece.num_tokens;
        // The answers to a prompt share it, and its first reading counts.
        self.num_cached += if index.is_multiple_of(self.n) { piece.num_cached } else { 0 };
        let echo = self.echoed.as_mut().and_then(|all| all[index].take());
        let places = self.places.as_mut();
        let logprobs = places.map(|all| {
            let prompt = echo.iter().flat_map(|echo| logprobs::of_prompt(&echo.ids, &piece.prompt));
            let tokens = piece.tokens.iter().map(|found| (found.token, Some(&found.logprobs)));
            all[index].of_completion(parts, prompt.chain(tokens))
        });
        let finish_reason = finish_reason(&piece);
        let new = std::mem::take(&mut piece.text);
        let text = match echo {
            Some(echo) => echo.text + &new,
            None => new,
        };
        Choice { index, text, logprobs, finish_reason }
    }
}

impl Format for Completions {
    fn whole(mut self: Box<Self>, parts: &ServedParts, answers: Vec<Piece>) -> Value {
        let answers = answers.into_iter().enumerate();
        let choices = answers.map(|(index, answer)| json!(self.choice(parts, index, answer)));
        let choices = choices.collect();
        let usage = usage(self.num_prompt, self.num_cached, self.num_new);
        self.head.with(choices, Some(usage))
    }

    fn piece(&mut self, parts: &ServedParts, choice: usize, piece: Piece) -> Vec<Message> {
        let choice = self.choice(parts, choice, piece);
        vec![self.head.message(&choice)]
    }

    fn end(&mut self) -> Vec<Message> {
        self.head
            .end(self.include_usage.then(|| usage(self.num_prompt, self.num_cached, self.num_new)))
    }
}

/// The prompts of a request: a text, its ids, or several of either.
fn prompts(value: Value, parts: &ServedParts) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = |message: &str| ApiError::field("prompt", message);
    let encode = |text: &str| {
        let spelled = cairn_data::tokenizer::SpelledSpecials::Text;
        let encoded = parts.tokenizer.encode_for_model(text, spelled);
        encoded.map_err(|error| ApiError::field("prompt", error))
    };
    let prompts = match value {
        Value::String(text) => vec![encode(&text)?],
        Value::Array(list) if list.iter().all(Value::is_number) => vec![ids(&list)?],
        Value::Array(list) if PROMPTS_MAX < list.len() => {
            let count = list.len();
            return Err(wrong(&format!("prompt has {count} entries, at most {PROMPTS_MAX}")));
        }
        Value::Array(list) => {
            let one = |value: &Value| match value {
                Value::String(text) => encode(text),
                Value::Array(list) => ids(list),
                _ => Err(wrong("prompt has an entry that is neither a text nor a list of ids")),
            };
            list.iter().map(one).collect::<Result<_, _>>()?
        }
        _ => return Err(wrong("prompt is neither a text nor a list")),
    };
    match prompts.iter().position(Vec::is_empty) {
        Some(index) => Err(wrong(&format!("prompt {index} has no tokens"))),
        None => Ok(prompts),
    }
}

fn ids(list: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| {
            ApiError::field("prompt", format!("prompt has {value}, which is no token id"))
        })
    };
    list.iter().map(id).collect()
}

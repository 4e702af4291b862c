//! What requests that generate ask for beside their prompts.

use cairn_engine::{Constraint, Request, SamplingParams};
use serde_json::{Map, Value};

use super::format::Format;
use super::{Job, Preparing};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::{Following, Grammar};
use crate::model::ServedModel;
use crate::sampling::sampling;

/// Answers of a request, at most.
pub(super) const CHOICES_MAX: usize = 64;
/// Log-probabilities that a request may be told, at most: each takes some forty bytes of its answer.
const LOGPROBS_MAX: usize = 1 << 19;
/// Stop strings of a request, at most.
const STOPS_MAX: usize = 16;
/// Bytes of a stop string, at most.
const STOP_BYTES_MAX: usize = 1024;

/// What a request that generates asks for beside its prompt.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) sampling: SamplingParams,
    /// New tokens, where the request says.
    pub(super) max_tokens: Option<usize>,
    /// `Some(n)` asks for the log-probability of each token and of the `n` likeliest.
    pub(super) logprobs: Option<usize>,
    pub(super) stops: Vec<String>,
    pub(super) stream: bool,
    /// Whether no token ends an answer before it has its length.
    ignore_eos: bool,
    /// Who goes first: lower before higher.
    priority: i32,
    /// Only requests with the same share what was computed for a prompt.
    cache_salt: u64,
    /// What the answers follow.
    constraint: Option<Following>,
}

impl Asked {
    /// Takes the fields that all endpoints share; strings that end an answer are in `stop`.
    pub(super) fn take(
        fields: &mut Fields,
        preparing: Preparing<'_>,
        stop: &'static str,
    ) -> Result<Self, ApiError> {
        preparing.take_model(fields)?;
        let stream = fields.take("stream")?.unwrap_or(false);
        let stops = stop_strings(fields, stop)?;
        let priority = fields.take("priority")?.unwrap_or(0);
        let salt: Option<String> = fields.take("cache_salt")?;
        let cache_salt = preparing.cache_salt(salt.as_deref());
        let ignore_eos = fields.take("ignore_eos")?.unwrap_or(false);
        let sampling = sampling(fields, &preparing.parts().stated, preparing.own_seed())?;
        Ok(Self {
            sampling,
            max_tokens: None,
            logprobs: None,
            stops,
            stream,
            ignore_eos,
            priority,
            cache_salt,
            constraint: None,
        })
    }

    /// Has the answers follow a grammar.
    pub(super) fn follow(
        &mut self,
        preparing: Preparing<'_>,
        grammar: Option<Grammar>,
    ) -> Result<(), ApiError> {
        if let Some(grammar) = grammar {
            let ServedModel { parts, grammars } = &preparing.shared.model;
            self.constraint = Some(grammars.compile(parts, &grammar)?);
        }
        Ok(())
    }

    /// The request for answer `choice` to a prompt; each has randomness of its own. Where it does not say how many
    /// tokens are wanted, `default_tokens` are, as far as there is room.
    pub(super) fn request(
        &self,
        preparing: Preparing<'_>,
        prompt: &[u32],
        choice: usize,
        default_tokens: usize,
    ) -> Result<Request, ApiError> {
        let room = preparing.shared.model.room(prompt.len())?;
        // What is asked for and does not fit is refused by the engine, with both numbers.
        let max_new_tokens = self.max_tokens.unwrap_or(default_tokens.min(room));
        let mut request = Request::new(prompt.to_vec(), self.sampling.clone(), max_new_tokens);
        if !self.ignore_eos {
            request.stop_tokens.clone_from(&preparing.parts().stop_tokens);
        }
        request.logprobs = self.logprobs;
        request.priority = self.priority;
        request.cache_salt = self.cache_salt;
        request.choice = u32::try_from(choice).map_err(ApiError::failed)?;
        request.constraint = self.constraint.as_ref().map(Constraint::boxed_clone);
        Ok(request)
    }

    /// What these requests, with so many tokens of prompts, want of the engine.
    pub(super) fn job(
        self,
        requests: Vec<Request>,
        num_prompt: usize,
        format: impl Format + 'static,
    ) -> Result<Job, ApiError> {
        check_logprobs(&requests)?;
        let (stops, streams) = (self.stops, self.stream);
        Ok(Job { requests, num_prompt, stops, streams, format: Box::new(format) })
    }
}

/// Refuses answers that would tell more log-probabilities than can be held.
fn check_logprobs(requests: &[Request]) -> Result<(), ApiError> {
    let told = |request: &Request| {
        let prompt = request.prompt_logprobs.map_or(0, |top| request.prompt.len() * (top + 1));
        let new = request.logprobs.map_or(0, |top| request.max_new_tokens.saturating_mul(top + 1));
        new.saturating_add(prompt)
    };
    let told = requests.iter().map(told).fold(0, usize::saturating_add);
    if told <= LOGPROBS_MAX {
        return Ok(());
    }
    let message = format!("{told} log-probabilities would be told, at most {LOGPROBS_MAX}");
    Err(ApiError::field("logprobs", message))
}

/// Takes what names the end user to the provider: nothing here depends on it, nor is it kept.
pub(super) fn take_user(fields: &mut Fields) -> Result<(), ApiError> {
    fields.take::<String>("user").map(|_| ())
}

/// Takes how many answers to each prompt are wanted.
pub(super) fn take_n(fields: &mut Fields) -> Result<usize, ApiError> {
    match fields.take("n")?.unwrap_or(1) {
        n if (1..=CHOICES_MAX).contains(&n) => Ok(n),
        n => Err(ApiError::field("n", format!("n is {n}, which is not in 1..={CHOICES_MAX}"))),
    }
}

/// Takes whether a stream ends with the numbers of tokens.
pub(super) fn take_include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    const NAME: &str = "stream_options";
    let options: Option<Map<String, Value>> = fields.take(NAME)?;
    if options.is_some() && !stream {
        return Err(ApiError::field(NAME, "stream_options is only for stream = true"));
    }
    let mut include_usage = false;
    for (name, value) in options.into_iter().flatten() {
        match (name.as_str(), value) {
            ("include_usage", Value::Bool(asked)) => include_usage = asked,
            (name, value) => {
                let message = format!("stream_options.{name} = {value} is not supported here");
                return Err(ApiError::field(NAME, message));
            }
        }
    }
    Ok(include_usage)
}

fn stop_strings(fields: &mut Fields, name: &'static str) -> Result<Vec<String>, ApiError> {
    let refuse = |message: String| Err(ApiError::field(name, message));
    let stops = match fields.take::<Value>(name)? {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(list)) => {
            let text = |value: Value| match value {
                Value::String(text) => Ok(text),
                other => {
                    Err(ApiError::field(name, format!("{name} has {other}, which is no string")))
                }
            };
            list.into_iter().map(text).collect::<Result<_, _>>()?
        }
        Some(other) => return refuse(format!("{name} is {other}, neither a string nor a list")),
    };
    if STOPS_MAX < stops.len() {
        return refuse(format!("{name} has {} strings, at most {STOPS_MAX}", stops.len()));
    }
    match stops.iter().find(|stop| stop.is_empty() || STOP_BYTES_MAX < stop.len()) {
        Some(stop) => refuse(format!(
            "{name} has a string of {} bytes, which is not in 1..={STOP_BYTES_MAX}",
            stop.len()
        )),
        None => Ok(stops),
    }
}

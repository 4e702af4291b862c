//! The endpoints, and what those that generate share.

mod chat;
mod completions;
mod stream;
mod tokens;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cairn_engine::{Request, SamplingParams};
use serde_json::{Value, json};
use tokio::task::JoinSet;

pub(crate) use chat::chat_completions;
pub(crate) use completions::completions;
pub(crate) use tokens::{detokenize, tokenize};

use crate::driver::Updates;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::ServedModel;
use crate::reply::{Piece, Reply};
use crate::sampling::sampling;
use crate::server::Shared;

/// Answers to one prompt, at most.
const CHOICES_MAX: usize = 64;
/// Stop strings of a request, at most.
const STOPS_MAX: usize = 16;
/// Bytes of a stop string, at most.
const STOP_BYTES_MAX: usize = 1024;

/// What a request that generates asks for beside its prompt.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) sampling: SamplingParams,
    /// Answers to each prompt.
    pub(crate) n: usize,
    /// New tokens, where the request says.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) stops: Vec<String>,
    pub(crate) stream: bool,
    /// Whether a stream ends with the numbers of tokens.
    pub(crate) include_usage: bool,
}

impl Asked {
    /// Takes the fields that completions and chats share.
    pub(crate) fn take(
        fields: &mut Fields,
        model: &ServedModel,
        own_seed: u64,
    ) -> Result<Self, ApiError> {
        let asked: Option<String> = fields.take("model")?;
        model.check_name(asked.as_deref())?;
        let n = fields.take("n")?.unwrap_or(1);
        if !(1..=CHOICES_MAX).contains(&n) {
            return Err(ApiError::field(
                "n",
                format!("n is {n}, which is not in 1..={CHOICES_MAX}"),
            ));
        }
        let stream = fields.take("stream")?.unwrap_or(false);
        let options: Option<serde_json::Map<String, Value>> = fields.take("stream_options")?;
        if options.is_some() && !stream {
            let message = "stream_options is only for stream = true";
            return Err(ApiError::field("stream_options", message));
        }
        let mut include_usage = false;
        for (name, value) in options.into_iter().flatten() {
            match (name.as_str(), value) {
                ("include_usage", Value::Bool(asked)) => include_usage = asked,
                (name, value) => {
                    let message = format!("stream_options.{name} = {value} is not supported here");
                    return Err(ApiError::field("stream_options", message));
                }
            }
        }
        // Names the end user to the provider; nothing here depends on it, nor is it kept.
        let _user: Option<String> = fields.take("user")?;
        let stops = stop_strings(fields)?;
        let sampling = sampling(fields, &model.parts.stated, own_seed)?;
        Ok(Self { sampling, n, max_tokens: None, stops, stream, include_usage })
    }

    /// The request for answer `choice` to a prompt: each has a seed of its own, the first the one asked for.
    pub(crate) fn request(
        &self,
        model: &ServedModel,
        prompt: &[u32],
        choice: usize,
        default_tokens: usize,
    ) -> Result<Request, ApiError> {
        let room = model.room(prompt.len())?;
        let mut sampling = self.sampling.clone().into_fields();
        sampling.seed = sampling.seed.wrapping_add(choice as u64);
        let sampling = SamplingParams::new(sampling).map_err(ApiError::failed)?;
        // What is asked for and does not fit is refused by the engine, with both numbers.
        let max_new_tokens = self.max_tokens.unwrap_or(default_tokens.min(room));
        let mut request = Request::new(prompt.to_vec(), sampling, max_new_tokens);
        request.stop_tokens.clone_from(&model.parts.stop_tokens);
        Ok(request)
    }
}

fn stop_strings(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let refuse = |message: String| Err(ApiError::field("stop", message));
    let stops = match fields.take::<Value>("stop")? {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(list)) => {
            let text = |value: Value| match value {
                Value::String(text) => Ok(text),
                other => {
                    Err(ApiError::field("stop", format!("stop has {other}, which is no string")))
                }
            };
            list.into_iter().map(text).collect::<Result<_, _>>()?
        }
        Some(other) => return refuse(format!("stop is {other}, neither a string nor a list")),
    };
    if STOPS_MAX < stops.len() {
        return refuse(format!("stop has {} strings, at most {STOPS_MAX}", stops.len()));
    }
    match stops.iter().find(|stop| stop.is_empty() || STOP_BYTES_MAX < stop.len()) {
        Some(stop) => refuse(format!(
            "stop has a string of {} bytes, which is not in 1..={STOP_BYTES_MAX}",
            stop.len()
        )),
        None => Ok(stops),
    }
}

/// A whole answer.
#[derive(Debug)]
struct Answer {
    text: String,
    finish: &'static str,
    num_tokens: usize,
}

/// Waits for an answer.
async fn whole(mut reply: Reply<'_>) -> Result<Answer, ApiError> {
    let mut text = String::new();
    loop {
        match reply.next().await? {
            Piece::Text(piece) => text += &piece,
            Piece::End(finish) => {
                return Ok(Answer { text, finish, num_tokens: reply.num_tokens() });
            }
        }
    }
}

/// Waits for all answers of a request, read together: each ends at its own stop string. If one fails, or the
/// client leaves, the others are let go of.
async fn all_whole(
    shared: &Arc<Shared>,
    stops: Vec<String>,
    updates: Vec<Updates>,
) -> Result<Vec<Answer>, ApiError> {
    let mut tasks = JoinSet::new();
    let mut answers: Vec<Option<Answer>> = updates.iter().map(|_| None).collect();
    for (index, updates) in updates.into_iter().enumerate() {
        let (shared, stops) = (Arc::clone(shared), stops.clone());
        tasks.spawn(async move {
            (index, whole(Reply::new(&shared.model.parts.tokenizer, stops, updates)).await)
        });
    }
    while let Some(done) = tasks.join_next().await {
        let (index, answer) = done.map_err(|_| ApiError::failed("the request broke off"))?;
        answers[index] = Some(answer?);
    }
    Ok(answers.into_iter().flatten().collect())
}

/// The numbers of tokens, as `OpenAI` counts them.
fn usage(num_prompt: usize, num_new: usize) -> Value {
    json!({
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
    })
}

/// Numbers requests; the number names an answer and keys its randomness where no seed is given.
#[derive(Debug, Default)]
pub(crate) struct Numbers(AtomicU64);

impl Numbers {
    pub(crate) fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// The seed of a request that names none.
fn own_seed(shared: &Shared, number: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&shared.seed.to_le_bytes()).update(&number.to_le_bytes());
    let mut seed = [0; 8];
    seed.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(seed)
}

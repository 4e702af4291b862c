//! `/v1/chat/completions`: conversations answered.

use serde_json::{Map, Value, json};

use super::asked::{Asked, take_include_usage, take_n, take_user};
use super::format::{Format, Message};
use super::head::{Head, finish_reason, usage};
use super::logprobs::{self, Names};
use super::{Job, Preparing, prompt};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::model::ServedParts;
use crate::reply::Piece;

/// Alternatives that a chat may ask for at each token: `OpenAI`'s.
const TOP_LOGPROBS_MAX: usize = 20;
/// Fields that are not there yet and have no value that asks for nothing.
const LACKING: [&str; 7] = [
    "audio",
    "function_call",
    "functions",
    "prediction",
    "reasoning_effort",
    "service_tier",
    "web_search_options",
];

/// Answers a conversation.
pub(crate) fn job(preparing: Preparing<'_>, mut fields: Fields) -> Result<Job, ApiError> {
    let mut asked = Asked::take(&mut fields, preparing, "stop")?;
    let n = take_n(&mut fields)?;
    let include_usage = take_include_usage(&mut fields, asked.stream)?;
    take_user(&mut fields)?;
    asked.max_tokens = max_tokens(&mut fields)?;
    asked.logprobs = take_logprobs(&mut fields)?;
    let names = Names::take(&mut fields)?;
    let messages: Vec<Map<String, Value>> = fields.need("messages")?;
    let variables = prompt::take_variables(&mut fields)?;
    fields.lacking("tools", &[json!([])])?;
    let grammar = Grammar::take(&mut fields)?;
    fields.lacking("parallel_tool_calls", &[json!(true), json!(false)])?;
    fields.lacking("store", &[json!(false)])?;
    fields.lacking("tool_choice", &[json!("none"), json!("auto")])?;
    fields.lacking("modalities", &[json!(["text"])])?;
    LACKING.iter().try_for_each(|name| fields.lacking(name, &[]))?;
    fields.finish()?;
    asked.follow(preparing, grammar)?;
    let messages = prompt::checked("messages", messages, &["text"])?;
    let prompt = prompt::encode(preparing, "messages", &messages, variables.as_ref())?;
    let requests = (0..n).map(|choice| asked.request(preparing, &prompt, choice, usize::MAX));
    let requests = requests.collect::<Result<_, _>>()?;
    let object = if asked.stream { "chat.completion.chunk" } else { "chat.completion" };
    let format = Chat {
        head: preparing.head("chatcmpl", object),
        logprobs: asked.logprobs.map(|_| names),
        num_choices: n,
        num_prompt: prompt.len(),
        num_new: 0,
        num_cached: 0,
        include_usage,
    };
    asked.job(requests, format.num_prompt, format)
}

/// The newer name of the limit and the older; both at once have to agree.
fn max_tokens(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let limits = [fields.take("max_completion_tokens")?, fields.take("max_tokens")?];
    match limits {
        [Some(newer), Some(older)] if newer != older => {
            let message = format!("max_tokens is {older} and max_completion_tokens is {newer}");
            Err(ApiError::field("max_tokens", message))
        }
        [newer, older] => Ok(newer.or(older)),
    }
}

fn take_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    const TOP: &str = "top_logprobs";
    let is_asked = fields.take("logprobs")?.unwrap_or(false);
    let top: Option<usize> = fields.take(TOP)?;
    match top {
        Some(1..) if !is_asked => Err(ApiError::field(TOP, "top_logprobs wants logprobs = true")),
        Some(top) if TOP_LOGPROBS_MAX < top => {
            let message = format!("top_logprobs is {top}, at most {TOP_LOGPROBS_MAX}");
            Err(ApiError::field(TOP, message))
        }
        top => Ok(is_asked.then(|| top.unwrap_or(0))),
    }
}

struct Chat {
    head: Head,
    /// How tokens are named where their log-probabilities are told.
    logprobs: Option<Names>,
    num_choices: usize,
    num_prompt: usize,
    num_new: usize,
    num_cached: usize,
    include_usage: bool,
}

impl Chat {
    fn logprobs(&self, parts: &ServedParts, piece: &Piece) -> Option<Value> {
        self.logprobs.map(|names| logprobs::of_chat(parts, names, &piece.tokens))
    }

    fn chunk(&self, index: usize, delta: &Value, more: [Option<Value>; 2]) -> Message {
        let [logprobs, finish] = more;
        let choice = json!({
            "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish,
        });
        Message::data(&self.head.with(vec![choice], None))
    }
}

impl Format for Chat {
    fn whole(self: Box<Self>, parts: &ServedParts, answers: Vec<Piece>) -> Value {
        let num_new = answers.iter().map(|answer| answer.num_tokens).sum();
        let num_cached = answers.first().map_or(0, |answer| answer.num_cached);
        let choice = |(index, answer): (usize, &Piece)| {
            json!({
                "index": index,
                "message": { "role": "assistant", "content": answer.text, "refusal": null },
                "logprobs": self.logprobs(parts, answer),
                "finish_reason": finish_reason(answer),
            })
        };
        let choices = answers.iter().enumerate().map(choice).collect();
        self.head.with(choices, Some(usage(self.num_prompt, num_cached, num_new)))
    }

    fn begin(&mut self) -> Vec<Message> {
        let role = json!({ "role": "assistant", "content": "" });
        (0..self.num_choices).map(|index| self.chunk(index, &role, [None, None])).collect()
    }

    fn piece(&mut self, parts: &ServedParts, choice: usize, piece: Piece) -> Vec<Message> {
        self.num_new += piece.num_tokens;
        // The answers share one prompt, whose first reading counts.
        self.num_cached += if choice == 0 { piece.num_cached } else { 0 };
        let mut messages = Vec::with_capacity(2);
        if !piece.text.is_empty() || !piece.tokens.is_empty() {
            let delta = json!({ "content": piece.text });
            messages.push(self.chunk(choice, &delta, [self.logprobs(parts, &piece), None]));
        }
        if let Some(finish) = finish_reason(&piece) {
            messages.push(self.chunk(choice, &json!({}), [None, Some(finish.into())]));
        }
        messages
    }

    fn end(&mut self) -> Vec<Message> {
        self.head
            .end(self.include_usage.then(|| usage(self.num_prompt, self.num_cached, self.num_new)))
    }
}

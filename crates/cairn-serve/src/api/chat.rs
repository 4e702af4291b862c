//! `/v1/chat/completions`: conversations answered.

use serde_json::{Map, Value, json};

use super::asked::{Asked, Wanted, take_include_usage, take_n, take_user};
use super::format::{Format, Message};
use super::head::{Counts, Head, finish_reason};
use super::logprobs::{self, Names};
use super::tools::Tools;
use super::{Job, Preparing, beams, conversation, prompt};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::model::ServedParts;
use crate::outline::CallDelta;
use crate::reply::Piece;

/// vLLM's limit of what is thought.
const BUDGET: &str = "thinking_token_budget";
/// Why an answer ended that calls something.
const CALLED: &str = "tool_calls";

/// Alternatives that a chat may ask for at each token: `OpenAI`'s.
const TOP_LOGPROBS_MAX: usize = 20;
/// Fields that are not there yet and have no value that asks for nothing.
const LACKING: [&str; 6] =
    ["audio", "function_call", "functions", "prediction", "service_tier", "web_search_options"];

/// Answers a conversation.
pub(crate) fn job(preparing: Preparing<'_>, mut fields: Fields) -> Result<Job, ApiError> {
    let beams = beams::take(&mut fields)?;
    let mut asked = Asked::take(&mut fields, preparing, "stop")?;
    let n = take_n(&mut fields)?;
    let include_usage = take_include_usage(&mut fields, asked.stream)?;
    take_user(&mut fields)?;
    asked.max_tokens = max_tokens(&mut fields)?;
    asked.logprobs = take_logprobs(&mut fields)?;
    let names = Names::take(&mut fields)?;
    let messages: Vec<Map<String, Value>> = fields.need("messages")?;
    let mut variables = prompt::take_variables(preparing, &mut fields)?;
    let effort = fields.take("reasoning_effort")?;
    prompt::set_effort(preparing, "reasoning_effort", effort, &mut variables)?;
    let tools = Tools::take_of_chat(&mut fields)?;
    let grammar = Grammar::take(&mut fields)?;
    let budget: Option<usize> = fields.take(BUDGET)?;
    let thinking_budget = budget.map(|budget| (BUDGET, budget));
    fields.lacking("store", &[json!(false)])?;
    fields.lacking("modalities", &[json!(["text"])])?;
    LACKING.iter().try_for_each(|name| fields.lacking(name, &[]))?;
    fields.finish()?;
    let messages = conversation::of_chat(preparing, messages)?;
    let prompt = prompt::encode(preparing, "messages", &messages, (&tools, &variables))?;
    let wanted = Wanted { grammar, tools: &tools, prompt: &prompt, thinking_budget };
    asked.plan(preparing, wanted)?;
    let choices = 0..if beams.is_some() { 1 } else { n };
    let requests = choices.map(|choice| asked.request(preparing, &prompt, choice, usize::MAX));
    let requests: Vec<_> = requests.collect::<Result<_, _>>()?;
    if let Some(beams) = beams {
        asked.beams = Some(beams::of_requests(beams, n, &requests, preparing.parts())?);
    }
    let object = if asked.stream { "chat.completion.chunk" } else { "chat.completion" };
    let format = Chat {
        head: preparing.head("chatcmpl", object),
        logprobs: asked.logprobs.map(|_| names),
        num_choices: n,
        num_prompt: prompt.len(),
        counts: Counts::default(),
        include_usage,
        have_called: vec![false; n],
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
    counts: Counts,
    include_usage: bool,
    /// Which of the answers have called something.
    have_called: Vec<bool>,
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
        let mut counts = Counts::default();
        answers.iter().enumerate().for_each(|(index, answer)| counts.note(answer, index == 0));
        let choice = |(index, answer): (usize, &Piece)| {
            let reason = finish_reason(answer).map(|reason| match reason {
                "stop" if !answer.calls.is_empty() => CALLED,
                reason => reason,
            });
            json!({
                "index": index,
                "message": message(answer),
                "logprobs": self.logprobs(parts, answer),
                "finish_reason": reason,
            })
        };
        let choices = answers.iter().enumerate().map(choice).collect();
        self.head.with(choices, Some(counts.usage(self.num_prompt)))
    }

    fn begin(&mut self) -> Vec<Message> {
        let role = json!({ "role": "assistant", "content": "" });
        (0..self.num_choices).map(|index| self.chunk(index, &role, [None, None])).collect()
    }

    fn piece(&mut self, parts: &ServedParts, choice: usize, piece: Piece) -> Vec<Message> {
        // The answers share one prompt, whose first reading counts.
        self.counts.note(&piece, choice == 0);
        let mut deltas = Vec::with_capacity(2);
        if !piece.reasoning.is_empty() {
            deltas.push(json!({ "reasoning_content": piece.reasoning }));
        }
        if !piece.text.is_empty() {
            deltas.push(json!({ "content": piece.text }));
        }
        self.have_called[choice] |= !piece.calls.is_empty();
        let delta = |call: &CallDelta| json!({ "tool_calls": [call_delta(call)] });
        deltas.extend(piece.calls.iter().map(delta));
        if deltas.is_empty() && !piece.tokens.is_empty() {
            deltas.push(json!({ "content": "" }));
        }
        // What a piece was made of is told with its first delta.
        let mut logprobs = self.logprobs(parts, &piece);
        let chunk = |delta: &Value| self.chunk(choice, delta, [logprobs.take(), None]);
        let mut messages: Vec<Message> = deltas.iter().map(chunk).collect();
        if let Some(finish) = finish_reason(&piece) {
            let has_called = finish == "stop" && self.have_called[choice];
            let finish = if has_called { CALLED } else { finish };
            messages.push(self.chunk(choice, &json!({}), [None, Some(finish.into())]));
        }
        messages
    }

    fn end(&mut self) -> Vec<Message> {
        self.head.end(self.include_usage.then(|| self.counts.usage(self.num_prompt)))
    }
}

/// The message of a whole answer.
fn message(answer: &Piece) -> Value {
    let mut message = json!({ "role": "assistant", "content": answer.text, "refusal": null });
    if !answer.reasoning.is_empty() {
        message["reasoning_content"] = answer.reasoning.as_str().into();
    }
    if !answer.calls.is_empty() {
        if answer.text.is_empty() {
            message["content"] = Value::Null;
        }
        let call = |call: &CallDelta| {
            let mut call = call_delta(call);
            call.as_object_mut().map(|call| call.remove("index"));
            call
        };
        message["tool_calls"] = answer.calls.iter().map(call).collect();
    }
    message
}

/// The next piece of a call: first its head, then its arguments.
fn call_delta(call: &CallDelta) -> Value {
    match &call.head {
        Some((id, name)) => json!({
            "index": call.index, "id": format!("call_{id}"), "type": "function",
            "function": { "name": name, "arguments": call.arguments },
        }),
        None => json!({ "index": call.index, "function": { "arguments": call.arguments } }),
    }
}

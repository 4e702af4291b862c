//! What requests that generate ask for beside their prompts.

use std::ops::Range;
use std::sync::Arc;

use cairn_data::chat::{CallForm, ReasoningMarkers};
use cairn_data::tokenizer::Tokenizer;
use cairn_engine::{BeamParams, Constraint, Request, SamplingParams};
use serde_json::{Map, Value};

use super::conversation::no_form;
use super::format::Format;
use super::tools::{ToolChoice, Tools};
use super::{Job, Preparing};
use crate::calls::{CallGrammar, Start};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;
use crate::guide::{ByteMarker, Goal, Guide, Thoughts};
use crate::model::{ServedModel, ServedParts};
use crate::outline::{Marker, Outline, symbols};
use crate::reply::Reading;
use crate::sampling::sampling;

/// Answers of a request, at most.
pub(super) const CHOICES_MAX: usize = 64;
/// Log-probabilities that a request may be told, at most: each takes some forty bytes of its answer.
const LOGPROBS_MAX: usize = 1 << 19;
/// Stop strings of a request, at most.
const STOPS_MAX: usize = 16;
/// Tokens of spaces behind the marker that begins what is thought, at most.
const SPACES_MAX: usize = 16;
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
    constraint: Option<Box<dyn Constraint>>,
    /// What they are made of, if not of text alone.
    outline: Option<Arc<Outline>>,
    /// How the likeliest are searched for, if they are.
    pub(super) beams: Option<BeamParams>,
}

/// What the answers to a conversation are to be.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    /// What is said follows it.
    pub(super) grammar: Option<Grammar>,
    pub(super) tools: &'a Tools,
    /// The conversation as the model is given it.
    pub(super) prompt: &'a [u32],
    /// Tokens of what is thought, at most, and the field that says so.
    pub(super) thinking_budget: Option<(&'static str, usize)>,
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
            outline: None,
            beams: None,
        })
    }

    /// Has the answers follow a grammar.
    pub(super) fn follow(
        &mut self,
        preparing: Preparing<'_>,
        grammar: Option<Grammar>,
    ) -> Result<(), ApiError> {
        if let Some(grammar) = grammar {
            let ServedModel { parts, grammars, .. } = preparing.model;
            self.constraint = Some(Box::new(grammars.compile(parts, &grammar)?));
        }
        Ok(())
    }

    /// Has the answers to a conversation be thought, said and called as is wanted.
    pub(super) fn plan(
        &mut self,
        preparing: Preparing<'_>,
        wanted: Wanted<'_>,
    ) -> Result<(), ApiError> {
        let (parts, shape) = (preparing.parts(), preparing.shape());
        let Wanted { grammar, tools, prompt, thinking_budget } = wanted;
        if let (Some((field, _)), None) = (thinking_budget, &shape.reasoning) {
            let message =
                format!("{field}: this model does not tell what it thinks from what it says");
            return Err(ApiError::field(field, message));
        }
        let budget = thinking_budget.map(|(_, budget)| budget);
        let mut outline = Outline::default();
        let mut thoughts = None;
        if let Some(markers) = &shape.reasoning {
            let is_open = is_thinking(&parts.tokenizer, &markers.open, prompt)?;
            outline = outline.with_reasoning(markers, &parts.tokenizer, is_open);
            thoughts = Some(thoughts_of(parts, markers, is_open, budget)?);
        }
        let goal = if tools.may_call() {
            let Some(form) = &shape.calls else { return Err(no_form("tools")) };
            if grammar.is_some() {
                let message =
                    "tools that may be called and a format of the answer exclude each other here";
                return Err(ApiError::field("tools", message));
            }
            let ids = blake3::hash(preparing.id("calls").as_bytes());
            outline = outline.with_calls(form, &parts.tokenizer, ids);
            calls_of(preparing, form, tools)?
        } else {
            match grammar {
                None => Goal::Free,
                Some(grammar) => {
                    let ServedModel { parts, grammars, .. } = preparing.model;
                    Goal::Follow(grammars.compile(parts, &grammar)?)
                }
            }
        };
        if shape.reasoning.is_some() || tools.may_call() {
            self.outline = Some(Arc::new(outline));
        }
        let is_free = matches!(goal, Goal::Free) && thinking_budget.is_none();
        if !is_free {
            let field = thinking_budget.map_or("tools", |(field, _)| field);
            let words = preparing.model.grammars.words(parts, field)?;
            self.constraint = Some(Box::new(Guide::new(words, thoughts, goal)));
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
        let room = preparing.model.room(prompt.len())?;
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
        request.constraint.clone_from(&self.constraint);
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
        let reading = Reading { stops: self.stops, outline: self.outline };
        let streams = self.stream;
        let beams = self.beams;
        Ok(Job { requests, num_prompt, reading, beams, streams, format: Box::new(format) })
    }
}

/// Whether the prompt ends with the marker of what is thought, and maybe spaces.
fn is_thinking(tokenizer: &Tokenizer, open: &str, prompt: &[u32]) -> Result<bool, ApiError> {
    let text = |ids: &[u32]| tokenizer.decode(ids).map_err(ApiError::failed);
    let mut said = prompt.len();
    while prompt.len() < said + SPACES_MAX
        && 0 < said
        && text(&prompt[said - 1..said])?.trim().is_empty()
    {
        said -= 1;
    }
    let open_ids = tokenizer.encode_with_specials(open).map_err(ApiError::failed)?;
    if let [only] = open_ids.as_slice() {
        return Ok(prompt[..said].last() == Some(only));
    }
    // Each of its tokens has a byte of it, unless it has none at all.
    let from = said.saturating_sub(2 * open.len());
    Ok(text(&prompt[from..said])?.trim_end().ends_with(open))
}

fn thoughts_of(
    parts: &ServedParts,
    markers: &ReasoningMarkers,
    is_open: bool,
    budget: Option<usize>,
) -> Result<Thoughts, ApiError> {
    let marker = |text: &str| ByteMarker::new(&symbols(text, Some(parts.tokenizer.specials())));
    let open_ids = parts.tokenizer.encode_with_specials(&markers.open).map_err(ApiError::failed)?;
    let close_ids =
        parts.tokenizer.encode_with_specials(&markers.close).map_err(ApiError::failed)?;
    Ok(Thoughts {
        open: marker(&markers.open),
        close: marker(&markers.close),
        is_open,
        open_ids,
        ends: parts.stop_tokens.clone(),
        budget: budget.map(|budget| (budget, close_ids)),
    })
}

/// What is to be called, as a grammar.
fn calls_of(preparing: Preparing<'_>, form: &CallForm, tools: &Tools) -> Result<Goal, ApiError> {
    const FIELD: &str = "tools";
    let ServedModel { parts, grammars, .. } = preparing.model;
    let (places, callables): (Vec<usize>, Vec<_>) = tools.callables().into_iter().unzip();
    let blame = |at: usize, reason: &str| {
        let message = format!("the schema of tools[{}]: {reason}", places[at]);
        ApiError::field(FIELD, message)
    };
    let tokenizer = &parts.tokenizer;
    let start = if tools.choice == ToolChoice::Auto { Start::Marker } else { Start::Answer };
    let is_parallel = tools.is_parallel && !matches!(tools.choice, ToolChoice::Named(_));
    let grammar = CallGrammar { form, tokenizer, callables: &callables, is_parallel, start };
    let lark = grammar.lark().map_err(|(at, reason)| blame(at, &reason))?;
    let following = grammars.compile(parts, &Grammar::own(FIELD, lark)).map_err(|error| {
        // Which of them it is, if one alone is wrong. Halves are looked at: together as much work as the whole.
        let refusal = |range: Range<usize>| {
            let grammar = CallGrammar { callables: &callables[range], ..grammar };
            grammars.compile(parts, &Grammar::own(FIELD, grammar.lark().ok()?)).err()
        };
        let mut range = 0..callables.len();
        while 1 < range.len() {
            let middle = range.start + range.len() / 2;
            let first = range.start..middle;
            range = if refusal(first.clone()).is_some() { first } else { middle..range.end };
        }
        let at = range.start;
        refusal(range).map_or(error, |error| blame(at, &error.to_string()))
    })?;
    if start == Start::Answer {
        return Ok(Goal::Follow(following));
    }
    let Marker { text, is_anchored } = Marker::of(form, tokenizer);
    let marker = ByteMarker::new(&symbols(&text, Some(tokenizer.specials())));
    Ok(Goal::Call { marker, is_anchored, following })
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use cairn_data::chat::{ChatInput, ChatTemplate};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_prompt_begins_what_is_thought_where_its_template_does() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tokenizers");
        let tokenizer = Tokenizer::load(&folder.join("byte_level/tokenizer.json")).unwrap();
        let is_thinking_after = |role: &str, open: &str| {
            // As templates do that go on thinking after a result.
            let source = format!(
                "{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}<|im_start|>\
                 {{% if messages[-1].role != 'tool' %}}{open}\n\n{{% endif %}}"
            );
            let template = ChatTemplate::parse(&source, Path::new("t")).unwrap();
            let messages = [json!({ "role": role, "content": "wet" })];
            let specials = BTreeMap::new();
            let input = ChatInput::new(&messages, &specials);
            let prompt = template.encode(&tokenizer, &input).unwrap();
            is_thinking(&tokenizer, open, &prompt).unwrap()
        };
        for open in ["<think>", "[muse]"] {
            assert!(is_thinking_after("user", open), "{open}");
            assert!(!is_thinking_after("tool", open), "{open}");
        }
        // Nor does a text that spells the marker where a token is meant.
        let split = ["<thi", "nk>"].map(|text| tokenizer.encode(text).unwrap()).concat();
        assert!(!is_thinking(&tokenizer, "<think>", &split).unwrap());
        assert!(!is_thinking(&tokenizer, "<think>", &[]).unwrap());
    }
}

//! Beam search: the likeliest answers, found by asking what may come after each of the best so far, a token at a
//! time. Each step is a request like others, whose prompt is in the cache but for its end, so others run between.

use cairn_engine::{
    BeamParams, BeamSearch, EarlyStopping, Finish, Request, SamplingParams, TOP_LOGPROBS_MAX,
};
use serde_json::Value;

use crate::driver::{Coming, Driver, Update};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::ServedParts;
use crate::reply::{Piece, Reading, replayed};

/// The field that asks for it.
const NAME: &str = "use_beam_search";
/// Fields that say how tokens are chosen, which this search does not.
const CHOOSING: [&str; 20] = [
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "tfs_z",
    "tfs",
    "epsilon_cutoff",
    "eta_cutoff",
    "mirostat",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "logit_bias",
    "seed",
    "stream",
    "echo",
    "logprobs",
    "response_format",
    "structured_outputs",
];

/// Takes whether the likeliest answers are searched for, and how; to be asked before what says how tokens are
/// chosen is taken.
pub(super) fn take(fields: &mut Fields) -> Result<Option<BeamParams>, ApiError> {
    let is_asked = fields.take(NAME)?.unwrap_or(false);
    let length_penalty = fields.number("length_penalty")?;
    let early_stopping: Option<Value> = fields.take("early_stopping")?;
    let given = [
        ("length_penalty", length_penalty.is_some()),
        ("early_stopping", early_stopping.is_some()),
    ];
    if !is_asked {
        return match given.iter().find(|(_, is_given)| *is_given) {
            Some((name, _)) => {
                Err(ApiError::field(name, format!("{name} is only for {NAME} = true")))
            }
            None => Ok(None),
        };
    }
    if let Some(name) = CHOOSING.iter().find(|name| fields.says(name)) {
        return Err(ApiError::field(name, format!("{name} and {NAME} exclude each other here")));
    }
    // 0 and 1 are what clients say that say nothing.
    let temperature = fields.value("temperature").and_then(Value::as_f64);
    if let Some(other) = temperature.filter(|number| ![0.0, 1.0].contains(number)) {
        let message = format!("temperature is {other}; {NAME} takes 0 and 1, which change nothing");
        return Err(ApiError::field("temperature", message));
    }
    let mut params = BeamParams::new(1);
    params.length_penalty = length_penalty.unwrap_or(params.length_penalty);
    params.early_stopping = match early_stopping {
        None | Some(Value::Bool(false)) => EarlyStopping::WhenUnlikely,
        Some(Value::Bool(true)) => EarlyStopping::AtOnce,
        Some(Value::String(word)) if word == "never" => EarlyStopping::WhenImpossible,
        Some(other) => {
            let message = format!("early_stopping is {other}, none of true, false, \"never\"");
            return Err(ApiError::field("early_stopping", message));
        }
    };
    Ok(Some(params))
}

/// As many beams as answers are wanted, for requests that the search can be made of.
pub(super) fn of_requests(
    params: BeamParams,
    n: usize,
    requests: &[Request],
    parts: &ServedParts,
) -> Result<BeamParams, ApiError> {
    let params = BeamParams { num_beams: n, num_return_sequences: n, ..params };
    for request in requests {
        let wanted = BeamSearch::new(params, 1, &request.stop_tokens).num_wanted();
        if TOP_LOGPROBS_MAX < wanted {
            let message = format!(
                "n = {n} beams look at {wanted} tokens after each; at most {TOP_LOGPROBS_MAX} are told"
            );
            return Err(ApiError::field("n", message));
        }
        if request.constraint.is_some() {
            let message =
                format!("{NAME} and what the answer has to follow exclude each other here");
            return Err(ApiError::field(NAME, message));
        }
        let (num_prompt, max_new) = (request.prompt.len(), request.max_new_tokens);
        if max_new == 0 || parts.max_context < num_prompt.saturating_add(max_new) {
            let message = format!(
                "max_tokens is {max_new}, and the prompt has {num_prompt} of {} tokens",
                parts.max_context
            );
            return Err(ApiError::field("max_tokens", message));
        }
    }
    Ok(params)
}

/// What a search begins with.
#[derive(Debug)]
struct Start {
    prompt: Vec<u32>,
    max_new_tokens: usize,
    stop_tokens: Vec<u32>,
    priority: i32,
    cache_salt: u64,
}

impl Start {
    fn of(request: Request) -> Self {
        let Request { prompt, max_new_tokens, stop_tokens, priority, cache_salt, .. } = request;
        Self { prompt, max_new_tokens, stop_tokens, priority, cache_salt }
    }
}

/// The likeliest answers to each prompt, best first.
pub(super) async fn answers(
    driver: &Driver,
    requests: Vec<Request>,
    (params, coming): (BeamParams, Coming),
    (parts, reading): (&ServedParts, &Reading),
) -> Result<Vec<Piece>, ApiError> {
    // The first step is one sequence, and later ones are not refused.
    driver.check_count(params.num_beams)?;
    let mut coming = Some(coming);
    let mut answers = Vec::with_capacity(requests.len() * params.num_beams);
    let starts: Vec<Start> = requests.into_iter().map(Start::of).collect();
    for request in starts {
        let mut num_cached = None;
        let mut search = BeamSearch::new(params, request.max_new_tokens, &request.stop_tokens);
        loop {
            let coming = coming.take().unwrap_or(Coming::Further);
            let after = step(driver, &request, (&search, coming), &mut num_cached).await?;
            if !search.advance_by(|beam| after[beam].iter().copied()) {
                break;
            }
        }
        for hypothesis in search.into_hypotheses() {
            let last = hypothesis.tokens.last();
            let ends = last.is_some_and(|token| request.stop_tokens.contains(token));
            let finish = if ends { Finish::Stop } else { Finish::Length };
            let index = answers.len();
            let mut piece =
                replayed(&parts.tokenizer, reading, index, (&hypothesis.tokens, finish))?;
            piece.num_cached = num_cached.unwrap_or(0);
            answers.push(piece);
        }
    }
    Ok(answers)
}

/// What may come after each beam, in order of id.
async fn step(
    driver: &Driver,
    request: &Start,
    (search, coming): (&BeamSearch<'_>, Coming),
    num_cached: &mut Option<usize>,
) -> Result<Vec<Vec<(u32, f32)>>, ApiError> {
    let one = |tokens: &[u32]| {
        let prompt = [&request.prompt, tokens].concat();
        Request {
            logprobs: Some(search.num_wanted()),
            priority: request.priority,
            cache_salt: request.cache_salt,
            ..Request::new(prompt, SamplingParams::greedy(), 1)
        }
    };
    let requests: Vec<Request> = search.beams().map(one).collect();
    let mut num_open = requests.len();
    let mut after = vec![Vec::new(); requests.len()];
    let mut updates = driver.add(requests, coming).await?;
    while num_open != 0 {
        let (beam, update) = updates.next().await.ok_or_else(ApiError::engine_gone)?;
        match update {
            // What was there before the first step is what others have left.
            Update::Admitted(prefix) => _ = num_cached.get_or_insert(prefix.num_cached_tokens),
            Update::Token(_, logprobs) => {
                let mut top = logprobs.map(|logprobs| logprobs.top).unwrap_or_default();
                top.sort_unstable_by_key(|(token, _)| *token);
                after[beam] = top;
            }
            Update::Finished(_) => num_open -= 1,
            Update::Failed(error) => return Err(error),
            Update::Prompt(_) => {}
        }
    }
    Ok(after)
}

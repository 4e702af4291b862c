//! The endpoints. Those that generate differ in how they read a body and in how they write answers, a [`Format`];
//! what lies between is [`generate`].

mod asked;
mod beams;
mod chat;
mod completions;
mod conversation;
mod embeddings;
mod format;
mod head;
mod logprobs;
mod messages;
mod prompt;
mod responses;
mod tokens;
mod tools;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, post};
use cairn_engine::{BeamParams, Request};

pub(crate) use self::chat::job as chat_completions;
pub(crate) use self::completions::job as completions;
pub(crate) use self::embeddings::embeddings;
pub(crate) use self::messages::{Refused, count_tokens, messages};
pub(crate) use self::responses::job as responses;
pub(crate) use self::tokens::{detokenize, tokenize, tokenizer_info};

use self::format::{Format, stream};
use crate::account::Account;
use crate::driver::Coming;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::intake::Body;
use crate::keys::Holder;
use crate::model::{ServedModel, ServedParts, Shape};
use crate::reply::{Piece, Reading, Reply};
use crate::server::Shared;

/// A request as it is prepared, away from the threads that serve connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Preparing<'a> {
    shared: &'a Shared,
    /// The model that is asked.
    model: &'a ServedModel,
    /// Numbers the request: names its answer, and keys its randomness where no seed is given.
    number: u64,
    /// Whose key it came with.
    holder: &'a Holder,
}

impl<'a> Preparing<'a> {
    /// What the model's answers are made of.
    fn shape(self) -> &'a Shape {
        self.model.shape()
    }

    /// Separates what is cached for different keys, and within one for different words of its holder: how soon an
    /// answer comes tells whether its prompt was there.
    fn cache_salt(&self, own: Option<&str>) -> u64 {
        let holder = self.holder.mark();
        if holder.is_none() && own.is_none() {
            return 0;
        }
        let mut hasher = blake3::Hasher::new();
        if let Some(mark) = holder {
            hasher.update(mark);
        }
        hasher.update(own.unwrap_or_default().as_bytes());
        first_word(&hasher)
    }

    fn parts(&self) -> &ServedParts {
        &self.model.parts
    }

    /// Takes the model's name, by which the model was found already.
    fn take_model(&self, fields: &mut Fields) -> Result<(), ApiError> {
        fields.take::<String>("model").map(|_| ())
    }

    /// The seed of a request that names none.
    fn own_seed(&self) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.shared.seed.to_le_bytes()).update(&self.number.to_le_bytes());
        first_word(&hasher)
    }
}

fn first_word(hasher: &blake3::Hasher) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(word)
}

/// What a request wants of the engine, and how it is told.
pub(crate) struct Job {
    requests: Vec<Request>,
    /// Tokens of its prompts.
    num_prompt: usize,
    reading: Reading,
    /// How the likeliest answers are searched for, if they are; then the requests are one for each prompt.
    beams: Option<BeamParams>,
    /// Whether answers are told piece by piece.
    streams: bool,
    format: Box<dyn Format>,
}

impl Job {
    /// Answers, of all prompts together.
    fn num_choices(&self) -> usize {
        self.requests.len() * self.beams.map_or(1, |beams| beams.num_beams)
    }

    /// Tokens that it counts against a key's tokens a minute: those of its prompts, and as many new ones as each
    /// answer may have; each beam has its own.
    fn num_tokens_max(&self) -> usize {
        let num_beams = self.beams.map_or(1, |beams| beams.num_beams);
        let new = self.requests.iter().map(|request| request.max_new_tokens);
        let new = new.fold(0, usize::saturating_add).saturating_mul(num_beams);
        new.saturating_add(self.num_prompt)
    }
}

/// Reads a request.
type Prepare = fn(Preparing<'_>, Fields) -> Result<Job, ApiError>;

/// An endpoint that generates.
pub(crate) fn generating(prepare: Prepare) -> MethodRouter<Arc<Shared>> {
    let answer =
        move |State(shared): State<Arc<Shared>>, body: Body| generate(shared, body, prepare);
    post(answer)
}

/// Reads a body, has it computed and writes the answers.
async fn generate(shared: Arc<Shared>, body: Body, prepare: Prepare) -> Result<Response, ApiError> {
    let (number, begin, holder) = (body.number, body.begin, body.holder.clone());
    let (job, model) = prepared(&shared, body, prepare).await?;
    let num_tokens = job.num_tokens_max();
    let metrics = Arc::clone(&shared.metrics);
    let num_choices = job.num_choices();
    let parts = &model.parts;
    let coming = Coming::Anew { begin, holder, num_tokens };
    if let Some(beams) = job.beams {
        let mut account = Account::new(number, metrics, begin, job.num_prompt, num_choices);
        let with = (parts, &job.reading);
        let answers = beams::answers(model.driver()?, job.requests, (beams, coming), with).await;
        let answers = answers.inspect_err(|error| account.fail(error.to_string()))?;
        answers.iter().for_each(|answer| account.note(answer));
        return whole(model, job.format, answers).await;
    }
    let updates = model.driver()?.add(job.requests, coming).await?;
    let mut account = Account::new(number, metrics, begin, job.num_prompt, num_choices);
    if job.streams {
        let answers = (job.reading, updates);
        return Ok(stream(model, job.format, answers, (account, shared.write_timeout)));
    }
    let mut answers = vec![Piece::default(); updates.num_choices()];
    let mut reply = Reply::new(&parts.tokenizer, &job.reading, updates);
    loop {
        match reply.next().await {
            Ok(Some((index, piece))) => {
                account.note(&piece);
                answers[index].extend(piece);
            }
            Ok(None) => break,
            Err(error) => {
                account.fail(error.to_string());
                return Err(error);
            }
        }
    }
    drop(reply);
    whole(model, job.format, answers).await
}

/// Writes whole answers.
async fn whole(
    model: Arc<ServedModel>,
    format: Box<dyn Format>,
    answers: Vec<Piece>,
) -> Result<Response, ApiError> {
    // They may be long, with all their log-probabilities.
    let write = move || Json(format.whole(&model.parts, answers)).into_response();
    let written = tokio::task::spawn_blocking(write).await;
    written.map_err(|_| ApiError::failed("writing the answer failed here"))
}

/// Reads a body with the model that it names.
async fn prepared<T: Send + 'static>(
    shared: &Arc<Shared>,
    body: Body,
    prepare: fn(Preparing<'_>, Fields) -> Result<T, ApiError>,
) -> Result<(T, Arc<ServedModel>), ApiError> {
    // Who has this is served to the end; who comes too late is told before the work.
    let serving = shared.models.serving()?;
    let (number, holder, with) = (body.number, body.holder.clone(), Arc::clone(shared));
    let read = move |fields: Fields| {
        let model = serving.find(fields.text("model"))?;
        let preparing = Preparing { shared: &with, model: &model, number, holder: &holder };
        let found = prepare(preparing, fields)?;
        Ok((found, model))
    };
    shared.intake.prepare(body, read).await
}

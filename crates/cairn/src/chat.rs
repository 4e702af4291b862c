//! A conversation: its messages, the model that answers, and what of it the model still holds.
//!
//! **Invariant:** messages after the system's come in pairs, a question and its answer: a question
//! that failed leaves no trace.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use cairn_artifacts::atomic;
use cairn_data::chat::{ChatInput, ChatTemplate};
use cairn_data::tokenizer::Tokenizer;
use cairn_engine::{Engine, Finish, Request, SamplingParams};
use serde_json::{Map, Value, json};

use crate::failure::UserError;
use crate::signals::StopFlag;

/// Tokens of an answer, where nothing is asked for.
const MAX_NEW_TOKENS: usize = 1024;

/// What a conversation is made of.
pub(crate) struct ChatParts<'a> {
    /// The model.
    pub(crate) engine: Engine,
    /// Its tokenizer.
    pub(crate) tokenizer: &'a Tokenizer,
    /// Its chat template.
    pub(crate) template: ChatTemplate,
    /// Special tokens by name, for the template.
    pub(crate) special_tokens: BTreeMap<String, String>,
    /// Further variables of the template.
    pub(crate) variables: Map<String, Value>,
    /// Tokens that end an answer.
    pub(crate) stops: Vec<u32>,
    /// How tokens are chosen.
    pub(crate) sampling: SamplingParams,
    /// Tokens of an answer at most.
    pub(crate) max_new_tokens: Option<usize>,
    /// Whether old turns may go.
    pub(crate) drops_oldest: bool,
    /// The system's message.
    pub(crate) system: Option<String>,
    /// Whether someone asked to stop.
    pub(crate) stop: StopFlag,
}

/// A conversation.
pub(crate) struct Chat<'a> {
    parts: ChatParts<'a>,
    messages: Vec<Value>,
}

/// What an answer took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    /// Tokens of the conversation before it.
    pub(crate) num_prompt_tokens: usize,
    /// Of those, tokens that the model still held.
    pub(crate) num_reused_tokens: usize,
    /// Tokens of the answer.
    pub(crate) num_new_tokens: usize,
    /// Messages that had to go.
    pub(crate) num_dropped: usize,
    /// Ids among the new ones that are no tokens.
    pub(crate) num_unknown: usize,
    /// Whether the context ended it.
    pub(crate) is_cut: bool,
    /// Why it ended.
    pub(crate) finish: Finish,
}

impl<'a> Chat<'a> {
    /// Begins a conversation.
    pub(crate) fn new(parts: ChatParts<'a>) -> Self {
        let mut chat = Self { parts, messages: Vec::new() };
        chat.reset();
        chat
    }

    /// The messages so far.
    pub(crate) fn messages(&self) -> &[Value] {
        &self.messages
    }

    /// Begins anew, with the same system's message.
    pub(crate) fn reset(&mut self) {
        let system = self.parts.system.as_ref();
        self.messages =
            system.map(|text| json!({"role": "system", "content": text})).into_iter().collect();
    }

    /// Begins anew with another system's message.
    pub(crate) fn set_system(&mut self, system: Option<String>) {
        self.parts.system = system;
        self.reset();
    }

    /// Takes the last question and its answer back; returns the question.
    pub(crate) fn undo(&mut self) -> Option<String> {
        let first = self.num_system();
        let question = self.messages.len().checked_sub(2).filter(|at| first <= *at)?;
        let text = self.messages[question]["content"].as_str().unwrap_or_default().to_owned();
        self.messages.truncate(question);
        Some(text)
    }

    /// Writes the messages.
    pub(crate) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let text = format!("{:#}\n", Value::Array(self.messages.clone()));
        Ok(atomic::write_bytes(path, text.as_bytes())?)
    }

    fn num_system(&self) -> usize {
        usize::from(self.parts.system.is_some())
    }

    /// Asks a question; `emit` gets the answer as it comes.
    pub(crate) fn ask(
        &mut self,
        question: &str,
        emit: &mut dyn FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Answer> {
        let before = self.messages.clone();
        let answer = self.try_ask(question, emit);
        if answer.is_err() {
            self.messages = before;
        }
        answer
    }

    fn try_ask(
        &mut self,
        question: &str,
        emit: &mut dyn FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Answer> {
        self.parts.stop.clear();
        self.messages.push(json!({"role": "user", "content": question}));
        let (prompt, num_dropped) = self.prompt()?;
        let room = self.parts.engine.options().max_context - prompt.len();
        let asked = self.parts.max_new_tokens.unwrap_or(MAX_NEW_TOKENS);
        let mut request =
            Request::new(prompt.clone(), self.parts.sampling.clone(), asked.min(room));
        request.stop_tokens = self.parts.stops.clone();
        let ChatParts { engine, tokenizer, stop, .. } = &mut self.parts;
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        let mut failure = None;
        let mut num_unknown = 0;
        let output = engine.generate(request, &mut |token| {
            // A model may have more rows than the tokenizer has tokens.
            let is_unknown = tokenizer.token(token).is_none();
            num_unknown += usize::from(is_unknown);
            // What structures the conversation is not part of the answer.
            if !is_unknown && !tokenizer.specials().contains_key(&token) {
                let emitted = stream.push(token).map_err(anyhow::Error::from).and_then(|piece| {
                    text += &piece;
                    emit(&piece)
                });
                if let Err(error) = emitted {
                    failure = Some(error);
                    return ControlFlow::Break(());
                }
            }
            if stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        let rest = stream.finish()?;
        text += &rest;
        emit(&rest)?;
        self.messages.push(json!({"role": "assistant", "content": text}));
        let is_cut = output.finish == Finish::Length && room <= asked;
        Ok(Answer {
            num_prompt_tokens: prompt.len(),
            num_reused_tokens: output.prefix.num_cached_tokens,
            num_new_tokens: output.tokens.len(),
            num_dropped,
            num_unknown,
            is_cut,
            finish: output.finish,
        })
    }

    /// The conversation as ids that leave room for an answer, and how many messages had to go.
    fn prompt(&mut self) -> anyhow::Result<(Vec<u32>, usize)> {
        let max_context = self.parts.engine.options().max_context;
        // An answer of a few words must fit; with old turns to drop, a quarter of the context.
        let wanted = match self.parts.drops_oldest {
            true => self.parts.max_new_tokens.unwrap_or(MAX_NEW_TOKENS).min(max_context / 4).max(1),
            false => 1,
        };
        let mut num_dropped = 0;
        loop {
            let ids = self.encode()?;
            if ids.len() + wanted <= max_context {
                return Ok((ids, num_dropped));
            }
            let first = self.num_system();
            if self.parts.drops_oldest && first + 2 < self.messages.len() {
                self.messages.drain(first..first + 2);
                num_dropped += 2;
                continue;
            }
            if ids.len() < max_context {
                return Ok((ids, num_dropped));
            }
            let message = format!(
                "the conversation has {} tokens, and the context holds {max_context}",
                ids.len()
            );
            let error = UserError::new(message);
            return Err(match self.messages.len() - first {
                1 => error.hint("shorten the message, or begin with a larger --max-context"),
                _ => error
                    .hint("/reset begins anew, /undo takes the last turn back")
                    .hint("--drop-oldest lets the oldest turns go"),
            }
            .into());
        }
    }

    fn encode(&self) -> anyhow::Result<Vec<u32>> {
        let input = ChatInput {
            add_generation_prompt: true,
            variables: Some(&self.parts.variables),
            now: Some(crate::outside::civil_time()),
            ..ChatInput::new(&self.messages, &self.parts.special_tokens)
        };
        Ok(self.parts.template.encode(self.parts.tokenizer, &input)?)
    }
}

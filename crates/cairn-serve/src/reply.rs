//! Answers on their way: what the engine says becomes pieces of what is thought, said and called. What is said ends
//! in front of a stop string, and nothing within a character.

use std::sync::Arc;

use cairn_data::stop_strings::StopStrings;
use cairn_data::tokenizer::{TokenStream, Tokenizer};
use cairn_engine::{Finish, PositionLogprobs};

use crate::driver::{Update, Updates};
use crate::error::ApiError;
use crate::outline::{CallDelta, Outline, Parts, Splitter, Symbol, special};

/// How a request's answers are read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    /// Texts that end what is said.
    pub(crate) stops: Vec<String>,
    /// What the answers are made of, if not of text alone.
    pub(crate) outline: Option<Arc<Outline>>,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The model ended it.
    Stop,
    /// This stop string came.
    StopString(String),
    /// There was no room for more.
    Length,
}

/// A token that was chosen, and how likely it and others were.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenLogprobs {
    pub(crate) token: u32,
    pub(crate) logprobs: PositionLogprobs,
}

/// What comes next of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Piece {
    /// What is thought, as far as it is certain now. Comes before the text.
    pub(crate) reasoning: String,
    /// Text that is certain now.
    pub(crate) text: String,
    /// What is called. Comes after the text.
    pub(crate) calls: Vec<CallDelta>,
    /// Tokens it was made of, that of a stop string included.
    pub(crate) num_tokens: usize,
    /// Tokens of what is thought.
    pub(crate) num_reasoning: usize,
    /// Those tokens' log-probabilities, where they were asked for.
    pub(crate) tokens: Vec<TokenLogprobs>,
    /// Log-probabilities of the prompt's tokens after the first, where they were asked for.
    pub(crate) prompt: Vec<PositionLogprobs>,
    /// Tokens of the prompt that were in the cache.
    pub(crate) num_cached: usize,
    /// Why the answer ends here, if it does.
    pub(crate) end: Option<End>,
}

impl Piece {
    /// Adds what comes next.
    pub(crate) fn extend(&mut self, next: Self) {
        self.reasoning += &next.reasoning;
        self.text += &next.text;
        for call in next.calls {
            match self.calls.last_mut().filter(|last| last.index == call.index) {
                Some(last) => last.arguments += &call.arguments,
                None => self.calls.push(call),
            }
        }
        self.num_tokens += next.num_tokens;
        self.num_reasoning += next.num_reasoning;
        self.tokens.extend(next.tokens);
        self.prompt.extend(next.prompt);
        self.num_cached += next.num_cached;
        self.end = next.end;
    }
}

/// The answers of a request, together.
#[derive(Debug)]
pub(crate) struct Reply<'a> {
    choices: Vec<Choice<'a>>,
    updates: Updates,
    /// Answers that have not ended.
    num_open: usize,
}

impl<'a> Reply<'a> {
    /// The answers that these updates become.
    pub(crate) fn new(tokenizer: &'a Tokenizer, reading: &Reading, updates: Updates) -> Self {
        let num_open = updates.num_choices();
        let choices = (0..num_open).map(|index| Choice::new(tokenizer, reading, index)).collect();
        Self { choices, updates, num_open }
    }

    /// What comes next, and of which answer; `None` after the last has ended. After an error nothing comes.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, Piece)>, ApiError> {
        while self.num_open != 0 {
            let (index, update) = self.updates.next().await.ok_or_else(ApiError::engine_gone)?;
            if let Some(piece) = self.take(index, update)? {
                return Ok(Some((index, piece)));
            }
        }
        Ok(None)
    }

    /// As [`next`](Self::next), but nothing is waited for: `None` if nothing is there.
    pub(crate) fn ready(&mut self) -> Result<Option<(usize, Piece)>, ApiError> {
        while self.num_open != 0 {
            let Some((index, update)) = self.updates.ready() else { return Ok(None) };
            if let Some(piece) = self.take(index, update)? {
                return Ok(Some((index, piece)));
            }
        }
        Ok(None)
    }

    /// Whether an answer has not ended.
    pub(crate) fn is_open(&self) -> bool {
        self.num_open != 0
    }

    fn take(&mut self, index: usize, update: Update) -> Result<Option<Piece>, ApiError> {
        let choice = &mut self.choices[index];
        if choice.has_ended {
            return Ok(None);
        }
        let piece = choice.take(update)?;
        if choice.has_ended {
            self.num_open -= 1;
            self.updates.let_go(index);
        }
        Ok(piece)
    }
}

/// An answer whose tokens are known.
pub(crate) fn replayed(
    tokenizer: &Tokenizer,
    reading: &Reading,
    index: usize,
    (tokens, finish): (&[u32], Finish),
) -> Result<Piece, ApiError> {
    let mut choice = Choice::new(tokenizer, reading, index);
    let mut answer = Piece::default();
    let tokens = tokens.iter().map(|&token| Update::Token(token, None));
    for update in tokens.chain([Update::Finished(finish)]) {
        if let Some(piece) = choice.take(update)? {
            answer.extend(piece);
        }
        if choice.has_ended {
            break;
        }
    }
    Ok(answer)
}

/// One answer.
#[derive(Debug)]
struct Choice<'a> {
    tokenizer: &'a Tokenizer,
    stream: Option<TokenStream<'a>>,
    stops: StopStrings,
    /// Tells what is thought, said and called apart.
    splitter: Option<Splitter>,
    /// What has been taken and not been given out.
    held: Piece,
    has_ended: bool,
}

impl<'a> Choice<'a> {
    fn new(tokenizer: &'a Tokenizer, reading: &Reading, index: usize) -> Self {
        let (stream, stops) = (Some(tokenizer.stream()), StopStrings::new(reading.stops.clone()));
        let outline = reading.outline.as_ref();
        let splitter = outline.map(|outline| Splitter::new(Arc::clone(outline), index));
        Self { tokenizer, stream, stops, splitter, held: Piece::default(), has_ended: false }
    }

    /// Takes an update; what can be given out then.
    fn take(&mut self, update: Update) -> Result<Option<Piece>, ApiError> {
        match update {
            Update::Failed(error) => return Err(error),
            Update::Admitted(prefix) => self.held.num_cached = prefix.num_cached_tokens,
            Update::Prompt(logprobs) => self.held.prompt.extend(logprobs),
            Update::Token(token, logprobs) => {
                self.held.num_tokens += 1;
                let logprobs = logprobs.map(|logprobs| TokenLogprobs { token, logprobs });
                self.held.tokens.extend(logprobs);
                self.take_token(token)?;
            }
            Update::Finished(finish) => self.finish(finish)?,
        }
        if let (None, Some(found)) = (&self.held.end, self.stops.found()) {
            self.held.end = Some(End::StopString(found.to_owned()));
        }
        self.has_ended = self.held.end.is_some();
        let Piece { reasoning, text, calls, .. } = &self.held;
        let is_due =
            self.has_ended || !text.is_empty() || !reasoning.is_empty() || !calls.is_empty();
        Ok(is_due.then(|| std::mem::take(&mut self.held)))
    }

    fn take_token(&mut self, token: u32) -> Result<(), ApiError> {
        // What structures a conversation is not part of its text; nor are ids that are no tokens.
        let is_special = self.tokenizer.specials().contains_key(&token);
        let is_text = !is_special && self.tokenizer.token(token).is_some();
        let stream = self.stream.as_mut().filter(|_| is_text);
        let text = match stream {
            Some(stream) => stream.push(token).map_err(ApiError::failed)?,
            None => String::new(),
        };
        let Some(splitter) = &mut self.splitter else {
            self.held.text += &self.stops.push(&text);
            return Ok(());
        };
        self.held.num_reasoning += usize::from(splitter.is_thinking());
        let of_token = is_special.then(|| special(token));
        let symbols: Vec<Symbol> = text.chars().map(u32::from).chain(of_token).collect();
        let parts = splitter.push(&symbols);
        self.hold(parts);
        Ok(())
    }

    fn hold(&mut self, parts: Parts) {
        self.held.reasoning += &parts.reasoning;
        self.held.text += &self.stops.push(&parts.text);
        if parts.calls.is_empty() || self.stops.stopped() {
            return;
        }
        // Nothing is said after a call.
        self.held.text += &std::mem::take(&mut self.stops).finish();
        let calls = parts.calls.into_iter();
        self.held.extend(Piece { calls: calls.collect(), ..Piece::default() });
    }

    fn finish(&mut self, finish: Finish) -> Result<(), ApiError> {
        let rest = self.stream.take().map(TokenStream::finish).transpose();
        let rest = rest.map_err(ApiError::failed)?.unwrap_or_default();
        match &mut self.splitter {
            None => self.held.text += &self.stops.push(&rest),
            Some(splitter) => {
                let symbols: Vec<Symbol> = rest.chars().map(u32::from).collect();
                let both = [splitter.push(&symbols), splitter.finish()];
                both.into_iter().for_each(|parts| self.hold(parts));
            }
        }
        if let Some(found) = self.stops.found() {
            self.held.end = Some(End::StopString(found.to_owned()));
            return Ok(());
        }
        self.held.text += &std::mem::take(&mut self.stops).finish();
        self.held.end = Some(match finish {
            Finish::Length => End::Length,
            Finish::Stop | Finish::Cancelled => End::Stop,
        });
        Ok(())
    }
}

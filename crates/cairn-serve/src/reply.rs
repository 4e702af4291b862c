//! Answers on their way: what the engine says becomes pieces of text, which end in front of a stop string and
//! never within a character.

use cairn_data::stop_strings::StopStrings;
use cairn_data::tokenizer::{TokenStream, Tokenizer};
use cairn_engine::{Finish, PositionLogprobs};

use crate::driver::{Update, Updates};
use crate::error::ApiError;

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
    /// Text that is certain now.
    pub(crate) text: String,
    /// Tokens it was made of, that of a stop string included.
    pub(crate) num_tokens: usize,
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
        self.text += &next.text;
        self.num_tokens += next.num_tokens;
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
    pub(crate) fn new(tokenizer: &'a Tokenizer, stops: &[String], updates: Updates) -> Self {
        let num_open = updates.num_choices();
        let choices = (0..num_open).map(|_| Choice::new(tokenizer, stops.to_vec())).collect();
        Self { choices, updates, num_open }
    }

    /// What comes next, and of which answer; `None` after the last has ended. After an error nothing comes.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, Piece)>, ApiError> {
        while self.num_open != 0 {
            let (index, update) = self.updates.next().await.ok_or_else(ApiError::engine_gone)?;
            let choice = &mut self.choices[index];
            if choice.has_ended {
                continue;
            }
            if let Some(piece) = choice.take(update)? {
                if piece.end.is_some() {
                    self.num_open -= 1;
                    self.updates.let_go(index);
                }
                return Ok(Some((index, piece)));
            }
        }
        Ok(None)
    }
}

/// One answer.
#[derive(Debug)]
struct Choice<'a> {
    tokenizer: &'a Tokenizer,
    stream: Option<TokenStream<'a>>,
    stops: StopStrings,
    /// What has been taken and not been given out.
    held: Piece,
    has_ended: bool,
}

impl<'a> Choice<'a> {
    fn new(tokenizer: &'a Tokenizer, stops: Vec<String>) -> Self {
        let (stream, stops) = (Some(tokenizer.stream()), StopStrings::new(stops));
        Self { tokenizer, stream, stops, held: Piece::default(), has_ended: false }
    }

    /// Takes an update; what can be given out then.
    fn take(&mut self, update: Update) -> Result<Option<Piece>, ApiError> {
        let text = match update {
            Update::Failed(error) => return Err(error),
            Update::Admitted(prefix) => {
                self.held.num_cached = prefix.num_cached_tokens;
                String::new()
            }
            Update::Prompt(logprobs) => {
                self.held.prompt.extend(logprobs);
                String::new()
            }
            Update::Token(token, logprobs) => {
                self.held.num_tokens += 1;
                let logprobs = logprobs.map(|logprobs| TokenLogprobs { token, logprobs });
                self.held.tokens.extend(logprobs);
                self.text_of(token)?
            }
            Update::Finished(finish) => self.finish(finish)?,
        };
        self.held.text += &text;
        if let (None, Some(found)) = (&self.held.end, self.stops.found()) {
            self.held.end = Some(End::StopString(found.to_owned()));
        }
        self.has_ended = self.held.end.is_some();
        let is_due = self.has_ended || !self.held.text.is_empty();
        Ok(is_due.then(|| std::mem::take(&mut self.held)))
    }

    fn text_of(&mut self, token: u32) -> Result<String, ApiError> {
        // What structures a conversation is not part of its text; nor are ids that are no tokens.
        let is_text = !self.tokenizer.specials().contains_key(&token)
            && self.tokenizer.token(token).is_some();
        let Some(stream) = self.stream.as_mut().filter(|_| is_text) else {
            return Ok(String::new());
        };
        Ok(self.stops.push(&stream.push(token).map_err(ApiError::failed)?))
    }

    fn finish(&mut self, finish: Finish) -> Result<String, ApiError> {
        let rest = self.stream.take().map(TokenStream::finish).transpose();
        let mut text = self.stops.push(&rest.map_err(ApiError::failed)?.unwrap_or_default());
        if let Some(found) = self.stops.found() {
            self.held.end = Some(End::StopString(found.to_owned()));
            return Ok(text);
        }
        text += &std::mem::take(&mut self.stops).finish();
        self.held.end = Some(match finish {
            Finish::Length => End::Length,
            Finish::Stop | Finish::Cancelled => End::Stop,
        });
        Ok(text)
    }
}

//! One answer on its way: updates of the engine become pieces of text, which end in front of a stop string and
//! never within a character.

use cairn_data::stop_strings::StopStrings;
use cairn_data::tokenizer::{TokenStream, Tokenizer};
use cairn_engine::Finish;

use crate::driver::{Update, Updates};
use crate::error::ApiError;

/// What comes next of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Text, never empty.
    Text(String),
    /// The end, and `OpenAI`'s word for it.
    End(&'static str),
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply<'a> {
    tokenizer: &'a Tokenizer,
    stream: Option<TokenStream<'a>>,
    stops: StopStrings,
    updates: Updates,
    /// Tokens so far.
    num_tokens: usize,
    /// Why it ended, once that is known and the rest of the text has been given out.
    end: Option<&'static str>,
}

impl<'a> Reply<'a> {
    /// The answer that these updates become.
    pub(crate) fn new(tokenizer: &'a Tokenizer, stops: Vec<String>, updates: Updates) -> Self {
        let (stream, stops) = (Some(tokenizer.stream()), StopStrings::new(stops));
        Self { tokenizer, stream, stops, updates, num_tokens: 0, end: None }
    }

    /// Tokens so far, those of a stop string included.
    pub(crate) fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// What comes next. After [`Piece::End`] or an error nothing does.
    pub(crate) async fn next(&mut self) -> Result<Piece, ApiError> {
        loop {
            if let Some(end) = self.end {
                return Ok(Piece::End(end));
            }
            let text = match self.updates.next().await {
                None => return Err(ApiError::engine_gone()),
                Some(Update::Failed(reason)) => return Err(ApiError::failed(reason)),
                Some(Update::Token(token)) => self.take(token)?,
                Some(Update::Finished(finish)) => self.finish(finish)?,
            };
            if !text.is_empty() {
                return Ok(Piece::Text(text));
            }
        }
    }

    fn take(&mut self, token: u32) -> Result<String, ApiError> {
        self.num_tokens += 1;
        // What structures a conversation is not part of its text; nor are ids that are no tokens.
        let is_text = !self.tokenizer.specials().contains_key(&token)
            && self.tokenizer.token(token).is_some();
        let Some(stream) = self.stream.as_mut().filter(|_| is_text) else {
            return Ok(String::new());
        };
        let text = self.stops.push(&stream.push(token).map_err(ApiError::failed)?);
        if self.stops.stopped() {
            self.end = Some("stop");
        }
        Ok(text)
    }

    fn finish(&mut self, finish: Finish) -> Result<String, ApiError> {
        let rest = self.stream.take().map(TokenStream::finish).transpose();
        let mut text = self.stops.push(&rest.map_err(ApiError::failed)?.unwrap_or_default());
        let is_stopped = self.stops.stopped();
        text += &std::mem::take(&mut self.stops).finish();
        self.end = Some(match finish {
            Finish::Length if !is_stopped => "length",
            Finish::Length | Finish::Stop | Finish::Cancelled => "stop",
        });
        Ok(text)
    }
}

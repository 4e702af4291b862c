//! Ids to text, one at a time, never half a character.
//!
//! **Invariant:** the pieces and the rest, end to end, are what `Tokenizer::decode` gives for all
//! the ids. A byte-level tokenizer's text is the concatenation of bytes. The other decoders look
//! back by one token (a word piece after another, a leading space at the beginning only) and, with
//! byte fallback, at the whole run of byte tokens: one bad byte makes every byte of its run U+FFFD.
//! So a run of byte tokens is held back until a token of another kind ends it.

use super::{Tokenizer, TokenizerError};

/// Tokens that are held back at most where byte level is one step of several, waiting for a
/// character to complete.
const HELD_TOKENS_MAX: usize = 16;

/// Turns ids into text as they come.
///
/// ```
/// # use cairn_data::tokenizer::{BpeSettings, train_bpe};
/// # let settings = BpeSettings { vocab_size: 257, ..BpeSettings::default() };
/// # let tokenizer = train_bpe(&settings, [Ok("x".to_owned())])?;
/// let mut stream = tokenizer.stream();
/// let mut text = String::new();
/// for id in tokenizer.encode("é!")? {
///     text += &stream.push(id)?; // "" after the first byte of é
/// }
/// text += &stream.finish()?;
/// assert_eq!(text, "é!");
/// # Ok::<(), cairn_data::tokenizer::TokenizerError>(())
/// ```
#[derive(Debug)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Byte level: the bytes of a character that is not complete yet.
    partial: Vec<u8>,
    /// Otherwise: tokens of the last piece, which decoders look back at, then the held ones.
    window: Vec<u32>,
    num_emitted: usize,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, partial: Vec::new(), window: Vec::new(), num_emitted: 0 }
    }

    /// Takes one id and returns the text that is complete now, often empty inside a character.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::UnknownId`] for an id outside the vocabulary, [`TokenizerError::Decode`]
    /// if the decoder refuses it; the stream is then as before.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        if self.tokenizer.is_byte_level() {
            let bytes = self.tokenizer.token_bytes(id);
            self.partial.extend(bytes.ok_or_else(|| self.tokenizer.unknown(id))?);
            return Ok(take_complete(&mut self.partial));
        }
        self.window.push(id);
        if self.tokenizer.is_byte_token(id) {
            return Ok(String::new());
        }
        let decoded = self.decode_window().inspect_err(|_| {
            self.window.pop();
        });
        let (seen, text) = decoded?;
        let held = self.window.len() - self.num_emitted;
        let may_be_cut = self.tokenizer.has_inner_byte_level();
        let is_cut = may_be_cut && text.ends_with(char::REPLACEMENT_CHARACTER);
        if is_cut && held < HELD_TOKENS_MAX {
            return Ok(String::new());
        }
        let num_past = if may_be_cut { self.num_emitted } else { self.window.len() - 1 };
        self.window.drain(..num_past);
        self.num_emitted = self.window.len();
        Ok(text.get(seen..).unwrap_or_default().to_owned())
    }

    /// Ends the stream and returns what was held back; an incomplete character becomes U+FFFD.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Decode`] if the decoder refuses the held tokens.
    pub fn finish(self) -> Result<String, TokenizerError> {
        if self.tokenizer.is_byte_level() {
            return Ok(String::from_utf8_lossy(&self.partial).into_owned());
        }
        let (seen, text) = self.decode_window()?;
        Ok(text.get(seen..).unwrap_or_default().to_owned())
    }

    /// Text of the window, and how many of its bytes have been returned already.
    fn decode_window(&self) -> Result<(usize, String), TokenizerError> {
        let seen = self.tokenizer.decode(&self.window[..self.num_emitted])?.len();
        Ok((seen, self.tokenizer.decode(&self.window)?))
    }
}

/// Takes all that cannot change any more: whole characters, and U+FFFD for each maximal run of
/// bytes that no continuation can complete, as `String::from_utf8_lossy` does on the whole.
fn take_complete(partial: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = partial.as_slice();
    while !rest.is_empty() {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                rest = after;
                // No length: the input ends inside a character that may still be completed.
                let Some(invalid) = error.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &after[invalid..];
            }
        }
    }
    let num_complete = partial.len() - rest.len();
    partial.drain(..num_complete);
    text
}

//! Text to ids, fast and in bounded memory, for the tokenizers that are made here.
//!
//! Most words of a text have been seen before, so an [`Encoder`] remembers the ids of words; only new
//! ones go through BPE. One encoder serves one thread.
//!
//! **Invariant:** the ids are those of `Tokenizer::encode` through the `tokenizers` crate, for every
//! text; tokenizers of another kind than GPT-2's byte level go through that crate.

use std::collections::HashMap;

use tokenizers::models::ModelWrapper;
use tokenizers::{Model, PreTokenizerWrapper};

use super::bytes::char_of_byte;
use super::words::words;
use super::{Tokenizer, TokenizerError};

/// Words that are remembered; above it all are forgotten, which bounds memory to about 10 MiB.
const WORDS_MAX: usize = 1 << 16;

/// Longest word that is remembered, in bytes.
const WORD_BYTES_MAX: usize = 48;

/// Encodes texts one after another; see [`Tokenizer::encoder`].
#[derive(Debug)]
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    known: HashMap<Box<str>, Box<[u32]>>,
    spelled: String,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, known: HashMap::new(), spelled: String::new() }
    }

    /// Token ids of a text; a special token spelled out in it is ordinary text.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Encode`] if the tokenizer's own model refuses the text.
    pub fn encode(&mut self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if !self.tokenizer.has_gpt2_words {
            self.tokenizer.check_growth(text)?;
            return super::encode(&self.tokenizer.literal, text, false);
        }
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        for word in words(text) {
            if let Some(known) = self.known.get(word) {
                ids.extend_from_slice(known);
            } else {
                let new = self.encode_word(word)?;
                ids.extend_from_slice(&new);
                self.remember(word, new);
            }
        }
        Ok(ids)
    }

    fn encode_word(&mut self, word: &str) -> Result<Vec<u32>, TokenizerError> {
        self.spelled.clear();
        self.spelled.extend(word.bytes().map(char_of_byte));
        let tokens = self
            .tokenizer
            .literal
            .get_model()
            .tokenize(&self.spelled)
            .map_err(|error| TokenizerError::Encode { reason: error.to_string() })?;
        Ok(tokens.into_iter().map(|token| token.id).collect())
    }

    fn remember(&mut self, word: &str, ids: Vec<u32>) {
        if WORD_BYTES_MAX < word.len() {
            return;
        }
        if WORDS_MAX <= self.known.len() {
            self.known.clear();
        }
        self.known.insert(word.into(), ids.into_boxed_slice());
    }
}

/// Whether a tokenizer is a BPE on GPT-2's words and nothing else touches the text.
pub(super) fn has_gpt2_words(tokenizer: &tokenizers::Tokenizer) -> bool {
    let is_byte_level = matches!(
        tokenizer.get_pre_tokenizer(),
        Some(PreTokenizerWrapper::ByteLevel(byte_level))
            if byte_level.use_regex && !byte_level.add_prefix_space
    );
    let has_only_specials =
        tokenizer.get_added_tokens_decoder().values().all(|added| added.special);
    is_byte_level
        && has_only_specials
        && tokenizer.get_normalizer().is_none()
        && matches!(tokenizer.get_model(), ModelWrapper::BPE(_))
}

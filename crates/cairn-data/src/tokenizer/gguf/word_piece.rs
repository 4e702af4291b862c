//! BERT's `WordPiece` in a GGUF file.
//!
//! llama.cpp's converter turns the marks around: a piece that goes on within a word loses its `##`, one
//! that begins a word gets `▁` in front, control tokens stay. A file that does not say whether texts are
//! put in lower case is read as llama.cpp reads it: they are, and lose their accents.

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::{CONTROL, Parts};

/// Pieces of longer words are not looked for, in BERT's own tokenizers.
const WORD_CHARS_MAX: usize = 100;

/// What puts a text in a normal form.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Normalizer {
    pub(super) lowercase: Option<bool>,
    pub(super) strip_accents: Option<bool>,
}

impl Parts<'_> {
    pub(super) fn word_piece(&self) -> Result<Json, String> {
        let mut vocab = Map::with_capacity(self.tokens.len());
        let mut seen = HashSet::with_capacity(self.tokens.len());
        for (id, (token, kind)) in self.tokens.iter().zip(&self.kinds).enumerate() {
            let piece = match token.strip_prefix('▁') {
                _ if kind.total_cmp(&CONTROL).is_eq() => (*token).to_owned(),
                Some(word) if !word.is_empty() => word.to_owned(),
                _ => format!("##{token}"),
            };
            if !seen.insert(piece.clone()) {
                return Err(format!("{piece:?} is the piece of two tokens"));
            }
            vocab.insert(piece, id.into());
        }
        let unknown = self.unknown.map_or(Some("[UNK]"), |id| self.tokens.get(id).copied());
        let unknown = unknown.filter(|token| seen.contains(*token));
        let lowercase = self.normalizer.lowercase.unwrap_or(true);
        Ok(json!({
            "normalizer": {
                "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "lowercase": lowercase,
                "strip_accents": self.normalizer.strip_accents.unwrap_or(lowercase),
            },
            "pre_tokenizer": { "type": "BertPreTokenizer" },
            "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
            "model": {
                "type": "WordPiece",
                "unk_token": unknown.ok_or("tokenizer.ggml.unknown_token_id names no token")?,
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": WORD_CHARS_MAX,
                "vocab": vocab,
            },
        }))
    }
}

//! The tokens of a `tokenizer.json`, checked against what the file itself says of them.
//!
//! The `tokenizers` crate drops empty added tokens, and gives an added token another id than the
//! stated one when the two do not fit. A model's embedding knows only the stated ids, so both are
//! errors here.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::models::unigram::Unigram;

use super::TokenizerError;
use super::growth::{Chains, TOKEN_BYTES_MAX};

/// An added token as a file states it.
#[derive(Debug, Deserialize)]
pub(super) struct StatedToken {
    pub(super) id: u32,
    pub(super) content: String,
}

/// What a `tokenizer.json` states that the `tokenizers` crate does not tell.
#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct Stated {
    /// Its added tokens.
    #[serde(default)]
    pub(super) added_tokens: Vec<StatedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Option<StatedModel>,
}

#[derive(Debug, Deserialize)]
struct StatedModel {
    unk_id: Option<usize>,
    unk_token: Option<String>,
}

impl Stated {
    /// The parts that make text of text.
    pub(super) fn chains(&self) -> Chains<'_> {
        Chains {
            normalizer: &self.normalizer,
            pre_tokenizer: &self.pre_tokenizer,
            post_processor: &self.post_processor,
            decoder: &self.decoder,
            unknown: self.model.as_ref().and_then(|model| model.unk_token.as_deref()),
        }
    }
}

/// Reads what is stated; also checks that all of the file is JSON.
pub(super) fn stated(json: &[u8]) -> Result<Stated, serde_json::Error> {
    serde_json::from_slice(json)
}

/// Makes a Unigram model that cannot spell special tokens: they are among its pieces, so that a
/// text in which one is spelled out would become the token. `None` for every other model.
pub(super) fn unspelled(
    tokenizer: &tokenizers::Tokenizer,
    stated: &Stated,
) -> tokenizers::Result<Option<Unigram>> {
    let ModelWrapper::Unigram(unigram) = tokenizer.get_model() else { return Ok(None) };
    let unknown = stated.model.as_ref().and_then(|model| model.unk_id);
    let specials = specials(tokenizer);
    let is_special = |at: usize| {
        unknown != Some(at) && u32::try_from(at).is_ok_and(|id| specials.contains_key(&id))
    };
    let mut vocab: Vec<(String, f64)> = unigram.iter().cloned().collect();
    // A piece that occurs twice has its last id, so a copy of the last one is never chosen.
    let last = (0..vocab.len()).rev().find(|at| !is_special(*at));
    for at in (0..vocab.len()).filter(|at| is_special(*at)) {
        vocab[at].0 = match last {
            Some(last) if at < last => vocab[last].0.clone(),
            _ => format!("\u{10FFFF}{at}\u{10FFFF}"),
        };
    }
    Unigram::from(vocab, unknown, unigram.byte_fallback()).map(Some)
}

/// Refuses an added token that would match everywhere.
pub(super) fn refuse_empty(stated: &[StatedToken], path: &Path) -> Result<(), TokenizerError> {
    match stated.iter().find(|token| token.content.is_empty()) {
        Some(token) => Err(TokenizerError::EmptyToken { path: path.to_owned(), id: token.id }),
        None => Ok(()),
    }
}

/// Checks that every stated token has its stated id.
pub(super) fn check_ids(
    stated: &[StatedToken],
    tokenizer: &tokenizers::Tokenizer,
    path: &Path,
) -> Result<(), TokenizerError> {
    for token in stated {
        let actual = tokenizer.token_to_id(&token.content);
        if actual != Some(token.id) {
            return Err(TokenizerError::AddedTokenId {
                path: path.to_owned(),
                token: token.content.clone(),
                stated: token.id,
                actual: actual.unwrap_or_default(),
            });
        }
    }
    Ok(())
}

/// All tokens, sorted by id; each id has one token and each token some text.
pub(super) fn tokens_by_id(
    tokenizer: &tokenizers::Tokenizer,
    path: &Path,
) -> Result<Vec<(u32, String)>, TokenizerError> {
    let vocab = tokenizer.get_vocab(true);
    let mut tokens: Vec<(u32, String)> = vocab.into_iter().map(|(token, id)| (id, token)).collect();
    tokens.sort_unstable();
    if let Some((id, _)) = tokens.iter().find(|(_, token)| token.is_empty()) {
        return Err(TokenizerError::EmptyToken { path: path.to_owned(), id: *id });
    }
    let longest = tokens.iter().map(|(_, token)| token.len()).max().unwrap_or(0);
    if longest > TOKEN_BYTES_MAX {
        #[expect(clippy::cast_precision_loss, reason = "a file is below 2^52 bytes")]
        return Err(TokenizerError::OverLimit {
            path: path.to_owned(),
            what: "bytes of its longest token",
            actual: longest as f64,
            limit: TOKEN_BYTES_MAX as f64,
        });
    }
    for pair in tokens.windows(2) {
        if let [(id, first), (next, second)] = pair
            && id == next
        {
            return Err(TokenizerError::DuplicateId {
                path: path.to_owned(),
                id: *id,
                first: first.clone(),
                second: second.clone(),
            });
        }
    }
    Ok(tokens)
}

/// The special tokens, by id.
pub(super) fn specials(tokenizer: &tokenizers::Tokenizer) -> BTreeMap<u32, String> {
    let added = tokenizer.get_added_tokens_decoder();
    let special = added.into_iter().filter(|(_, token)| token.special);
    special.map(|(id, token)| (id, token.content)).collect()
}

/// The added tokens that are not flagged special, by their text.
pub(super) fn unflagged(tokenizer: &tokenizers::Tokenizer) -> BTreeMap<String, u32> {
    let added = tokenizer.get_added_tokens_decoder();
    let unflagged = added.into_iter().filter(|(_, token)| !token.special);
    unflagged.map(|(id, token)| (token.content, id)).collect()
}

//! Log-probabilities as `OpenAI` writes them: two forms, one of completions and one of chats.

use cairn_engine::PositionLogprobs;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::ServedParts;
use crate::reply::TokenLogprobs;

/// How tokens are named.
#[derive(Clone, Copy, Debug)]
pub(super) enum Names {
    /// By their spelling; bytes that are no character by themselves become U+FFFD.
    Spelling,
    /// By their ids, as vLLM's `return_tokens_as_token_ids` wants it: one spelling may be that of several.
    Ids,
}

impl Names {
    /// Takes which are wanted.
    pub(super) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let by_ids = fields.take("return_tokens_as_token_ids")?.unwrap_or(false);
        Ok(if by_ids { Self::Ids } else { Self::Spelling })
    }

    fn of(self, parts: &ServedParts, token: u32) -> String {
        match self {
            Self::Spelling => String::from_utf8_lossy(&bytes(parts, token)).into_owned(),
            Self::Ids => format!("token_id:{token}"),
        }
    }
}

/// What a token puts into a text; nothing for ids that are no tokens, which padded vocabularies have.
fn bytes(parts: &ServedParts, token: u32) -> Vec<u8> {
    if let Some(bytes) = parts.tokenizer.token_bytes(token) {
        return bytes.to_vec();
    }
    let piece = parts.tokenizer.token(token).unwrap_or_default();
    // SentencePiece's ways to write a byte and a space.
    let hex = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => piece.replace('\u{2581}', " ").into_bytes(),
    }
}

/// The form of chats.
pub(super) fn of_chat(parts: &ServedParts, names: Names, tokens: &[TokenLogprobs]) -> Value {
    let entry = |token: u32, logprob: f32| {
        let name = names.of(parts, token);
        json!({ "token": name, "logprob": finite(logprob), "bytes": bytes(parts, token) })
    };
    let content = tokens.iter().map(|TokenLogprobs { token, logprobs }| {
        let mut found = entry(*token, logprobs.chosen);
        let top = logprobs.top.iter().map(|&(token, logprob)| entry(token, logprob));
        found["top_logprobs"] = top.collect();
        found
    });
    json!({ "content": content.collect::<Value>(), "refusal": null })
}

/// The form of completions, in which places are told: characters of the text in front of each token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    names: Names,
    characters: usize,
}

impl Places {
    /// From the beginning of a text on.
    pub(super) fn new(names: Names) -> Self {
        Self { names, characters: 0 }
    }

    /// The next tokens; the first of a text has nothing in front of it that could make it likely.
    pub(super) fn of_completion<'a>(
        &mut self,
        parts: &ServedParts,
        tokens: impl Iterator<Item = (u32, Option<&'a PositionLogprobs>)>,
    ) -> Value {
        let (mut named, mut logprobs, mut top, mut offsets) = (vec![], vec![], vec![], vec![]);
        for (token, found) in tokens {
            let name = self.names.of(parts, token);
            offsets.push(self.characters);
            // A character begins with a byte that goes on none.
            let begins = |byte: &&u8| *byte & 0b1100_0000 != 0b1000_0000;
            self.characters += bytes(parts, token).iter().filter(begins).count();
            logprobs.push(found.map(|found| finite(found.chosen)));
            top.push(found.map(|found| {
                let mut likeliest = Map::new();
                for &(token, logprob) in &found.top {
                    // Of tokens with one name the likeliest counts, which comes first.
                    likeliest.entry(self.names.of(parts, token)).or_insert(finite(logprob));
                }
                // The token itself is always among them.
                likeliest.entry(name.clone()).or_insert(finite(found.chosen));
                likeliest
            }));
            named.push(name);
        }
        json!({
            "tokens": named, "token_logprobs": logprobs, "top_logprobs": top,
            "text_offset": offsets,
        })
    }
}

/// The tokens of a prompt with their log-probabilities, of which the first has none.
pub(super) fn of_prompt<'a>(
    ids: &'a [u32],
    logprobs: &'a [PositionLogprobs],
) -> impl Iterator<Item = (u32, Option<&'a PositionLogprobs>)> {
    ids.iter().copied().zip(std::iter::once(None).chain(logprobs.iter().map(Some)))
}

/// JSON has no infinity; `OpenAI`'s number for a token that cannot come.
fn finite(logprob: f32) -> Value {
    f64::from(logprob.max(-9999.0)).into()
}

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
            // Ids that are no tokens exist in padded vocabularies, and have no spelling.
            Self::Spelling => parts.tokenizer.decode(&[token]).unwrap_or_default(),
            Self::Ids => format!("token_id:{token}"),
        }
    }
}

/// The form of chats.
pub(super) fn of_chat(parts: &ServedParts, names: Names, tokens: &[TokenLogprobs]) -> Value {
    let entry = |token: u32, logprob: f32| {
        let bytes = match parts.tokenizer.token_bytes(token) {
            Some(bytes) => bytes.to_vec(),
            None => Names::Spelling.of(parts, token).into_bytes(),
        };
        let name = names.of(parts, token);
        json!({ "token": name, "logprob": finite(logprob), "bytes": bytes })
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
            self.characters += Names::Spelling.of(parts, token).chars().count();
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

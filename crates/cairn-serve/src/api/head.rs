//! What the objects of completions and chats have in common.

use serde::Serialize;
use serde_json::{Value, json};

use super::Preparing;
use super::format::Message;
use crate::reply::{End, Piece};

/// What every object of an answer says.
#[derive(Clone, Debug)]
pub(super) struct Head {
    id: String,
    object: &'static str,
    model: String,
    created: u64,
}

impl Preparing<'_> {
    /// What the objects of this request's answer say.
    pub(super) fn head(&self, prefix: &str, object: &'static str) -> Head {
        Head {
            id: self.id(prefix),
            object,
            model: self.parts().name.clone(),
            created: (self.shared.now)(),
        }
    }

    /// The name of this request's answer.
    pub(super) fn id(&self, prefix: &str) -> String {
        // Requests of an earlier process had the same numbers.
        format!("{prefix}-{:x}-{}", self.shared.started, self.number)
    }
}

impl Head {
    /// An object with these choices.
    pub(super) fn with(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let Self { id, object, model, created } = self;
        let mut found = json!({
            "id": id, "object": object, "created": created, "model": model, "choices": choices,
        });
        if let Some(usage) = usage {
            found["usage"] = usage;
        }
        found
    }

    /// An object of a stream, with one choice. Written as it is, since there is one for each token.
    pub(super) fn message(&self, choice: &impl Serialize) -> Message {
        #[derive(Serialize)]
        struct Object<'a, C> {
            id: &'a str,
            object: &'a str,
            created: u64,
            model: &'a str,
            choices: [C; 1],
        }
        let Self { id, object, model, created } = self;
        let object = Object { id, object, created: *created, model, choices: [choice] };
        let data = serde_json::to_string(&object).expect("names are texts");
        Message { event: None, data }
    }

    /// The end of a stream, with the numbers of tokens where they are wanted.
    pub(super) fn end(&self, usage: Option<Value>) -> Vec<Message> {
        let usage = usage.map(|usage| Message::data(&self.with(Vec::new(), Some(usage))));
        let done = Message { event: None, data: "[DONE]".to_owned() };
        usage.into_iter().chain([done]).collect()
    }
}

/// Why an answer ended, in `OpenAI`'s word.
pub(super) fn finish_reason(piece: &Piece) -> Option<&'static str> {
    piece.end.as_ref().map(|end| match end {
        End::Stop | End::StopString(_) => "stop",
        End::Length => "length",
    })
}

/// Tokens of answers, so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) num_new: usize,
    pub(super) num_cached: usize,
    pub(super) num_reasoning: usize,
}

impl Counts {
    /// Notes a piece of an answer; whether what was there of its prompt counts.
    pub(super) fn note(&mut self, piece: &Piece, reads_prompt: bool) {
        self.num_new += piece.num_tokens;
        self.num_reasoning += piece.num_reasoning;
        self.num_cached += if reads_prompt { piece.num_cached } else { 0 };
    }

    /// As `OpenAI` counts them, with those of what was thought.
    pub(super) fn usage(&self, num_prompt: usize) -> Value {
        let mut found = usage(num_prompt, self.num_cached, self.num_new);
        found["completion_tokens_details"] = json!({ "reasoning_tokens": self.num_reasoning });
        found
    }
}

/// The numbers of tokens, as `OpenAI` counts them; `num_cached` of the prompt were there already.
pub(super) fn usage(num_prompt: usize, num_cached: usize, num_new: usize) -> Value {
    json!({
        "prompt_tokens": num_prompt,
        "prompt_tokens_details": { "cached_tokens": num_cached },
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
    })
}

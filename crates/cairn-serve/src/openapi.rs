//! What the endpoints take and answer, in `OpenAPI`'s words, written from the table that the routes are made of.

use std::sync::{Arc, OnceLock};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::keys::{Needs, Scope};
use crate::routes::{Route, table};
use crate::server::Shared;

/// What an endpoint takes and answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    /// Fields of its body, if it has one.
    fields: Option<&'static [&'static [Field]]>,
    answer: Answer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// A page for people.
    Page,
    /// Lines of text.
    Text,
    /// A JSON object.
    Object,
    /// A JSON object, or a stream of them where the body says `stream`.
    Stream,
}

/// A field of a body. A field that is null is taken for one that is not there.
#[derive(Clone, Copy, Debug)]
struct Field {
    name: &'static str,
    kind: Kind,
    about: &'static str,
    is_needed: bool,
}

/// What a field holds.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Flag,
    /// True, false or a word.
    FlagOr(&'static str),
    /// An integer of at least so much.
    Integer(i64),
    Number,
    Text,
    Object,
    List,
    /// One text or several.
    Texts,
    /// A text, ids, or several of either.
    Prompts,
    /// A text or a list of parts.
    Content,
    /// A word or an object.
    Choice,
    /// Nothing: what is not supported here may be null.
    Null,
}

const fn field(name: &'static str, kind: Kind, about: &'static str) -> Field {
    Field { name, kind, about, is_needed: false }
}

const fn needed(name: &'static str, kind: Kind, about: &'static str) -> Field {
    Field { name, kind, about, is_needed: true }
}

/// A field that clients send as null, of which nothing else is taken.
const fn lacking(name: &'static str) -> Field {
    field(name, Kind::Null, "Not supported here: only null")
}

/// The model's name, which every body may say.
const MODEL: &[Field] =
    &[field("model", Kind::Text, "Which model; the first where nothing is said")];

/// What all that generate take.
const ASKED: &[Field] = &[
    field("stream", Kind::Flag, "Answer piece by piece"),
    field("temperature", Kind::Number, "0 takes the likeliest token"),
    field("top_k", Kind::Integer(-1), "Of the likeliest so many; 0 and -1 are all"),
    field("top_p", Kind::Number, "Of the likeliest with so much probability together"),
    field("min_p", Kind::Number, "Of those with this share of the likeliest one's probability"),
    field("typical_p", Kind::Number, "Of the most typical with so much probability together"),
    field("tfs_z", Kind::Number, "Without the tail beyond so much of the second slope"),
    field("tfs", Kind::Number, "Another name of tfs_z"),
    field("epsilon_cutoff", Kind::Number, "Of those with at least this probability"),
    field("eta_cutoff", Kind::Number, "The same, less where many are likely"),
    field("mirostat", Kind::Integer(0), "2 steers surprise instead of leaving tokens out"),
    field("mirostat_tau", Kind::Number, "To so many bits"),
    field("mirostat_eta", Kind::Number, "By so much of the error"),
    field("repetition_penalty", Kind::Number, "Divides scores of what was there"),
    field("no_repeat_ngram_size", Kind::Integer(1), "Nothing of so many tokens comes twice"),
    field("presence_penalty", Kind::Number, "Taken from scores of what was generated"),
    field("frequency_penalty", Kind::Number, "Taken for each time it was generated"),
    field("logit_bias", Kind::Object, "Added to scores, by token id"),
    field("seed", Kind::Integer(i64::MIN), "Decides the answer, alone or in a crowd"),
    field("ignore_eos", Kind::Flag, "No token ends an answer"),
    field("priority", Kind::Integer(i32::MIN as i64), "Lower goes first"),
    field("cache_salt", Kind::Text, "Only requests with the same share what was computed"),
];

/// What completions and chats take.
const OPENAI: &[Field] = &[
    field("n", Kind::Integer(1), "Answers"),
    field("stop", Kind::Texts, "Texts that end an answer, at most 16"),
    field("stream_options", Kind::Object, "include_usage ends a stream with the numbers of tokens"),
    field("return_tokens_as_token_ids", Kind::Flag, "Names tokens by their ids"),
    field("response_format", Kind::Object, "json_object, or json_schema with a schema"),
    field("structured_outputs", Kind::Object, "One of json, regex, choice and grammar"),
    field("use_beam_search", Kind::Flag, "The n likeliest answers that a search finds"),
    field("length_penalty", Kind::Number, "Of that search: the length's exponent in a score"),
    field("early_stopping", Kind::FlagOr("never"), "Of that search: when it has found enough"),
    field("user", Kind::Text, "Nothing depends on it"),
];

const COMPLETIONS: &[Field] = &[
    needed("prompt", Kind::Prompts, "What is continued"),
    field("max_tokens", Kind::Integer(0), "New tokens"),
    field("logprobs", Kind::Integer(0), "Tells log-probabilities, and those of so many others"),
    field("echo", Kind::Flag, "Begins an answer with its prompt"),
    field("best_of", Kind::Integer(1), "As many as n"),
    field("suffix", Kind::Text, "Only an empty one"),
];

const CHAT: &[Field] = &[
    needed("messages", Kind::List, "The conversation"),
    field("max_tokens", Kind::Integer(0), "New tokens"),
    field("max_completion_tokens", Kind::Integer(0), "New tokens"),
    field("logprobs", Kind::Flag, "Tells log-probabilities"),
    field("top_logprobs", Kind::Integer(0), "And those of so many others"),
    field("chat_template_kwargs", Kind::Object, "Numbers and truth values for the template"),
    field("parallel_tool_calls", Kind::Flag, "Whether several functions are called at once"),
    field("reasoning_effort", Kind::Text, "How much is thought, where the model knows of it"),
    field("thinking_token_budget", Kind::Integer(0), "Tokens of what is thought"),
    field("store", Kind::Flag, "Nothing is stored: only false"),
    field("modalities", Kind::List, "Only text"),
    lacking("audio"),
    lacking("function_call"),
    lacking("functions"),
    lacking("prediction"),
    lacking("service_tier"),
    lacking("web_search_options"),
];

const RESPONSES: &[Field] = &[
    needed("input", Kind::Content, "The conversation"),
    field("instructions", Kind::Text, "What goes before it"),
    field("max_output_tokens", Kind::Integer(0), "New tokens"),
    field("text", Kind::Object, "format is what the answer follows"),
    field("reasoning", Kind::Object, "effort says how much is thought"),
    field("parallel_tool_calls", Kind::Flag, "Whether several functions are called at once"),
    field("metadata", Kind::Object, "Given back with the answer"),
    field("stop", Kind::Texts, "Texts that end an answer, at most 16"),
    field("user", Kind::Text, "Nothing depends on it"),
    field("store", Kind::Flag, "Nothing is stored, and the answer says so"),
    field("background", Kind::Flag, "Only false"),
    field("include", Kind::List, "Only an empty one"),
    field("truncation", Kind::Text, "Only disabled"),
    field("top_logprobs", Kind::Integer(0), "Only 0"),
    lacking("conversation"),
    lacking("max_tool_calls"),
    lacking("previous_response_id"),
    lacking("prompt"),
    lacking("safety_identifier"),
    lacking("service_tier"),
    lacking("stream_options"),
];

const MESSAGES: &[Field] = &[
    needed("max_tokens", Kind::Integer(0), "New tokens"),
    field("stop_sequences", Kind::List, "Texts that end an answer, at most 16"),
    field("metadata", Kind::Object, "Nothing depends on it"),
];

const CONVERSATION: &[Field] = &[
    needed("messages", Kind::List, "The conversation"),
    field("system", Kind::Content, "What goes before it"),
    field("thinking", Kind::Object, "Whether is thought, and in how many tokens"),
    lacking("container"),
    lacking("context_management"),
    lacking("mcp_servers"),
    lacking("service_tier"),
];

const TOOLS: &[Field] = &[
    field("tools", Kind::List, "Functions that may be called"),
    field("tool_choice", Kind::Choice, "Whether they are"),
];

const TOKENIZE: &[Field] = &[
    field("prompt", Kind::Text, "A text"),
    field("add_special_tokens", Kind::Flag, "With the tokens that stand around texts"),
    field("messages", Kind::List, "Or a conversation"),
    field("chat_template_kwargs", Kind::Object, "Numbers and truth values for the template"),
    field("parallel_tool_calls", Kind::Flag, "Changes nothing"),
];

const EMBEDDINGS: &[Field] = &[
    needed("input", Kind::Prompts, "What becomes vectors"),
    field("encoding_format", Kind::Text, "float, or base64 of the numbers' bytes"),
    field("dimensions", Kind::Integer(1), "As many as the vectors have"),
    field("user", Kind::Text, "Nothing depends on it"),
];

const DETOKENIZE: &[Field] = &[needed("tokens", Kind::List, "Ids")];

const NAMED: &[Field] = &[needed("model", Kind::Text, "What clients call the model")];

const LOAD: &[Field] = &[
    needed("model", Kind::Text, "What clients are to call the model"),
    field("path", Kind::Text, "Where it is within the folder of models; where it has its name"),
];

const ADAPTER: &[Field] = &[needed("lora_name", Kind::Text, "What clients call it")];

const LOAD_ADAPTER: &[Field] = &[
    needed("lora_path", Kind::Text, "Where it is within the folder of models"),
    field("base_model_name", Kind::Text, "The model beside whose weights it is; the first"),
    field("load_inplace", Kind::Flag, "Only false"),
];

impl Form {
    pub(crate) const PAGE: Self = Self { fields: None, answer: Answer::Page };
    pub(crate) const TEXT: Self = Self { fields: None, answer: Answer::Text };
    pub(crate) const OBJECT: Self = Self { fields: None, answer: Answer::Object };
    pub(crate) const COMPLETIONS: Self = Self::stream(&[MODEL, COMPLETIONS, OPENAI, ASKED]);
    pub(crate) const CHAT: Self = Self::stream(&[MODEL, CHAT, TOOLS, OPENAI, ASKED]);
    pub(crate) const RESPONSES: Self = Self::stream(&[MODEL, RESPONSES, TOOLS, ASKED]);
    pub(crate) const MESSAGES: Self = Self::stream(&[MODEL, CONVERSATION, MESSAGES, TOOLS, ASKED]);
    pub(crate) const COUNT_TOKENS: Self = Self::object(&[MODEL, CONVERSATION, TOOLS]);
    pub(crate) const EMBEDDINGS: Self = Self::object(&[MODEL, EMBEDDINGS]);
    pub(crate) const TOKENIZE: Self = Self::object(&[MODEL, TOKENIZE, TOOLS]);
    pub(crate) const DETOKENIZE: Self = Self::object(&[MODEL, DETOKENIZE]);
    pub(crate) const LOAD: Self = Self::object(&[LOAD]);
    pub(crate) const UNLOAD: Self = Self::object(&[NAMED]);
    pub(crate) const LOAD_ADAPTER: Self = Self::object(&[ADAPTER, LOAD_ADAPTER]);
    pub(crate) const UNLOAD_ADAPTER: Self = Self::object(&[ADAPTER]);

    const fn object(fields: &'static [&'static [Field]]) -> Self {
        Self { fields: Some(fields), answer: Answer::Object }
    }

    const fn stream(fields: &'static [&'static [Field]]) -> Self {
        Self { fields: Some(fields), answer: Answer::Stream }
    }

    /// The schema of the body.
    fn body(&self) -> Option<Value> {
        let all = self.fields?.iter().copied().flatten();
        let needed: Vec<&str> =
            all.clone().filter(|field| field.is_needed).map(|field| field.name).collect();
        let properties: Map<String, Value> =
            all.map(|field| (field.name.to_owned(), field.schema())).collect();
        let mut schema =
            json!({ "type": "object", "additionalProperties": false, "properties": properties });
        if !needed.is_empty() {
            schema["required"] = needed.into();
        }
        Some(schema)
    }

    /// The types of what is answered.
    fn answers(&self) -> Value {
        let object = json!({ "schema": { "type": "object" } });
        let text = json!({ "schema": { "type": "string" } });
        match self.answer {
            Answer::Page => json!({ "text/html": text }),
            Answer::Text => json!({ "application/openmetrics-text": text }),
            Answer::Object => json!({ "application/json": object }),
            Answer::Stream => json!({ "application/json": object, "text/event-stream": text }),
        }
    }
}

impl Field {
    fn schema(&self) -> Value {
        let text = json!({ "type": "string" });
        let list = json!({ "type": "array" });
        let ids = json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } });
        let kind = match self.kind {
            Kind::Flag => json!({ "type": "boolean" }),
            Kind::FlagOr(word) => json!({ "anyOf": [{ "type": "boolean" }, { "const": word }] }),
            Kind::Integer(i64::MIN) => json!({ "type": "integer" }),
            Kind::Integer(least) => json!({ "type": "integer", "minimum": least }),
            Kind::Number => json!({ "type": "number" }),
            Kind::Text => text,
            Kind::Object => json!({ "type": "object" }),
            Kind::List => list,
            Kind::Texts => json!({ "anyOf": [text, { "type": "array", "items": text }] }),
            Kind::Prompts => json!({ "anyOf": [
                text, ids, { "type": "array", "items": text }, { "type": "array", "items": ids },
            ]}),
            Kind::Content => json!({ "anyOf": [text, list] }),
            Kind::Choice => json!({ "anyOf": [text, { "type": "object" }] }),
            Kind::Null => json!({ "type": "null" }),
        };
        let mut schema = match (self.is_needed, self.kind) {
            (true, _) | (_, Kind::Null) => kind,
            _ => json!({ "anyOf": [kind, { "type": "null" }] }),
        };
        schema["description"] = self.about.into();
        schema
    }
}

/// The description of all endpoints.
pub(crate) async fn document(State(shared): State<Arc<Shared>>) -> Response {
    static TEXT: OnceLock<String> = OnceLock::new();
    let text = TEXT.get_or_init(|| describe(&table(), shared.version).to_string());
    ([(CONTENT_TYPE, "application/json")], text.as_str()).into_response()
}

fn describe(table: &[Route], version: &str) -> Value {
    let mut paths = Map::new();
    for route in table {
        let methods = paths.entry(route.path).or_insert_with(|| json!({}));
        methods[route.method.as_str().to_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Cairn", "version": version },
        "paths": paths,
        "components": { "securitySchemes": {
            "bearer": { "type": "http", "scheme": "bearer" },
            "key": { "type": "apiKey", "in": "header", "name": "x-api-key" },
        }},
    })
}

fn operation(route: &Route) -> Value {
    let needs = match route.needs {
        Needs::Nothing => "no key".to_owned(),
        Needs::Key => "a key, where the server asks for keys".to_owned(),
        Needs::Scope(scope) => {
            format!("a key with scope '{}', where the server asks for keys", Scope::name(scope))
        }
    };
    let error = json!({ "description": "An error", "content": {
        "application/json": { "schema": { "type": "object" } },
    }});
    let mut found = json!({
        "summary": route.about,
        "description": format!("Needs {needs}."),
        "responses": {
            "200": { "description": route.about, "content": route.form.answers() },
            "default": error,
        },
    });
    if route.needs != Needs::Nothing {
        found["security"] = json!([{ "bearer": [] }, { "key": [] }]);
    }
    if let Some(schema) = route.form.body() {
        let content = json!({ "application/json": { "schema": schema } });
        found["requestBody"] = json!({ "required": true, "content": content });
    }
    let parameter = route.path.split_once('{').and_then(|(_, rest)| rest.split_once('}'));
    if let Some((name, _)) = parameter {
        let schema = json!({ "type": "string" });
        found["parameters"] =
            json!([{ "name": name, "in": "path", "required": true, "schema": schema }]);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_endpoint_is_described_and_says_what_it_needs() {
        let table = table();
        let document = describe(&table, "1");
        for Route { method, path, needs, about, .. } in &table {
            let found = &document["paths"][path][method.as_str().to_lowercase()];
            assert_eq!(found["summary"], *about, "{path}");
            assert_eq!(found.get("security").is_some(), *needs != Needs::Nothing, "{path}");
            let content = &found["responses"]["200"]["content"];
            assert!(content.as_object().is_some_and(|content| !content.is_empty()), "{path}");
            let has_body = found.get("requestBody").is_some();
            assert_eq!(has_body, *method == axum::http::Method::POST, "{path}");
        }
        // No two rows are about the same.
        let count: usize = document["paths"]
            .as_object()
            .unwrap()
            .values()
            .map(|found| found.as_object().unwrap().len())
            .sum();
        assert_eq!(count, table.len());
        let chat = &document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"];
        let schema = &chat["application/json"]["schema"];
        assert_eq!(schema["required"], json!(["messages"]));
        assert_eq!(schema["additionalProperties"], false);
        let model = &document["paths"]["/v1/models/{id}"]["get"]["parameters"][0];
        assert_eq!(model["name"], "id");
    }
}

//! Facts of the tokenizer beside a model's weights.

use std::collections::BTreeMap;
use std::path::Path;

use cairn_artifacts::checkpoint::TOKENIZER_FILE;
use cairn_artifacts::hash::Hash;
use cairn_data::tokenizer::{Tokenizer, TokenizerConfig};
use cairn_spec::ModelSpec;
use serde::Serialize;

use crate::table::Table;

/// Special tokens that the table shows; the JSON object has all.
const SHOWN_SPECIALS: usize = 8;

/// What there is to know before any text is read.
#[derive(Clone, Debug, Serialize)]
pub(super) struct TokenizerFacts {
    model: &'static str,
    vocab_size: u32,
    is_byte_level: bool,
    has_byte_fallback: bool,
    end_of_document: Option<u32>,
    special_tokens: BTreeMap<u32, String>,
    named_tokens: BTreeMap<String, String>,
    chat_templates: Vec<String>,
    hash: Hash,
}

impl TokenizerFacts {
    /// Reads the tokenizer in `folder`; `None` if there is none.
    pub(super) fn read(folder: &Path, spec: &ModelSpec) -> anyhow::Result<Option<Self>> {
        let path = folder.join(TOKENIZER_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let tokenizer = Tokenizer::load(&path)?;
        tokenizer.check_model(spec.vocab_size)?;
        let config = TokenizerConfig::read(folder)?;
        config.check(&tokenizer, folder)?;
        Ok(Some(Self {
            model: tokenizer.model_name(),
            vocab_size: tokenizer.vocab_size(),
            is_byte_level: tokenizer.is_byte_level(),
            has_byte_fallback: tokenizer.has_byte_fallback(),
            end_of_document: tokenizer.end_of_document(),
            special_tokens: tokenizer.specials().clone(),
            named_tokens: config.special_tokens,
            chat_templates: config.chat_templates.into_iter().map(|t| t.name).collect(),
            hash: tokenizer.hash(),
        }))
    }

    /// The facts for people.
    pub(super) fn table(&self) -> String {
        let mut table = Table::new(&[]).with_text_columns(2);
        let of = match (self.is_byte_level, self.has_byte_fallback) {
            (true, _) => ", byte level",
            (false, true) => ", bytes where there is no token",
            (false, false) => "",
        };
        table.row([&"tokenizer", &format!("{}{of}, {} tokens", self.model, self.vocab_size)]);
        let specials: Vec<String> =
            self.special_tokens.iter().map(|(id, token)| format!("{token} {id}")).collect();
        let shown = specials.iter().take(SHOWN_SPECIALS).cloned().collect::<Vec<_>>().join(", ");
        let more = specials.len().saturating_sub(SHOWN_SPECIALS);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        table.row([&"special tokens", &format!("{shown}{more}")]);
        for (name, token) in &self.named_tokens {
            table.row([name, token]);
        }
        let end = self.end_of_document.map_or_else(|| "no token".to_owned(), |id| id.to_string());
        table.row([&"ends a document", &end]);
        let templates = match self.chat_templates.as_slice() {
            [] => "none".to_owned(),
            names => names.join(", "),
        };
        table.row([&"chat templates", &templates]);
        table.row([&"hash", &self.hash]);
        table.to_string()
    }
}

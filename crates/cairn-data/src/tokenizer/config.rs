//! What the files beside a `tokenizer.json` say: names of special tokens and chat templates.
//!
//! `tokenizer_config.json` comes first, `special_tokens_map.json` fills in names it lacks.
//! `chat_template.jinja` (and `additional_chat_templates/NAME.jinja`) win over the `chat_template`
//! of the configuration, as in transformers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{ModelFiles, Tokenizer, TokenizerError};

/// Largest file beside a tokenizer that is read, in bytes.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// The folder of further templates.
const TEMPLATES: &str = "additional_chat_templates";
/// The name of the template that is used when none is named.
const DEFAULT_TEMPLATE: &str = "default";

/// Special tokens that have a name of their own.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A chat template with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTemplate {
    /// `default`, or what it is for, such as `tool_use`.
    pub name: String,
    /// The file it came from.
    pub path: PathBuf,
    /// The template.
    pub source: String,
}

/// What the files beside a `tokenizer.json` say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizerConfig {
    /// Special tokens by name (`bos_token`, `eos_token`, …), as they are spelled.
    pub special_tokens: BTreeMap<String, String>,
    /// Further special tokens.
    pub additional_special_tokens: Vec<String>,
    /// Whether a text begins with the `bos_token`, where the file says.
    pub add_bos_token: Option<bool>,
    /// Whether a text ends with the `eos_token`, where the file says.
    pub add_eos_token: Option<bool>,
    /// Most tokens of a text, where the file states a real limit.
    pub model_max_length: Option<usize>,
    /// Chat templates; the first one is the default if none is called so.
    pub chat_templates: Vec<NamedTemplate>,
    /// Added tokens by id.
    pub added_tokens: BTreeMap<u32, String>,
}

impl TokenizerConfig {
    /// Reads the files in `folder` that are there.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::File`] if a file cannot be read, [`TokenizerError::FileTooLarge`] above
    /// 16 MiB, [`TokenizerError::Config`] if it is not what its name says.
    pub fn read(folder: &Path) -> Result<Self, TokenizerError> {
        Self::of(ModelFiles::Folder(folder))
    }

    /// As [`read`](Self::read), for files that may be inside a pack.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read); [`TokenizerError::Pack`] if the pack's file was altered.
    pub fn of(files: ModelFiles<'_>) -> Result<Self, TokenizerError> {
        let mut config = Self::default();
        if let Some((object, path)) = read_object(files, "tokenizer_config.json")? {
            config.take_config(&object, &path)?;
        }
        if let Some((object, path)) = read_object(files, "special_tokens_map.json")? {
            config.take_specials(&object, &path)?;
        }
        config.take_template_files(files)?;
        Ok(config)
    }

    /// A special token by the name of its role, as it is spelled.
    pub fn special(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name).map(String::as_str)
    }

    /// A chat template by name; without one the default, which is the only one if there is one.
    pub fn chat_template(&self, name: Option<&str>) -> Option<&NamedTemplate> {
        let called = |name: &str| self.chat_templates.iter().find(|t| t.name == name);
        match name {
            Some(name) => called(name),
            None => called(DEFAULT_TEMPLATE).or(match self.chat_templates.as_slice() {
                [only] => Some(only),
                _ => None,
            }),
        }
    }

    /// Checks that the tokenizer has the tokens that the files name.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::AddedTokenId`] for a token with another id, [`TokenizerError::Config`] for
    /// a named special token that the vocabulary lacks.
    pub fn check(&self, tokenizer: &Tokenizer, folder: &Path) -> Result<(), TokenizerError> {
        let path = folder.join("tokenizer_config.json");
        for (stated, token) in &self.added_tokens {
            match tokenizer.token_id(token) {
                Some(actual) if actual == *stated => {}
                Some(actual) => {
                    let (token, stated) = (token.clone(), *stated);
                    return Err(TokenizerError::AddedTokenId { path, token, stated, actual });
                }
                None => {
                    let reason = format!("tokenizer.json has no token {token:?} (id {stated})");
                    return Err(TokenizerError::Config { path, reason });
                }
            }
        }
        for (name, token) in &self.special_tokens {
            if tokenizer.token_id(token).is_none() {
                let reason = format!("{name} is {token:?}, which tokenizer.json does not have");
                return Err(TokenizerError::Config { path, reason });
            }
        }
        Ok(())
    }

    fn take_config(
        &mut self,
        object: &Map<String, Value>,
        path: &Path,
    ) -> Result<(), TokenizerError> {
        self.take_specials(object, path)?;
        let flag = |name: &str| match object.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong(path, format!("{name} is {other}, expected true or false"))),
        };
        self.add_bos_token = flag("add_bos_token")?;
        self.add_eos_token = flag("add_eos_token")?;
        // A length of 1e30 is how the files say that there is none.
        self.model_max_length = object
            .get("model_max_length")
            .and_then(Value::as_u64)
            .and_then(|length| usize::try_from(length).ok())
            .filter(|length| *length <= 1 << 32);
        self.take_added(object, path)?;
        match object.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => self.add_template(DEFAULT_TEMPLATE, path, source),
            Some(Value::Array(templates)) => {
                for template in templates {
                    let text = |key: &str| template.get(key).and_then(Value::as_str);
                    let (Some(name), Some(source)) = (text("name"), text("template")) else {
                        let reason = "chat_template lists something without name and template";
                        return Err(wrong(path, reason.to_owned()));
                    };
                    self.add_template(name, path, source);
                }
            }
            Some(_) => {
                let reason = "chat_template is neither a text nor a list of templates";
                return Err(wrong(path, reason.to_owned()));
            }
        }
        Ok(())
    }

    fn take_added(
        &mut self,
        object: &Map<String, Value>,
        path: &Path,
    ) -> Result<(), TokenizerError> {
        let added = match object.get("added_tokens_decoder") {
            None | Some(Value::Null) => return Ok(()),
            Some(Value::Object(added)) => added,
            Some(_) => return Err(wrong(path, "added_tokens_decoder is no object".to_owned())),
        };
        for (id, token) in added {
            let (Ok(id), Some(content)) = (id.parse::<u32>(), content_of(token)) else {
                let reason = format!("added_tokens_decoder: {id:?} is not an id with a token");
                return Err(wrong(path, reason));
            };
            if content.is_empty() {
                return Err(TokenizerError::EmptyToken { path: path.to_owned(), id });
            }
            self.added_tokens.insert(id, content.to_owned());
        }
        Ok(())
    }

    /// Takes names that are not known yet.
    fn take_specials(
        &mut self,
        object: &Map<String, Value>,
        path: &Path,
    ) -> Result<(), TokenizerError> {
        for name in NAMES {
            let token = match object.get(name) {
                None | Some(Value::Null) => continue,
                Some(token) => content_of(token)
                    .ok_or_else(|| wrong(path, format!("{name} is {token}, expected a token")))?,
            };
            self.special_tokens.entry(name.to_owned()).or_insert_with(|| token.to_owned());
        }
        if let Some(Value::Array(more)) = object.get("additional_special_tokens") {
            for token in more {
                let token = content_of(token)
                    .ok_or_else(|| wrong(path, format!("additional_special_tokens has {token}")))?;
                if !self.additional_special_tokens.iter().any(|known| known == token) {
                    self.additional_special_tokens.push(token.to_owned());
                }
            }
        }
        Ok(())
    }

    fn take_template_files(&mut self, files: ModelFiles<'_>) -> Result<(), TokenizerError> {
        if let Some((object, path)) = read_object(files, "chat_template.json")?
            && let Some(source) = object.get("chat_template").and_then(Value::as_str)
        {
            self.replace_template(DEFAULT_TEMPLATE, &path, source);
        }
        if let Some((source, path)) = read_text(files, "chat_template.jinja")? {
            self.replace_template(DEFAULT_TEMPLATE, &path, &source);
        }
        for file in files.names_in(TEMPLATES)? {
            let Some(name) = file.strip_suffix(".jinja") else { continue };
            if let Some((source, path)) = read_text(files, &format!("{TEMPLATES}/{file}"))? {
                self.replace_template(name, &path, &source);
            }
        }
        Ok(())
    }

    fn replace_template(&mut self, name: &str, path: &Path, source: &str) {
        self.chat_templates.retain(|template| template.name != name);
        self.add_template(name, path, source);
    }

    fn add_template(&mut self, name: &str, path: &Path, source: &str) {
        self.chat_templates.push(NamedTemplate {
            name: name.to_owned(),
            path: path.to_owned(),
            source: source.to_owned(),
        });
    }
}

/// The spelling of a token that is a text or an object with one.
fn content_of(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn wrong(path: &Path, reason: String) -> TokenizerError {
    TokenizerError::Config { path: path.to_owned(), reason }
}

/// An object, and the path of the file that it is.
pub(super) type FoundObject = (Map<String, Value>, PathBuf);

/// The text of a small file, and its path; `None` without the file.
fn read_text(
    files: ModelFiles<'_>,
    name: &str,
) -> Result<Option<(String, PathBuf)>, TokenizerError> {
    let Some(bytes) = files.read(name, CONFIG_BYTES_MAX)? else { return Ok(None) };
    let path = files.path_of(name);
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some((text, path))),
        Err(_) => Err(wrong(&path, "it is not UTF-8".to_owned())),
    }
}

/// The object in a small JSON file, and its path; `None` without the file.
pub(super) fn read_object(
    files: ModelFiles<'_>,
    name: &str,
) -> Result<Option<FoundObject>, TokenizerError> {
    let Some((text, path)) = read_text(files, name)? else { return Ok(None) };
    match serde_json::from_str(&text) {
        Ok(object) => Ok(Some((object, path))),
        Err(error) => Err(wrong(&path, error.to_string())),
    }
}

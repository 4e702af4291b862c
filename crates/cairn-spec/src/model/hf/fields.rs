//! Typed access to the fields of a `config.json`; a field that is `null` counts as absent.

use crate::model::SpecError;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Longest text quoted in an error, in characters.
const QUOTE_CHARS_MAX: usize = 60;

/// Longest list of numbers: more than any head has dimensions.
const REALS_MAX: usize = 1 << 13;

/// One object of a `config.json`.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Put before field names in errors: `rope_scaling.`.
    prefix: &'static str,
    /// What was asked for, so that what nobody asks for can be named.
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, prefix: "", asked: RefCell::default() }
    }

    /// The fields that are set and that nobody asked for, in order.
    pub(super) fn unread(&self) -> Vec<String> {
        let asked = self.asked.borrow();
        let set = self.map.iter().filter(|(_, value)| !value.is_null());
        let mut unread: Vec<String> =
            set.map(|(name, _)| name.clone()).filter(|name| !asked.contains(name)).collect();
        unread.sort_unstable();
        unread
    }

    /// The field's value, unless absent or null.
    pub(super) fn value(&self, field: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(field.to_owned());
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether the file has the field, be it null.
    pub(super) fn has(&self, field: &str) -> bool {
        self.asked.borrow_mut().insert(field.to_owned());
        self.map.contains_key(field)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &'a String> {
        self.map.keys()
    }

    pub(super) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    pub(super) fn object(&self, field: &'static str) -> Result<Option<Self>, SpecError> {
        let prefix = match field {
            "rope_parameters" => "rope_parameters.",
            "full_attention" => "rope_parameters.full_attention.",
            "sliding_attention" => "rope_parameters.sliding_attention.",
            _ => "rope_scaling.",
        };
        match self.value(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, prefix, asked: RefCell::default() })),
            Some(other) => Err(self.wrong_type(field, "an object", other)),
        }
    }

    pub(super) fn size(&self, field: &str) -> Result<Option<usize>, SpecError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.map(Some).ok_or_else(|| self.wrong_type(field, "a whole number", value))
    }

    pub(super) fn required_size(&self, field: &str) -> Result<usize, SpecError> {
        self.size(field)?.ok_or_else(|| self.missing(field))
    }

    pub(super) fn real(&self, field: &str) -> Result<Option<f64>, SpecError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong_type(field, "a number", value))
    }

    pub(super) fn required_real(&self, field: &str) -> Result<f64, SpecError> {
        self.real(field)?.ok_or_else(|| self.missing(field))
    }

    /// A list of numbers.
    pub(super) fn reals(&self, field: &str) -> Result<Option<Vec<f64>>, SpecError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        let reals = value
            .as_array()
            .filter(|items| items.len() <= REALS_MAX)
            .and_then(|items| items.iter().map(Value::as_f64).collect::<Option<Vec<_>>>());
        reals.map(Some).ok_or_else(|| self.wrong_type(field, "a list of numbers", value))
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool, SpecError> {
        match self.value(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong_type(field, "true or false", other)),
        }
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<String>, SpecError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(self.wrong_type(field, "a text", other)),
        }
    }

    pub(super) fn required_text(&self, field: &str) -> Result<String, SpecError> {
        self.text(field)?.ok_or_else(|| self.missing(field))
    }

    /// A list of texts; empty if absent.
    pub(super) fn texts(&self, field: &str) -> Result<Vec<String>, SpecError> {
        let Some(value) = self.value(field) else { return Ok(Vec::new()) };
        let texts = value.as_array().and_then(|items| {
            items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        });
        texts.ok_or_else(|| self.wrong_type(field, "a list of texts", value))
    }

    /// One token id or a list of them. `None` if the file does not have the field, an empty list
    /// if it says `null` or a negative number: LLaMA 1 files say `-1` for "no such token".
    pub(super) fn token_ids(&self, field: &str) -> Result<Option<Vec<u32>>, SpecError> {
        if !self.has(field) {
            return Ok(None);
        }
        let Some(value) = self.value(field) else { return Ok(Some(Vec::new())) };
        let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut ids = Vec::with_capacity(items.len());
        for item in items {
            let id = item.as_i64().ok_or_else(|| self.wrong_type(field, "a token id", value))?;
            if id < 0 {
                continue;
            }
            let id = u32::try_from(id).map_err(|_| self.wrong_type(field, "a token id", value))?;
            ids.push(id);
        }
        Ok(Some(ids))
    }

    /// Two names for one size; both may be present if they agree.
    pub(super) fn size_of_either(
        &self,
        name: &str,
        alias: &str,
    ) -> Result<Option<usize>, SpecError> {
        match (self.size(name)?, self.size(alias)?) {
            (Some(first), Some(second)) if first != second => Err(SpecError::Contradiction {
                first: self.name(name),
                first_value: first.to_string(),
                second: self.name(alias),
                second_value: second.to_string(),
            }),
            (first, second) => Ok(first.or(second)),
        }
    }

    pub(super) fn missing(&self, field: &str) -> SpecError {
        SpecError::Missing { field: self.name(field) }
    }

    fn wrong_type(&self, field: &str, expected: &'static str, value: &Value) -> SpecError {
        SpecError::WrongType { field: self.name(field), expected, actual: quote(value) }
    }
}

/// The value as JSON, cut to a readable length.
pub(super) fn quote(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(QUOTE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// What kind of JSON value this is.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

//! Typed access to the keys of a GGUF file, with a memory of what was read.

use super::{ARCHITECTURES, GgufSpecError};
use cairn_artifacts::gguf::{GgufFile, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Longest value quoted in an error, in characters.
const QUOTE_CHARS_MAX: usize = 60;

/// Keys under the architecture's name that change no number, whatever they say: whether a scaled
/// rotation was trained with, and who laid out the tensors (their order is the same).
const HARMLESS: [&str; 2] = ["rope.scaling.finetuned", "tensor_data_layout"];

/// Keys that mean what is computed anyway when they have this value.
const NEUTRAL: [(&str, f64); 8] = [
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("attention.causal", 1.0),
    ("attention.sliding_window", 0.0),
    ("rope.scaling.attn_factor", 1.0),
    ("use_parallel_residual", 0.0),
    // A softmax over all experts, whose chosen parts are made to add up to one.
    ("expert_gating_func", 1.0),
    ("expert_weights_norm", 1.0),
];

/// The keys of a file.
pub(super) struct Keys<'a> {
    file: &'a GgufFile,
    architecture: &'a str,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    /// The keys of a file that holds a whole model of a known architecture.
    pub(super) fn new(file: &'a GgufFile) -> Result<Self, GgufSpecError> {
        let mut keys = Self { file, architecture: "", read: RefCell::default() };
        let key = "general.architecture";
        let architecture = keys.optional_text(key)?;
        let architecture =
            architecture.ok_or_else(|| GgufSpecError::Missing { key: key.to_owned() })?;
        keys.architecture = architecture;
        if keys.optional_text("general.type")?.is_some_and(|kind| kind != "model") {
            return Err(keys.unsupported("general.type"));
        }
        if keys.optional_whole("split.count")?.is_some_and(|count| count > 1) {
            return Err(keys.unsupported("split.count"));
        }
        if !ARCHITECTURES.contains(&architecture) {
            return Err(GgufSpecError::Architecture { architecture: architecture.to_owned() });
        }
        Ok(keys)
    }

    pub(super) const fn architecture(&self) -> &'a str {
        self.architecture
    }

    pub(super) const fn file(&self) -> &'a GgufFile {
        self.file
    }

    /// The key with the architecture in front.
    pub(super) fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub(super) fn has_tensor(&self, name: &str) -> bool {
        self.file.header().tensor(name).is_some()
    }

    /// A size of the architecture; one number for all layers.
    pub(super) fn size(&self, key: &str) -> Result<u64, GgufSpecError> {
        let size = self.optional_size(key)?;
        size.ok_or_else(|| GgufSpecError::Missing { key: self.full(key) })
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<u64>, GgufSpecError> {
        self.optional_whole(&self.full(key))
    }

    pub(super) fn real(&self, key: &str) -> Result<f64, GgufSpecError> {
        let real = self.optional_real(key)?;
        real.ok_or_else(|| GgufSpecError::Missing { key: self.full(key) })
    }

    pub(super) fn optional_real(&self, key: &str) -> Result<Option<f64>, GgufSpecError> {
        let key = self.full(key);
        match self.value(&key) {
            None => Ok(None),
            Some(Value::Real(real, _)) if !real.is_finite() => {
                let found = real.to_string();
                Err(GgufSpecError::WrongType { key, found, expected: "a finite number" })
            }
            // The shortest decimal number that is this f32: what the author wrote.
            Some(Value::Real(real, cairn_artifacts::gguf::ValueType::F32)) => {
                Ok(Some(shortest(*real)))
            }
            Some(Value::Real(real, _)) => Ok(Some(*real)),
            Some(other) => Err(wrong_type(&key, other, "a number")),
        }
    }

    /// A text of the architecture.
    pub(super) fn optional_word(&self, key: &str) -> Result<Option<&'a str>, GgufSpecError> {
        self.optional_text(&self.full(key))
    }

    /// True or false, of the architecture.
    pub(super) fn optional_flag(&self, key: &str) -> Result<Option<bool>, GgufSpecError> {
        let key = self.full(key);
        match self.value(&key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wrong_type(&key, other, "true or false")),
        }
    }

    /// Refuses a size that is there and another one.
    pub(super) fn expect(&self, key: &str, expected: u64) -> Result<(), GgufSpecError> {
        match self.optional_size(key)? {
            Some(found) if found != expected => Err(self.unsupported(&self.full(key))),
            Some(_) | None => Ok(()),
        }
    }

    fn optional_text(&self, key: &str) -> Result<Option<&'a str>, GgufSpecError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(key, other, "a text")),
        }
    }

    pub(super) fn optional_whole(&self, key: &str) -> Result<Option<u64>, GgufSpecError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Unsigned(number, _)) => Ok(Some(*number)),
            Some(Value::Signed(number, _)) if *number >= 0 => Ok(Some(number.unsigned_abs())),
            Some(other) => Err(wrong_type(key, other, "a whole number")),
        }
    }

    pub(super) fn optional_list_len(&self, key: &str) -> Result<Option<u64>, GgufSpecError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::List(list)) => Ok(Some(list.len() as u64)),
            Some(other) => Err(wrong_type(key, other, "a list")),
        }
    }

    fn value(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.file.value(key)
    }

    /// Refuses a key of the architecture that nothing has read and that is not known to be
    /// harmless: it may change the numbers.
    pub(super) fn refuse_unread(&self) -> Result<(), GgufSpecError> {
        let read = self.read.borrow();
        for (key, value) in self.file.header().metadata() {
            let own = key.strip_prefix(self.architecture).and_then(|rest| rest.strip_prefix('.'));
            let Some(own) = own else { continue };
            let neutral = NEUTRAL.iter().any(|(name, neutral)| {
                *name == own
                    && as_number(value).is_some_and(|number| number.total_cmp(neutral).is_eq())
            });
            if !read.contains(key) && !neutral && !HARMLESS.contains(&own) {
                return Err(self.unsupported(key));
            }
        }
        Ok(())
    }

    /// An error about a key and its value.
    pub(super) fn unsupported(&self, key: &str) -> GgufSpecError {
        let value = self.file.value(key).map_or_else(|| "something".to_owned(), quote);
        let architecture = self.architecture.to_owned();
        GgufSpecError::Unsupported { key: key.to_owned(), value, architecture }
    }
}

/// The shortest decimal number that rounds to the same `f32`.
pub(super) fn shortest(real: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, reason = "the file had an f32")]
    let narrow = real as f32;
    narrow.to_string().parse().unwrap_or(real)
}

#[expect(clippy::cast_precision_loss, reason = "compared with 0 and 1")]
fn as_number(value: &Value) -> Option<f64> {
    match value {
        Value::Unsigned(number, _) => Some(*number as f64),
        Value::Signed(number, _) => Some(*number as f64),
        Value::Real(number, _) => Some(*number),
        Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
        Value::Text(_) | Value::List(_) => None,
    }
}

fn quote(value: &Value) -> String {
    let text = match value {
        Value::Unsigned(number, _) => number.to_string(),
        Value::Signed(number, _) => number.to_string(),
        Value::Real(number, _) => number.to_string(),
        Value::Bool(flag) => flag.to_string(),
        Value::Text(text) => format!("'{text}'"),
        Value::List(list) => format!("a list of {}", list.len()),
    };
    match text.char_indices().nth(QUOTE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn wrong_type(key: &str, found: &Value, expected: &'static str) -> GgufSpecError {
    GgufSpecError::WrongType {
        key: key.to_owned(),
        found: found.value_type().to_string(),
        expected,
    }
}

//! What is in a GGUF file: the model, where it is one that is computed, keys and tensors.

use std::fmt::Write as _;
use std::path::Path;

use cairn_artifacts::gguf::{Array, GgufFile, Value as GgufValue, ValueType};
use serde_json::{Value, json};

use super::{InspectArgs, draw};
use crate::context::Context;
use crate::failure::UserError;
use crate::figures::{Bytes, Count};
use crate::table::Table;

/// Longest value shown, in characters.
const SHOWN_CHARS_MAX: usize = 60;
/// Elements of a list that are shown.
const SHOWN_ELEMENTS: usize = 4;

/// Prints what is in the file.
pub(super) fn inspect(path: &Path, args: &InspectArgs, context: &Context) -> anyhow::Result<()> {
    if !args.told.is_empty() {
        return Err(UserError::new(format!("{} describes its model itself", path.display()))
            .hint("--set is for safetensors without a config.json")
            .into());
    }
    let file = GgufFile::open(path)?;
    let spec = cairn_model::gguf::spec(&file);
    if args.parts.program || args.picture.is_some() {
        return draw(&spec?, args, context);
    }
    if args.json {
        let object = json!({
            "version": file.header().version(),
            "alignment": file.header().alignment(),
            "spec": spec.ok().map(serde_json::to_value).transpose()?,
            "metadata": metadata_json(&file),
            "tensors": file.tensors().map(|tensor| json!({
                "name": tensor.name,
                "type": tensor.tensor_type.name(),
                "shape": tensor.shape,
                "bytes": tensor.bytes,
            })).collect::<Vec<Value>>(),
        });
        return context.terminal.print(serde_json::to_string_pretty(&object)?);
    }
    let mut text = String::new();
    let mut table = Table::new(&[]).with_text_columns(2);
    table.row([&"format", &format!("GGUF, version {}", file.header().version())]);
    match &spec {
        Ok(spec) => {
            let parameters = spec.parameter_count().total();
            table.row([&"family", &spec.family]);
            table.row([&"parameters", &format!("{} ({parameters})", Count(parameters as f64))]);
            let storage = args.weights.dtype.storage_of(spec, Some(&file))?;
            let held = Bytes::of(storage.weight_bytes(spec)?);
            table.row([&"in memory", &format!("{held} as {storage}")]);
        }
        Err(error) => {
            let cause = std::error::Error::source(error);
            let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
            table.row([&"model", &format!("not computed here: {error}{cause}")]);
        }
    }
    let _ = write!(text, "{table}\n\n{}\n\n{}", metadata_table(&file), tensor_table(&file));
    context.terminal.print(text)
}

fn metadata_table(file: &GgufFile) -> String {
    let mut table = Table::new(&["key", "type", "value"]).with_text_columns(3);
    for (key, value) in file.header().metadata() {
        table.row([&printable(key), &value.value_type(), &shown(file, key, value)]);
    }
    table.to_string()
}

fn tensor_table(file: &GgufFile) -> String {
    let mut table = Table::new(&["tensor", "type", "shape", "bytes"]).with_text_columns(3);
    for tensor in file.tensors() {
        let shape = format!("{:?}", tensor.shape);
        table.row([&printable(&tensor.name), &tensor.tensor_type, &shape, &tensor.bytes]);
    }
    let bytes: usize = file.tensors().map(|tensor| tensor.bytes).sum();
    format!("{table}\n{} tensors, {}", file.tensors().len(), Bytes::of(bytes))
}

fn shown(file: &GgufFile, key: &str, value: &GgufValue) -> String {
    let text = match value {
        GgufValue::Unsigned(number, _) => number.to_string(),
        GgufValue::Signed(number, _) => number.to_string(),
        GgufValue::Real(number, ValueType::F32) => narrow(*number),
        GgufValue::Real(number, _) => number.to_string(),
        GgufValue::Bool(flag) => flag.to_string(),
        GgufValue::Text(text) => printable(text),
        GgufValue::List(list) => list_text(file, key, list),
    };
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The digits that an `f32` needs.
#[expect(clippy::cast_possible_truncation, reason = "it was an f32")]
fn narrow(number: f64) -> String {
    (number as f32).to_string()
}

fn list_text(file: &GgufFile, key: &str, list: &Array) -> String {
    let more = if list.len() > SHOWN_ELEMENTS { ", …" } else { "" };
    let first = if list.element() == ValueType::Text {
        let texts = file.texts(key, list).unwrap_or_default();
        let first = texts.iter().take(SHOWN_ELEMENTS).map(|text| format!("{text:?}"));
        first.collect::<Vec<_>>()
    } else {
        let numbers = file.numbers(key, list).unwrap_or_default();
        numbers.iter().take(SHOWN_ELEMENTS).map(ToString::to_string).collect()
    };
    format!("{} × {}: {}{more}", list.len(), list.element(), first.join(", "))
}

/// The text without what would move the terminal's cursor.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_debug().collect() } else { vec![c] })
        .collect()
}

fn metadata_json(file: &GgufFile) -> Value {
    let pairs = file.header().metadata().map(|(key, value)| {
        let value = match value {
            GgufValue::Unsigned(number, _) => json!(number),
            GgufValue::Signed(number, _) => json!(number),
            GgufValue::Real(number, _) => json!(number),
            GgufValue::Bool(flag) => json!(flag),
            GgufValue::Text(text) => json!(text),
            GgufValue::List(list) => match file.texts(key, list) {
                Ok(texts) => json!(texts),
                Err(_) => json!(file.numbers(key, list).unwrap_or_default()),
            },
        };
        (key.to_owned(), value)
    });
    Value::Object(pairs.collect())
}

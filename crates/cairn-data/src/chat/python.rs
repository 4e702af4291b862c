//! Values as Python writes them: `str`, `repr` and `json.dumps`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Value};

use super::bounds::Budget;

/// Widest indentation of JSON.
const INDENT_MAX: usize = 64;

/// A value that came as JSON. JSON readers bound its depth.
pub(super) fn value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Value::from(whole),
            (None, Some(whole)) => Value::from(whole),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(list) => Value::from(list.iter().map(value).collect::<Vec<_>>()),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), value(item))))
        }
    }
}

/// `str(value)`; nothing for what is undefined.
pub(super) fn text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let mut text = String::new();
            write_repr(&mut text, value);
            text
        }
    }
}

fn write_repr(out: &mut String, value: &Value) {
    match value.kind() {
        ValueKind::String => write_quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Number => write_number(out, value),
        ValueKind::Seq | ValueKind::Iterable => {
            let is_tuple = value.is_tuple();
            out.push(if is_tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter().into_iter().flatten() {
                if 0 < count {
                    out.push_str(", ");
                }
                write_repr(out, &item);
                count += 1;
            }
            out.push_str(match (is_tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                (false, _) => "]",
            });
        }
        ValueKind::Map => {
            out.push('{');
            let pairs = value.as_object().and_then(|object| object.try_iter_pairs());
            for (index, (key, item)) in pairs.into_iter().flatten().enumerate() {
                if 0 < index {
                    out.push_str(", ");
                }
                write_repr(out, &key);
                out.push_str(": ");
                write_repr(out, &item);
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
}

/// A text in single quotes, or in double ones where that saves escapes.
fn write_quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote => {
                out.push('\\');
                out.push(c);
            }
            _ if c < ' ' || c == '\u{7f}' => {
                push_formatted(out, format_args!("\\x{:02x}", u32::from(c)));
            }
            _ => out.push(c),
        }
    }
    out.push(quote);
}

fn write_number(out: &mut String, value: &Value) {
    if value.is_integer() {
        out.push_str(&value.to_string());
        return;
    }
    match f64::try_from(value.clone()) {
        Ok(number) => out.push_str(&float(number)),
        Err(_) => out.push_str(&value.to_string()),
    }
}

/// `repr` of a float: the shortest digits, an exponent below 1e-4 and from 1e16 on.
fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    if number.is_infinite() {
        return if number < 0.0 { "-inf" } else { "inf" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// How `json.dumps` writes.
struct Style<'a> {
    budget: &'a Budget,
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl<'a> Style<'a> {
    /// The arguments of transformers' `tojson`.
    fn of(arguments: &[Value], budget: &'a Budget) -> Result<Self, Error> {
        type Arguments = (Option<bool>, Option<Value>, Option<Vec<String>>, Option<bool>, Kwargs);
        let (ascii, indent, separators, sort, options): Arguments = from_args(arguments)?;
        let indent: Option<Value> = indent.or(options.get("indent")?);
        let separators: Option<Vec<String>> = separators.or(options.get("separators")?);
        let ensure_ascii = ascii.or(options.get("ensure_ascii")?).unwrap_or(false);
        let sort_keys = sort.or(options.get("sort_keys")?).unwrap_or(false);
        options.assert_all_used()?;
        let wrong = |what: &'static str| Error::new(ErrorKind::InvalidOperation, what);
        let indent = match indent.filter(|indent| !indent.is_none()) {
            None => None,
            Some(indent) => Some(match (indent.as_str(), indent.as_usize()) {
                (Some(text), _) if text.len() <= INDENT_MAX => text.to_owned(),
                (None, Some(width)) if width <= INDENT_MAX => " ".repeat(width),
                _ => return Err(wrong("the indentation of JSON is at most 64 characters")),
            }),
        };
        let (item_separator, key_separator) = match separators.as_deref() {
            None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
            None => (", ".to_owned(), ": ".to_owned()),
            Some([item, key]) if item.len().max(key.len()) <= INDENT_MAX => {
                (item.clone(), key.clone())
            }
            Some(_) => return Err(wrong("separators of JSON are two short texts")),
        };
        Ok(Self { budget, ensure_ascii, indent, item_separator, key_separator, sort_keys })
    }
}

/// `json.dumps(value, …)` with the arguments of transformers' filter.
pub(super) fn json(value: &Value, arguments: &[Value], budget: &Budget) -> Result<String, Error> {
    let style = Style::of(arguments, budget)?;
    let mut out = String::new();
    write_json(&mut out, value, &style, 0)?;
    budget.spend(out.len())?;
    Ok(out)
}

fn write_json(
    out: &mut String,
    value: &Value,
    style: &Style<'_>,
    depth: usize,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => write_json_number(out, value),
        ValueKind::String => {
            write_json_text(out, value.as_str().unwrap_or_default(), style.ensure_ascii);
        }
        ValueKind::Seq => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_block(out, style, (['[', ']'], depth), items.len(), |out, index| {
                write_json(out, &items[index], style, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let pairs = value.as_object().and_then(|object| object.try_iter_pairs());
            let mut pairs: Vec<(String, Value)> =
                pairs.into_iter().flatten().map(|(key, item)| (json_key(&key), item)).collect();
            if style.sort_keys {
                pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
            }
            write_block(out, style, (['{', '}'], depth), pairs.len(), |out, index| {
                write_json_text(out, &pairs[index].0, style.ensure_ascii);
                out.push_str(&style.key_separator);
                write_json(out, &pairs[index].1, style, depth + 1)
            })?;
        }
        kind => {
            let reason = format!("a value of type {kind} is not JSON");
            return Err(Error::new(ErrorKind::InvalidOperation, reason));
        }
    }
    Ok(())
}

fn write_block(
    out: &mut String,
    style: &Style<'_>,
    ([open, close], depth): ([char; 2], usize),
    count: usize,
    mut write: impl FnMut(&mut String, usize) -> Result<(), Error>,
) -> Result<(), Error> {
    out.push(open);
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            style.budget.spend(depth * indent.len())?;
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
        Ok::<(), Error>(())
    };
    for index in 0..count {
        if 0 < index {
            out.push_str(&style.item_separator);
        }
        line(out, depth + 1)?;
        write(out, index)?;
    }
    if 0 < count {
        line(out, depth)?;
    }
    out.push(close);
    Ok(())
}

/// Python turns keys that are no texts into texts.
fn json_key(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.to_owned(),
        _ => text(key),
    }
}

fn write_json_number(out: &mut String, value: &Value) {
    let mut text = String::new();
    write_number(&mut text, value);
    out.push_str(match text.as_str() {
        "nan" => "NaN",
        "inf" => "Infinity",
        "-inf" => "-Infinity",
        number => number,
    });
}

fn write_json_text(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            _ if c < ' ' || ensure_ascii && !c.is_ascii() => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    push_formatted(out, format_args!("\\u{unit:04x}"));
                }
            }
            _ => out.push(c),
        }
    }
    out.push('"');
}

fn push_formatted(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a String takes any text");
}

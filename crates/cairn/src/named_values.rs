//! `NAME=VALUE` pairs of a command line.

use serde_json::{Map, Value, json};

use crate::failure::UserError;

/// Reads pairs whose values are JSON; what is not JSON is text. `example` is one that would do.
pub(crate) fn named_values(
    pairs: &[String],
    example: &str,
) -> Result<Map<String, Value>, UserError> {
    let mut values = Map::new();
    for pair in pairs {
        let Some((name, value)) = pair.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            return Err(UserError::new(format!("--set {pair} names no value"))
                .hint(format!("write --set {example}")));
        };
        let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
        values.insert(name.to_owned(), value);
    }
    Ok(values)
}

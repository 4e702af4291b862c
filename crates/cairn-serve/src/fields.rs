//! The body of a request, read strictly: each field is taken once, and what nobody took is refused by name.

use cairn_data::json::count_values;
use cairn_spec::unique_json;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Names that are no further apart than this are taken for each other's misspelling.
const LIKENESS_MIN: f64 = 0.8;

/// Values in a body, at most: a prompt as ids may have this many tokens. Each takes up to a hundred bytes while
/// the body is read.
const VALUES_MAX: usize = 1 << 18;

/// The fields of a JSON object that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct Fields {
    left: Map<String, Value>,
    /// Names that were asked for.
    known: Vec<&'static str>,
}

impl Fields {
    /// Reads a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body)
            .map_err(|error| ApiError::invalid(format!("the body is not UTF-8: {error}")))?;
        let values = count_values(body);
        if VALUES_MAX < values {
            let message = format!("the body has {values} values in it, at most {VALUES_MAX}");
            return Err(ApiError::invalid(message));
        }
        let value = unique_json::parse(text)
            .map_err(|error| ApiError::invalid(format!("the body is no JSON to read: {error}")))?;
        match value {
            Value::Object(left) => Ok(Self { left, known: Vec::new() }),
            _ => Err(ApiError::invalid("the body is not a JSON object")),
        }
    }

    /// A field, if it is there and not null.
    pub(crate) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<T>, ApiError> {
        self.known.push(name);
        match self.left.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|error| ApiError::field(name, format!("{name}: {error}"))),
        }
    }

    /// Whether a field is there and not null.
    pub(crate) fn says(&self, name: &str) -> bool {
        self.left.get(name).is_some_and(|value| !value.is_null())
    }

    /// A field that is taken later.
    pub(crate) fn value(&self, name: &str) -> Option<&Value> {
        self.left.get(name)
    }

    /// The text of a field that is taken later.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.left.get(name).and_then(Value::as_str)
    }

    /// A field that has to be there.
    pub(crate) fn need<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| ApiError::field(name, format!("{name} is missing")))
    }

    /// A number that is one, as f32.
    pub(crate) fn number(&mut self, name: &'static str) -> Result<Option<f32>, ApiError> {
        let found: Option<f64> = self.take(name)?;
        #[expect(clippy::cast_possible_truncation, reason = "rounded as any f32, and checked")]
        let narrow = found.map(|value| value as f32);
        match narrow {
            Some(value) if !value.is_finite() => {
                Err(ApiError::field(name, format!("{name} is too large a number")))
            }
            other => Ok(other),
        }
    }

    /// A field that is not there yet: only `neutral`, which asks for nothing, is taken.
    pub(crate) fn lacking(
        &mut self,
        name: &'static str,
        neutral: &[Value],
    ) -> Result<(), ApiError> {
        match self.take::<Value>(name)? {
            Some(value) if !neutral.contains(&value) => {
                Err(ApiError::field(name, format!("{name} is not supported here")))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what nobody took.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        let Some(name) = self.left.keys().next() else { return Ok(()) };
        let likeness = |known: &&str| strsim::jaro_winkler(name, known);
        let nearest = self.known.iter().copied().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        let nearest = nearest.filter(|known| LIKENESS_MIN <= likeness(known));
        let hint = nearest.map(|known| format!("; is {known} meant?")).unwrap_or_default();
        Err(ApiError::field(name, format!("there is no field '{name}' here{hint}")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(error: &ApiError) -> String {
        error.body()["error"]["message"].as_str().unwrap().to_owned()
    }

    #[test]
    fn what_nobody_took_is_refused_by_name() {
        let mut fields = Fields::parse(br#"{"temperature": 0.5, "temprature": 1}"#).unwrap();
        assert_eq!(fields.number("temperature").unwrap(), Some(0.5));
        let error = fields.finish().unwrap_err();
        assert_eq!(error.body()["error"]["param"], "temprature");
        assert_eq!(message(&error), "there is no field 'temprature' here; is temperature meant?");
        assert!(Fields::parse(b"{}").unwrap().finish().is_ok());
    }

    #[test]
    fn bodies_that_are_none_are_refused() {
        for (body, expected) in [
            (&b"\xff{}"[..], "the body is not UTF-8"),
            (b"", "the body is no JSON to read"),
            (b"[1]", "the body is not a JSON object"),
            (br#"{"n": 1, "n": 2}"#, "'n' is there twice, as 1 and as 2"),
            (br#"{"n": NaN}"#, "the body is no JSON to read"),
        ] {
            let error = Fields::parse(body).unwrap_err();
            assert!(message(&error).contains(expected), "{error:?}");
        }
        let deep = [&b"[".repeat(100_000)[..], b"1"].concat();
        assert!(Fields::parse(&deep).is_err());
    }

    #[test]
    fn fields_have_types_and_ranges() {
        let body =
            br#"{"n": "two", "temperature": 1e308, "seed": 1e400, "echo": true, "user": null}"#;
        assert!(message(&Fields::parse(body).unwrap_err()).contains("out of range"));
        let body = br#"{"n": "two", "temperature": 1e308, "echo": true, "user": null}"#;
        let mut fields = Fields::parse(body).unwrap();
        assert!(message(&fields.take::<usize>("n").unwrap_err()).starts_with("n: invalid type"));
        let large = fields.number("temperature").unwrap_err();
        assert_eq!(message(&large), "temperature is too large a number");
        let lacking = fields.lacking("echo", &[json!(false)]).unwrap_err();
        assert_eq!(message(&lacking), "echo is not supported here");
        assert_eq!(fields.take::<String>("user").unwrap(), None);
        assert_eq!(message(&fields.need::<String>("prompt").unwrap_err()), "prompt is missing");
    }
}

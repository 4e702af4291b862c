//! JSON whose objects say each thing once. Parsers take the last of two equal keys without a word, and
//! others the first: a file that has both is two files.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Why a text is no such JSON.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum UniqueError {
    /// It is not JSON; the parser's words.
    Json(String),
    /// A key is there twice.
    Twice(Box<Twice>),
}

/// A key that an object has twice.
#[derive(Clone, Debug, PartialEq)]
pub struct Twice {
    /// Its name, with those of the objects around it.
    pub field: String,
    /// What it is first.
    pub first: Value,
    /// What it is then.
    pub second: Value,
}

impl fmt::Display for UniqueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json(reason) => f.write_str(reason),
            Self::Twice(twice) => {
                let Twice { field, first, second } = &**twice;
                write!(f, "'{field}' is there twice, as {first} and as {second}")
            }
        }
    }
}

/// Parses a text.
///
/// # Errors
///
/// [`UniqueError`] with the parser's words, or with the key that an object has twice.
pub fn parse(text: &str) -> Result<Value, UniqueError> {
    let json = |error: serde_json::Error| UniqueError::Json(error.to_string());
    let (path, twice) = (RefCell::default(), RefCell::default());
    let mut parser = serde_json::Deserializer::from_str(text);
    let value = Unique { path: &path, twice: &twice }.deserialize(&mut parser);
    let value = value.map_err(json)?;
    parser.end().map_err(json)?;
    match twice.into_inner() {
        Some(twice) => Err(UniqueError::Twice(Box::new(twice))),
        None => Ok(value),
    }
}

/// Reads one value.
#[derive(Clone, Copy)]
struct Unique<'a> {
    /// The names around it.
    path: &'a RefCell<Vec<String>>,
    /// The first key that is there twice.
    twice: &'a RefCell<Option<Twice>>,
}

impl<'de> DeserializeSeed<'de> for Unique<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = items.next_element_seed(self)? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            self.path.borrow_mut().push(key.clone());
            let second = entries.next_value_seed(self)?;
            let Some(first) = object.insert(key.clone(), second) else {
                self.path.borrow_mut().pop();
                continue;
            };
            // Said twice alike, there are no two readings.
            if first != object[&key] {
                let field = self.path.borrow().join(".");
                let second = object[&key].clone();
                self.twice.borrow_mut().get_or_insert(Twice { field, first, second });
            }
            self.path.borrow_mut().pop();
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_said_once_is_read_as_ever() {
        let text = r#"{"a": [1, -2, 2.5, 1e300, 18446744073709551615, 18446744073709551616, null],
            "b": {"a": true, "c": {}}, "ä": "é\n", "": []}"#;
        assert_eq!(parse(text), Ok(serde_json::from_str::<Value>(text).unwrap()));
        for wrong in ["", "{", "[1,]", "{\"a\": 1} x", "nul", &"[".repeat(1000)] {
            let expected = serde_json::from_str::<Value>(wrong).unwrap_err().to_string();
            assert_eq!(parse(wrong), Err(UniqueError::Json(expected)), "{wrong}");
        }
    }

    #[test]
    fn what_is_said_twice_is_named_with_both_values() {
        for (text, message) in [
            (r#"{"a": 1, "b": 2, "a": 3}"#, "'a' is there twice, as 1 and as 3"),
            (r#"{"a": 1, "\u0061": 2}"#, "'a' is there twice, as 1 and as 2"),
            (r#"{"r": {"x": 1, "x": [2]}}"#, "'r.x' is there twice, as 1 and as [2]"),
            (r#"{"l": [{"x": 1}, {"x": 1, "x": null}]}"#, "'l.x' is there twice, as 1 and as null"),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), message);
        }
        assert!(parse(&format!("{{\"a\": {}1{}}}", "[".repeat(100), "]".repeat(100))).is_ok());
        assert_eq!(parse(r#"{"a": [1], "a": [1]}"#), Ok(json!({"a": [1]})));
        let twice = parse(r#"{"a": {"b": 1}, "a": 2}"#).unwrap_err();
        let (first, second) = (json!({"b": 1}), json!(2));
        let expected = Twice { field: "a".to_owned(), first, second };
        assert_eq!(twice, UniqueError::Twice(Box::new(expected)));
    }
}

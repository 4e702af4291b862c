//! What a key of a GGUF file may hold.

use super::GgufError;
use super::cursor::Cursor;
use std::fmt;
use std::ops::Range;

/// Deepest accepted nesting of lists; real files have lists of plain values only.
pub(super) const LIST_DEPTH_MAX: u32 = 4;

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    List,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// Every type, by its number in the file.
    pub const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::Text,
        Self::List,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// Bytes of a value; `None` if that depends on the value.
    const fn size_bytes(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::List => None,
        }
    }

    pub(super) fn read(
        cursor: &mut Cursor<'_>,
        what: &dyn Fn() -> String,
    ) -> Result<Self, GgufError> {
        let offset = cursor.offset();
        let id = cursor.u32(what)?;
        let found = usize::try_from(id).ok().and_then(|index| Self::ALL.get(index));
        found.copied().ok_or_else(|| GgufError::UnknownValueType { what: what(), offset, id })
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "a truth value",
            Self::Text => "a text",
            Self::List => "a list",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

/// The value of a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number of one of the unsigned types, and which.
    Unsigned(u64, ValueType),
    /// A whole number of one of the signed types, and which.
    Signed(i64, ValueType),
    /// An `f32` or `f64`, and which.
    Real(f64, ValueType),
    /// True or false.
    Bool(bool),
    /// A text.
    Text(Box<str>),
    /// A list; its elements stay in the file.
    List(Box<Array>),
}

impl Value {
    /// Its type.
    pub const fn value_type(&self) -> ValueType {
        match self {
            Self::Unsigned(_, value_type)
            | Self::Signed(_, value_type)
            | Self::Real(_, value_type) => *value_type,
            Self::Bool(_) => ValueType::Bool,
            Self::Text(_) => ValueType::Text,
            Self::List(_) => ValueType::List,
        }
    }

    pub(super) fn read(
        cursor: &mut Cursor<'_>,
        value_type: ValueType,
        what: &dyn Fn() -> String,
    ) -> Result<Self, GgufError> {
        let offset = cursor.offset();
        Ok(match value_type {
            ValueType::Text => Self::Text(cursor.text(what)?.into()),
            ValueType::List => Self::List(Box::new(Array::skip(cursor, 1, what)?)),
            ValueType::Bool => match cursor.array(what)? {
                [0] => Self::Bool(false),
                [1] => Self::Bool(true),
                [byte] => return Err(GgufError::NotBool { what: what(), offset, byte }),
            },
            ValueType::F32 => {
                Self::Real(f32::from_le_bytes(cursor.array(what)?).into(), value_type)
            }
            ValueType::F64 => Self::Real(f64::from_le_bytes(cursor.array(what)?), value_type),
            ValueType::I8 | ValueType::I16 | ValueType::I32 | ValueType::I64 => {
                Self::Signed(read_signed(cursor, value_type, what)?, value_type)
            }
            ValueType::U8 | ValueType::U16 | ValueType::U32 | ValueType::U64 => {
                Self::Unsigned(read_unsigned(cursor, value_type, what)?, value_type)
            }
        })
    }
}

fn read_unsigned(
    cursor: &mut Cursor<'_>,
    value_type: ValueType,
    what: &dyn Fn() -> String,
) -> Result<u64, GgufError> {
    Ok(match value_type {
        ValueType::U8 => u8::from_le_bytes(cursor.array(what)?).into(),
        ValueType::U16 => u16::from_le_bytes(cursor.array(what)?).into(),
        ValueType::U32 => u32::from_le_bytes(cursor.array(what)?).into(),
        _ => u64::from_le_bytes(cursor.array(what)?),
    })
}

fn read_signed(
    cursor: &mut Cursor<'_>,
    value_type: ValueType,
    what: &dyn Fn() -> String,
) -> Result<i64, GgufError> {
    Ok(match value_type {
        ValueType::I8 => i8::from_le_bytes(cursor.array(what)?).into(),
        ValueType::I16 => i16::from_le_bytes(cursor.array(what)?).into(),
        ValueType::I32 => i32::from_le_bytes(cursor.array(what)?).into(),
        _ => i64::from_le_bytes(cursor.array(what)?),
    })
}

/// A list: the type of its elements, how many there are, and where in the file they lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array {
    element: ValueType,
    len: usize,
    bytes: Range<usize>,
}

impl Array {
    /// Type of the elements.
    pub const fn element(&self) -> ValueType {
        self.element
    }

    /// Number of elements.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Moves over a list, checking that all of it is there.
    fn skip(
        cursor: &mut Cursor<'_>,
        depth: u32,
        what: &dyn Fn() -> String,
    ) -> Result<Self, GgufError> {
        if depth > LIST_DEPTH_MAX {
            return Err(GgufError::NestedTooDeep { what: what(), max: LIST_DEPTH_MAX });
        }
        let element = ValueType::read(cursor, what)?;
        let count = cursor.u64(what)?;
        let start = cursor.offset();
        if let Some(size) = element.size_bytes() {
            cursor.skip(count.saturating_mul(size), what)?;
        } else {
            // A count beyond what the file holds ends with the file: every element takes bytes.
            for _ in 0..count {
                if element == ValueType::Text {
                    let length = cursor.u64(what)?;
                    cursor.skip(length, what)?;
                } else {
                    Self::skip(cursor, depth + 1, what)?;
                }
            }
        }
        let len = usize::try_from(count).expect("every element takes bytes of the file");
        Ok(Self { element, len, bytes: start..cursor.offset() })
    }

    pub(super) fn texts<'a>(&self, key: &str, file: &'a [u8]) -> Result<Vec<&'a str>, GgufError> {
        if self.element != ValueType::Text {
            return Err(self.wrong_type(key, "a list of texts"));
        }
        let mut cursor = Cursor::new(file, self.bytes.start);
        let what = || format!("an element of {key}");
        (0..self.len).map(|_| cursor.text(&what)).collect()
    }

    #[expect(clippy::cast_precision_loss, reason = "asked for as f64")]
    pub(super) fn numbers(&self, key: &str, file: &[u8]) -> Result<Vec<f64>, GgufError> {
        if self.element == ValueType::Bool || self.element.size_bytes().is_none() {
            return Err(self.wrong_type(key, "a list of numbers"));
        }
        let mut cursor = Cursor::new(file, self.bytes.start);
        let what = || format!("an element of {key}");
        let number = |_| match Value::read(&mut cursor, self.element, &what)? {
            Value::Unsigned(number, _) => Ok(number as f64),
            Value::Signed(number, _) => Ok(number as f64),
            Value::Real(number, _) => Ok(number),
            Value::Bool(_) | Value::Text(_) | Value::List(_) => unreachable!("looked at above"),
        };
        (0..self.len).map(number).collect()
    }

    fn wrong_type(&self, key: &str, expected: &'static str) -> GgufError {
        GgufError::WrongType { key: format!("an element of {key}"), found: self.element, expected }
    }
}

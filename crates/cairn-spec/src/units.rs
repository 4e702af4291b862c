//! Sizes, times and counts as people write them: `2.1GB`, `4GiB`, `30m`, `300M`.
//!
//! Every value is kept as a whole number of its smallest unit and printed so that it reads back
//! equal.

use crate::Hint;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A unit: its name and how many of the smallest unit it is.
type Unit = (&'static str, u64);

const BYTE_UNITS: [Unit; 9] = [
    ("B", 1),
    ("kB", 1_000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("TB", 1_000_000_000_000),
    ("TiB", 1 << 40),
];
const TIME_UNITS: [Unit; 5] =
    [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
const COUNT_UNITS: [Unit; 5] =
    [("", 1), ("k", 1_000), ("M", 1_000_000), ("B", 1_000_000_000), ("T", 1_000_000_000_000)];

/// A text that is not a quantity of the expected kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not {expected}")]
pub struct UnitError {
    /// The text.
    pub text: String,
    /// What it should have been.
    pub expected: &'static str,
    /// What such a quantity looks like.
    pub examples: &'static str,
}

impl Hint for UnitError {
    fn hints(&self) -> Vec<String> {
        vec![format!("write it like {}", self.examples)]
    }
}

/// A quantity with units: how its texts look.
struct Quantity {
    units: &'static [Unit],
    /// The unit of a bare number.
    bare: u64,
    expected: &'static str,
    examples: &'static str,
}

const BYTES: Quantity = Quantity {
    units: &BYTE_UNITS,
    bare: 1,
    expected: "a number of bytes",
    examples: "4GiB, 2.1GB or 1048576",
};
const TIME: Quantity =
    Quantity { units: &TIME_UNITS, bare: 1_000, expected: "a time", examples: "90s, 30m or 1.5h" };
const COUNT: Quantity =
    Quantity { units: &COUNT_UNITS, bare: 1, expected: "a count", examples: "300M, 1.5B or 20000" };

impl Quantity {
    fn error(&self, text: &str) -> UnitError {
        UnitError { text: text.to_owned(), expected: self.expected, examples: self.examples }
    }

    /// Parses a number with an optional unit; unit names match whatever their case, unless two
    /// differ only in it (`m` and `M` never occur together).
    fn parse(&self, text: &str) -> Result<u64, UnitError> {
        let trimmed = text.trim();
        let digits_end = trimmed
            .char_indices()
            .find(|(i, c)| {
                !(c.is_ascii_digit() || matches!(c, '.' | '_') || is_exponent(trimmed, *i))
            })
            .map_or(trimmed.len(), |(i, _)| i);
        let (number, unit) = trimmed.split_at(digits_end);
        let unit = unit.trim_start();
        let size = match self.units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
            _ if unit.is_empty() => self.bare,
            Some((_, size)) => *size,
            None => return Err(self.error(text)),
        };
        let number = number.replace('_', "");
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(size).ok_or_else(|| self.error(text));
        }
        let number: f64 = number.parse().map_err(|_| self.error(text))?;
        self.round(number, size).ok_or_else(|| self.error(text))
    }

    /// `number` units as a whole number of the smallest unit, rounded.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the range is checked, and a number with a fraction is rounded anyway"
    )]
    fn round(&self, number: f64, size: u64) -> Option<u64> {
        let value = (number * size as f64).round();
        (0.0..9.0e18).contains(&value).then_some(value as u64)
    }

    /// The value in the largest unit that leaves no fraction.
    fn format(&self, value: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, size): &&Unit| value >= *size && value.is_multiple_of(*size);
        let (name, size) = self.units.iter().rev().find(fits).unwrap_or(&self.units[0]);
        write!(f, "{}{name}", value / size)
    }
}

/// Whether the character at `i` belongs to an exponent, as in `1e9` or `1e+9`.
fn is_exponent(text: &str, i: usize) -> bool {
    let bytes = text.as_bytes();
    let is_e = |at: usize| matches!(bytes.get(at), Some(b'e' | b'E'));
    let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let is_sign = |at: usize| matches!(bytes.get(at), Some(b'+' | b'-'));
    (is_e(i) && i > 0 && (is_digit(i + 1) || (is_sign(i + 1) && is_digit(i + 2))))
        || (i > 0 && is_e(i - 1) && is_sign(i) && is_digit(i + 1))
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A length of time, in whole milliseconds; a bare number means seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimeSpan(pub Duration);

/// A number of things, such as tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Count(pub u64);

/// Bytes as an error or a table says them: three digits in the largest binary unit, `1.41 GiB`. For
/// reading only; what is read back is a [`ByteSize`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundedBytes(pub u64);

impl fmt::Display for RoundedBytes {
    #[expect(clippy::cast_precision_loss, reason = "three digits are printed")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1 << 10 {
            return f.pad(&format!("{} bytes", self.0));
        }
        let mut size = self.0 as f64 / 1024.0;
        let mut unit = 0;
        // 999.5 would print as four digits.
        while size >= 999.5 && unit + 1 < units.len() {
            size /= 1024.0;
            unit += 1;
        }
        let decimals = match size {
            x if x < 9.995 => 2,
            x if x < 99.95 => 1,
            _ => 0,
        };
        f.pad(&format!("{size:.decimals$} {}", units[unit]))
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        BYTES.parse(text).map(Self)
    }
}

impl FromStr for TimeSpan {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        TIME.parse(text).map(|milliseconds| Self(Duration::from_millis(milliseconds)))
    }
}

impl FromStr for Count {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        COUNT.parse(text).map(Self)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        BYTES.format(self.0, f)
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        TIME.format(milliseconds, f)
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        COUNT.format(self.0, f)
    }
}

/// A quantity in a file: a number or a text.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, or a text with a unit")]
enum Written {
    Whole(u64),
    Real(f64),
    Text(String),
}

impl Written {
    fn read<T: FromStr<Err = UnitError>, E: de::Error>(self) -> Result<T, E> {
        let text = match self {
            Self::Whole(number) => number.to_string(),
            Self::Real(number) => number.to_string(),
            Self::Text(text) => text,
        };
        text.parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Written::deserialize(deserializer)?.read()
    }
}

impl<'de> Deserialize<'de> for TimeSpan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Written::deserialize(deserializer)?.read()
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Written::deserialize(deserializer)?.read()
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for TimeSpan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantities_mean_what_people_mean() {
        for (text, bytes) in [
            ("2.1GB", 2_100_000_000),
            ("4GiB", 4 << 30),
            ("4 gib", 4 << 30),
            ("1_000", 1_000),
            ("1e6", 1_000_000),
            ("1.5e+3 kb", 1_500_000),
            ("0.1B", 0),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for (text, seconds) in [("30m", 1800.0), ("1.5h", 5400.0), ("90", 90.0), ("250ms", 0.25)] {
            assert_eq!(text.parse(), Ok(TimeSpan(Duration::from_secs_f64(seconds))), "{text}");
        }
        for (text, count) in [("300M", 300_000_000), ("1.5b", 1_500_000_000), ("7", 7)] {
            assert_eq!(text.parse(), Ok(Count(count)), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused_with_an_example() {
        for text in
            ["", "GB", "-1GB", "1XB", "1.2.3GB", "NaN", "inf", "1e99", "99999999999TB", "e9"]
        {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert_eq!(error.to_string(), format!("'{text}' is not a number of bytes"));
            assert_eq!(error.hints(), ["write it like 4GiB, 2.1GB or 1048576"]);
        }
        assert!("30 minutes".parse::<TimeSpan>().is_err());
    }

    #[test]
    fn rounded_bytes_have_three_digits() {
        let check = |bytes: u64, expected: &str| {
            assert_eq!(RoundedBytes(bytes).to_string(), expected);
        };
        check(999, "999 bytes");
        check(1536, "1.50 KiB");
        check((1 << 20) - 1, "1.00 MiB");
        check(1_518_503_936, "1.41 GiB");
        check(123 << 30, "123 GiB");
        check(u64::MAX, "16777216 TiB");
    }

    proptest! {
        #[test]
        fn printed_quantities_read_back_equal(value in 0u64..1 << 53) {
            prop_assert_eq!(ByteSize(value).to_string().parse(), Ok(ByteSize(value)));
            prop_assert_eq!(Count(value).to_string().parse(), Ok(Count(value)));
            let time = TimeSpan(Duration::from_millis(value));
            prop_assert_eq!(time.to_string().parse(), Ok(time));
        }

        #[test]
        fn any_text_is_refused_or_read(text in "\\PC{0,20}") {
            let _ = text.parse::<ByteSize>();
            let _ = text.parse::<TimeSpan>();
        }
    }
}

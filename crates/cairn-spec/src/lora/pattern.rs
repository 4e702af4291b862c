//! Names of modules as PEFT writes them: regular expressions in Python's syntax, and numbers for those
//! that a name matches.
//!
//! Patterns come from foreign files. They are matched in time linear in the name; one whose meaning
//! here and in Python may differ is refused, as are one that would take much memory and too many of them.

use std::fmt;

use regex::{Regex, RegexBuilder};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes that a compiled pattern may take.
const PATTERN_BYTES_MAX: usize = 1 << 18;
/// Keys of one field that may be patterns; plain names are not counted.
pub(super) const PATTERNS_MAX: usize = 256;
/// What has one meaning in Python's patterns and another here: possessive repetitions, sets of sets.
const DIFFERENT: [&str; 8] = ["++", "*+", "?+", "}+", "&&", "--", "~~", "[["];

/// A pattern that a module's name matches or does not.
#[derive(Clone)]
pub struct NamePattern {
    text: String,
    regex: Regex,
}

impl NamePattern {
    /// A pattern that whole names match, as `re.fullmatch` of Python has it.
    ///
    /// # Errors
    ///
    /// Why the pattern cannot be used.
    pub fn whole(text: &str) -> Result<Self, String> {
        Self::new(text, &format!("^(?:{text})$"))
    }

    /// A pattern of what stands before the number of a block: PEFT's `layers_pattern`.
    ///
    /// # Errors
    ///
    /// As from [`whole`](Self::whole).
    pub fn before_number(text: &str) -> Result<Self, String> {
        // Without a group of its own, as PEFT has it.
        Self::new(text, &format!(r"^(?:(?:^|.*?\.){text}\.(?P<idx>\d+)\.)"))
    }

    fn new(text: &str, regex: &str) -> Result<Self, String> {
        if let Some(part) = DIFFERENT.iter().find(|part| text.contains(**part)) {
            return Err(format!("'{part}' does not mean the same here as in Python"));
        }
        let build = |regex: &str| {
            let built = RegexBuilder::new(regex).size_limit(PATTERN_BYTES_MAX).build();
            built.map_err(|error| reason(&error))
        };
        // Alone first, so that no bracket of it closes one of ours.
        build(text)?;
        Ok(Self { text: text.to_owned(), regex: build(regex)? })
    }

    /// The pattern as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether a name matches.
    pub fn matches(&self, name: &str) -> bool {
        self.regex.is_match(name)
    }

    /// The number that stands in a name where the pattern says: `None` if the name does not match, and
    /// `Some(None)` if it matches without a number.
    pub(super) fn number(&self, name: &str) -> Option<Option<usize>> {
        let found = self.regex.captures(name)?;
        Some(found.name("idx").and_then(|number| number.as_str().parse().ok()))
    }
}

/// What is wrong with a pattern, in one line.
fn reason(error: &regex::Error) -> String {
    let text = error.to_string();
    text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

/// Why one pattern more cannot be used.
pub(super) fn too_many() -> String {
    format!("there are more than {PATTERNS_MAX}")
}

impl PartialEq for NamePattern {
    fn eq(&self, other: &Self) -> bool {
        self.regex.as_str() == other.regex.as_str()
    }
}

impl fmt::Debug for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

/// Numbers by name, in the order of the file: of several keys that match a name the first counts. A key
/// matches whole names, or what follows one of their dots.
#[derive(Clone, Debug, PartialEq)]
pub struct Patterns<T>(Vec<(Key, T)>);

#[derive(Clone, Debug, PartialEq)]
enum Key {
    /// Of letters, digits, `_`, `-` and dots, each of which stands for any character.
    Plain(String),
    Pattern(NamePattern),
}

impl Key {
    fn new(text: &str) -> Result<Self, String> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if text.chars().all(is_plain) {
            return Ok(Self::Plain(text.to_owned()));
        }
        NamePattern::new(text, &format!(r"^(?:.*\.)?(?:{text})$")).map(Self::Pattern)
    }

    fn text(&self) -> &str {
        match self {
            Self::Plain(text) => text,
            Self::Pattern(pattern) => pattern.text(),
        }
    }

    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Pattern(pattern) => pattern.matches(name),
            Self::Plain(text) => {
                let mut rest = name.chars().rev();
                let is_same = |c: char| rest.next().is_some_and(|found| c == '.' || c == found);
                text.chars().rev().all(is_same) && rest.next().is_none_or(|before| before == '.')
            }
        }
    }
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    /// Adds a key after those there are.
    ///
    /// # Errors
    ///
    /// As from [`NamePattern::whole`].
    pub fn push(&mut self, key: &str, value: T) -> Result<(), String> {
        let key = Key::new(key)?;
        let is_pattern = |key: &Key| matches!(key, Key::Pattern(_));
        let patterns = self.0.iter().filter(|(key, _)| is_pattern(key)).count();
        if is_pattern(&key) && patterns >= PATTERNS_MAX {
            return Err(too_many());
        }
        self.0.push((key, value));
        Ok(())
    }

    /// The number of a module.
    pub fn get(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(key, _)| key.matches(module)).map(|(_, value)| *value)
    }

    /// Whether the keys are in alphabetical order, as PEFT saves them and recipes have them.
    pub fn is_sorted(&self) -> bool {
        self.0.is_sorted_by(|(a, _), (b, _)| a.text() <= b.text())
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key.text(), value)))
    }
}

impl<'de, T: Deserialize<'de> + Copy> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys<T>(Patterns<T>);
        impl<'de, T: Deserialize<'de> + Copy> Visitor<'de> for Keys<T> {
            type Value = Patterns<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("numbers by name")
            }

            fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Patterns<T>, A::Error> {
                while let Some((key, value)) = map.next_entry::<String, T>()? {
                    self.0.push(&key, value).map_err(serde::de::Error::custom)?;
                }
                // Not every format of recipes keeps an order.
                self.0.0.sort_by(|(a, _), (b, _)| a.text().cmp(b.text()));
                Ok(self.0)
            }
        }
        deserializer.deserialize_map(Keys(Patterns::default()))
    }
}

//! Under which license a document may be used, and which of them a corpus takes.
//!
//! A license is an SPDX expression (<https://spdx.dev/learn/handling-license-info/>) in its canonical
//! spelling, or unknown; nothing is guessed from a license's text. Where a file carries an
//! `SPDX-License-Identifier:` header of its own, that statement wins over its package's, as in the
//! REUSE specification: it is the one made about this very file.

use std::fmt;

use spdx::{Expression, Licensee, ParseMode};

use super::CorpusError;

/// Where an SPDX header is looked for: the first bytes of a file.
const HEADER_BYTES_MAX: usize = 4096;

/// Longest license expression that is parsed, in bytes.
const EXPRESSION_BYTES_MAX: usize = 1024;

const HEADER: &str = "SPDX-License-Identifier:";

/// The license of a document.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum License {
    /// No statement was found, or none that is an SPDX expression.
    #[default]
    Unknown,
    /// A canonical SPDX expression, such as `MIT OR Apache-2.0`.
    Spdx(String),
}

impl License {
    /// How an unknown license is written in manifests and `--license-allow`.
    pub const UNKNOWN: &'static str = "unknown";

    /// Reads an SPDX expression; loose forms such as `MIT/Apache-2.0` are made canonical.
    pub fn parse(text: &str) -> Self {
        let text = text.trim();
        if text.is_empty() || EXPRESSION_BYTES_MAX < text.len() {
            return Self::Unknown;
        }
        let canonical = match Expression::canonicalize(text) {
            Ok(canonical) => canonical.unwrap_or_else(|| text.to_owned()),
            Err(_) => return Self::Unknown,
        };
        match Expression::parse_mode(&canonical, ParseMode::LAX) {
            Ok(_) => Self::Spdx(canonical),
            Err(_) => Self::Unknown,
        }
    }

    /// Finds the `SPDX-License-Identifier:` header among the first lines of a text.
    pub fn of_header(text: &str) -> Self {
        let head = text.floor_char_boundary(HEADER_BYTES_MAX.min(text.len()));
        text[..head]
            .lines()
            .filter_map(|line| line.split_once(HEADER))
            // Only a comment states something: a header inside a string is some program's data.
            .filter(|(before, _)| before.chars().all(|c| "/*#;-!<%\" \t".contains(c)))
            .filter(|(before, _)| !before.contains('"'))
            .map(|(_, expression)| {
                Self::parse(expression.trim().trim_end_matches("*/").trim_end_matches("-->"))
            })
            .find(|license| *license != Self::Unknown)
            .unwrap_or_default()
    }

    /// The canonical expression, or `unknown`.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Unknown => Self::UNKNOWN,
            Self::Spdx(expression) => expression,
        }
    }

    /// Uses `other` where this one is unknown.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        match self {
            Self::Unknown => other.clone(),
            Self::Spdx(_) => self,
        }
    }
}

impl fmt::Display for License {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The licenses a corpus takes: those whose expression this set can satisfy.
///
/// ```
/// use cairn_data::corpus::{License, LicenseFilter};
///
/// let allow = LicenseFilter::parse(&["MIT".to_owned(), "BSD-3-Clause".to_owned()])?;
/// assert!(allow.allows(&License::parse("MIT OR Apache-2.0")));
/// assert!(!allow.allows(&License::parse("MIT AND Apache-2.0")));
/// assert!(!allow.allows(&License::Unknown));
/// # Ok::<(), cairn_data::corpus::CorpusError>(())
/// ```
#[derive(Clone, Debug)]
pub struct LicenseFilter {
    allowed: Vec<Licensee>,
    unknown: bool,
    names: Vec<String>,
}

impl LicenseFilter {
    /// Reads the names: SPDX identifiers, with an exception where one is meant, or `unknown`.
    ///
    /// # Errors
    ///
    /// [`CorpusError::LicenseName`] for a name that SPDX does not have.
    pub fn parse(names: &[String]) -> Result<Self, CorpusError> {
        let mut filter = Self { allowed: Vec::new(), unknown: false, names: names.to_vec() };
        filter.names.sort();
        for name in names {
            if name == License::UNKNOWN {
                filter.unknown = true;
                continue;
            }
            let licensee = Licensee::parse(name).map_err(|error| CorpusError::LicenseName {
                name: name.clone(),
                reason: error.reason.to_string(),
            })?;
            filter.allowed.push(licensee);
        }
        Ok(filter)
    }

    /// Whether the expression can be satisfied by the allowed licenses.
    pub fn allows(&self, license: &License) -> bool {
        let License::Spdx(expression) = license else { return self.unknown };
        Expression::parse_mode(expression, ParseMode::LAX).is_ok_and(|expression| {
            expression.evaluate(|req| self.allowed.iter().any(|allowed| allowed.satisfies(req)))
        })
    }

    /// The names it was made of, sorted.
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_header(text: &str, expected: &str) {
        assert_eq!(License::of_header(text).as_str(), expected, "{text:?}");
    }

    #[test]
    fn expressions_become_canonical() {
        for (text, expected) in [
            ("MIT/Apache-2.0", "MIT OR Apache-2.0"),
            ("MIT OR Apache-2.0", "MIT OR Apache-2.0"),
            (" Apache-2.0 WITH LLVM-exception ", "Apache-2.0 WITH LLVM-exception"),
            ("see LICENSE.txt", "unknown"),
            ("(MIT", "unknown"),
            ("", "unknown"),
        ] {
            assert_eq!(License::parse(text).as_str(), expected, "{text:?}");
        }
        assert_eq!(License::parse(&"(".repeat(100_000)), License::Unknown);
    }

    #[test]
    fn header_is_found_in_comments_only() {
        check_header("// SPDX-License-Identifier: MIT\nfn f() {}", "MIT");
        check_header("#!/bin/sh\n# SPDX-License-Identifier: GPL-2.0-only\n", "GPL-2.0-only");
        check_header("/* SPDX-License-Identifier: BSD-3-Clause */", "BSD-3-Clause");
        check_header("<!-- SPDX-License-Identifier: CC0-1.0 -->", "CC0-1.0");
        check_header("let s = \"SPDX-License-Identifier: MIT\";", "unknown");
        check_header("// SPDX-License-Identifier: whatever you like", "unknown");
        check_header(&format!("{}\n// SPDX-License-Identifier: MIT", "x".repeat(5000)), "unknown");
        // The limit falls inside a character.
        check_header(&"é".repeat(5000), "unknown");
    }

    #[test]
    fn filter_satisfies_expressions() {
        let names = ["MIT", "Apache-2.0", "GPL-3.0-or-later", "unknown"].map(str::to_owned);
        let filter = LicenseFilter::parse(&names).unwrap();
        for allowed in ["MIT", "Zlib OR MIT", "MIT AND Apache-2.0", "(Zlib AND ISC) OR MIT"] {
            assert!(filter.allows(&License::parse(allowed)), "{allowed}");
        }
        for refused in ["Zlib", "MIT AND Zlib", "Apache-2.0 WITH LLVM-exception"] {
            assert!(!filter.allows(&License::parse(refused)), "{refused}");
        }
        assert!(filter.allows(&License::Unknown));
        assert!(!LicenseFilter::parse(&names[..2]).unwrap().allows(&License::Unknown));
    }

    #[test]
    fn unknown_name_is_refused() {
        let error = LicenseFilter::parse(&["MIT-ish".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("MIT-ish"), "{error}");
    }
}

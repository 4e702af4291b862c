//! What a corpus leaves out, and why: nothing is dropped without being counted and listed.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// Why a file or a record is not in the corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SkipReason {
    /// There is nothing at this path (any more).
    Missing,
    /// Opening or reading it failed; the detail says how.
    Unreadable,
    /// A link, a device, a socket: links are not followed, so that no text is taken twice.
    NotAFile,
    /// No text, or only whitespace.
    Empty,
    /// It holds a zero byte.
    Binary,
    /// It is not UTF-8.
    NotUtf8,
    /// Larger than `file_bytes_max`.
    FileTooLarge,
    /// Larger than `document_bytes_max`.
    DocumentTooLarge,
    /// Its kind was not asked for.
    OtherKind,
    /// A name that starts with a dot.
    Hidden,
    /// A folder that `CACHEDIR.TAG` marks as a cache.
    CacheFolder,
    /// A folder of a package registry that holds no package.
    NotAPackage,
    /// A line that is not a JSON object.
    InvalidJson,
    /// A JSON object without a `text` string.
    NoText,
    /// The license filter does not allow it.
    LicenseNotAllowed,
    /// The same text as an earlier document.
    Duplicate,
    /// The tokenizer refused its text; the detail says why.
    NotTokenized,
    /// Its group has `group_bytes_max` of text without it.
    GroupFull,
    /// It changed between the scan and the build.
    Changed,
}

impl SkipReason {
    /// The reason for a failed read.
    pub(crate) fn of_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            _ => Self::Unreadable,
        }
    }
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing",
            Self::Unreadable => "unreadable",
            Self::NotAFile => "not a regular file",
            Self::Empty => "empty",
            Self::Binary => "binary",
            Self::NotUtf8 => "not UTF-8",
            Self::FileTooLarge => "file too large",
            Self::DocumentTooLarge => "document too large",
            Self::OtherKind => "other kind of file",
            Self::Hidden => "hidden",
            Self::CacheFolder => "cache folder",
            Self::NotAPackage => "not a package",
            Self::InvalidJson => "invalid JSON",
            Self::NoText => "no text field",
            Self::LicenseNotAllowed => "license not allowed",
            Self::Duplicate => "duplicate",
            Self::GroupFull => "beyond the limit of a group",
            Self::NotTokenized => "refused by the tokenizer",
            Self::Changed => "changed during the build",
        })
    }
}

/// One file, folder or record that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    /// Path relative to the input's root; `FILE:LINE` for a record.
    pub path: String,
    /// Why.
    pub reason: SkipReason,
    /// What the system or the parser said, or the limit that was passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// How many were left out, by reason.
pub type SkipCounts = BTreeMap<SkipReason, u64>;

/// Entries of the list that are kept; the counts go on.
pub const SKIPS_LISTED_MAX: usize = 100_000;

/// All that was left out: exact counts, and a list of the first [`SKIPS_LISTED_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skips {
    counts: SkipCounts,
    listed: Vec<Skipped>,
}

impl Skips {
    /// How many, by reason.
    pub fn counts(&self) -> &SkipCounts {
        &self.counts
    }

    /// Which, in the order they were met.
    pub fn listed(&self) -> &[Skipped] {
        &self.listed
    }

    /// How many are counted but not listed.
    pub fn num_unlisted(&self) -> u64 {
        let listed = u64::try_from(self.listed.len()).expect("a length fits in 64 bits");
        self.counts.values().sum::<u64>() - listed
    }

    /// `3 empty, 1 binary`, for one line of text.
    pub fn summary(&self) -> String {
        let parts = self.counts.iter().map(|(reason, count)| format!("{count} {reason}"));
        parts.collect::<Vec<_>>().join(", ")
    }

    pub(crate) fn push(&mut self, path: String, reason: SkipReason, detail: Option<String>) {
        self.add(Skipped { path, reason, detail });
    }

    pub(crate) fn add(&mut self, skipped: Skipped) {
        *self.counts.entry(skipped.reason).or_default() += 1;
        if self.listed.len() < SKIPS_LISTED_MAX {
            self.listed.push(skipped);
        }
    }
}

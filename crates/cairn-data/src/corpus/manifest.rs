//! The manifest: what a corpus is, file by file, with hashes. JSON, schema `corpus/1`.
//!
//! It holds no time and no path of the machine it was made on, so the same inputs give the same
//! manifest, byte for byte.

use cairn_artifacts::Hash;
use serde::{Deserialize, Serialize};

use super::skip::SkipCounts;
use super::split::{Split, SplitSettings};
use super::token_file::TokenWidth;

/// Version of the manifest and of the files it describes.
pub const SCHEMA: &str = "corpus/1";

/// The manifest's name in the corpus folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Largest manifest that is written or read, in bytes.
pub const MANIFEST_BYTES_MAX: u64 = 256 << 20;

/// Documents, tokens and bytes of text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Documents.
    pub documents: u64,
    /// Tokens, ends of document included.
    pub tokens: u64,
    /// Bytes of text; an end of document has none.
    pub text_bytes: u64,
}

impl Counts {
    pub(super) fn add(&mut self, tokens: u32, text_bytes: u32) {
        self.documents += 1;
        self.tokens += u64::from(tokens);
        self.text_bytes += u64::from(text_bytes);
    }

    fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

/// A file of the corpus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Name in the corpus folder.
    pub file: String,
    /// Size.
    pub bytes: u64,
    /// Hash of the whole file.
    pub blake3: Hash,
}

/// The tokenizer the tokens were made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerEntry {
    /// Its copy in the corpus folder.
    pub file: FileEntry,
    /// One more than its largest id.
    pub vocab_size: u32,
    /// The id after every document.
    pub end_of_document: u32,
}

/// One side of the split.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitEntry {
    /// What it holds.
    pub counts: Counts,
    /// Where its documents are.
    pub index: FileEntry,
    /// Its tokens, in order.
    pub shards: Vec<ShardEntry>,
}

/// One token file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// The file.
    pub file: FileEntry,
    /// Its tokens.
    pub tokens: u64,
}

/// What a license or a group contributes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// SPDX expression or `unknown`; or the group.
    pub name: String,
    /// To training.
    #[serde(default, skip_serializing_if = "Counts::is_zero")]
    pub train: Counts,
    /// To validation.
    #[serde(default, skip_serializing_if = "Counts::is_zero")]
    pub validation: Counts,
}

impl Share {
    pub(super) fn of_mut(&mut self, split: Split) -> &mut Counts {
        match split {
            Split::Train => &mut self.train,
            Split::Validation => &mut self.validation,
        }
    }
}

/// What was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkippedEntry {
    /// The list, JSON lines of path, reason and detail.
    pub list: FileEntry,
    /// How many, by reason.
    pub counts: SkipCounts,
    /// How many are counted but not listed.
    pub unlisted: u64,
}

/// The settings that decide what a corpus holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SettingsEntry {
    /// Last names of the inputs, for people.
    pub inputs: Vec<String>,
    /// Extensions taken; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extensions: Option<Vec<String>>,
    /// Licenses allowed; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license_allow: Option<Vec<String>>,
    /// Largest file.
    pub file_bytes_max: u64,
    /// Largest document.
    pub document_bytes_max: u64,
    /// Most text of a group; any if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_bytes_max: Option<u64>,
    /// Tokens after which a new shard begins.
    pub shard_tokens_max: u64,
    /// What is held out.
    pub split: SplitSettings,
}

/// Everything about a corpus but its tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: String,
    /// Hash over all that training and validation read; run records carry it.
    pub data_hash: Hash,
    /// The tokenizer.
    pub tokenizer: TokenizerEntry,
    /// How tokens are stored.
    pub token_width: TokenWidth,
    /// What is learned from.
    pub train: SplitEntry,
    /// What is measured on.
    pub validation: SplitEntry,
    /// Per license, in the order of first use.
    pub licenses: Vec<Share>,
    /// Per group, in the order of first use.
    pub groups: Vec<Share>,
    /// What was left out.
    pub skipped: SkippedEntry,
    /// How it was made.
    pub settings: SettingsEntry,
}

impl Manifest {
    /// One side of the split.
    pub fn split(&self, split: Split) -> &SplitEntry {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// Computes the data hash from the hashes of the tokenizer, the indexes and the shards, and from
    /// the names that the indexes refer to.
    pub(super) fn compute_data_hash(&self) -> Hash {
        let mut text = format!("{SCHEMA}\ntokenizer {}\n", self.tokenizer.file.blake3);
        for split in Split::ALL {
            let entry = self.split(split);
            text += &format!("{split} index {}\n", entry.index.blake3);
            for shard in &entry.shards {
                text += &format!("{split} shard {}\n", shard.file.blake3);
            }
        }
        for (kind, shares) in [("license", &self.licenses), ("group", &self.groups)] {
            for share in shares {
                // With its length, so that no name can be read as two.
                text += &format!("{kind} {} {}\n", share.name.len(), share.name);
            }
        }
        Hash::of_bytes(text.as_bytes())
    }

    /// Every file the manifest names, the tokenizer's first.
    pub fn files(&self) -> impl Iterator<Item = &FileEntry> {
        let splits = Split::ALL.into_iter().flat_map(|split| {
            let entry = self.split(split);
            std::iter::once(&entry.index).chain(entry.shards.iter().map(|shard| &shard.file))
        });
        std::iter::once(&self.tokenizer.file)
            .chain(splits)
            .chain(std::iter::once(&self.skipped.list))
    }
}

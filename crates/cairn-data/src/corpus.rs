//! From files to tokens on disk.
//!
//! - [`scan`] reads the [`Input`]s, checks and hashes every text, finds its license and group, drops
//!   exact duplicates and decides the split;
//! - [`build`] tokenizes what the scan found into a corpus folder: shards, indexes, a manifest;
//! - [`Corpus`] opens such a folder, checks it, and reads documents from mapped files.
//!
//! ```
//! use cairn_data::corpus::{BuildSettings, Corpus, Input, ScanSettings, Split, build, scan};
//! use cairn_data::tokenizer::{BpeSettings, train_bpe};
//! use std::ops::ControlFlow;
//!
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! # for name in ["larch", "birch"] {
//! #     std::fs::create_dir_all(folder.join("text").join(name))?;
//! #     std::fs::write(folder.join("text").join(name).join("a.txt"), format!("the {name} tree"))?;
//! # }
//! let mut quiet = |_| ControlFlow::Continue(());
//! let scan = scan(ScanSettings::new(vec![Input::Path(folder.join("text"))]), &mut quiet)?;
//! let bpe = BpeSettings { vocab_size: 260, ..BpeSettings::default() };
//! let tokenizer = train_bpe(&bpe, scan.sample(32 << 20))?;
//! let report = build(&scan, &tokenizer, &BuildSettings::new(folder.join("corpus")), &mut quiet)?;
//! assert_eq!(report.skips.summary(), "");
//!
//! let corpus = Corpus::open(&folder.join("corpus"))?;
//! let document = corpus.documents(Split::Validation).document(0);
//! println!("{} ({}), {} bytes", document.path, corpus.license(&document), document.text_bytes);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod build;
mod error;
mod index_file;
mod input;
mod json_lines;
mod license;
mod manifest;
mod package;
mod read;
mod scan;
mod skip;
mod split;
mod token_file;

use std::ops::ControlFlow;

#[cfg(test)]
pub(crate) use self::build::tests::build_corpus_of_tokens;
pub use self::build::{BuildReport, BuildSettings, Existing, build};
pub use self::error::CorpusError;
pub use self::index_file::{DocumentRecord, check_index};
pub use self::input::{FileKinds, Input};
pub use self::license::{License, LicenseFilter};
pub use self::manifest::{
    Counts, FileEntry, MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest, SCHEMA, SettingsEntry,
    ShardEntry, Share, SkippedEntry, SplitEntry, TokenizerEntry,
};
pub use self::read::{Corpus, Documents, ReadError};
pub use self::scan::{GROUPS_MAX, Limits, Scan, ScanSettings, scan};
pub use self::skip::{SKIPS_LISTED_MAX, SkipCounts, SkipReason, Skipped, Skips};
pub use self::split::{Split, SplitBy, SplitSettings};
pub use self::token_file::TokenWidth;

/// What is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Texts are read, checked and hashed.
    Scan,
    /// Documents are tokenized and written.
    Tokenize,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is going on.
    pub stage: Stage,
    /// Documents done.
    pub documents: u64,
    /// Bytes of text done.
    pub bytes: u64,
    /// Bytes of text in all, once they are known.
    pub bytes_total: Option<u64>,
}

/// Hears how far it is, on the caller's thread; [`ControlFlow::Break`] asks to stop.
pub type ProgressFn<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

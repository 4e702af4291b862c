//! The build: a scan and a tokenizer become a corpus folder.
//!
//! Documents are read, tokenized on several threads and written in the order of the scan, with a
//! bounded number of them in flight. The folder is built under another name and renamed when it is
//! complete, so a corpus exists as a whole or not at all: whatever ends the build, a full disk or a
//! kill, leaves no manifest behind.
//!
//! **Invariant:** the files depend on the scan and the tokenizer only, not on threads.

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};

use cairn_artifacts::atomic::{FolderDraft, check_writable};

use super::index_file::{DocumentRecord, IndexBuilder};
use super::manifest::{
    Counts, FileEntry, MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest, SCHEMA, SettingsEntry,
    ShardEntry, Share, SkippedEntry, SplitEntry, TokenizerEntry,
};
use super::read::is_corpus;
use super::scan::Document;
use super::skip::{SkipReason, Skipped, Skips};
use super::token_file::{
    CreateFile, DiskFile, FileWriter, HEADER_BYTES, TokenWidth, encode_ids, header,
};
use super::{CorpusError, FileKinds, Input, Progress, ProgressFn, Scan, Split, Stage};
use crate::ordered;
use crate::tokenizer::{Encoder, Tokenizer};

/// Text a thread takes at once, in bytes; a larger document goes alone.
const BATCH_BYTES: u64 = 256 << 10;

/// Batches in flight per thread.
const BATCHES_PER_THREAD: usize = 3;

const TOKENIZER_FILE: &str = "tokenizer.json";
const SKIPPED_FILE: &str = "skipped.jsonl";

/// What to do where a corpus exists already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// Leave it and fail.
    #[default]
    Refuse,
    /// Replace a corpus, once the new one is complete; never a folder of anything else.
    Replace,
}

/// Where and how to build.
#[derive(Clone, Debug)]
pub struct BuildSettings {
    /// The corpus folder.
    pub folder: PathBuf,
    /// What to do if it exists.
    pub existing: Existing,
    /// Tokens after which a new shard begins; a document is never cut.
    pub shard_tokens_max: u64,
    /// Threads that tokenize.
    pub threads: usize,
}

impl BuildSettings {
    /// Builds on one thread into a folder that must not exist.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, existing: Existing::Refuse, shard_tokens_max: 128 << 20, threads: 1 }
    }

    /// Refuses a folder that holds something which is not to be replaced, or that cannot be made.
    /// [`build`] does so too; asked before a scan, it spares the work.
    ///
    /// # Errors
    ///
    /// [`CorpusError::Exists`], [`CorpusError::File`].
    pub fn check_folder(&self) -> Result<(), CorpusError> {
        let may_replace = self.existing == Existing::Replace && is_corpus(&self.folder);
        if !may_replace && holds_something(&self.folder) {
            return Err(CorpusError::Exists { path: self.folder.clone() });
        }
        Ok(check_writable(&self.folder)?)
    }
}

/// What was built and what was left out.
#[derive(Clone, Debug, PartialEq)]
pub struct BuildReport {
    /// The manifest, as written.
    pub manifest: Manifest,
    /// What was left out, by the scan and by the build.
    pub skips: Skips,
}

/// Tokenizes and writes the documents of a scan.
///
/// `progress` is called after every batch; answering [`ControlFlow::Break`] ends the build and leaves
/// nothing.
///
/// # Errors
///
/// [`CorpusError::Exists`] unless a corpus is to be replaced, [`CorpusError::NoEndOfDocument`] for a
/// tokenizer without one, [`CorpusError::File`] naming the file that could not be written,
/// [`CorpusError::NoDocuments`] if every document changed or vanished since the scan,
/// [`CorpusError::Setting`], [`CorpusError::TooMany`], [`CorpusError::Interrupted`].
pub fn build(
    scan: &Scan,
    tokenizer: &Tokenizer,
    settings: &BuildSettings,
    progress: &mut ProgressFn<'_>,
) -> Result<BuildReport, CorpusError> {
    let create =
        |path: &Path| File::create_new(path).map(|file| Box::new(file) as Box<dyn DiskFile>);
    build_on(&create, scan, tokenizer, settings, progress)
}

/// [`build`] on a disk that may be a test's.
pub(super) fn build_on(
    create: &CreateFile<'_>,
    scan: &Scan,
    tokenizer: &Tokenizer,
    settings: &BuildSettings,
    progress: &mut ProgressFn<'_>,
) -> Result<BuildReport, CorpusError> {
    for (name, value) in [
        ("shard_tokens_max", settings.shard_tokens_max),
        ("threads", settings.threads.try_into().unwrap_or(u64::MAX)),
    ] {
        if value == 0 {
            let (value, expected) = ("0".to_owned(), "at least 1");
            return Err(CorpusError::Setting { name, value, expected });
        }
    }
    let end_of_document = tokenizer.end_of_document().ok_or(CorpusError::NoEndOfDocument)?;
    settings.check_folder()?;
    let draft = FolderDraft::new(&settings.folder)?;
    let disk = Disk { create, draft: draft.path(), target: &settings.folder };
    let width = TokenWidth::for_vocab(tokenizer.vocab_size());
    let mut build = Build {
        sides: Split::ALL
            .map(|split| SideWriter::new(&disk, split, width, settings.shard_tokens_max)),
        licenses: shares(scan.licenses.list.iter().map(ToString::to_string)),
        groups: shares(scan.groups.list.iter().cloned()),
        skips: scan.skips().clone(),
        scan,
    };
    build.tokenize(tokenizer, end_of_document, settings.threads, progress)?;
    let report = build.finish(&disk, tokenizer, end_of_document, settings)?;
    draft.publish()?;
    Ok(report)
}

/// Whether a folder exists with anything in it, or a file does.
fn holds_something(folder: &Path) -> bool {
    match std::fs::read_dir(folder) {
        Ok(mut entries) => entries.next().is_some(),
        // A file, or a folder that cannot be looked into.
        Err(_) => folder.symlink_metadata().is_ok(),
    }
}

fn shares(names: impl Iterator<Item = String>) -> Vec<Share> {
    names
        .map(|name| Share { name, train: Counts::default(), validation: Counts::default() })
        .collect()
}

/// Where files are created, and what errors call them.
struct Disk<'a> {
    create: &'a CreateFile<'a>,
    draft: &'a Path,
    target: &'a Path,
}

impl Disk<'_> {
    fn file(&self, name: &str) -> Result<FileWriter, CorpusError> {
        let (draft, target) = (self.draft.join(name), self.target.join(name));
        Ok(FileWriter::create(self.create, &draft, target)?)
    }

    fn write(&self, name: &str, parts: &[Vec<u8>]) -> Result<FileEntry, CorpusError> {
        let mut file = self.file(name)?;
        for part in parts {
            file.write(part)?;
        }
        finish(name.to_owned(), file)
    }
}

fn finish(name: String, file: FileWriter) -> Result<FileEntry, CorpusError> {
    let (bytes, blake3) = file.finish()?;
    Ok(FileEntry { file: name, bytes, blake3 })
}

/// One side of the split being written.
struct SideWriter<'a> {
    disk: &'a Disk<'a>,
    split: Split,
    width: TokenWidth,
    shard_tokens_max: u64,
    index: IndexBuilder,
    counts: Counts,
    done: Vec<ShardEntry>,
    open: Option<OpenShard>,
    bytes: Vec<u8>,
}

struct OpenShard {
    name: String,
    file: FileWriter,
    tokens: u64,
}

impl<'a> SideWriter<'a> {
    fn new(disk: &'a Disk<'a>, split: Split, width: TokenWidth, shard_tokens_max: u64) -> Self {
        Self {
            disk,
            split,
            width,
            shard_tokens_max,
            index: IndexBuilder::default(),
            counts: Counts::default(),
            done: Vec::new(),
            open: None,
            bytes: Vec::new(),
        }
    }

    fn push(
        &mut self,
        document: &Document,
        ids: &[u32],
        num_tokens: u32,
    ) -> Result<(), CorpusError> {
        if self.open.as_ref().is_some_and(|open| {
            0 < open.tokens && self.shard_tokens_max < open.tokens + u64::from(num_tokens)
        }) {
            self.close()?;
        }
        if self.open.is_none() {
            let name = format!("{}-{:05}.tokens", self.split, self.done.len());
            let mut file = self.disk.file(&name)?;
            file.write(&header(self.width, self.counts.tokens))?;
            self.open = Some(OpenShard { name, file, tokens: 0 });
        }
        if let Some(open) = &mut self.open {
            self.bytes.clear();
            encode_ids(ids, self.width, &mut self.bytes);
            open.file.write(&self.bytes)?;
            open.tokens += u64::from(num_tokens);
        }
        self.index.push(&DocumentRecord {
            path: &document.path,
            first_token: self.counts.tokens,
            num_tokens,
            text_bytes: document.text_bytes,
            group: document.group,
            license: document.license,
        });
        self.counts.add(num_tokens, document.text_bytes);
        Ok(())
    }

    fn close(&mut self) -> Result<(), CorpusError> {
        if let Some(OpenShard { name, file, tokens }) = self.open.take() {
            let file = finish(name, file)?;
            debug_assert_eq!(file.bytes, HEADER_BYTES + tokens * u64::from(self.width.bytes()));
            self.done.push(ShardEntry { file, tokens });
        }
        Ok(())
    }

    fn finish(mut self) -> Result<SplitEntry, CorpusError> {
        self.close()?;
        let index = self.disk.write(&format!("{}.index", self.split), &self.index.parts())?;
        Ok(SplitEntry { counts: self.counts, index, shards: self.done })
    }
}

/// A build under way.
struct Build<'a> {
    scan: &'a Scan,
    sides: [SideWriter<'a>; 2],
    licenses: Vec<Share>,
    groups: Vec<Share>,
    skips: Skips,
}

/// A document's number and its ids, or why it has none.
type Tokenized = (usize, Result<Vec<u32>, Skipped>);

impl Build<'_> {
    fn tokenize(
        &mut self,
        tokenizer: &Tokenizer,
        end_of_document: u32,
        threads: usize,
        progress: &mut ProgressFn<'_>,
    ) -> Result<(), CorpusError> {
        let scan = self.scan;
        let bytes_total =
            scan.documents.iter().map(|document| u64::from(document.text_bytes)).sum();
        let mut done = Progress {
            stage: Stage::Tokenize,
            documents: 0,
            bytes: 0,
            bytes_total: Some(bytes_total),
        };
        let worker = || {
            let mut encoder = tokenizer.encoder();
            move |batch: Range<usize>| -> Vec<Tokenized> {
                let ids = |number| tokenize(scan, number, &mut encoder, end_of_document);
                batch.clone().zip(batch.map(ids)).collect()
            }
        };
        let window = threads * BATCHES_PER_THREAD;
        ordered::for_each(
            threads,
            window,
            batches(&scan.documents),
            worker,
            |batch: Vec<Tokenized>| {
                for (number, ids) in batch {
                    let document = &scan.documents[number];
                    done.documents += 1;
                    done.bytes += u64::from(document.text_bytes);
                    match ids {
                        Ok(ids) => self.take(document, &ids)?,
                        Err(skipped) => self.skips.add(skipped),
                    }
                }
                match progress(done) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(CorpusError::Interrupted),
                }
            },
        )
    }

    fn take(&mut self, document: &Document, ids: &[u32]) -> Result<(), CorpusError> {
        let Ok(num_tokens) = u32::try_from(ids.len()) else {
            let detail = Some(format!("{} tokens, limit {}", ids.len(), u32::MAX));
            self.skips.push(document.path.to_string(), SkipReason::DocumentTooLarge, detail);
            return Ok(());
        };
        let side = self.sides.iter_mut().find(|side| side.split == document.split);
        side.expect("there is a writer for every side").push(document, ids, num_tokens)?;
        let index = |number: u32| usize::try_from(number).expect("a u32 fits");
        let shares =
            [&mut self.licenses[index(document.license)], &mut self.groups[index(document.group)]];
        for share in shares {
            share.of_mut(document.split).add(num_tokens, document.text_bytes);
        }
        Ok(())
    }

    fn finish(
        self,
        disk: &Disk<'_>,
        tokenizer: &Tokenizer,
        end_of_document: u32,
        settings: &BuildSettings,
    ) -> Result<BuildReport, CorpusError> {
        let [train, validation] = self.sides;
        let (token_width, train, validation) = (train.width, train.finish()?, validation.finish()?);
        if train.counts.documents + validation.counts.documents == 0 {
            return Err(CorpusError::NoDocuments { skipped: self.skips.summary() });
        }
        let json = tokenizer.json().to_vec();
        let mut manifest = Manifest {
            schema: SCHEMA.to_owned(),
            data_hash: tokenizer.hash(),
            tokenizer: TokenizerEntry {
                file: disk.write(TOKENIZER_FILE, &[json])?,
                vocab_size: tokenizer.vocab_size(),
                end_of_document,
            },
            token_width,
            train,
            validation,
            licenses: self.licenses,
            groups: self.groups,
            skipped: skipped_entry(&self.skips, disk)?,
            settings: settings_entry(self.scan, settings),
        };
        manifest.data_hash = manifest.compute_data_hash();
        let mut json = to_json(&manifest, true);
        json.push(b'\n');
        if MANIFEST_BYTES_MAX < u64::try_from(json.len()).unwrap_or(u64::MAX) {
            let what = "bytes of manifest, which names every group";
            return Err(CorpusError::TooMany { what, limit: MANIFEST_BYTES_MAX });
        }
        disk.write(MANIFEST_FILE, &[json])?;
        Ok(BuildReport { manifest, skips: self.skips })
    }
}

/// Cuts the documents into runs of at most [`BATCH_BYTES`] of text, or of one document.
fn batches(documents: &[Document]) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = documents[start..].iter().take_while(|document| {
            bytes += u64::from(document.text_bytes);
            bytes <= BATCH_BYTES
        });
        let batch = start..(start + fits.count().max(1)).min(documents.len());
        start = batch.end;
        Some(batch).filter(|batch| !batch.is_empty())
    })
}

fn tokenize(
    scan: &Scan,
    number: usize,
    encoder: &mut Encoder<'_>,
    end_of_document: u32,
) -> Result<Vec<u32>, Skipped> {
    let document = &scan.documents[number];
    let text = scan.read(document)?;
    let mut ids = encoder.encode(&text).map_err(|error| Skipped {
        path: document.path.to_string(),
        reason: SkipReason::NotTokenized,
        detail: Some(error.to_string()),
    })?;
    ids.push(end_of_document);
    Ok(ids)
}

fn skipped_entry(skips: &Skips, disk: &Disk<'_>) -> Result<SkippedEntry, CorpusError> {
    let mut file = disk.file(SKIPPED_FILE)?;
    for skipped in skips.listed() {
        let mut line = to_json(skipped, false);
        line.push(b'\n');
        file.write(&line)?;
    }
    Ok(SkippedEntry {
        list: finish(SKIPPED_FILE.to_owned(), file)?,
        counts: skips.counts().clone(),
        unlisted: skips.num_unlisted(),
    })
}

fn settings_entry(scan: &Scan, settings: &BuildSettings) -> SettingsEntry {
    let scanned = &scan.settings;
    SettingsEntry {
        inputs: scanned.inputs.iter().map(Input::label).collect(),
        extensions: match &scanned.kinds {
            FileKinds::Any => None,
            FileKinds::Extensions(extensions) => Some(extensions.iter().cloned().collect()),
        },
        license_allow: scanned.license_allow.as_ref().map(|allow| allow.names().to_vec()),
        file_bytes_max: scanned.limits.file_bytes_max,
        document_bytes_max: scanned.limits.document_bytes_max,
        group_bytes_max: scanned.limits.group_bytes_max,
        shard_tokens_max: settings.shard_tokens_max,
        split: scanned.split.clone(),
    }
}

fn to_json(value: &impl serde::Serialize, pretty: bool) -> Vec<u8> {
    let json = if pretty { serde_json::to_vec_pretty(value) } else { serde_json::to_vec(value) };
    json.expect("strings, numbers and lists of them have a JSON form")
}

#[cfg(test)]
pub(crate) mod tests;

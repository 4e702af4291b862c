//! The scan: which documents a corpus has, before any of them is tokenized.
//!
//! Every text is read once, checked, hashed and let go; what stays is about 150 bytes a document
//! (place, hash, path, group, license), never text. The build, the tokenizer's sample and the split
//! all start from the same [`Scan`], so they agree on what the corpus is.
//!
//! **Invariant:** documents are in the order of inputs, then of file names, then of lines; the result
//! depends on neither threads nor time.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::ops::ControlFlow;

use cairn_artifacts::Hash;

use super::input::{self, SourceFile, top_folder};
use super::json_lines::{LinePlace, Record, for_each_line};
use super::skip::{SkipReason, Skipped, Skips};
use super::{
    CorpusError, FileKinds, Input, License, LicenseFilter, Progress, ProgressFn, Split, SplitBy,
    SplitSettings, Stage,
};
use crate::ordered;
use crate::permutation::Permutation;
use crate::tokenizer::TokenizerError;

/// Longest path or group name that a record can bring along, in bytes.
const NAME_BYTES_MAX: usize = 4096;

/// Records that say nothing about their group are spread over this many groups by their text.
const RECORD_GROUPS: u32 = 1024;

/// Groups are named in the manifest, so their number is bounded.
pub const GROUPS_MAX: usize = 1 << 20;

const TOO_MANY_DOCUMENTS: CorpusError =
    CorpusError::TooMany { what: "documents", limit: u32::MAX as u64 };

/// Files in flight per thread.
const FILES_PER_THREAD: usize = 4;

/// Sizes above which something is left out, with its path and size in the list of skipped files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest file that is opened.
    pub file_bytes_max: u64,
    /// Largest text of one document; memory is proportional to it. Below 4 GiB.
    pub document_bytes_max: u64,
    /// Most text of one group. In a registry it keeps generated bindings, a third of the text of
    /// some, from crowding out the rest.
    pub group_bytes_max: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { file_bytes_max: 64 << 30, document_bytes_max: 16 << 20, group_bytes_max: None }
    }
}

/// What to put into a corpus.
#[derive(Clone, Debug)]
pub struct ScanSettings {
    /// Where the text is.
    pub inputs: Vec<Input>,
    /// Which files of a folder are taken.
    pub kinds: FileKinds,
    /// Which licenses are taken; all, unknown ones included, if there is no filter.
    pub license_allow: Option<LicenseFilter>,
    /// What is too large.
    pub limits: Limits,
    /// What is held out.
    pub split: SplitSettings,
    /// Threads that read.
    pub threads: usize,
}

impl ScanSettings {
    /// Takes all text of the inputs, with the default limits and split.
    pub fn new(inputs: Vec<Input>) -> Self {
        Self {
            inputs,
            kinds: FileKinds::Any,
            license_allow: None,
            limits: Limits::default(),
            split: SplitSettings::default(),
            threads: 1,
        }
    }
}

/// One document of a scan.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) path: Box<str>,
    file: u32,
    line: Option<LinePlace>,
    hash: Hash,
    pub(super) text_bytes: u32,
    pub(super) group: u32,
    pub(super) license: u32,
    pub(super) split: Split,
}

/// The documents of a corpus to be.
#[derive(Debug)]
pub struct Scan {
    pub(super) settings: ScanSettings,
    files: Vec<SourceFile>,
    pub(super) documents: Vec<Document>,
    pub(super) groups: Names<String>,
    pub(super) licenses: Names<License>,
    pub(super) skips: Skips,
    /// Bytes of text of each group.
    group_bytes: Vec<u64>,
}

/// Names and their numbers, in the order of first use.
#[derive(Debug)]
pub(super) struct Names<N> {
    pub(super) list: Vec<N>,
    numbers: HashMap<N, u32>,
}

impl<N: Clone + Eq + std::hash::Hash> Names<N> {
    fn new() -> Self {
        Self { list: Vec::new(), numbers: HashMap::new() }
    }

    fn number(&mut self, name: N) -> u32 {
        let next = u32::try_from(self.list.len()).expect("fewer names than documents");
        *self.numbers.entry(name).or_insert_with_key(|name| {
            self.list.push(name.clone());
            next
        })
    }
}

/// A text that was found in a file, without the text.
#[derive(Debug)]
struct Found {
    path: String,
    line: Option<LinePlace>,
    hash: Hash,
    text_bytes: u32,
    group: String,
    license: License,
}

/// All that one file gave.
#[derive(Debug, Default)]
struct FileScan {
    found: Vec<Found>,
    skipped: Vec<Skipped>,
    bytes: u64,
}

/// Reads all inputs and decides what the corpus holds.
///
/// `progress` is called after every file; answering [`ControlFlow::Break`] ends the scan.
///
/// # Errors
///
/// [`CorpusError::NoDocuments`] if nothing is left, with the reasons; [`CorpusError::NoRegistry`]
/// without a registry folder; [`CorpusError::OneGroup`] if the split is impossible;
/// [`CorpusError::Setting`] for a limit or a fraction out of range; [`CorpusError::Interrupted`].
/// A single bad file is never an error: it is skipped, counted and listed.
pub fn scan(settings: ScanSettings, progress: &mut ProgressFn<'_>) -> Result<Scan, CorpusError> {
    settings.check()?;
    let mut skips = Skips::default();
    let files = input::list(&settings.inputs, &settings.kinds, &mut skips)?;
    let mut scan = Scan {
        files: Vec::new(),
        documents: Vec::new(),
        groups: Names::new(),
        licenses: Names::new(),
        skips,
        group_bytes: Vec::new(),
        settings,
    };
    let mut first_of_hash = HashMap::new();
    let mut done = Progress { stage: Stage::Scan, documents: 0, bytes: 0, bytes_total: None };
    let (threads, limits) = (scan.settings.threads, scan.settings.limits);
    let mut file_number = 0..;
    ordered::for_each(
        threads,
        threads * FILES_PER_THREAD,
        files.iter(),
        || |file| scan_file(file, limits),
        |result: FileScan| {
            let file = file_number.next().ok_or(TOO_MANY_DOCUMENTS)?;
            done.bytes += result.bytes;
            scan.take(file, result, &mut first_of_hash)?;
            done.documents = scan.num_documents();
            match progress(done) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(CorpusError::Interrupted),
            }
        },
    )?;
    scan.files = files;
    if scan.documents.is_empty() {
        return Err(CorpusError::NoDocuments { skipped: scan.skips.summary() });
    }
    scan.split()?;
    Ok(scan)
}

impl ScanSettings {
    fn check(&self) -> Result<(), CorpusError> {
        let bytes = self.limits.document_bytes_max;
        if bytes == 0 || u64::from(u32::MAX) < bytes {
            return Err(CorpusError::Setting {
                name: "document_bytes_max",
                value: bytes.to_string(),
                expected: "at least 1 and below 4 GiB",
            });
        }
        if self.threads == 0 {
            return Err(CorpusError::Setting {
                name: "threads",
                value: "0".to_owned(),
                expected: "at least 1",
            });
        }
        // An impossible fraction is refused before anything is read.
        self.split.assign(std::iter::empty()).map(|_| ())
    }
}

impl Scan {
    /// Documents that will be in the corpus.
    pub fn num_documents(&self) -> u64 {
        u64::try_from(self.documents.len()).expect("a length fits in 64 bits")
    }

    /// Documents and bytes of text on one side of the split.
    pub fn size(&self, split: Split) -> (u64, u64) {
        let side = self.documents.iter().filter(|document| document.split == split);
        side.fold((0, 0), |(documents, bytes), document| {
            (documents + 1, bytes + u64::from(document.text_bytes))
        })
    }

    /// What was left out so far.
    pub fn skips(&self) -> &Skips {
        &self.skips
    }

    /// Texts of the training side to train a tokenizer on, at most `bytes_max` bytes of them.
    ///
    /// Documents are drawn in a random order that depends on the split's seed alone, and read one at
    /// a time; one that does not fit the rest of the budget is passed over. Validation text is never
    /// drawn. A document that has become unreadable is passed over here and reported by the build.
    pub fn sample(
        &self,
        bytes_max: u64,
    ) -> impl Iterator<Item = Result<String, TokenizerError>> + Send {
        let order = Permutation::new(self.num_documents(), self.settings.split.seed, u64::MAX);
        let mut left = bytes_max;
        (0..self.num_documents())
            .filter_map(move |draw| {
                let index = usize::try_from(order.at(draw)).expect("a document's number fits");
                let document = &self.documents[index];
                let bytes = u64::from(document.text_bytes);
                if document.split != Split::Train || left < bytes {
                    return None;
                }
                left -= bytes;
                Some(document)
            })
            .filter_map(|document| self.read(document).ok().map(Ok))
    }

    /// Reads a document's text again and makes sure it is the text that was scanned.
    pub(super) fn read(&self, document: &Document) -> Result<String, Skipped> {
        let file = &self.files[usize::try_from(document.file).expect("a u32 fits")];
        let skip = |(reason, detail)| Skipped { path: document.path.to_string(), reason, detail };
        let text = match document.line {
            None => read_text(file, self.settings.limits).map_err(skip)?,
            Some(line) => {
                let bytes = read_at(file, line).map_err(|error| skip(of_io(&error)))?;
                let record = Record::parse(&bytes).map_err(skip)?;
                record.text.unwrap_or_default()
            }
        };
        if Hash::of_bytes(text.as_bytes()) != document.hash {
            return Err(skip((SkipReason::Changed, None)));
        }
        Ok(text)
    }

    fn take(
        &mut self,
        file: u32,
        result: FileScan,
        first_of_hash: &mut HashMap<Hash, u32>,
    ) -> Result<(), CorpusError> {
        for skipped in result.skipped {
            self.skips.add(skipped);
        }
        for found in result.found {
            let allow = &self.settings.license_allow;
            if allow.as_ref().is_some_and(|allow| !allow.allows(&found.license)) {
                let license = Some(found.license.to_string());
                self.skips.push(found.path, SkipReason::LicenseNotAllowed, license);
                continue;
            }
            if let Some(first) = first_of_hash.get(&found.hash) {
                let first = &self.documents[usize::try_from(*first).expect("a u32 fits")];
                let same = Some(format!("same as {}", first.path));
                self.skips.push(found.path, SkipReason::Duplicate, same);
                continue;
            }
            let group_bytes = self.group_bytes_with(&found);
            if let Some(limit) = self.settings.limits.group_bytes_max
                && limit < group_bytes
            {
                let detail = format!("group {}, limit {limit} bytes", found.group);
                self.skips.push(found.path, SkipReason::GroupFull, Some(detail));
                continue;
            }
            let number = u32::try_from(self.documents.len()).map_err(|_| TOO_MANY_DOCUMENTS)?;
            first_of_hash.insert(found.hash, number);
            let group = self.groups.number(found.group);
            let group_index = usize::try_from(group).expect("a u32 fits");
            self.group_bytes.resize(self.groups.list.len(), 0);
            self.group_bytes[group_index] = group_bytes;
            self.documents.push(Document {
                path: found.path.into_boxed_str(),
                file,
                line: found.line,
                hash: found.hash,
                text_bytes: found.text_bytes,
                group,
                license: self.licenses.number(found.license),
                split: Split::Train,
            });
        }
        if GROUPS_MAX < self.groups.list.len() {
            return Err(CorpusError::TooMany { what: "groups", limit: 1 << 20 });
        }
        Ok(())
    }

    /// Bytes of text that a document's group has with it.
    fn group_bytes_with(&self, found: &Found) -> u64 {
        let group = self.groups.numbers.get(&found.group);
        let group = group.and_then(|group| usize::try_from(*group).ok());
        group.map_or(0, |group| self.group_bytes[group]) + u64::from(found.text_bytes)
    }

    fn split(&mut self) -> Result<(), CorpusError> {
        let split = &self.settings.split;
        match split.by {
            SplitBy::Group => {
                let sides = split.assign(self.groups.list.iter().map(String::as_str))?;
                for document in &mut self.documents {
                    document.split = sides[usize::try_from(document.group).expect("a u32 fits")];
                }
            }
            SplitBy::Document => {
                // By text, not by path: paths of several inputs may be equal.
                let names: Vec<String> =
                    self.documents.iter().map(|document| document.hash.to_string()).collect();
                let sides = split.assign(names.iter().map(String::as_str))?;
                for (document, side) in self.documents.iter_mut().zip(sides) {
                    document.split = side;
                }
            }
        }
        Ok(())
    }
}

type Refusal = (SkipReason, Option<String>);

fn of_io(error: &io::Error) -> Refusal {
    (SkipReason::of_io(error), Some(error.to_string()))
}

fn scan_file(file: &SourceFile, limits: Limits) -> FileScan {
    let mut result = FileScan::default();
    let refusal = if file.is_json_lines() {
        scan_lines(file, limits, &mut result).err()
    } else {
        match read_text(file, limits) {
            Ok(text) => {
                result.bytes = bytes_of(&text);
                result.found.push(Found {
                    path: file.relative.clone(),
                    line: None,
                    hash: Hash::of_bytes(text.as_bytes()),
                    text_bytes: u32::try_from(text.len()).expect("the limit is below 4 GiB"),
                    group: file.group().to_owned(),
                    license: License::of_header(&text).or(&file.license),
                });
                None
            }
            Err(refusal) => Some(refusal),
        }
    };
    if let Some((reason, detail)) = refusal {
        result.skipped.push(Skipped { path: file.relative.clone(), reason, detail });
    }
    result
}

fn scan_lines(file: &SourceFile, limits: Limits, result: &mut FileScan) -> Result<(), Refusal> {
    let opened = open(file, limits)?;
    let FileScan { found, skipped, bytes } = result;
    for_each_line(BufReader::new(opened), limits.document_bytes_max, |line, content| {
        *bytes += line.bytes;
        let too_large = (SkipReason::DocumentTooLarge, None);
        let record = content.ok_or(too_large).and_then(Record::parse);
        match record.and_then(|record| found_in(file, line, record, limits)) {
            Ok(document) => found.push(document),
            Err((reason, detail)) => {
                let path = format!("{}:{}", file.relative, line.number);
                skipped.push(Skipped { path, reason, detail });
            }
        }
    })
    .map_err(|error| of_io(&error))?;
    if found.is_empty() && skipped.is_empty() { Err((SkipReason::Empty, None)) } else { Ok(()) }
}

fn found_in(
    file: &SourceFile,
    line: LinePlace,
    record: Record,
    limits: Limits,
) -> Result<Found, Refusal> {
    let text = record.text.ok_or((SkipReason::NoText, None))?;
    check_text(&text, limits)?;
    let named = |name: Option<String>| {
        name.map(|name| name.trim_start_matches('/').to_owned())
            .filter(|name| !name.is_empty() && name.len() <= NAME_BYTES_MAX)
    };
    let hash = Hash::of_bytes(text.as_bytes());
    let path = named(record.path);
    let group = named(record.group)
        .or_else(|| path.as_deref().map(|path| top_folder(path).to_owned()))
        .unwrap_or_else(|| {
            let [a, b, c, d, ..] = *hash.as_bytes();
            format!("{}#{}", file.relative, u32::from_le_bytes([a, b, c, d]) % RECORD_GROUPS)
        });
    let stated = record.license.as_deref().map(License::parse).unwrap_or_default();
    Ok(Found {
        path: path.unwrap_or_else(|| format!("{}:{}", file.relative, line.number)),
        line: Some(line),
        hash,
        text_bytes: u32::try_from(text.len()).expect("the limit is below 4 GiB"),
        group,
        license: stated.or(&License::of_header(&text)).or(&file.license),
    })
}

fn open(file: &SourceFile, limits: Limits) -> Result<File, Refusal> {
    let opened = File::open(&file.path).map_err(|error| of_io(&error))?;
    let metadata = opened.metadata().map_err(|error| of_io(&error))?;
    if !metadata.is_file() {
        return Err((SkipReason::NotAFile, None));
    }
    check_size(metadata.len(), limits.file_bytes_max, SkipReason::FileTooLarge)?;
    Ok(opened)
}

fn read_text(file: &SourceFile, limits: Limits) -> Result<String, Refusal> {
    let opened = open(file, limits)?;
    let bytes = opened.metadata().map_err(|error| of_io(&error))?.len();
    check_size(bytes, limits.document_bytes_max, SkipReason::DocumentTooLarge)?;
    let mut text = Vec::with_capacity(usize::try_from(bytes).expect("the limit is below 4 GiB"));
    // A file may grow while it is read, so the limit holds for what is read as well.
    opened
        .take(limits.document_bytes_max + 1)
        .read_to_end(&mut text)
        .map_err(|error| of_io(&error))?;
    if text.contains(&0) {
        return Err((SkipReason::Binary, None));
    }
    let text = String::from_utf8(text)
        .map_err(|error| (SkipReason::NotUtf8, Some(error.utf8_error().to_string())))?;
    check_text(&text, limits)?;
    Ok(text)
}

fn check_text(text: &str, limits: Limits) -> Result<(), Refusal> {
    check_size(bytes_of(text), limits.document_bytes_max, SkipReason::DocumentTooLarge)?;
    if text.trim().is_empty() {
        return Err((SkipReason::Empty, None));
    }
    if text.contains('\0') {
        return Err((SkipReason::Binary, None));
    }
    Ok(())
}

fn check_size(bytes: u64, limit: u64, reason: SkipReason) -> Result<(), Refusal> {
    if limit < bytes {
        return Err((reason, Some(format!("{bytes} bytes, limit {limit}"))));
    }
    Ok(())
}

fn read_at(file: &SourceFile, line: LinePlace) -> io::Result<Vec<u8>> {
    let mut opened = File::open(&file.path)?;
    opened.seek(SeekFrom::Start(line.offset))?;
    let mut bytes = Vec::new();
    opened.take(line.bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn bytes_of(text: &str) -> u64 {
    u64::try_from(text.len()).expect("a length fits in 64 bits")
}

#[cfg(test)]
pub(super) mod tests;

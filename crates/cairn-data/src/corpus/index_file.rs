//! The index file: where each document's tokens are, how long its text is, and what it is.
//!
//! ```text
//! magic "CAIRNDOC" | version u32 | 0 u32 | documents u64 | path bytes u64     32 bytes
//! first_token u64 | path_start u64 | num_tokens u32 | text_bytes u32 | group u32 | license u32   each
//! the paths, end to end, UTF-8
//! ```
//! All little-endian. Documents lie end to end: each starts at the token, and its path at the byte,
//! where the one before ends.

use std::path::{Path, PathBuf};

use cairn_artifacts::MappedFile;

use super::ReadError;

const MAGIC: &[u8; 8] = b"CAIRNDOC";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
const RECORD_BYTES: usize = 32;

/// What the index knows of one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentRecord<'a> {
    /// Path relative to its input, or `FILE:LINE`.
    pub path: &'a str,
    /// Its first token, counted over the split.
    pub first_token: u64,
    /// Its tokens, the end of document included.
    pub num_tokens: u32,
    /// Bytes of its text.
    pub text_bytes: u32,
    /// Place in the manifest's list of groups.
    pub group: u32,
    /// Place in the manifest's list of licenses.
    pub license: u32,
}

/// An index file in the making.
#[derive(Debug, Default)]
pub(super) struct IndexBuilder {
    records: Vec<u8>,
    paths: Vec<u8>,
    num_documents: u64,
}

impl IndexBuilder {
    pub(super) fn push(&mut self, document: &DocumentRecord<'_>) {
        self.records.extend(document.first_token.to_le_bytes());
        self.records.extend(length(self.paths.len()).to_le_bytes());
        let fields = [document.num_tokens, document.text_bytes, document.group, document.license];
        for field in fields {
            self.records.extend(field.to_le_bytes());
        }
        self.paths.extend(document.path.as_bytes());
        self.num_documents += 1;
    }

    /// The header, the records and the paths, to be written one after another.
    pub(super) fn parts(&self) -> [Vec<u8>; 3] {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend([0; 4]);
        header.extend(self.num_documents.to_le_bytes());
        header.extend(length(self.paths.len()).to_le_bytes());
        [header, self.records.clone(), self.paths.clone()]
    }
}

/// A mapped index file that has been checked from end to end.
#[derive(Debug)]
pub(super) struct IndexFile<B = MappedFile> {
    path: PathBuf,
    bytes: B,
    num_documents: usize,
}

/// Sums over an index, to hold against the manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct IndexTotals {
    pub(super) documents: u64,
    pub(super) tokens: u64,
    pub(super) text_bytes: u64,
}

/// Checks the bytes of a document index from end to end and returns how many documents it has.
/// `num_groups` and `num_licenses` bound what a document may refer to.
///
/// # Errors
///
/// [`ReadError::Malformed`] saying what is wrong.
pub fn check_index(bytes: &[u8], num_groups: usize, num_licenses: usize) -> Result<u64, ReadError> {
    let parsed = IndexFile::parse(Path::new("index"), bytes, num_groups, num_licenses);
    parsed.map(|(_, totals)| totals.documents)
}

impl<B: std::ops::Deref<Target = [u8]>> IndexFile<B> {
    /// Checks the header and every record, so that no later access can fail.
    ///
    /// `num_groups` and `num_licenses` bound what a record may refer to.
    pub(super) fn parse(
        path: &Path,
        bytes: B,
        num_groups: usize,
        num_licenses: usize,
    ) -> Result<(Self, IndexTotals), ReadError> {
        let malformed = |reason: &str| ReadError::Malformed {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let header = bytes.get(..HEADER_BYTES).ok_or_else(|| malformed("it has no header"))?;
        if &header[..8] != MAGIC {
            return Err(malformed("it is not a document index"));
        }
        let version = u32_at(header, 8);
        if version != VERSION {
            return Err(malformed(&format!("its version is {version}, expected {VERSION}")));
        }
        let sizes = sizes(u64_at(header, 16), u64_at(header, 24));
        let (num_documents, path_bytes) = sizes
            .filter(|sizes| HEADER_BYTES + sizes.0 * RECORD_BYTES + sizes.1 == bytes.len())
            .ok_or_else(|| malformed("its length does not match its header"))?;
        let index = Self { path: path.to_owned(), bytes, num_documents };
        std::str::from_utf8(index.paths()).map_err(|_| malformed("a path is not UTF-8"))?;
        let totals = index.check(path_bytes, num_groups, num_licenses)?;
        Ok((index, totals))
    }

    fn check(
        &self,
        path_bytes: usize,
        num_groups: usize,
        num_licenses: usize,
    ) -> Result<IndexTotals, ReadError> {
        let paths = std::str::from_utf8(self.paths()).unwrap_or_default();
        let (mut totals, mut path_start) = (IndexTotals::default(), 0);
        for index in 0..self.num_documents {
            let record = self.record(index);
            let (start, end) = (self.path_start(index), self.path_end(index));
            let is_good = u64_at(record, 0) == totals.tokens
                && start == Some(path_start)
                && end.is_some_and(|end| end <= path_bytes && paths.get(path_start..end).is_some())
                && 0 < u32_at(record, 16)
                && below(u32_at(record, 24), num_groups)
                && below(u32_at(record, 28), num_licenses);
            if !is_good {
                let reason = format!("record {index} contradicts its neighbors or the manifest");
                return Err(ReadError::Malformed { path: self.path.clone(), reason });
            }
            path_start = end.unwrap_or(path_bytes);
            totals.documents += 1;
            // At most 2^59 records of 2^32: no overflow.
            totals.tokens = totals.tokens.saturating_add(u64::from(u32_at(record, 16)));
            totals.text_bytes = totals.text_bytes.saturating_add(u64::from(u32_at(record, 20)));
        }
        if path_start != path_bytes {
            let reason = "it has paths that no document has".to_owned();
            return Err(ReadError::Malformed { path: self.path.clone(), reason });
        }
        Ok(totals)
    }

    pub(super) fn len(&self) -> usize {
        self.num_documents
    }

    /// One document.
    pub(super) fn document(&self, index: usize) -> DocumentRecord<'_> {
        assert!(index < self.num_documents, "document {index} of {}", self.num_documents);
        let record = self.record(index);
        let (start, end) = (self.path_start(index), self.path_end(index));
        // The file was checked when it was opened; if another program has changed it since, the
        // path is empty rather than wrong.
        let path = start.zip(end).and_then(|(start, end)| self.paths().get(start..end));
        DocumentRecord {
            path: path.and_then(|path| std::str::from_utf8(path).ok()).unwrap_or_default(),
            first_token: u64_at(record, 0),
            num_tokens: u32_at(record, 16),
            text_bytes: u32_at(record, 20),
            group: u32_at(record, 24),
            license: u32_at(record, 28),
        }
    }

    fn record(&self, index: usize) -> &[u8] {
        let start = HEADER_BYTES + index * RECORD_BYTES;
        &self.bytes[start..start + RECORD_BYTES]
    }

    fn path_start(&self, index: usize) -> Option<usize> {
        usize::try_from(u64_at(self.record(index), 8)).ok()
    }

    fn path_end(&self, index: usize) -> Option<usize> {
        let is_last = index + 1 == self.num_documents;
        if is_last { Some(self.paths().len()) } else { self.path_start(index + 1) }
    }

    fn paths(&self) -> &[u8] {
        &self.bytes[HEADER_BYTES + self.num_documents * RECORD_BYTES..]
    }
}

/// Both counts as sizes, if no sum of them overflows.
fn sizes(num_documents: u64, path_bytes: u64) -> Option<(usize, usize)> {
    let (num_documents, path_bytes) =
        (usize::try_from(num_documents).ok()?, usize::try_from(path_bytes).ok()?);
    num_documents.checked_mul(RECORD_BYTES)?.checked_add(path_bytes)?.checked_add(HEADER_BYTES)?;
    Some((num_documents, path_bytes))
}

fn below(value: u32, bound: usize) -> bool {
    usize::try_from(value).is_ok_and(|value| value < bound)
}

fn length(len: usize) -> u64 {
    u64::try_from(len).expect("a length fits in 64 bits")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn built(documents: &[(String, u32)]) -> Vec<u8> {
        let mut builder = IndexBuilder::default();
        let mut first_token = 0;
        for (path, num_tokens) in documents {
            let (num_tokens, text_bytes, group, license) = (*num_tokens, 7, 1, 0);
            let record =
                DocumentRecord { path, first_token, num_tokens, text_bytes, group, license };
            builder.push(&record);
            first_token += u64::from(num_tokens);
        }
        builder.parts().concat()
    }

    fn parse(bytes: &[u8]) -> Result<(IndexFile<&[u8]>, IndexTotals), ReadError> {
        IndexFile::parse(Path::new("train.index"), bytes, 2, 1)
    }

    proptest! {
        #[test]
        fn documents_come_back(documents in prop::collection::vec((".{0,9}", 1u32..99), 0..20)) {
            let bytes = built(&documents);
            let (index, totals) = parse(&bytes).unwrap();
            prop_assert_eq!(index.len(), documents.len());
            let tokens: u64 = documents.iter().map(|(_, tokens)| u64::from(*tokens)).sum();
            prop_assert_eq!(totals.tokens, tokens);
            for (number, (path, tokens)) in documents.iter().enumerate() {
                let found = index.document(number);
                prop_assert_eq!((found.path, found.num_tokens), (path.as_str(), *tokens));
            }
        }

        /// Whatever the bytes, the answer is an index that can be read or an error.
        #[test]
        fn altered_bytes_never_panic(
            changes in prop::collection::vec((0usize..200, any::<u8>()), 1..6),
            cut in 0usize..200,
        ) {
            let documents = [("é.rs".to_owned(), 3), ("b".to_owned(), 5), ("c/d".to_owned(), 1)];
            let mut bytes = built(&documents);
            for (at, value) in changes {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            bytes.truncate(bytes.len() - cut % 3);
            if let Ok((index, _)) = parse(&bytes) {
                for number in 0..index.len() {
                    index.document(number);
                }
            }
        }

        #[test]
        fn random_bytes_never_panic(rest in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(VERSION.to_le_bytes());
            bytes.extend(rest);
            let _ = parse(&bytes);
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let documents = [("a".to_owned(), 3), ("b".to_owned(), 5)];
        let good = built(&documents);
        assert!(parse(&good).is_ok());
        let second = HEADER_BYTES + RECORD_BYTES;
        // Magic, version, count, path bytes; first token, path start, token count, group, license.
        for at in
            [0, 8, 16, 24, second, second + 8, second + 16 - RECORD_BYTES, second + 24, second + 28]
        {
            let mut bytes = good.clone();
            bytes[at] ^= 0x40;
            assert!(parse(&bytes).is_err(), "byte {at}");
        }
        for cut in 1..good.len() {
            assert!(parse(&good[..good.len() - cut]).is_err(), "{cut} bytes cut off");
        }
    }
}

//! Token files, the shards: ids end to end behind a small header.
//!
//! ```text
//! magic "CAIRNTOK" | version u32 | bytes a token u32 (2 or 4) | first token u64 | 0 u64     32 bytes
//! the ids
//! ```
//! All little-endian; the first token is counted over the split. A document never spans two files.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use cairn_artifacts::hash::Hasher;
use cairn_artifacts::{FileError, Hash, MappedFile};
use serde::{Deserialize, Serialize};

use super::ReadError;

const MAGIC: &[u8; 8] = b"CAIRNTOK";
const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: u64 = 32;

/// Bytes collected before they are handed to the operating system.
const BUFFER_BYTES: usize = 1 << 20;

/// How a token id is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenWidth {
    /// Two bytes, for vocabularies of at most 65,536.
    U16,
    /// Four bytes.
    U32,
}

impl TokenWidth {
    /// The narrowest one that holds every id of a vocabulary.
    pub fn for_vocab(vocab_size: u32) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Bytes a token.
    pub fn bytes(self) -> u32 {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// A file that can be made to last; the second implementation is the test's full disk.
pub(super) trait DiskFile: Write {
    /// Returns when the bytes are on the disk.
    fn sync(&mut self) -> io::Result<()>;
}

impl DiskFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Creates the files of a corpus.
pub(super) type CreateFile<'a> = dyn Fn(&Path) -> io::Result<Box<dyn DiskFile>> + 'a;

/// A file being written and hashed; errors name the place it will have, not the draft.
pub(super) struct FileWriter {
    file: BufWriter<Box<dyn DiskFile>>,
    target: PathBuf,
    hasher: Hasher,
    bytes: u64,
}

impl FileWriter {
    pub(super) fn create(
        create: &CreateFile<'_>,
        draft: &Path,
        target: PathBuf,
    ) -> Result<Self, FileError> {
        let file = create(draft).map_err(FileError::on("create", &target))?;
        let file = BufWriter::with_capacity(BUFFER_BYTES, file);
        Ok(Self { file, target, hasher: Hasher::new(), bytes: 0 })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.file.write_all(bytes).map_err(FileError::on("write", &self.target))?;
        self.hasher.update(bytes);
        self.bytes += u64::try_from(bytes.len()).expect("a length fits in 64 bits");
        Ok(())
    }

    /// Makes the file last; returns its size and hash.
    pub(super) fn finish(mut self) -> Result<(u64, Hash), FileError> {
        self.file
            .flush()
            .and_then(|()| self.file.get_mut().sync())
            .map_err(FileError::on("write", &self.target))?;
        Ok((self.bytes, self.hasher.finish()))
    }
}

/// The header of a token file.
pub(super) fn header(width: TokenWidth, first_token: u64) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend(width.bytes().to_le_bytes());
    header.extend(first_token.to_le_bytes());
    header.extend([0; 8]);
    header
}

/// Appends the stored form of ids to `bytes`.
pub(super) fn encode_ids(ids: &[u32], width: TokenWidth, bytes: &mut Vec<u8>) {
    match width {
        TokenWidth::U16 => bytes.extend(ids.iter().flat_map(|id| {
            u16::try_from(*id).expect("the width was chosen for the vocabulary").to_le_bytes()
        })),
        TokenWidth::U32 => bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes())),
    }
}

/// A mapped token file.
#[derive(Debug)]
pub(super) struct TokenFile<B = MappedFile> {
    path: PathBuf,
    bytes: B,
    width: TokenWidth,
    pub(super) first_token: u64,
    num_tokens: u64,
}

impl<B: std::ops::Deref<Target = [u8]>> TokenFile<B> {
    /// Checks the header and the length.
    pub(super) fn parse(
        path: &Path,
        bytes: B,
        width: TokenWidth,
        first_token: u64,
    ) -> Result<Self, ReadError> {
        let malformed = |reason: &str| {
            Err(ReadError::Malformed { path: path.to_owned(), reason: reason.to_owned() })
        };
        let header = header(width, first_token);
        if !bytes.starts_with(&header) {
            return malformed("its header is not the one that the manifest promises");
        }
        let body = bytes.len() - header.len();
        let width_bytes = usize::try_from(width.bytes()).expect("2 or 4 fits");
        if !body.is_multiple_of(width_bytes) {
            return malformed("it ends inside a token");
        }
        let num_tokens = u64::try_from(body / width_bytes).expect("a length fits in 64 bits");
        Ok(Self { path: path.to_owned(), bytes, width, first_token, num_tokens })
    }

    pub(super) fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// Appends `count` ids from `first` on (counted over the split) to `ids`.
    ///
    /// The file's hash is not checked on every read, its ids are: one outside the vocabulary would
    /// read outside the embedding.
    pub(super) fn read(
        &self,
        first: u64,
        count: usize,
        vocab_size: u32,
        ids: &mut Vec<u32>,
    ) -> Result<(), ReadError> {
        let width = usize::try_from(self.width.bytes()).expect("2 or 4 fits");
        let header = usize::try_from(HEADER_BYTES).expect("32 fits");
        let range = first
            .checked_sub(self.first_token)
            .and_then(|skip| usize::try_from(skip).ok())
            .and_then(|skip| skip.checked_mul(width)?.checked_add(header))
            .and_then(|from| Some(from..count.checked_mul(width)?.checked_add(from)?));
        let stored = range.and_then(|range| self.bytes.get(range)).ok_or_else(|| {
            let reason = format!("it has no {count} tokens from token {first} on");
            ReadError::Malformed { path: self.path.clone(), reason }
        })?;
        let read = ids.len();
        match self.width {
            TokenWidth::U16 => ids.extend(
                stored.chunks_exact(2).map(|id| u32::from(u16::from_le_bytes([id[0], id[1]]))),
            ),
            TokenWidth::U32 => ids.extend(
                stored.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])),
            ),
        }
        match ids[read..].iter().find(|id| vocab_size <= **id) {
            None => Ok(()),
            Some(id) => Err(ReadError::Token { path: self.path.clone(), id: *id, vocab_size }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(ids: &[u32], width: TokenWidth) -> Vec<u8> {
        let mut bytes = header(width, 100);
        encode_ids(ids, width, &mut bytes);
        bytes
    }

    fn parse(bytes: &[u8], width: TokenWidth) -> Result<TokenFile<&[u8]>, ReadError> {
        TokenFile::parse(Path::new("train-00000.tokens"), bytes, width, 100)
    }

    proptest! {
        #[test]
        fn ids_come_back(ids in prop::collection::vec(0u32..65_536, 0..50), wide: bool, skip in 0usize..50) {
            let width = if wide { TokenWidth::U32 } else { TokenWidth::U16 };
            let bytes = file(&ids, width);
            let tokens = parse(&bytes, width).unwrap();
            let skip = skip.min(ids.len());
            let mut read = vec![7];
            tokens.read(100 + skip as u64, ids.len() - skip, 65_536, &mut read).unwrap();
            prop_assert_eq!(&read[1..], &ids[skip..]);
            prop_assert!(tokens.read(100 + skip as u64, ids.len() - skip + 1, 65_536, &mut read).is_err());
        }

        #[test]
        fn any_range_of_any_bytes_is_an_answer(
            mut rest in prop::collection::vec(any::<u8>(), 0..80),
            first: u64,
            count: usize,
            keep_header: bool,
        ) {
            let mut bytes = if keep_header { header(TokenWidth::U16, 100) } else { Vec::new() };
            bytes.append(&mut rest);
            if let Ok(tokens) = parse(&bytes, TokenWidth::U16) {
                let _ = tokens.read(first, count, 1000, &mut Vec::new());
                let _ = tokens.read(100 + first % 50, count % 50, 1000, &mut Vec::new());
            }
        }
    }

    #[test]
    fn token_outside_the_vocabulary_is_refused() {
        let bytes = file(&[1, 2, 300], TokenWidth::U16);
        let tokens = parse(&bytes, TokenWidth::U16).unwrap();
        assert!(tokens.read(100, 2, 300, &mut Vec::new()).is_ok());
        let error = tokens.read(100, 3, 300, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, ReadError::Token { id: 300, vocab_size: 300, .. }), "{error}");
    }

    #[test]
    fn header_is_checked() {
        let good = file(&[1, 2, 3], TokenWidth::U16);
        for at in 0..usize::try_from(HEADER_BYTES).unwrap() {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            assert!(parse(&bytes, TokenWidth::U16).is_err(), "byte {at}");
        }
        assert!(parse(&good[..good.len() - 1], TokenWidth::U16).is_err());
        assert!(parse(&good[..20], TokenWidth::U16).is_err());
    }
}

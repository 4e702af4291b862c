//! A corpus folder, opened for reading.
//!
//! Opening checks everything that is cheap: the manifest against itself, every file's size, the
//! hashes of the tokenizer and of the indexes, every record of the indexes, the headers of the
//! shards. [`Corpus::verify`] hashes the shards as well, the whole of them.
//!
//! **Invariant:** no file of the corpus is ever held in memory; tokens are read from mapped files.

use std::io::Read;
use std::path::{Component, Path, PathBuf};

use cairn_artifacts::{FileError, Hash, MappedFile};
use cairn_spec::Hint;

use super::index_file::{DocumentRecord, IndexFile, IndexTotals};
use super::manifest::{FileEntry, MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest, SCHEMA, SplitEntry};
use super::split::Split;
use super::token_file::TokenFile;
use crate::tokenizer::{Tokenizer, TokenizerError};

/// A corpus that cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The system refused; a missing manifest means that there is no corpus.
    #[error(transparent)]
    File(#[from] FileError),
    /// The manifest is not one.
    #[error("{path} is not a corpus manifest: {reason}", path = path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The corpus was made by another version of Cairn.
    #[error("{path} has schema {found:?}, expected {expected:?}", path = path.display())]
    Schema {
        /// The manifest.
        path: PathBuf,
        /// Its schema.
        found: String,
        /// The one that is read.
        expected: &'static str,
    },
    /// A file is not the one that the manifest describes.
    #[error(
        "{path} was altered: it has {found_bytes} bytes and hash {found}, the manifest says \
         {expected_bytes} bytes and {expected}",
        path = path.display()
    )]
    Altered {
        /// The file.
        path: PathBuf,
        /// Its hash in the manifest.
        expected: Hash,
        /// Its hash now.
        found: Hash,
        /// Its size in the manifest.
        expected_bytes: u64,
        /// Its size now.
        found_bytes: u64,
    },
    /// A file contradicts its own header or the manifest.
    #[error("{path} cannot be read: {reason}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A token that is not in the vocabulary.
    #[error("{path} has token {id}, outside the vocabulary of {vocab_size}", path = path.display())]
    Token {
        /// The token file.
        path: PathBuf,
        /// The token.
        id: u32,
        /// One more than the largest id.
        vocab_size: u32,
    },
    /// The corpus's tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl Hint for ReadError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::File(error) if error.path.ends_with(MANIFEST_FILE) => {
                vec!["make a corpus with `cairn corpus build`".to_owned()]
            }
            Self::File(error) => error.hints(),
            Self::Tokenizer(error) => error.hints(),
            Self::Manifest { .. }
            | Self::Schema { .. }
            | Self::Altered { .. }
            | Self::Malformed { .. }
            | Self::Token { .. } => vec![
                "build the corpus again with `cairn corpus build`, or copy it again from where it \
                 came from"
                    .to_owned(),
            ],
        }
    }
}

/// A corpus folder.
#[derive(Debug)]
pub struct Corpus {
    folder: PathBuf,
    manifest: Manifest,
    train: Documents,
    validation: Documents,
}

/// The documents of one side of the split, in order.
#[derive(Debug)]
pub struct Documents {
    index: IndexFile,
    shards: Vec<TokenFile>,
    num_tokens: u64,
    vocab_size: u32,
}

impl Corpus {
    /// Opens the corpus in a folder.
    ///
    /// # Errors
    ///
    /// [`ReadError::File`] if a file is missing or unreadable, [`ReadError::Schema`] for a corpus of
    /// another version, [`ReadError::Altered`] with both hashes for a file of another size and for a
    /// tokenizer or an index of another hash, [`ReadError::Manifest`] and [`ReadError::Malformed`]
    /// for contradictions.
    pub fn open(folder: &Path) -> Result<Self, ReadError> {
        let path = folder.join(MANIFEST_FILE);
        let manifest = read_manifest(&path)?;
        manifest.check(&path)?;
        for entry in manifest.files() {
            check_size(folder, entry)?;
        }
        check_hash(folder, &manifest.tokenizer.file)?;
        let train = Documents::open(folder, &manifest, Split::Train)?;
        let validation = Documents::open(folder, &manifest, Split::Validation)?;
        Ok(Self { folder: folder.to_owned(), manifest, train, validation })
    }

    /// Hashes every file in full and compares with the manifest.
    ///
    /// # Errors
    ///
    /// [`ReadError::Altered`] for the first file that differs, [`ReadError::File`].
    pub fn verify(&self) -> Result<(), ReadError> {
        self.manifest.files().try_for_each(|entry| check_hash(&self.folder, entry))
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The documents of one side.
    pub fn documents(&self, split: Split) -> &Documents {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// Hash over all that training and validation read, for run records.
    pub fn data_hash(&self) -> Hash {
        self.manifest.data_hash
    }

    /// The token after every document.
    pub fn end_of_document(&self) -> u32 {
        self.manifest.tokenizer.end_of_document
    }

    /// Loads the tokenizer the tokens were made with.
    ///
    /// # Errors
    ///
    /// [`ReadError::Tokenizer`] if this version cannot load it.
    pub fn load_tokenizer(&self) -> Result<Tokenizer, ReadError> {
        Ok(Tokenizer::load(&self.folder.join(&self.manifest.tokenizer.file.file))?)
    }

    /// The license of a document, as the manifest spells it.
    pub fn license(&self, document: &DocumentRecord<'_>) -> &str {
        &self.manifest.licenses[usize::try_from(document.license).expect("a u32 fits")].name
    }

    /// The group of a document.
    pub fn group(&self, document: &DocumentRecord<'_>) -> &str {
        &self.manifest.groups[usize::try_from(document.group).expect("a u32 fits")].name
    }
}

impl Documents {
    fn open(folder: &Path, manifest: &Manifest, split: Split) -> Result<Self, ReadError> {
        let entry = manifest.split(split);
        check_hash(folder, &entry.index)?;
        let path = folder.join(&entry.index.file);
        let mapped = MappedFile::open(&path)?;
        let (index, totals) =
            IndexFile::parse(&path, mapped, manifest.groups.len(), manifest.licenses.len())?;
        let counts = entry.counts;
        let promised = IndexTotals {
            documents: counts.documents,
            tokens: counts.tokens,
            text_bytes: counts.text_bytes,
        };
        if totals != promised {
            let reason = format!("it has {totals:?}, the manifest says {promised:?}");
            return Err(ReadError::Malformed { path, reason });
        }
        let shards = open_shards(folder, manifest, entry)?;
        let vocab_size = manifest.tokenizer.vocab_size;
        let documents = Self { index, shards, num_tokens: counts.tokens, vocab_size };
        documents.check_shards(&path)?;
        Ok(documents)
    }

    /// No document may span two shards: they are read in one piece.
    fn check_shards(&self, index: &Path) -> Result<(), ReadError> {
        let tokens: u64 = self.shards.iter().map(TokenFile::num_tokens).sum();
        let mut is_good = tokens == self.num_tokens;
        for number in 0..self.len() {
            let document = self.document(number);
            let end = document.first_token + u64::from(document.num_tokens);
            is_good &= self
                .shard(document.first_token)
                .is_some_and(|shard| end <= shard.first_token + shard.num_tokens());
        }
        if is_good {
            return Ok(());
        }
        let reason = "its documents do not fit the shards".to_owned();
        Err(ReadError::Malformed { path: index.to_owned(), reason })
    }

    /// Number of documents.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens, ends of document included.
    pub fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// What is known of a document.
    ///
    /// # Panics
    ///
    /// Panics if `number` is not below [`len`](Self::len).
    pub fn document(&self, number: usize) -> DocumentRecord<'_> {
        self.index.document(number)
    }

    /// Appends `count` tokens of a document, from its token `skip` on, to `ids`.
    ///
    /// # Errors
    ///
    /// [`ReadError::Token`] for a token outside the vocabulary: the file was altered.
    /// [`ReadError::Malformed`] if the document has no such tokens.
    pub fn read_tokens(
        &self,
        number: usize,
        skip: u32,
        count: usize,
        ids: &mut Vec<u32>,
    ) -> Result<(), ReadError> {
        let document = self.document(number);
        let first = document.first_token + u64::from(skip);
        let shard = self.shard(document.first_token).expect("checked when it was opened");
        shard.read(first, count, self.vocab_size, ids)
    }

    /// The shard that holds a token.
    fn shard(&self, token: u64) -> Option<&TokenFile> {
        let after = self.shards.partition_point(|shard| shard.first_token <= token);
        self.shards.get(after.checked_sub(1)?)
    }
}

impl Manifest {
    /// Checks what can be checked without looking at another file.
    fn check(&self, path: &Path) -> Result<(), ReadError> {
        let wrong = |reason: String| Err(ReadError::Manifest { path: path.to_owned(), reason });
        let expected = self.compute_data_hash();
        if expected != self.data_hash {
            return wrong(format!(
                "its data hash is {}, its files' hashes give {expected}",
                self.data_hash
            ));
        }
        let vocab_size = self.tokenizer.vocab_size;
        if vocab_size <= self.tokenizer.end_of_document {
            return wrong(format!("its end of document is outside the vocabulary of {vocab_size}"));
        }
        for entry in self.files() {
            // A manifest may come from anywhere; it names files in its own folder only.
            let mut parts = Path::new(&entry.file).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return wrong(format!("{:?} is not a file name", entry.file));
            }
        }
        Ok(())
    }
}

fn read_manifest(path: &Path) -> Result<Manifest, ReadError> {
    let wrong = |reason: String| ReadError::Manifest { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(FileError::on("open", path))?;
    let mut json = Vec::new();
    file.take(MANIFEST_BYTES_MAX + 1)
        .read_to_end(&mut json)
        .map_err(FileError::on("read", path))?;
    if MANIFEST_BYTES_MAX < u64::try_from(json.len()).unwrap_or(u64::MAX) {
        return Err(wrong(format!("it is larger than {MANIFEST_BYTES_MAX} bytes")));
    }
    parse_manifest(path, &json)
}

/// Whether a folder holds a corpus of any version, and so nothing of anybody else.
pub(super) fn is_corpus(folder: &Path) -> bool {
    match read_manifest(&folder.join(MANIFEST_FILE)) {
        Ok(_) => true,
        Err(ReadError::Schema { found, .. }) => found.starts_with("corpus/"),
        Err(_) => false,
    }
}

fn parse_manifest(path: &Path, json: &[u8]) -> Result<Manifest, ReadError> {
    /// The one field that every version has.
    #[derive(serde::Deserialize)]
    struct AnyVersion {
        schema: String,
    }
    let wrong = |error: serde_json::Error| ReadError::Manifest {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let AnyVersion { schema: found } = serde_json::from_slice(json).map_err(wrong)?;
    if found != SCHEMA {
        return Err(ReadError::Schema { path: path.to_owned(), found, expected: SCHEMA });
    }
    serde_json::from_slice(json).map_err(wrong)
}

fn open_shards(
    folder: &Path,
    manifest: &Manifest,
    entry: &SplitEntry,
) -> Result<Vec<TokenFile>, ReadError> {
    let mut first_token = 0u64;
    let mut shards = Vec::with_capacity(entry.shards.len());
    for shard in &entry.shards {
        let path = folder.join(&shard.file.file);
        let file =
            TokenFile::parse(&path, MappedFile::open(&path)?, manifest.token_width, first_token)?;
        if file.num_tokens() != shard.tokens || shard.tokens == 0 {
            let found = file.num_tokens();
            let reason = format!("it has {found} tokens, the manifest says {}", shard.tokens);
            return Err(ReadError::Malformed { path, reason });
        }
        first_token = first_token.saturating_add(shard.tokens);
        shards.push(file);
    }
    Ok(shards)
}

fn check_size(folder: &Path, entry: &FileEntry) -> Result<(), ReadError> {
    let path = folder.join(&entry.file);
    let metadata = std::fs::metadata(&path).map_err(FileError::on("open", &path))?;
    if metadata.len() == entry.bytes { Ok(()) } else { Err(altered(path, entry)?) }
}

fn check_hash(folder: &Path, entry: &FileEntry) -> Result<(), ReadError> {
    let path = folder.join(&entry.file);
    let found = Hash::of_file(&path)?;
    if found == entry.blake3 { Ok(()) } else { Err(altered(path, entry)?) }
}

fn altered(path: PathBuf, entry: &FileEntry) -> Result<ReadError, ReadError> {
    let metadata = std::fs::metadata(&path).map_err(FileError::on("open", &path))?;
    Ok(ReadError::Altered {
        expected: entry.blake3,
        found: Hash::of_file(&path)?,
        expected_bytes: entry.bytes,
        found_bytes: metadata.len(),
        path,
    })
}

#[cfg(test)]
mod tests;

//! Text to token ids and back, through a `tokenizer.json`.
//!
//! [`Tokenizer`] wraps the `tokenizers` crate and fixes what that crate leaves open: text is never
//! truncated or padded, BPE dropout is off, and a special token *spelled out in a document* is
//! ordinary text, so that a corpus cannot forge an end of document.
//!
//! [`train_bpe`] makes a byte-level BPE, [`TokenStream`] turns ids into text one at a time.

mod bytes;
mod encoder;
mod error;
mod gguf;
mod stream;
mod train;
mod words;

use std::path::Path;
use std::sync::OnceLock;

use cairn_artifacts::{FileError, Hash, atomic};
use tokenizers::models::ModelWrapper;

pub use self::encoder::Encoder;
pub use self::error::TokenizerError;
pub use self::stream::TokenStream;
pub use self::train::{BpeSettings, train_bpe};

use self::bytes::ByteTable;

/// Largest `tokenizer.json` that is read, in bytes. The largest known ones are below 40 MiB.
pub const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// Largest vocabulary that is accepted, in token ids.
pub const VOCAB_SIZE_MAX: u32 = 1 << 22;

/// The end-of-document token of the tokenizers made here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// What other tokenizers call their end-of-document token, most specific first.
const END_OF_DOCUMENT_NAMES: [&str; 6] =
    [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]"];

/// A loaded tokenizer, with the exact bytes of the file it came from.
///
/// ```
/// use cairn_data::tokenizer::{BpeSettings, train_bpe};
///
/// let settings = BpeSettings { vocab_size: 300, ..BpeSettings::default() };
/// let texts = ["a cairn is a stack of stones"; 8].map(|text| Ok(text.to_owned()));
/// let tokenizer = train_bpe(&settings, texts)?;
///
/// let ids = tokenizer.encode("a cairn ⛰")?;
/// assert_eq!(tokenizer.decode(&ids)?, "a cairn ⛰");
/// # Ok::<(), cairn_data::tokenizer::TokenizerError>(())
/// ```
#[derive(Debug)]
pub struct Tokenizer {
    /// Special tokens in the text are text.
    literal: tokenizers::Tokenizer,
    /// Special tokens in the text are themselves; made when first needed.
    parsing: OnceLock<tokenizers::Tokenizer>,
    bytes: Option<ByteTable>,
    has_gpt2_words: bool,
    json: Vec<u8>,
    hash: Hash,
    vocab_size: u32,
    end_of_document: Option<u32>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::File`] if the file cannot be read, [`TokenizerError::FileTooLarge`] above
    /// [`TOKENIZER_BYTES_MAX`], [`TokenizerError::Parse`] if it is not a tokenizer,
    /// [`TokenizerError::Vocab`] if its vocabulary is empty or too large.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let bytes = std::fs::metadata(path).map_err(FileError::on("read", path))?.len();
        if TOKENIZER_BYTES_MAX < bytes {
            return Err(TokenizerError::FileTooLarge {
                path: path.to_owned(),
                bytes,
                limit: TOKENIZER_BYTES_MAX,
            });
        }
        Self::parse(std::fs::read(path).map_err(FileError::on("read", path))?, path)
    }

    /// Reads a tokenizer from the bytes of a `tokenizer.json`; `path` is used in errors only.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load), but for reading.
    pub fn parse(json: Vec<u8>, path: &Path) -> Result<Self, TokenizerError> {
        let parse = |reason: String| TokenizerError::Parse { path: path.to_owned(), reason };
        let mut literal = deserialize(&json).map_err(parse)?;
        literal.with_truncation(None).map_err(|error| parse(error.to_string()))?;
        literal.with_padding(None);
        if let ModelWrapper::BPE(bpe) = literal.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            literal.with_model(bpe);
        }
        let vocab = literal.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |last| u64::from(*last) + 1);
        let vocab_size = u32::try_from(vocab_size)
            .ok()
            .filter(|size| (1..=VOCAB_SIZE_MAX).contains(size))
            .ok_or_else(|| TokenizerError::Vocab {
                path: path.to_owned(),
                vocab_size,
                limit: VOCAB_SIZE_MAX,
            })?;
        let end_of_document =
            END_OF_DOCUMENT_NAMES.iter().find_map(|name| literal.token_to_id(name));
        let bytes = ByteTable::of(&literal, &vocab, vocab_size);
        literal.set_encode_special_tokens(true);
        let hash = Hash::of_bytes(&json);
        let has_gpt2_words = encoder::has_gpt2_words(&literal);
        let parsing = OnceLock::new();
        Ok(Self {
            literal,
            parsing,
            bytes,
            has_gpt2_words,
            json,
            hash,
            vocab_size,
            end_of_document,
        })
    }

    /// Writes the `tokenizer.json` to `path`, byte for byte as it was read or trained.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::File`], naming the path; the file is then as it was before.
    pub fn save(&self, path: &Path) -> Result<(), TokenizerError> {
        Ok(atomic::write_bytes(path, &self.json)?)
    }

    /// Token ids of a text; a special token spelled out in it is ordinary text.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Encode`] if the tokenizer's own model refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encoder().encode(text)
    }

    /// Encodes many texts: an encoder remembers words, so keep one for each thread.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder::new(self)
    }

    /// Token ids of a text whose special tokens are meant, such as a rendered chat template.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn encode_with_specials(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let parsing = self.parsing.get_or_init(|| {
            let mut parsing = self.literal.clone();
            parsing.set_encode_special_tokens(false);
            parsing
        });
        encode(parsing, text)
    }

    /// Text of the ids, special tokens included; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::UnknownId`] for an id outside the vocabulary, [`TokenizerError::Decode`]
    /// if the decoder refuses the tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        if let Some(bytes) = &self.bytes {
            let mut text = Vec::with_capacity(4 * ids.len());
            for id in ids {
                text.extend_from_slice(bytes.of_id(*id).ok_or_else(|| self.unknown(*id))?);
            }
            return Ok(String::from_utf8(text)
                .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()));
        }
        if let Some(id) = ids.iter().find(|id| self.literal.id_to_token(**id).is_none()) {
            return Err(self.unknown(*id));
        }
        self.literal
            .decode(ids, false)
            .map_err(|error| TokenizerError::Decode { reason: error.to_string() })
    }

    /// Starts to turn ids into text one at a time; no piece ever holds half a character.
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream::new(self)
    }

    /// The bytes an id stands for, where the tokenizer is byte level.
    ///
    /// `None` for an id outside the vocabulary, and for every id of another kind of tokenizer.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.bytes.as_ref().and_then(|bytes| bytes.of_id(id))
    }

    /// Whether every id stands for fixed bytes, so that decoding is concatenation.
    pub fn is_byte_level(&self) -> bool {
        self.bytes.is_some()
    }

    /// One more than the largest token id: the rows an embedding needs.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// The id that ends a document, if the vocabulary has one under a usual name.
    pub fn end_of_document(&self) -> Option<u32> {
        self.end_of_document
    }

    /// The id of a token by its spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.literal.token_to_id(token)
    }

    /// Whether the same tokens have the same ids in another tokenizer.
    pub fn has_ids_of(&self, other: &Self) -> bool {
        self.literal.get_vocab(true) == other.literal.get_vocab(true)
    }

    /// Hash of the file's bytes.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// The bytes of the `tokenizer.json`.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// The `tokenizer_config.json` that lets `AutoTokenizer` load the folder it lies in.
    pub fn hf_config(&self) -> String {
        let end = self.end_of_document.and_then(|id| self.literal.id_to_token(id));
        let config = serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "clean_up_tokenization_spaces": false,
        });
        format!("{config:#}\n")
    }

    fn unknown(&self, id: u32) -> TokenizerError {
        TokenizerError::UnknownId { id, vocab_size: self.vocab_size }
    }
}

/// Reads the file through the `tokenizers` crate, which panics on some broken ones (0.23.2: a decoder
/// that is not JSON, a precompiled normalizer that is not base64). A foreign file may not end the
/// process, so its syntax is checked first and what is left is caught here.
fn deserialize(json: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    serde_json::from_slice::<serde::de::IgnoredAny>(json).map_err(|error| error.to_string())?;
    std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json))
        .map_err(|_| "the `tokenizers` crate cannot read it".to_owned())?
        .map_err(|error| error.to_string())
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
    // `encode_fast` leaves out the offsets, which nothing here needs.
    let encoding = tokenizer
        .encode_fast(text, false)
        .map_err(|error| TokenizerError::Encode { reason: error.to_string() })?;
    Ok(encoding.get_ids().to_vec())
}

#[cfg(test)]
mod tests;

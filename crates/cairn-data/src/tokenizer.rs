//! Text to token ids and back, through a `tokenizer.json`.
//!
//! [`Tokenizer`] wraps the `tokenizers` crate and fixes what that crate leaves open: text is never
//! truncated or padded, BPE dropout is off, and a special token *spelled out in a document* is
//! ordinary text, so that a corpus cannot forge an end of document.
//!
//! [`train_bpe`] makes a byte-level BPE, [`TokenStream`] turns ids into text one at a time,
//! [`TokenizerConfig`] is what the files beside a `tokenizer.json` say, [`GenerationConfig`] what
//! a model's authors generate with.

mod added;
mod bytes;
mod config;
mod encoder;
mod error;
mod files;
mod generation;
mod gguf;
mod growth;
mod stream;
mod train;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use cairn_artifacts::{FileError, Hash, atomic};
use tokenizers::DecoderWrapper;
use tokenizers::models::ModelWrapper;

pub use self::config::{NamedTemplate, TokenizerConfig};
pub use self::encoder::Encoder;
pub use self::error::TokenizerError;
pub use self::files::ModelFiles;
pub use self::generation::GenerationConfig;
pub use self::gguf::no_tokenizer as gguf_without_tokenizer;
pub use self::stream::TokenStream;
pub use self::train::{BpeSettings, train_bpe};

use self::added::Stated;
use self::bytes::ByteTable;
use self::growth::{Excess, Growth};

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
    /// What the normalizer may make of a text.
    growth: Growth,
    bytes: Option<ByteTable>,
    /// Tokens that byte fallback reads as bytes.
    byte_tokens: BTreeSet<u32>,
    /// Special tokens, by id.
    specials: BTreeMap<u32, String>,
    /// Added tokens that are not flagged special, by their text.
    unflagged: BTreeMap<String, u32>,
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
    /// [`TOKENIZER_BYTES_MAX`], and as [`parse`](Self::parse).
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        Self::parse(read_bounded(path, TOKENIZER_BYTES_MAX)?, path)
    }

    /// As [`load`](Self::load), from the files of a model; `None` where there is none among them.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load); [`TokenizerError::Pack`] if the pack's file was altered.
    pub fn of(files: ModelFiles<'_>) -> Result<Option<Self>, TokenizerError> {
        const NAME: &str = "tokenizer.json";
        let Some(json) = files.read(NAME, TOKENIZER_BYTES_MAX)? else { return Ok(None) };
        Self::parse(json, &files.path_of(NAME)).map(Some)
    }

    /// Reads a tokenizer from the bytes of a `tokenizer.json`; `path` is used in errors only.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Parse`] if it is not a tokenizer, [`TokenizerError::Vocab`] if its
    /// vocabulary is empty or too large, [`TokenizerError::EmptyToken`],
    /// [`TokenizerError::DuplicateId`] and [`TokenizerError::AddedTokenId`] if its tokens
    /// contradict each other, [`TokenizerError::OverLimit`] if it may make far more of a text than
    /// the text is.
    pub fn parse(json: Vec<u8>, path: &Path) -> Result<Self, TokenizerError> {
        let parse = |reason: String| TokenizerError::Parse { path: path.to_owned(), reason };
        let excess = |Excess { what, actual, limit }| TokenizerError::OverLimit {
            path: path.to_owned(),
            what,
            actual,
            limit,
        };
        growth::check_values(&json).map_err(excess)?;
        let stated = added::stated(&json).map_err(|error| parse(error.to_string()))?;
        added::refuse_empty(&stated.added_tokens, path)?;
        let growth = growth_of(&stated).map_err(parse)?.map_err(excess)?;
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
        added::check_ids(&stated.added_tokens, &literal, path)?;
        let tokens = added::tokens_by_id(&literal, path)?;
        let vocab_size = tokens.last().map_or(0, |(id, _)| u64::from(*id) + 1);
        let vocab_size = u32::try_from(vocab_size)
            .ok()
            .filter(|size| (1..=VOCAB_SIZE_MAX).contains(size))
            .ok_or_else(|| TokenizerError::Vocab {
                path: path.to_owned(),
                vocab_size,
                limit: VOCAB_SIZE_MAX,
            })?;
        if let Some(unigram) =
            added::unspelled(&literal, &stated).map_err(|error| parse(error.to_string()))?
        {
            literal.with_model(unigram);
        }
        let end_of_document =
            END_OF_DOCUMENT_NAMES.iter().find_map(|name| literal.token_to_id(name));
        literal.set_encode_special_tokens(true);
        Ok(Self {
            bytes: ByteTable::of(&literal, &tokens, vocab_size),
            byte_tokens: bytes::byte_tokens(&literal, &tokens),
            specials: added::specials(&literal),
            unflagged: added::unflagged(&literal),
            has_gpt2_words: encoder::has_gpt2_words(&literal),
            parsing: OnceLock::new(),
            hash: Hash::of_bytes(&json),
            literal,
            growth,
            json,
            vocab_size,
            end_of_document,
        })
    }

    /// Checks that a model has a row for every token.
    ///
    /// A model may have more rows than the tokenizer has tokens: many are padded.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::ModelVocab`] naming both sizes.
    pub fn check_model(&self, vocab_size: usize) -> Result<(), TokenizerError> {
        if usize::try_from(self.vocab_size).is_ok_and(|size| size <= vocab_size) {
            return Ok(());
        }
        Err(TokenizerError::ModelVocab { tokenizer: self.vocab_size, model: vocab_size })
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
        self.check_growth(text)?;
        encode(self.parsing(), text, false)
    }

    /// Token ids of a text as a model wants them: with the tokens that the file's post-processor
    /// puts around it (a beginning of sequence, `[CLS]` and `[SEP]`).
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn encode_for_model(
        &self,
        text: &str,
        spelled: SpelledSpecials,
    ) -> Result<Vec<u32>, TokenizerError> {
        self.check_growth(text)?;
        match spelled {
            SpelledSpecials::Text => encode(&self.literal, text, true),
            SpelledSpecials::Tokens => encode(self.parsing(), text, true),
        }
    }

    /// Refuses a text of which the normalizer makes far too much.
    fn check_growth(&self, text: &str) -> Result<(), TokenizerError> {
        let normalizer = self.literal.get_normalizer();
        // The encoding itself says what is wrong with a text that the normalizer gives up on.
        let checked = catch_unwind(AssertUnwindSafe(|| self.growth.check(text, normalizer)));
        checked.unwrap_or(Ok(())).map_err(|grown| TokenizerError::Encode {
            reason: format!(
                "the normalizer makes {grown} bytes or more of its {}; the limit is 16 for each \
                 and 16 MiB",
                text.len()
            ),
        })
    }

    fn parsing(&self) -> &tokenizers::Tokenizer {
        self.parsing.get_or_init(|| {
            let mut parsing = self.literal.clone();
            parsing.set_encode_special_tokens(false);
            parsing
        })
    }

    /// Special tokens, by id.
    pub fn specials(&self) -> &BTreeMap<u32, String> {
        &self.specials
    }

    /// Added tokens that are not flagged special, by their text: every text that spells one becomes the token,
    /// in [`encode`](Self::encode) too.
    pub fn unflagged(&self) -> &BTreeMap<String, u32> {
        &self.unflagged
    }

    /// The spelling of a token in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.literal.id_to_token(id)
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
        catch_unwind(AssertUnwindSafe(|| self.literal.decode(ids, false)))
            .map_err(|_| "the `tokenizers` crate cannot decode them".to_owned())
            .and_then(|text| text.map_err(|error| error.to_string()))
            .map_err(|reason| TokenizerError::Decode { reason })
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

    /// Whether byte fallback reads the token as a byte.
    fn is_byte_token(&self, id: u32) -> bool {
        self.byte_tokens.contains(&id)
    }

    /// Whether byte level is one of several steps of the decoder, so that a piece may be cut.
    fn has_inner_byte_level(&self) -> bool {
        let is_byte_level = |step: &DecoderWrapper| matches!(step, DecoderWrapper::ByteLevel(_));
        self.bytes.is_none()
            && self
                .literal
                .get_decoder()
                .is_some_and(|decoder| bytes::steps(decoder).iter().any(is_byte_level))
    }

    /// The kind of its model, as `tokenizer.json` names it.
    pub fn model_name(&self) -> &'static str {
        match self.literal.get_model() {
            ModelWrapper::BPE(_) => "BPE",
            ModelWrapper::WordPiece(_) => "WordPiece",
            ModelWrapper::WordLevel(_) => "WordLevel",
            ModelWrapper::Unigram(_) => "Unigram",
        }
    }

    /// Whether bytes that no token spells have tokens of their own.
    pub fn has_byte_fallback(&self) -> bool {
        !self.byte_tokens.is_empty()
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

/// Whether a special token spelled out in a text is text or the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpelledSpecials {
    /// It is text: what a user typed.
    Text,
    /// It is the token: what a template wrote, or a mask to fill.
    Tokens,
}

/// Reads a file of at most `limit` bytes, whatever its length claims to be.
fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, TokenizerError> {
    let read = |error| TokenizerError::from(FileError::on("read", path)(error));
    let file = File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    let mut bytes = Vec::new();
    if length <= limit {
        file.take(limit + 1).read_to_end(&mut bytes).map_err(read)?;
    }
    let bytes_found = length.max(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    if limit < bytes_found {
        return Err(TokenizerError::FileTooLarge {
            path: path.to_owned(),
            bytes: bytes_found,
            limit,
        });
    }
    Ok(bytes)
}

/// Reads the file through the `tokenizers` crate, which panics on some broken ones (0.23.2: a decoder
/// that is not JSON, a precompiled normalizer that is not base64). A foreign file may not end the
/// process, so its syntax was checked before and what is left is caught here.
fn deserialize(json: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    catch_unwind(|| tokenizers::Tokenizer::from_bytes(json))
        .map_err(|_| "the `tokenizers` crate cannot read it".to_owned())?
        .map_err(|error| error.to_string())
}

/// The bound on what a file makes of a text; the `tokenizers` crate panics on some parts that are broken.
fn growth_of(stated: &Stated) -> Result<Result<Growth, Excess>, String> {
    catch_unwind(AssertUnwindSafe(|| Growth::of(stated.chains())))
        .map_err(|_| "the `tokenizers` crate cannot read it".to_owned())?
        .map_err(|error| error.to_string())
}

/// Encodes through the `tokenizers` crate, which panics where a file's pattern gives up on a text.
fn encode(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
    adds_specials: bool,
) -> Result<Vec<u32>, TokenizerError> {
    // `encode_fast` leaves out the offsets, which nothing here needs.
    catch_unwind(AssertUnwindSafe(|| tokenizer.encode_fast(text, adds_specials)))
        .map_err(|_| "the `tokenizers` crate cannot encode it".to_owned())
        .and_then(|encoding| encoding.map_err(|error| error.to_string()))
        .map(|encoding| encoding.get_ids().to_vec())
        .map_err(|reason| TokenizerError::Encode { reason })
}

#[cfg(test)]
mod tests;

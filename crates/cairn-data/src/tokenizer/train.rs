//! Training of a byte-level BPE.
//!
//! GPT-2's recipe: its pre-tokenizer, all 256 bytes in the alphabet (so every text has an encoding
//! and no token means "unknown"), merges by count. One special token, [`END_OF_TEXT`], is id 0.

use std::path::Path;

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{AddedToken, Trainer};

use super::bytes::char_of_byte;
use super::words::words;
use super::{END_OF_TEXT, Tokenizer, TokenizerError};

/// The 256 bytes and the end of document.
const VOCAB_SIZE_MIN: u32 = 257;

/// How to train a byte-level BPE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BpeSettings {
    /// Tokens to end with. A small text may give fewer: look at [`Tokenizer::vocab_size`].
    pub vocab_size: u32,
    /// A pair is merged only if it occurs at least this often.
    pub min_frequency: u64,
    /// Longest token, in bytes; keeps a run of dashes from filling the vocabulary.
    pub token_bytes_max: usize,
}

impl Default for BpeSettings {
    fn default() -> Self {
        Self { vocab_size: 4096, min_frequency: 2, token_bytes_max: 32 }
    }
}

/// Trains a byte-level BPE on texts that are read once, one at a time.
///
/// Memory grows with the number of *different* words, so with the size of the sample: bound the
/// sample, as `Scan::sample` does. The result depends on the texts, not on their order or on the
/// number of threads.
///
/// # Errors
///
/// [`TokenizerError::VocabTooSmall`] below 257 tokens, [`TokenizerError::NoText`] if there is no
/// text, [`TokenizerError::Train`] if the trainer fails, and the first error of `texts`.
pub fn train_bpe(
    settings: &BpeSettings,
    texts: impl IntoIterator<Item = Result<String, TokenizerError>, IntoIter: Send>,
) -> Result<Tokenizer, TokenizerError> {
    let vocab_size = settings.vocab_size;
    if vocab_size < VOCAB_SIZE_MIN {
        return Err(TokenizerError::VocabTooSmall { vocab_size, min: VOCAB_SIZE_MIN });
    }
    let train = |error: tokenizers::Error| TokenizerError::Train { reason: error.to_string() };
    let mut trainer = BpeTrainer::builder()
        .vocab_size(usize::try_from(vocab_size).expect("a u32 fits"))
        .min_frequency(settings.min_frequency)
        .max_token_length(Some(settings.token_bytes_max))
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .show_progress(false)
        .build();
    let mut failure = None;
    let mut num_texts = 0u64;
    let texts = texts.into_iter().map_while(|text| match text {
        Ok(text) => {
            num_texts += u64::from(!text.is_empty());
            Some(text)
        }
        Err(error) => {
            failure = Some(error);
            None
        }
    });
    let spelled = |word: &str| word.bytes().map(char_of_byte).collect();
    trainer.feed(texts, |text| Ok(words(text).map(spelled).collect())).map_err(train)?;
    if let Some(error) = failure {
        return Err(error);
    }
    if num_texts == 0 {
        return Err(TokenizerError::NoText);
    }
    let json = assemble(&trainer).and_then(|tokenizer| tokenizer.to_string(true)).map_err(train)?;
    Tokenizer::parse(json.into_bytes(), Path::new("the trained tokenizer"))
}

/// Makes the tokenizer of the words that the trainer has counted.
fn assemble(trainer: &BpeTrainer) -> tokenizers::Result<tokenizers::Tokenizer> {
    let mut model = BPE::default();
    let special_tokens = trainer.train(&mut model)?;
    let byte_level = ByteLevel::default().add_prefix_space(false).trim_offsets(false);
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level));
    tokenizer.add_special_tokens(special_tokens)?;
    Ok(tokenizer)
}
